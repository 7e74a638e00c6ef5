"""Leaving stores without waiting for the ranks that still work with them.

A rank that leaves a store by an exception may have to leave others before anybody can
hear of it: the others may be in a call of another store. So farewells run beside the
program, in a thread, and the end of the process waits for them all at once.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Generator, Iterable
from typing import TypeAlias

from .errors import text_of

Steps: TypeAlias = Generator[None, None, Exception | None]

_NAP_S = 1e-3

may_use_threads = True

_under_way: list[Steps] = []
_lock = threading.Lock()
_thread: threading.Thread | None = None


def begin(steps: Steps) -> None:
    """Take a first step, and let a thread take the others.

    Parameters
    ----------
    steps : generator
        As `Agreement.leave` gives it.

    Notes
    -----
    Where MPI does not allow threads (see `may_use_threads`) the other steps are taken at
    the next call of a store, and at the end of the process.
    """
    global _thread
    with _lock:
        _under_way.append(steps)
        _step()
        if may_use_threads and _under_way and (_thread is None or not _thread.is_alive()):
            _thread = threading.Thread(target=_run, name="kvcoll-farewell", daemon=True)
            _thread.start()


def finish(more: Iterable[Steps]) -> None:
    """Take the steps of all farewells in turn until each has ended."""
    with _lock:
        _under_way.extend(more)
        while _under_way:
            _step()
            time.sleep(0)


def advance() -> None:
    """Take one step of each farewell."""
    with _lock:
        _step()
    time.sleep(_NAP_S / 10)


def forget() -> None:
    """Drop all farewells: in a child made by fork they are its parent's."""
    global _lock
    _lock = threading.Lock()
    _under_way.clear()


def _run() -> None:
    while True:
        with _lock:
            _step()
            if not _under_way:
                return
        time.sleep(_NAP_S)


def _step() -> None:
    for steps in list(_under_way):
        try:
            next(steps)
        except StopIteration:
            _under_way.remove(steps)
        except Exception as error:  # of MPI: one lost farewell must not hold up the others
            _under_way.remove(steps)
            print(f"kvcoll: a store could not be left: {text_of(error)}", file=sys.stderr)
