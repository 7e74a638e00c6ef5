"""How long a wait may be, learnt from how far apart calls were so far; pure, no clock.

Training waits for many things that are no fault: one rank evaluates at the end of each
epoch, writes a checkpoint, compiles its first step. So the bound follows the longest that
calls were apart, not the usual: what was spoken of once is then known.
"""

from __future__ import annotations

from typing import Final, final

from .settings import Watchdog

FACTOR: Final = 4.0
FIRST_CALLS: Final = 20  # in these a step is compiled, files are read for the first time
_LONG_S: Final = 1.0
_FADES: Final = 0.999  # by half in 700 long steps


@final
class Learnt:
    """The longest that the calls of one order of calls were apart."""

    def __init__(self) -> None:
        self._calls = 0
        self._longest_s = 0.0

    def passed(self, calls: int, apart_s: float) -> None:
        """Learn that after so many seconds without a call some have come.

        Parameters
        ----------
        calls : int
        apart_s : float
            Between the last call before and the first of these.
        """
        self._calls += calls
        if self._calls <= FIRST_CALLS:
            return
        if apart_s >= _LONG_S:
            self._longest_s *= _FADES
        self._longest_s = max(self._longest_s, apart_s)

    def bound_s(self, settings: Watchdog, *, of_push: bool) -> float:
        """Say from when on a wait is spoken of.

        Parameters
        ----------
        settings : Watchdog
        of_push : bool
            Whether it is a push that waits: other calls are made to wait.
        """
        if not of_push or self._calls <= FIRST_CALLS:
            return settings.ceiling_s
        return min(settings.ceiling_s, max(settings.floor_s, FACTOR * self._longest_s))
