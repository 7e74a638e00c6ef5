"""Who may call a store now: the right thread, one call at a time, while it is open."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType
from typing import final

from .errors import (
    KVCollError,
    RankLeftError,
    StoreClosedError,
    ThreadError,
    WaitEndedError,
)


@final
class Guard:
    """A context manager around every call of one store.

    Parameters
    ----------
    one_thread : bool
        Whether only the thread of the first call may call, as in a store whose calls
        are collective: their order must be the same on all ranks. Else threads wait
        for one another.
    beside : callable or None
        Gives the number of the thread in which updates run, if they run beside the
        calls: it may read.
    ended : callable
        Says why no other rank can be asked any more, or ``''``.
    """

    def __init__(
        self,
        *,
        one_thread: bool,
        beside: Callable[[], int | None] | None,
        ended: Callable[[], str],
    ) -> None:
        self.beside, self._ended = beside, ended
        self._lock = threading.RLock()
        self._one_thread = one_thread
        self._thread: int | None = None
        self._begun = self._ended_calls = 0  # only ever grow, for who looks now and then
        self.closed = ""
        self._unsaid: ThreadError | None = None

    def __enter__(self) -> None:
        self.enter(is_collective=True)

    def enter(self, *, is_collective: bool) -> None:
        """Let a call in, or raise."""
        if self._one_thread:
            ident = threading.get_ident()
            if self._thread != ident:
                self._take_thread(ident, is_collective)
        self._lock.acquire()
        self._begun += 1
        if self.closed:
            self._leave()
            raise StoreClosedError(f"the store was closed: {self.closed}")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if isinstance(error, RankLeftError):
            self.closed = str(error)
        elif isinstance(error, WaitEndedError):
            pass  # the store may be of use again, without the ranks that are lost
        elif error is not None and not self.closed:
            self.closed = self._ended()
        self._leave()

    def check_thread(self) -> None:
        """Raise unless the caller's thread is the one that may call."""
        if self._one_thread and self._thread not in (None, threading.get_ident()):
            self._take_thread(threading.get_ident(), is_collective=False)

    def check_collective(self) -> None:
        """Raise what stands against a collective call from here.

        Raises
        ------
        KVCollError
            Another thread has called before: to be told to the other ranks.
        """
        error, self._unsaid = self._unsaid, None
        if error is not None:
            raise error

    @property
    def calls(self) -> tuple[int, int]:
        """How many calls have begun, and how many have ended."""
        return self._begun, self._ended_calls

    @property
    def thread(self) -> int | None:
        """The thread that calls, if it must be one; None before its first call."""
        return self._thread

    @property
    def inside(self) -> bool:
        """Whether a call is running already: this one comes from its updater."""
        return self._begun > self._ended_calls + 1

    @property
    def is_busy(self) -> bool:
        """Whether a call is running, asked from outside of one."""
        return self._begun > self._ended_calls

    def nested(self) -> KVCollError:
        """Make the error of a collective call from within an updater."""
        return ThreadError(
            "an updater may pull, but must not init, push, set, wait or close: "
            "the ranks are in the middle of a push"
        )

    @property
    def is_beside(self) -> bool:
        """Whether the caller is an updater that runs beside the calls."""
        return self.beside is not None and threading.get_ident() == self.beside()

    def _leave(self) -> None:
        self._ended_calls += 1
        self._lock.release()

    def _take_thread(self, ident: int, is_collective: bool) -> None:
        if self._thread is None:
            self._thread = ident
            return
        if self.is_beside:
            raise self.nested()
        error = ThreadError(
            "a distributed store is called from one thread of each rank, the one that "
            f"called it first: got a call from thread {threading.current_thread().name!r}"
        )
        if is_collective:  # the other ranks wait for it, and are told at the next call
            self._unsaid = error
        raise error


@final
class Reading:
    """The same around calls that no other rank takes part in.

    Parameters
    ----------
    guard : Guard
    """

    def __init__(self, guard: Guard) -> None:
        self._guard = guard
        self._enter = guard.enter

    def __enter__(self) -> None:
        # A call that waits for the updates holds the guard's lock.
        if self._guard.beside is None or not self._guard.is_beside:
            self._enter(is_collective=False)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._guard.beside is None or not self._guard.is_beside:
            self._guard.__exit__(kind, error, trace)
