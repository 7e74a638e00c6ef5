"""What turns the sum of a push into the stored value: three ways, one contract."""

from __future__ import annotations

import struct
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias, final

from .arrays import Array, wide
from .bucket import Bucket, Member
from .errors import ArgumentError
from .optimizer.base import Optimizer
from .optimizer.step import Factors, Step
from .place import HOST, Parts, Place, Update, UpdateEach
from .replica import Chunk, Entry
from .schema import Key, digest
from .sparse import Rows, RowSparse, blocks
from .transport.contract import Sink

UpdateFunction: TypeAlias = Callable[[Any, Any, Array], object]  # key, input, stored
RowsSink: TypeAlias = Callable[[Rows], None]


class Updater(ABC):
    """Changes stored values in place, given the sum of a push."""

    #: Where values and sums lie.
    place: Place = HOST
    #: Whether the sum may be written straight into the stored value.
    assigns = False
    #: Whether the user's code runs in it, which may raise on one rank and not on another.
    may_raise = False
    #: Whether a key's step depends on its whole sum, so that a bucket must not come in pieces.
    needs_whole_keys = False
    #: Whether an update by rows is done by `begin_rows`, not by the array they stand for.
    takes_rows = False
    #: Whether an update goes by what was agreed on, whatever the user changes meanwhile.
    keeps_settings = True

    @abstractmethod
    def prepare(self, buckets: Sequence[Bucket]) -> None:
        """Do before the first push of a list of keys what can fail."""

    @abstractmethod
    def begin(self, bucket: Bucket) -> Sink:
        """Begin the update of one bucket: its keys count one update more.

        Returns
        -------
        callable
            Takes start, stop and the sum of the elements between, and updates them; only
            once, maybe later and from another thread. It goes by what the last `digest`
            saw, whatever is changed since. An updater that `may_raise` or
            `needs_whole_keys` gets a bucket as a whole; the former may write to its sum.
        """

    def update_each(self, bucket: Bucket, sums: Sequence[Array]) -> None:
        """Update one bucket whose keys' sums lie apart; for an updater that takes pieces.

        Parameters
        ----------
        bucket : Bucket
        sums : sequence of arrays
            For each member, of its shape.
        """
        sink = self.begin(bucket)
        for member, total in zip(bucket.members, sums, strict=True):
            if member.start < member.stop:
                sink(member.start, member.stop, total.reshape(-1))

    @abstractmethod
    def begin_rows(self, bucket: Bucket) -> RowsSink:
        """Begin the update of one key by a sum of rows, if the updater `takes_rows`.

        Returns
        -------
        callable
            Takes the sum; only once, maybe later and from another thread.
        """

    @abstractmethod
    def digest(self, buckets: Sequence[Bucket]) -> int:
        """Digest what must be equal on all ranks, before each push of these buckets."""

    @abstractmethod
    def states(self, bucket: Bucket) -> list[Array]:
        """Give what else than the values an update of a bucket has changed, as flat arrays."""

    @abstractmethod
    def describe(self) -> str:
        """Say what this is, for messages."""

    @abstractmethod
    def take_back(self, bucket: Bucket) -> None:
        """Take back a `begin` whose sum will not come: its keys count one update less."""

    def told(self) -> Any:
        """Say in what JSON holds what else than arrays another one needs to go on as this one."""
        return None

    def level(self, told: Any, entries: Mapping[Key, Entry]) -> list[Array]:
        """Become what another one has told of itself, but for arrays that are still to be copied.

        Parameters
        ----------
        told : any
            What its `told` gave.
        entries : mapping
            The keys of the store.

        Returns
        -------
        list of numpy.ndarray
            What is to be copied, flat; the same on all ranks.
        """
        return []


