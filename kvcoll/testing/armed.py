"""The faults of this process that wait for their moment.

Rules of the file: a fault strikes once; a push finds nothing to look at once none waits.
"""

from __future__ import annotations

import errno
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, final

from .. import faults as hooks
from ..faults import Push
from .kinds import Fault, FillDisk, Flip, place_of
from .words import VARIABLE, parse


@contextmanager
def faults(*wanted: Fault) -> Iterator[list[Fault]]:
    """Set faults for a with-block.

    Parameters
    ----------
    *wanted : Fault

    Yields
    ------
    list of Fault
        Those that have not struck yet: at the end of a good test it is empty.

    Raises
    ------
    TypeError
        One is no `Fault`.
    """
    for fault in wanted:
        if not isinstance(fault, Fault):
            raise TypeError(f"a fault is one of kvcoll.testing's, got {fault!r}")
    with _armed.set(wanted) as left:
        yield left


def arm(environment: Mapping[str, str]) -> None:
    """Set the faults that the environment asks for, once; they stay until they strike.

    Raises
    ------
    ArgumentError
        They cannot be read.
    """
    text = environment.get(VARIABLE, "")
    if text != _armed.of_environment:
        wanted = parse(text)
        _armed.of_environment = text
        _armed.add(_Wait(fault) for fault in wanted)


class _Wait:
    """A fault that waits for its moment."""

    def __init__(self, fault: Fault, left: list[Fault] | None = None) -> None:
        self.fault, self._left = fault, left
        self._n_pushes = 0  # of its key

    def is_now(self, push: Push) -> bool:
        """Say whether this is the push; counts it."""
        fault = self.fault
        if fault.rank != push.rank:
            return False
        if fault.key is None:
            return fault.push in (None, push.number)
        if place_of(push.key, fault.key) < 0:
            return False
        self._n_pushes += 1
        return fault.push in (None, self._n_pushes)

    def struck(self) -> None:
        """Take note that it has struck."""
        if self._left is not None:
            self._left.remove(self.fault)


@final
class _Armed(hooks.Armed):
    """All faults of this process that wait, and the disk."""

    def __init__(self) -> None:
        self.of_environment = ""
        self._waiting: list[_Wait] = []
        self._striking: list[Fault] = []
        self._filled: dict[int, float] = {}  # until when, by the fault's identity

    @contextmanager
    def set(self, wanted: Sequence[Fault]) -> Iterator[list[Fault]]:
        """Add faults for a with-block."""
        left = list(wanted)
        waits = [_Wait(fault, left) for fault in wanted]
        self.add(waits)
        try:
            yield left
        finally:
            self._waiting = [wait for wait in self._waiting if wait not in waits]
            for fault in wanted:
                self._filled.pop(id(fault), None)
            self._arm()

    def add(self, waits: Iterable[_Wait]) -> None:
        """Add faults."""
        self._waiting.extend(waits)
        self._arm()

    def before_push(self, push: Push, value: Any) -> tuple[Any, bool]:
        """Let those strike whose moment it is."""
        now = [wait for wait in self._waiting if wait.is_now(push)]
        self._striking = [wait.fault for wait in now]
        self._waiting = [wait for wait in self._waiting if wait not in now]
        is_made = True
        for wait in now:
            wait.struck()
            value, makes = wait.fault.before(push, value)
            if isinstance(wait.fault, FillDisk):
                lasts_s = wait.fault.seconds
                until_s = math.inf if lasts_s is None else time.monotonic() + lasts_s
                self._filled[id(wait.fault)] = until_s
            is_made = is_made and makes
        if not self._striking:
            self._arm()
        return value, is_made

    def after_push(
        self, push: Push, stored: Callable[[Any], AbstractContextManager[Sequence[Any]]]
    ) -> None:
        """Let those strike that come after the push."""
        striking, self._striking = self._striking, []
        for fault in striking:
            if isinstance(fault, Flip):
                fault.after(push, stored)
        self._arm()

    def before_write(self) -> None:
        """Raise ENOSPC while the disk is full."""
        if any(time.monotonic() < until for until in self._filled.values()):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _arm(self) -> None:
        is_needed = self._waiting or self._striking or self._filled
        hooks.armed = self if is_needed else None


_armed = _Armed()
