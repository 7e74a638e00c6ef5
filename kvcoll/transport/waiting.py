"""How a rank passes the time until another one has done its part.

Rules of the file: nobody is woken, everybody looks again; between two looks a rank gives
its core away, to other ranks of the host, to the caller's threads and to the kernel,
which has the network's work to do.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import final

from .alarm import Alarm

# Over 1 Gbit/s naps cost no time, as the kernel's buffers keep the wire busy meanwhile, and
# spare three quarters of the cores' time; but a small sum would be over before the first.
_LOOKS = 2000
_NAP_S = 50e-6
# MPICH takes some 128 KB from the network at a look: so a patient rank looks a few times.
_PATIENT_LOOKS = 4
_PATIENT_NAP_S = 500e-6


@final
class Waiting:
    """Looks often at first, then sleeps between looks.

    Parameters
    ----------
    looks : int, optional
        After how many looks in vain to sleep for the first time in a sum.
    again : int, optional
        After how many more to sleep again.
    nap_s : float, optional
        How long to sleep; the kernel adds some 50 microseconds.
    yields : bool, default True
        Whether to offer the core between looks, before the next nap. Before Python 3.12
        a thread that does so keeps the interpreter's lock, so another one gains nothing.
    alarm : Alarm or None, default None
        What ends the waiting before time.
    """

    def __init__(
        self,
        *,
        looks: int = _LOOKS,
        again: int = 1,
        nap_s: float = _NAP_S,
        yields: bool = True,
        alarm: Alarm | None = None,
    ) -> None:
        self._looks, self._again, self._nap_s, self._yields = looks, again, nap_s, yields
        self._left = looks
        self._check = (alarm or Alarm()).check

    @classmethod
    def patient(cls, alarm: Alarm | None = None) -> Waiting:
        """Give one that sleeps soon, so that the core is another thread's."""
        often = _PATIENT_LOOKS
        return cls(looks=often, again=often, nap_s=_PATIENT_NAP_S, yields=False, alarm=alarm)

    @classmethod
    def restless(cls, alarm: Alarm | None = None) -> Waiting:
        """Give one that never sleeps."""
        return cls(looks=sys.maxsize, alarm=alarm)

    def begin(self) -> None:
        """Look often again: a sum begins."""
        self._left = self._looks

    def pause(self) -> None:
        """Pass the time after a look in vain.

        Raises
        ------
        WaitEndedError
            The alarm has sounded.
        """
        self._check()
        self._left -= 1
        if self._left > 0:
            if self._yields:
                os.sched_yield()
        else:
            self._left = self._again
            time.sleep(self._nap_s)

    def until(self, done: Callable[[], bool]) -> None:
        """Return once `done` says so."""
        while not done():
            self.pause()
