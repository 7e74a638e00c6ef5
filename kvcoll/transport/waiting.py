"""How a rank passes the time until another one has done its part.

Rules of the file: nobody is woken, everybody looks again; between two looks a rank gives
its core away, to other ranks of the host, to the caller's threads and to the kernel,
which has the network's work to do.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import final

# Measured over 1 Gbit/s with 1 and 2 ranks a host: naps cost no time, as the kernel's buffers
# keep the wire busy meanwhile, and a quarter of the cores' time. See scripts/results.
_LOOKS = 200
_NAP_S = 50e-6
_PATIENT_NAP_S = 500e-6


@final
class Waiting:
    """Looks often at first, then sleeps between looks.

    Parameters
    ----------
    looks : int
        After how many looks in vain to sleep; until then the core is only offered.
    nap_s : float
        How long to sleep; the kernel adds some 50 microseconds.
    """

    def __init__(self, *, looks: int = _LOOKS, nap_s: float = _NAP_S) -> None:
        self.looks, self.nap_s = looks, nap_s
        self._in_vain = 0

    @classmethod
    def patient(cls) -> Waiting:
        """Give one that sleeps at once, so that the core is another thread's."""
        return cls(looks=0, nap_s=_PATIENT_NAP_S)

    def pause(self) -> None:
        """Pass the time after a look in vain."""
        if self._in_vain < self.looks:
            self._in_vain += 1
            os.sched_yield()
        else:
            time.sleep(self.nap_s)

    def restart(self) -> None:
        """Look often again: something has come."""
        self._in_vain = 0

    def until(self, done: Callable[[], bool]) -> None:
        """Return once `done` says so."""
        self._in_vain = 0
        while not done():
            self.pause()