@final
class Assign(Updater):
    """The sum replaces the value: what a store does that was given no updater."""

    assigns = True
    takes_rows = True

    def __init__(self) -> None:
        self._written: dict[Key, Array] = {}  # rows that are not 0, where only rows were pushed

    def prepare(self, buckets: Sequence[Bucket]) -> None:
        """Do nothing."""

    def begin(self, bucket: Bucket) -> Sink:
        """Copy the sum."""

        def copy(start: int, stop: int, total: Array) -> None:
            for run in bucket.runs:
                low, high = max(start, run.start), min(stop, run.stop)
                if low < high:
                    to = run.chunk_start - run.start
                    stored = run.chunk.flat[to + low : to + high]
                    self.place.copy(total[low - start : high - start], stored)

        return copy

    def update_each(self, bucket: Bucket, sums: Sequence[Array]) -> None:
        """Copy each."""
        for run in bucket.runs:
            starts = bucket.starts[run.first : run.last] + (run.chunk_start - run.start)
            parts = Parts(run.chunk.flat, starts, bucket.sizes[run.first : run.last])
            self.place.copy_each(sums[run.first : run.last], parts)

    def begin_rows(self, bucket: Bucket) -> RowsSink:
        """Write the rows, and 0 elsewhere: of a second sum only where the last one wrote."""
        entry = bucket.members[0].entry

        def write(rows: Rows) -> None:
            stored = entry.value.reshape(entry.spec.shape[0], rows.data.shape[1])
            last = self._written.pop(entry.spec.key, None)
            if last is None:
                stored.fill(0)
            else:
                stored[last] = 0
            stored[rows.indices] = rows.data
            self._written[entry.spec.key] = rows.indices

        return write

    def digest(self, buckets: Sequence[Bucket]) -> int:
        """Give the same on every rank, always; take note of who will write whole keys."""
        if self._written:
            for bucket in buckets:
                for member in () if bucket.is_sparse else bucket.members:
                    self._written.pop(member.entry.spec.key, None)
        return 0

    def states(self, bucket: Bucket) -> list[Array]:
        """Nothing."""
        return []

    def describe(self) -> str:
        """Say that there is none."""
        return "no updater"

    def take_back(self, bucket: Bucket) -> None:
        """Do nothing: nothing is counted."""

    def level(self, told: Any, entries: Mapping[Key, Entry]) -> list[Array]:
        """Forget where rows were written."""
        self._written.clear()
        return []


@final
class Custom(Updater):
    """A function of the user's: ``function(key, input, stored)``."""

    may_raise = True
    takes_rows = True

    def __init__(self, function: UpdateFunction) -> None:
        self._function = function

    def prepare(self, buckets: Sequence[Bucket]) -> None:
        """Do nothing."""

    def begin(self, bucket: Bucket) -> Sink:
        """Call the function for each key of the bucket, which comes as a whole."""

        def call(start: int, stop: int, total: Array) -> None:
            lend = self.place.lend
            with self.place.lending():
                for entry, _, low, high in bucket.members:
                    spec = entry.spec
                    given = lend(total[low:high].reshape(spec.shape))
                    self._function(spec.key, given, lend(entry.value))

        return call

    def begin_rows(self, bucket: Bucket) -> RowsSink:
        """Call the function with a `RowSparse`."""
        entry = bucket.members[0].entry
        spec = entry.spec
        return lambda rows: self._call(spec.key, rows.as_row_sparse(spec.shape), entry.value)

    def _call(self, key: Key, total: Array | RowSparse, stored: Array) -> None:
        self._function(key, total, stored)

    def digest(self, buckets: Sequence[Bucket]) -> int:
        """Tell it from the other kinds; functions themselves cannot be compared."""
        return 1

    def states(self, bucket: Bucket) -> list[Array]:
        """Nothing that is known."""
        return []

    def describe(self) -> str:
        """Say that it is the user's."""
        return "an updater"

    def take_back(self, bucket: Bucket) -> None:
        """Do nothing: it has not been called yet."""


