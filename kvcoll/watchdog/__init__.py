"""Who keeps the others waiting, and where: said while they wait, raised if it takes too long."""

from .patrol import EXIT_CODE
from .settings import Watchdog, settled
from .track import Track, Watched

__all__ = ["EXIT_CODE", "Track", "Watchdog", "Watched", "settled"]
