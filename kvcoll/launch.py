"""When a push runs: in line, behind its caller, or late.

Rules of the file: while sums wait in a backlog, its thread alone uses the transport (and,
where pushes are late, the agreement): who else needs it drains first. The values of a push that
waits lie in memory of their own, in which they were packed before the push returned.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import NamedTuple, final

from .agreement import Agreement, Call
from .arrays import Array, DType
from .backlog import Backlog, Job, SharedError
from .bucket import Bucket
from .engine import Engine, Push
from .errors import ArgumentError
from .history import History, Note
from .packing import pack_into
from .replica import Entry
from .schema import Key
from .slots import Slots
from .sparse import Rows
from .topology import Topology
from .transport.contract import Sink
from .updater import RowsSink, Updater


class Launch(ABC):
    """When the pushes of a store run."""

    #: Whether a push is complete when it returns.
    is_in_line = False
    #: Whether updates run in a thread of their own, see `ident`.
    is_beside = False
    #: To be held by who reads stored values, so that no update is seen half done.
    reading: AbstractContextManager[object] = nullcontext()
    #: Takes samples of what pushes have updated, if that is wanted.
    history: History | None = None

    @abstractmethod
    def reserve(self, push: Push, updater: Updater, values: list[list[Array]]) -> Call:
        """Take what a push needs, and say what to agree on; what can fail here alone fails here."""

    @abstractmethod
    def push(
        self,
        push: Push,
        values: list[list[Array]],
        updater: Updater,
        call: Call,
        *,
        plain: bool,
        priority: int,
        rows: Sequence[Rows] = (),
    ) -> None:
        """Run a push, or see to it that it will be run.

        Parameters
        ----------
        push : Push
        values : list of list of numpy.ndarray
            For each key of `push` what this rank pushes.
        updater : Updater
        call : Call
            What `reserve` gave.
        plain : bool
            Whether any of the values is not the array that the store gave for the key.
        priority : int
            Of pushes that wait those with the highest are summed first.
        rows : sequence of Rows, optional
            For each of `push.sparse` what this rank pushes, in memory of its own.
        """

    @abstractmethod
    def wait(self, entries: Iterable[Entry], *, to_read: bool = False) -> None:
        """Wait until no push of these keys waits, if `to_read` then only where a pull does so."""

    @abstractmethod
    def drain(self) -> None:
        """Wait until no push waits."""

    @abstractmethod
    def stop(self) -> None:
        """Drain, if that can be, and end what runs beside the caller."""

    @property
    @abstractmethod
    def ident(self) -> int | None:
        """The number of the thread in which updates run beside the caller, if any."""

    @abstractmethod
    def interrupt(self) -> None:
        """Drop all pushes that wait; only once all waiting for other ranks has been ended."""

    @abstractmethod
    def move(self, topology: Topology, agreement: Agreement) -> None:
        """Go on with other ranks, after `interrupt`."""

    @abstractmethod
    def raise_untold(self) -> None:
        """Raise why pushes were given up, if nobody has been told."""

    @property
    @abstractmethod
    def is_busy(self) -> bool:
        """Whether pushes wait that will still be run."""

    @property
    @abstractmethod
    def ended(self) -> str:
        """Why pushes that waited were given up, so that the store can only be left; or ``''``."""


@final
class InLine(Launch):
    """A push is complete when it returns."""

    is_in_line = True

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def reserve(self, push: Push, updater: Updater, values: list[list[Array]]) -> Call:
        """Leave it to the engine."""
        return self._engine.reserve(push, updater, values)

    def push(
        self,
        push: Push,
        values: list[list[Array]],
        updater: Updater,
        call: Call,
        *,
        plain: bool,
        priority: int,
        rows: Sequence[Rows] = (),
    ) -> None:
        """Run it."""
        flags = self._engine.agree(push, call, values, plain=plain)
        self._engine.push_agreed(push, values, updater, flags, rows)
        if self.history is not None:
            self.history.of_push(updater)(push.entries)

    def wait(self, entries: Iterable[Entry], *, to_read: bool = False) -> None:
        """Return at once."""

    def drain(self) -> None:
        """Return at once."""

    def stop(self) -> None:
        """Do nothing."""

    @property
    def ident(self) -> int | None:
        """None."""
        return None

    def interrupt(self) -> None:
        """Do nothing."""

    def move(self, topology: Topology, agreement: Agreement) -> None:
        """Do nothing."""

    def raise_untold(self) -> None:
        """Do nothing."""

    @property
    def is_busy(self) -> bool:
        """Never."""
        return False

    @property
    def ended(self) -> str:
        """Never anything."""
        return ""


class _Packed(NamedTuple):
    """A bucket whose values wait for their sum."""

    bucket: Bucket
    slot: Array
    source: Array
    sink: Sink

    @property
    def total(self) -> Array:
        """Where the sum may go: in place of the values, or beside them if these are wider."""
        bucket = self.bucket
        start = self.source.nbytes if self.source.dtype != bucket.dtype else 0
        stop = start + bucket.n_elements * bucket.dtype.itemsize
        return self.slot[start:stop].view(bucket.dtype)


@final
class _Waiting:
    """Which jobs wait for which keys, and the memory in which their values lie."""

    def __init__(self, engine: Engine, backlog: Backlog) -> None:
        self._engine, self._backlog = engine, backlog
        self._slots = Slots()
        self._jobs: dict[Key, deque[Job]] = {}
        self._n_jobs = 0

    def reserve(self, push: Push, at_most: int) -> None:
        """Wait until at most so many jobs wait for each key, and take memory for one more."""
        self.wait(push.entries, at_most)
        packed = (bucket for bucket in push.buckets if not bucket.is_sparse)
        self._slots.reserve(_slot_bytes(bucket) for bucket in packed)

    def pack(
        self, bucket: Bucket, values: list[list[Array]], updater: Updater, dtype: DType
    ) -> _Packed:
        """Pack a bucket in memory that was reserved, in a dtype, and begin its update."""
        slot = self._slots.take(_slot_bytes(bucket))
        flat = self._engine.packed(bucket)
        if flat is not None:
            dtype = flat.dtype
        source = slot[: bucket.n_elements * dtype.itemsize].view(dtype)
        if flat is None:
            pack_into(bucket, values, source)
        else:
            source[:] = flat
        return _Packed(bucket, slot, source, updater.begin(bucket))

    def give_back(self, packed: _Packed) -> None:
        """Give back the memory of a bucket that has been summed."""
        self._slots.give_back(_slot_bytes(packed.bucket), packed.slot)

    def add(
        self, keys: Iterable[Key], priority: int, run: partial[None], drop: Callable[[], None]
    ) -> None:
        """Queue a job; drop it where none are taken any more, as since a rank was lost."""
        job = Job(self._n_jobs, priority, run, drop)
        self._n_jobs += 1
        try:
            self._backlog.add(job)
        except BaseException:
            drop()
            raise
        for key in keys:
            self._jobs.setdefault(key, deque()).append(job)

    def wait(self, entries: Iterable[Entry], at_most: int = 0) -> None:
        """Wait until at most so many jobs wait for each key."""
        for entry in entries:
            jobs = self._jobs.get(entry.spec.key)
            if jobs:
                while jobs and jobs[0].done:
                    jobs.popleft()
                while len(jobs) > at_most:
                    self._backlog.wait([jobs[0]])
                    jobs.popleft()  # only now: the wait may have been interrupted

    def drain(self) -> None:
        """Wait for all jobs."""
        self._backlog.drain()
        self._jobs.clear()


class _Behind(Launch):
    """What pushes that run in a backlog have in common.

    Parameters
    ----------
    engine : Engine
    leads : bool
        Whether this rank says which of the pushes that wait is next.
    agree : callable
        As for `Backlog`.
    """

    #: Whether every rank knows by itself what is next.
    _all_lead = False

    def __init__(self, engine: Engine, *, leads: bool, agree: Callable[[int], int]) -> None:
        self._engine = engine
        self._begin(leads=leads, agree=agree)

    @final
    def _begin(self, *, leads: bool, agree: Callable[[int], int]) -> None:
        """Begin with an empty backlog."""
        self._agree = agree
        self._backlog = Backlog(leads=leads, agree=agree, failed=self._abort)
        self._waiting = _Waiting(self._engine, self._backlog)

    def interrupt(self) -> None:
        """End the thread, and take back what the jobs have begun that were not run."""
        for job in self._backlog.interrupt():
            job.drop()

    def move(self, topology: Topology, agreement: Agreement) -> None:
        """Begin anew."""
        self._begin(leads=self._all_lead or topology.rank == 0, agree=self._agree)

    @final
    def drain(self) -> None:
        """Wait for all that is in the backlog."""
        self._waiting.drain()

    @final
    def stop(self) -> None:
        """End the thread."""
        self._backlog.stop()

    @final
    def raise_untold(self) -> None:
        """Ask the backlog."""
        if not self._backlog.was_told:
            self._backlog.check()

    @property
    @final
    def is_busy(self) -> bool:
        """Whether the backlog has jobs."""
        return self._backlog.is_busy

    @final
    def _abort(self, error: BaseException) -> None:
        self._engine.abort("a push that runs behind its caller", error)


@final
class Overlap(_Behind):
    """A push returns once the ranks have agreed on it and its values are packed.

    Sums and updates run in the backlog; a key waits for one sum at most. An updater that
    may raise runs in line, and so does a push of rows.

    Parameters
    ----------
    engine : Engine
    leads : bool
        Whether this is rank 0.
    """

    def __init__(self, engine: Engine, *, leads: bool) -> None:
        super().__init__(engine, leads=leads, agree=engine.from_rank_0)
        self._unfinished: deque[list[int]] = deque()  # of each push how many jobs it has left
        self._counting = threading.Lock()

    def reserve(self, push: Push, updater: Updater, values: list[list[Array]]) -> Call:
        """Wait until no sum waits for these keys, too."""
        if updater.may_raise or push.sparse:
            self.drain()
        else:
            self._waiting.reserve(push, at_most=0)
        return self._engine.reserve(push, updater, values)

    def push(
        self,
        push: Push,
        values: list[list[Array]],
        updater: Updater,
        call: Call,
        *,
        plain: bool,
        priority: int,
        rows: Sequence[Rows] = (),
    ) -> None:
        """Agree, pack, and leave sum and update to the backlog: a job a bucket."""
        flags = self._engine.agree(push, call, values, plain=plain)
        note = None if self.history is None else self.history.of_push(updater)
        if updater.may_raise or push.sparse:
            self._engine.push_agreed(push, values, updater, flags, rows)
            if note is not None:
                note(push.entries)
            return
        left = [len(push.buckets)]
        with self._counting:
            self._unfinished.append(left)
        self._count_whole()
        in_pieces = not (updater.needs_whole_keys or self._engine.apart)
        try:
            for bucket in push.buckets:
                dtype = self._engine.packed_dtype(bucket, flags)
                packed = self._waiting.pack(bucket, values, updater, dtype)
                keys = [member.entry.spec.key for member in bucket.members]
                run = partial(self._sum, packed, left, note, in_pieces=in_pieces)
                self._waiting.add(keys, priority, run, partial(updater.take_back, bucket))
        except BaseException as error:
            self._engine.abort(push.call.name, error)
            raise

    def wait(self, entries: Iterable[Entry], *, to_read: bool = False) -> None:
        """Wait for the sums of these keys."""
        self._waiting.wait(entries)

    @property
    def ident(self) -> int | None:
        """None: the user's code does not run beside the caller."""
        return None

    @property
    def ended(self) -> str:
        """Never anything: a sum that fails ends the job."""
        return ""

    def interrupt(self) -> None:
        """Drop what waits; of a push of which keys have been updated the others miss it."""
        super().interrupt()
        self._unfinished.clear()

    def _sum(self, packed: _Packed, left: list[int], note: Note | None, *, in_pieces: bool) -> None:
        engine = self._engine
        if in_pieces:
            engine.is_whole = False
            engine.sum_packed(packed.bucket, packed.source, packed.sink)
        else:
            engine.sum_packed_whole(packed.bucket, packed.source, packed.total)
            engine.is_whole = False
            packed.sink(0, packed.bucket.n_elements, packed.total)
        if note is not None:
            note(member.entry for member in packed.bucket.members)
        engine.is_whole = True
        engine.steps += 1
        left[0] -= 1
        self._count_whole()
        self._waiting.give_back(packed)

    def _count_whole(self) -> None:
        """Count the pushes that are whole, and all before them, as versions."""
        with self._counting:
            while self._unfinished and not self._unfinished[0][0]:
                self._unfinished.popleft()
                self._engine.version += 1


