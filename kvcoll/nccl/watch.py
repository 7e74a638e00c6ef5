"""A watch over what is under way among GPUs, so that nothing waits for ever.

Rules of the file: work that others must take part in ends, or fails by name. NCCL's
asynchronous errors are asked for at each call and in each wait; a transfer that makes no way
for `limit_s` is aborted, from a thread of its own too, since the user may wait in a call of
CuPy's that knows nothing of kvcoll. What has failed stays failed. When the alarm of the ranks
sounds, as when one is lost, all is aborted at once, and who waits raises the alarm's error.
"""

from __future__ import annotations

import contextlib
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from functools import partial
from typing import final

from ..errors import CollectiveError, DeviceError, text_of
from ..gpu.device import Event
from ..gpu.nccl import Communicator
from ..gpu.patience import Patience
from ..transport.alarm import Alarm

#: Threads of this name look on; they order nothing.
THREAD_NAME = "kvcoll-watch"
_LOOKS_PER_LIMIT = 20
_LONGEST_NAP_S = 1.0
_SHORTEST_NAP_S = 1e-5
_WAIT_NAP_S = 1e-3
_MOST_UNDER_WAY = 64
_TOLD_WITHIN_S = 2.0  # in which MPI tells that a rank is lost whose end NCCL has noticed


@final
class Watch(Patience):
    """Knows what is under way on the communicators of one transport.

    Parameters
    ----------
    comms : sequence of Communicator
        Of this process.
    limit_s : float
        How long a transfer may make no way.
    who : str
        This rank, for messages: ``'rank 1 of 4'``.
    alarm : Alarm or None, default None
        Of the ranks that take part.
    survives : bool, default False
        Whether the alarm tells of lost ranks: then it may explain an error of NCCL's.

    Attributes
    ----------
    was_cut : bool
        Whether the failure found a transfer under way, so that memory holds rubbish.
    """

    def __init__(
        self,
        comms: Sequence[Communicator],
        limit_s: float,
        who: str,
        alarm: Alarm | None = None,
        *,
        survives: bool = False,
    ) -> None:
        self._comms, self._limit_s, self._who = list(comms), limit_s, who
        self._alarm, self._survives = alarm, survives
        self.was_cut = False
        self._lock = threading.RLock()
        self._under_way: deque[tuple[str, Event]] = deque()
        self._moved = time.monotonic()  # when the last one ended, or the first one began
        self._failure: CollectiveError | None = None
        self._ended = threading.Event()
        self._has_ended = False
        self._thread: threading.Thread | None = None
        if alarm is not None:
            alarm.on_sound(partial(_heard, weakref.ref(self)))

    def also(self, comms: Sequence[Communicator]) -> None:
        """Ask more communicators for errors, and abort these, too."""
        self._comms += comms

    def expect(self, name: str, event: Event) -> None:
        """Take note of a transfer that ends with an event.

        Raises
        ------
        CollectiveError
            Something has failed before.
        """
        self.check()
        with self._lock:
            if not self._under_way:
                self._moved = time.monotonic()
            self._under_way.append((name, event))
            many = len(self._under_way) > _MOST_UNDER_WAY
        if many:
            self.look()
        if self._thread is None:
            nap_s = min(_LONGEST_NAP_S, self._limit_s / _LOOKS_PER_LIMIT)
            arguments = (weakref.ref(self), self._ended, nap_s)
            self._thread = threading.Thread(
                target=_keep_looking, args=arguments, name=THREAD_NAME, daemon=True
            )
            self._thread.start()

    def check(self) -> None:
        """Raise what has failed; waits only where NCCL has, and MPI may say that a rank is lost.

        Raises
        ------
        WaitEndedError
            The alarm has sounded.
        CollectiveError
            With NCCL's own last error, or the name of the transfer that stalled.
        """
        if self._alarm is not None and self._alarm.error is not None:
            self._alarm.check()
        if self._failure is not None:
            raise CollectiveError(str(self._failure))
        for comm in self._comms:
            try:
                comm.check()
            except CollectiveError as error:
                self._await_alarm()
                self._fail(f"{self._who}: {error}")
                raise CollectiveError(str(self._failure)) from error

    def wait(self, event: Event) -> None:
        """Wait on the host, as long as there is hope.

        Raises
        ------
        WaitEndedError
            The alarm has sounded.
        CollectiveError
            As `check`; also where the wait has taken `limit_s` and nothing was under way.
        """
        nap_s, began = _SHORTEST_NAP_S, time.monotonic()
        while not event.done():
            if self._alarm is not None:
                self._alarm.check()
            self.look()
            self.check()
            if time.monotonic() - began > 2 * self._limit_s:
                self._fail(f"{self._who}: work on the GPU has not ended in {2 * self._limit_s:g} s")
            time.sleep(nap_s)
            nap_s = min(2 * nap_s, _WAIT_NAP_S)
        self.check()

    def look(self) -> None:
        """Forget what has ended; abort what makes no way."""
        failure = ""
        with self._lock:
            try:
                self._forget_done()
            except DeviceError as error:
                failure = f"{self._who}: {self._under_way[0][0]}: {text_of(error)}"
            stalled = bool(self._under_way) and time.monotonic() - self._moved > self._limit_s
            name = self._under_way[0][0] if stalled else ""
        if failure:
            self._fail(failure)
        if stalled:
            self._fail(
                f"{self._who}: {name} has not ended within {self._limit_s:g} s and was aborted: "
                "another rank has not come to it, or the link to it is down"
            )

    def end(self) -> bool:
        """Stop looking; say whether all has ended well."""
        self._ended.set()
        if self._failure is None:
            self.look()
        self._has_ended = True
        return self._failure is None and not self._under_way

    @property
    def is_told(self) -> bool:
        """Whether the alarm has sounded."""
        return self._alarm is not None and self._alarm.error is not None

    @property
    def failed(self) -> bool:
        """Whether the communicators were aborted."""
        return self._failure is not None

    def _fail(self, text: str) -> None:
        """Keep the first failure, and end what is on the streams, for all who wait there."""
        with self._lock:
            if self._failure is not None:
                return
            with contextlib.suppress(DeviceError):  # then it stays under way
                self._forget_done()  # before the abort: after it all seems to be done
            self.was_cut = bool(self._under_way)
            self._failure = CollectiveError(text)
        self._ended.set()
        for comm in self._comms:
            comm.abort()

    def _forget_done(self) -> None:
        while self._failure is None and self._under_way and self._under_way[0][1].done():
            self._under_way.popleft()
            self._moved = time.monotonic()

    def _await_alarm(self) -> None:
        """Give MPI the time to say that a rank is lost, which NCCL does not."""
        end = time.monotonic() + _TOLD_WITHIN_S
        while self._alarm is not None and self._survives and time.monotonic() < end:
            self._alarm.check()
            time.sleep(_WAIT_NAP_S)

    def give_up(self) -> None:
        """Abort all, as the alarm has sounded; once this watch has ended there is nothing to do."""
        if self._alarm is not None and not self._has_ended:
            self._fail(f"{self._who}: {self._alarm.error}")


def _heard(watch: weakref.ref[Watch]) -> None:
    own = watch()
    if own is not None:
        own.give_up()


def _keep_looking(watch: weakref.ref[Watch], ended: threading.Event, nap_s: float) -> None:
    while not ended.wait(nap_s):
        own = watch()
        if own is None:
            return
        own.look()
        del own
