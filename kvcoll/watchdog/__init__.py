"""Who keeps the others waiting, and where: said while they wait, raised if it takes too long.

What is needed before there is a distributed store is here; the rest is loaded with the first one.
"""

from .settings import EXIT_CODE, Watchdog, settled

__all__ = ["EXIT_CODE", "Watchdog", "settled"]