@dataclass
class _Segment:
    """Neighbours that share one step."""

    start: int
    stop: int
    chunk: Chunk
    chunk_start: int
    step: Step
    first: int  # its members: bucket.members[first:last]
    last: int


@final
class Optimize(Updater):
    """An optimizer, and the states of the keys that it has seen.

    States lie as the values do: one array a chunk and state, so that neighbours are
    updated as one.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        # Ours do not raise, and a schedule is asked before the ranks agree; a subclass may.
        self.may_raise = not type(optimizer).__module__.startswith("kvcoll.")
        self.keeps_settings = not self.may_raise
        self.needs_whole_keys = optimizer.needs_whole_keys
        self._settings: Sequence[float] | None = None  # as digested last
        self._agreed = (0.0, 0.0, 0)  # rate, decay and count of updates of the push under way
        self._states: dict[Chunk, list[Array]] = {}
        self._counts: dict[Key, int] = {}
        # Keys made ready for a push that may yet be refused, on some ranks only: of no account.
        self._new: set[Key] = set()
        self._factors: dict[Key, Factors] = {}
        self._forget_factors()
        # The user may change the optimizer's settings while an update waits for its sum:
        # updates go by a copy, made anew when the settings have changed.
        self._as_agreed = optimizer
        self._agreed_settings: tuple[float, ...] = ()

    def prepare(self, buckets: Sequence[Bucket]) -> None:
        """Make room for the states of keys that are new."""
        for bucket in buckets:
            for entry, _, _, _ in bucket.members:
                if entry.spec.key not in self._counts:
                    self._optimizer.check(entry.spec)
            self._optimizer.reserve(bucket.dtype)
            for run in bucket.runs:
                self._make_states(run.chunk)
            for entry, _, _, _ in bucket.members:
                if entry.spec.key not in self._counts:
                    self._new.add(entry.spec.key)
                    self._counts[entry.spec.key] = self._optimizer.begin_num_update

    def begin(self, bucket: Bucket) -> Sink:
        """Count the update, and find which neighbours share their step."""
        return partial(self._apply, self._as_agreed, self._segments(bucket))

    def update_each(self, bucket: Bucket, sums: Sequence[Array]) -> None:
        """Do as `begin`, and hand over all segments at once."""
        if self.needs_whole_keys:
            super().update_each(bucket, sums)
            return
        work = []
        for segment in self._segments(bucket):
            keys = slice(segment.first, segment.last)
            starts = bucket.starts[keys] + (segment.chunk_start - segment.start)
            weights = Parts(segment.chunk.flat, starts, bucket.sizes[keys])
            states = self._states[segment.chunk]
            work.append(UpdateEach(weights, states, sums[keys], segment.step))
        self.place.update_each(self._as_agreed, work)

    def _segments(self, bucket: Bucket) -> list[_Segment]:
        rate, decay, num_update = self._agreed
        self._optimizer.num_update = num_update
        rates = self._rates(bucket.members)
        apart = self.needs_whole_keys
        segments = []
        for run in bucket.runs:
            first = run.first
            for number in range(run.first + 1, run.last + 1):
                if number == run.last or apart or rates[number] != rates[first]:
                    low, high = bucket.members[first].start, bucket.members[number - 1].stop
                    factors, count = rates[first]
                    step = Step(rate * factors.lr, decay * factors.wd, count, factors.adapts)
                    at = run.chunk_start + low - run.start
                    segments.append(_Segment(low, high, run.chunk, at, step, first, number))
                    first = number
        return segments

    def _apply(
        self,
        optimizer: Optimizer,
        segments: Sequence[_Segment],
        start: int,
        stop: int,
        total: Array,
    ) -> None:
        work = []
        for segment in segments:
            low, high = max(start, segment.start), min(stop, segment.stop)
            if low < high:
                at = segment.chunk_start - segment.start
                own = slice(at + low, at + high)
                states = [state[own] for state in self._states[segment.chunk]]
                grad = total[low - start : high - start]
                work.append(Update(segment.chunk.flat[own], grad, states, segment.step))
        self.place.update(optimizer, work)

    def begin_rows(self, bucket: Bucket) -> RowsSink:
        """Count the update, as `begin` does; only the rows of the sum will be updated."""
        rate, decay, num_update = self._agreed
        self._optimizer.num_update = num_update
        ((factors, count),) = self._rates(bucket.members)
        step = Step(rate * factors.lr, decay * factors.wd, count, factors.adapts)
        return partial(self._apply_rows, self._as_agreed, bucket.members[0].entry, step)

    def _apply_rows(self, optimizer: Optimizer, entry: Entry, step: Step, rows: Rows) -> None:
        """Take rows of value and states into flat arrays, update these, and put them back."""
        width = rows.data.shape[1]
        shape = (entry.spec.shape[0], width)
        whole = [array.reshape(shape) for array in (entry.flat, *self.states_of(entry))]
        for block in blocks(rows.data):
            indices = rows.indices[block]
            parts = [array[indices] for array in whole]
            weight, *states = (part.reshape(-1) for part in parts)
            optimizer.update_flat(weight, rows.data[block].reshape(-1), states, step)
            for array, part in zip(whole, parts, strict=True):
                array[indices] = part

    def digest(self, buckets: Sequence[Bucket]) -> int:
        """Digest the settings, which may be changed between pushes, and the rate of this one."""
        optimizer, counts = self._optimizer, self._counts
        self._check_states(buckets)
        newest = max((counts[m.entry.spec.key] + 1 for b in buckets for m in b.members), default=0)
        num_update = max(optimizer.num_update, newest)
        try:
            settings = optimizer.settings_at(num_update if buckets else optimizer.num_update)
            rate, decay, *others = map(float, settings)
        except ValueError as error:
            raise TypeError(
                f"the settings of {type(optimizer).__name__} must be numbers: {error}"
            ) from None
        self._settings = settings
        self._agreed = rate, decay, num_update
        kept = (bool(optimizer.multi_precision), *others)
        if not self.may_raise and self._agreed_settings != kept:
            self._as_agreed, self._agreed_settings = copy(optimizer), kept
            self.takes_rows = bool(optimizer.lazy_update)
        if self._version != optimizer.version:
            self._forget_factors()
        numbers = [rate, float(num_update), decay, *others]
        mixed = self._name_digest
        for word in struct.unpack(f"<{len(numbers)}Q", struct.pack(f"<{len(numbers)}d", *numbers)):
            mixed = (mixed ^ word) * 0x9E3779B97F4A7C15 % 2**64
        return mixed

    def states(self, bucket: Bucket) -> list[Array]:
        """Give the states of the bucket's keys."""
        return [
            state[run.chunk_start : run.chunk_start + run.stop - run.start]
            for run in bucket.runs
            for state in self._states[run.chunk]
        ]

    def describe(self) -> str:
        """Name the optimizer and its settings, those that were digested last."""
        return self._optimizer.describe(self._settings)

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer."""
        return self._optimizer

    def counts(self) -> dict[Key, int]:
        """Give the keys that have states, each with its number of updates so far."""
        return {key: count for key, count in self._counts.items() if key not in self._new}

    def states_of(self, entry: Entry) -> list[Array]:
        """Give the states of one key that has them, as flat arrays."""
        return [state[entry.start : entry.stop] for state in self._states[entry.chunk]]

    def adopt(self, entry: Entry, count: int) -> None:
        """Let a key count so many updates; `states_of` it are 0 and to be filled.

        Only before the first push; a key that is not adopted begins anew.
        """
        self._make_states(entry.chunk)
        self._counts[entry.spec.key] = count
        self._new.discard(entry.spec.key)

    def take_back(self, bucket: Bucket) -> None:
        """Count the bucket's keys, and all updates, as before the last `begin`."""
        least = self._optimizer.begin_num_update
        for member in bucket.members:
            key = member.entry.spec.key
            self._counts[key] -= 1
            if self._counts[key] == least:
                self._new.add(key)
        self._optimizer.num_update = max([least, *self._counts.values()])

    def told(self) -> Any:
        """Give the counts; a key without a count has no states that are of use."""
        return [self._optimizer.num_update, list(self.counts().items())]

    def level(self, told: Any, entries: Mapping[Key, Entry]) -> list[Array]:
        """Take the counts; give the states."""
        self._optimizer.num_update, counts = told
        self._counts.clear()
        self._new.clear()
        self._counts.update((key, count) for key, count in counts if key in entries)
        for key in self._counts:
            self._make_states(entries[key].chunk)
        return [state for key in self._counts for state in self.states_of(entries[key])]

    def all_states(self) -> list[Array]:
        """Give the memory of all states as few flat arrays, the same on all ranks."""
        return [state[: chunk.used] for chunk, states in self._states.items() for state in states]

    def with_optimizer(self, optimizer: Optimizer) -> Optimize:
        """Give an updater of the same states and counts, and an optimizer of equal settings."""
        own = Optimize(optimizer)
        own.place, own._states = self.place, self._states
        own._counts, own._new = self._counts, self._new
        return own

    def at(
        self,
        place: Place,
        chunks: Mapping[Chunk, Chunk],
        copy_to: Callable[[Array, Array], None],
    ) -> Optimize:
        """Give an updater of the same optimizer, counts and states, at another place.

        Parameters
        ----------
        place : Place
        chunks : mapping of Chunk to Chunk
            For each that has states the one of the same keys at that place.
        copy_to : callable
            Copies a flat array of this place into one of that place.
        """
        own = Optimize(self._optimizer)
        own.place, own._counts, own._new = place, dict(self._counts), set(self._new)
        for chunk, states in self._states.items():
            own._make_states(chunks[chunk])
            for state, other in zip(states, own._states[chunks[chunk]], strict=True):
                copy_to(state[: chunk.used], other[: chunk.used])
        return own

    def _make_states(self, chunk: Chunk) -> None:
        if chunk not in self._states:
            n, dtype = self._optimizer.n_states(chunk.flat.dtype), wide(chunk.flat.dtype)
            self._states[chunk] = [self.place.zeros(chunk.flat.size, dtype) for _ in range(n)]

    def _forget_factors(self) -> None:
        """Take note of settings that are no numbers, and of changed factors of keys."""
        self._version = self._optimizer.version
        self._factors.clear()
        name = type(self._optimizer).__qualname__
        self._name_digest = digest(name, *self._optimizer.names_and_factors())

    def _rates(self, members: Sequence[Member]) -> list[tuple[Factors, int]]:
        """Count an update of each key; give what it goes by."""
        counts, factors, optimizer = self._counts, self._factors, self._optimizer
        if self._new:
            self._begin_states([member.entry for member in members])
        rates = []
        for member in members:
            key = member.entry.spec.key
            count = counts[key] = counts[key] + 1
            if key not in factors:
                factors[key] = optimizer.multipliers(key)
            rates.append((factors[key], count))
        return rates

    def _begin_states(self, entries: Sequence[Entry]) -> None:
        """Let keys have states from now on, if they are new."""
        for entry in entries:
            if entry.spec.key in self._new:
                if self._optimizer.keeps_master(entry.spec.dtype):
                    self.place.copy(entry.flat, self.states_of(entry)[-1])
                self._new.discard(entry.spec.key)

    def _check_states(self, buckets: Sequence[Bucket]) -> None:
        for bucket in buckets:
            n = self._optimizer.n_states(bucket.dtype)
            if any(len(self._states[run.chunk]) != n for run in bucket.runs):
                raise ArgumentError(
                    f"momentum, centered and multi_precision of {type(self._optimizer).__name__} "
                    "cannot be turned on or off once it has updated keys: call set_optimizer with "
                    "a new one"
                )
