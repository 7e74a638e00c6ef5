"""What ends a rank's waiting for others: whoever knows of something sounds it, whoever waits looks.

Rules of the file: one alarm for all that is done over one communicator and its duplicates;
it sounds once, and for ever; looking costs an attribute as long as nothing is the matter, and
is done only between two looks in vain at what is waited for.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from copy import copy
from typing import Final, final

from ..errors import WaitEndedError

_LOOK_EVERY_S: Final = 0.005


@final
class Alarm:
    """The reason why nobody need wait for other ranks any more, once there is one.

    Any thread may call it.

    Attributes
    ----------
    error : WaitEndedError or None
        What all who wait raise.
    """

    def __init__(self) -> None:
        self.error: WaitEndedError | None = None
        self._lock = threading.Lock()
        self._followers: list[Callable[[], None]] = []
        self._look: Callable[[], None] | None = None
        self._due_s = 0.0

    def sound(self, error: WaitEndedError) -> bool:
        """End all waiting, from now on; the first error counts.

        Parameters
        ----------
        error : WaitEndedError

        Returns
        -------
        bool
            Whether it was the first.
        """
        with self._lock:
            if self.error is not None:
                return False
            self.error = error
            followers, self._followers = self._followers, []
        for follow in followers:
            follow()
        return True

    def on_sound(self, follow: Callable[[], None]) -> None:
        """Have something called as soon as it sounds: by whoever sounds it, once.

        At once, if it has sounded. It must not raise.
        """
        with self._lock:
            if self.error is None:
                self._followers.append(follow)
                return
        follow()

    def look_by(self, look: Callable[[], None]) -> None:
        """Have those who wait call `look` every few milliseconds; it may sound the alarm."""
        self._look = look

    def check(self) -> None:
        """Raise a copy of the error, if there is one.

        To be called between two looks in vain at what is waited for.

        Raises
        ------
        WaitEndedError
            The alarm has sounded.
        """
        if self.error is not None:
            raise copy(self.error)
        if self._look is not None:
            now_s = time.monotonic()
            if now_s >= self._due_s:
                self._due_s = now_s + _LOOK_EVERY_S
                self._look()
                if self.error is not None:
                    raise copy(self.error)