@final
class Late(_Behind):
    """A push returns at once; the ranks agree on it, sum and update when all have come to it.

    In the order of the pushes, so that all replicas pass through the same versions.

    Parameters
    ----------
    engine : Engine
    agreement : Agreement
        The one that the engine has, for this store alone.
    staleness : int
        How many pushes of a key may wait when a push returns.
    """

    is_beside = True
    _all_lead = True

    def __init__(self, engine: Engine, agreement: Agreement, *, staleness: int) -> None:
        # Jobs run by their numbers, which are the same everywhere: nobody need be asked.
        super().__init__(engine, leads=True, agree=lambda number: number)
        self.reading = threading.RLock()
        self._applied: Sequence[_Packed | RowsSink] = ()  # of the push that was complete last
        self._agreement = agreement
        self._staleness = staleness

    def reserve(self, push: Push, updater: Updater, values: list[list[Array]]) -> Call:
        """Wait until fewer pushes wait for these keys than may, too."""
        if updater.assigns:
            raise ArgumentError(
                "a push to a 'dist_async' store needs an updater: call set_optimizer or "
                "set_updater first"
            )
        if not updater.keeps_settings:
            self.drain()
        self._waiting.reserve(push, at_most=max(self._staleness - 1, 0))
        return self._engine.reserve(push, updater, values)

    def push(
        self,
        push: Push,
        values: list[list[Array]],
        updater: Updater,
        call: Call,
        *,
        plain: bool,
        priority: int,
        rows: Sequence[Rows] = (),
    ) -> None:
        """Pack, and leave all else to the backlog: one job."""
        parts = [
            self._engine.begin_rows(bucket, updater)
            if bucket.is_sparse
            else self._waiting.pack(bucket, values, updater, bucket.wide_dtype)
            for bucket in push.buckets
        ]
        keys = [entry.spec.key for entry in push.entries]
        note = None if self.history is None else self.history.of_push(updater)
        run = partial(self._run, push, parts, rows, updater, call, note)
        self._waiting.add(keys, 0, run, partial(self._take_back, push, parts, updater))
        if self._staleness == 0 or not updater.keeps_settings:
            self._waiting.wait(push.entries)

    def wait(self, entries: Iterable[Entry], *, to_read: bool = False) -> None:
        """Wait for the pushes of these keys; a pull does not, but is told of errors."""
        if not to_read:
            self._waiting.wait(entries)
        elif threading.get_ident() != self._backlog.ident:
            self._backlog.check()

    @property
    def ident(self) -> int | None:
        """The backlog's thread."""
        return self._backlog.ident

    @property
    def ended(self) -> str:
        """Which error of a push it was; lost ranks may be left behind."""
        return "" if self._backlog.was_interrupted else self._backlog.failure

    def move(self, topology: Topology, agreement: Agreement) -> None:
        """Begin anew."""
        super().move(topology, agreement)
        self._agreement = agreement

    def _take_back(self, push: Push, parts: Sequence[_Packed | RowsSink], updater: Updater) -> None:
        # The ranks may have been interrupted as they asked whether it has failed elsewhere.
        if parts is not self._applied:
            for bucket in push.buckets:
                updater.take_back(bucket)

    def _run(
        self,
        push: Push,
        parts: Sequence[_Packed | RowsSink],
        rows: Sequence[Rows],
        updater: Updater,
        call: Call,
        note: Note | None,
    ) -> None:
        try:
            self._agreement.confirm(call)
        except Exception as error:
            raise SharedError(error) from error
        totals = iter(self._engine.sum_rows(push, rows))
        updates = []
        for part in parts:  # all sums before the first update: a loss then leaves all as it was
            if isinstance(part, _Packed):
                self._engine.sum_packed_whole(part.bucket, part.source, part.total)
                updates.append(partial(part.sink, 0, part.bucket.n_elements, part.total))
            else:
                updates.append(partial(part, next(totals)))
        failure = self._update_all(updates)
        if failure is None:
            self._applied = parts
        for part in parts:
            if isinstance(part, _Packed):
                self._waiting.give_back(part)
        if updater.may_raise:
            with self.reading:
                told = self._engine.mend(push, updater, failure)
            if told is not None:
                raise SharedError(told)
        elif failure is not None:
            raise failure
        if note is not None:
            note(push.entries)

    def _update_all(self, updates: Sequence[Callable[[], None]]) -> BaseException | None:
        """Run updates, the first that fails being the last; give what it has raised."""
        failure: BaseException | None = None
        for update in updates:
            with self.reading:
                self._engine.is_whole = False
                failure = self._engine.try_update(update)
            if failure is not None:
                break
        self._engine.count_updated(failure)
        return failure


def _slot_bytes(bucket: Bucket) -> int:
    """Say what a bucket takes when it is packed; in two dtypes, if its sums are wider."""
    both = bucket.wide_dtype.itemsize + bucket.is_small_float * bucket.dtype.itemsize
    return bucket.n_elements * both
