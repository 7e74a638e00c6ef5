"""Sums that wait to be taken behind the caller's back, in one order on all ranks.

Every rank has the same jobs, in time, since the ranks agree on a push before it adds
them; but not all have them at the same moment. So before each job rank 0 says which:
the most urgent that it has, and the others wait until they have it, too. Rules of the
file: only the one thread here runs jobs, in the order that rank 0 says; nobody waits
for the network while it has no job.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import final

from .errors import RankFailedError, WaitEndedError, text_of


@dataclass(eq=False)
class Job:
    """One sum that waits.

    Attributes
    ----------
    number : int
        The same on all ranks, ascending in the order of the pushes.
    priority : int
        Jobs of higher priority come first, of the same by number.
    run : callable
        Does it, in the backlog's thread.
    drop : callable
        Called in its place if it will not be run.
    done : bool
    """

    number: int
    priority: int
    run: Callable[[], None] = field(repr=False)
    drop: Callable[[], None] = field(default=lambda: None, repr=False)
    done: bool = False


class SharedError(Exception):
    """Raised by a job for an error that all ranks have come to together: nobody waits.

    Parameters
    ----------
    error : Exception
        What those who wait raise.
    """

    def __init__(self, error: BaseException) -> None:
        super().__init__(str(error))
        self.error = error


@final
class Backlog:
    """Jobs, and the thread that runs them.

    Parameters
    ----------
    leads : bool
        Whether this rank says which job comes next: rank 0 does.
    agree : callable
        Gives on every rank the number that rank 0 gave; called by all ranks together.
    failed : callable
        Called with what a job has raised, in the backlog's thread: the others wait in
        that job. Nothing is run after it, nor after a `SharedError`.
    """

    def __init__(
        self,
        *,
        leads: bool,
        agree: Callable[[int], int],
        failed: Callable[[BaseException], None],
    ) -> None:
        self._leads, self._agree, self._failed = leads, agree, failed
        self._jobs: dict[int, Job] = {}
        self._changed = threading.Condition()
        self._unfinished = 0
        self._told = False
        self._error: BaseException | None = None
        self._shared: BaseException | None = None
        self._stopping = self._interrupted = False
        self._running: Job | None = None
        self._thread: threading.Thread | None = None

    def add(self, job: Job) -> None:
        """Queue a job; the thread takes it when its turn comes."""
        with self._changed:
            self.check()
            self._jobs[job.number] = job
            self._unfinished += 1
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._work, name="kvcoll-backlog", daemon=True
                )
                self._thread.start()
            self._changed.notify_all()

    def wait(self, jobs: Iterable[Job]) -> None:
        """Wait until jobs are done.

        Raises
        ------
        RankFailedError
            One of this store's jobs has failed on this rank.
        BaseException
            What the ranks have agreed to raise, see `SharedError`.
        """
        for job in jobs:
            if not job.done:
                with self._changed:
                    while not job.done:
                        self.check()
                        self._changed.wait()

    def drain(self) -> None:
        """Wait until all jobs are done; raises as `wait` does."""
        with self._changed:
            while self._unfinished:
                self.check()
                self._changed.wait()

    def stop(self) -> None:
        """Drain, and end the thread; nothing if it has failed."""
        if not self.failure:
            self.drain()
        thread = self._thread
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if thread is not None:
            thread.join()

    def interrupt(self) -> list[Job]:
        """End the thread, which waits for no rank any more; give the jobs that were not run.

        That which was running comes first, whether or not it has come to its end.
        """
        with self._changed:
            self._stopping = self._interrupted = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()
        left = sorted(self._jobs.values(), key=lambda job: job.number)
        return left if self._running is None else [self._running, *left]

    @property
    def was_interrupted(self) -> bool:
        """Whether it is for lost ranks that nothing will be run any more."""
        return isinstance(self._shared, WaitEndedError)

    @property
    def ident(self) -> int | None:
        """The thread's number, as `threading.get_ident` gives it in it."""
        return None if self._thread is None else self._thread.ident

    @property
    def failure(self) -> str:
        """Why nothing will be run any more, or ``''``."""
        error = self._shared or self._error
        return "" if error is None else text_of(error) or type(error).__name__

    @property
    def is_busy(self) -> bool:
        """Whether jobs wait, or one runs."""
        return bool(self._unfinished) and not self.failure

    @property
    def was_told(self) -> bool:
        """Whether somebody has been told why nothing will be run any more."""
        return self._told

    def check(self) -> None:
        """Raise why nothing will be run any more, if so; as `wait` does."""
        self._told = self._told or bool(self._shared or self._error)
        if self._shared is not None:
            raise self._shared
        if self._error is not None:
            name = type(self._error).__name__
            raise RankFailedError(
                f"a push that ran behind its caller failed on this rank: "
                f"{name}: {text_of(self._error)}"
            ) from self._error

    def _work(self) -> None:
        try:
            while (job := self._next()) is not None:
                self._running = job
                job.run()
                with self._changed:
                    self._running = None
                    job.done = True
                    self._unfinished -= 1
                    self._changed.notify_all()
        except SharedError as shared:
            with self._changed:
                self._shared = shared.error
                self._changed.notify_all()
        except WaitEndedError as ended:  # so will the other ranks learn
            with self._changed:
                self._shared = ended
                self._changed.notify_all()
        except BaseException as error:  # the other ranks wait in the job: end, and tell the caller
            with self._changed:
                self._error = error
                self._changed.notify_all()
            self._failed(error)

    def _next(self) -> Job | None:
        """Wait for a job, and for rank 0 to say which."""
        with self._changed:
            while not self._jobs or self._interrupted:
                if self._stopping:
                    return None
                self._changed.wait()
            most_urgent = min(self._jobs.values(), key=lambda job: (-job.priority, job.number))
        number = self._agree(most_urgent.number if self._leads else -1)
        with self._changed:
            while number not in self._jobs:
                if self._interrupted:
                    return None
                self._changed.wait()
            return self._jobs.pop(number)
