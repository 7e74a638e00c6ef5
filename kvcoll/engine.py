"""How a push runs: agree, pack, sum over the ranks, update.

Rules of the file: what it gets has been checked; memory is taken before the ranks
agree, so that nothing can fail on one rank alone once the others wait for it; the
user's updater is the one exception, and the ranks agree once more after it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, final

import numpy as np

from .agreement import Agreement, Call, name_ranks
from .arrays import Array, DType
from .bucket import Bucket
from .bucket import plan as plan_buckets
from .compression import Compression
from .compressor import Compressor
from .errors import UpdaterError, WaitEndedError, text_of
from .gpu.at import ListsAt
from .packing import as_flat, pack_into, wants_wide
from .place import HOST, Place
from .replica import Chunk, Entry
from .rows import sum_rows
from .schema import Spec
from .sparse import Rows, spread
from .sums import order_of
from .transport.contract import Sink, Transport, Window, copies_to
from .updater import RowsSink, Updater

# Flags of an agreement.
_WIDE = 1  # some rank sums several values, or wider ones, for keys of 16 or 8 bits
_FAILED = 2  # some rank's updater raised
_PLAIN = 4  # some rank pushes arrays that are not the store's own

# In cache, as an optimizer's own pieces are.
_SPREAD_ELEMENTS = 1 << 16

_AFTER_UPDATE = Call("the end of a push", 0, ends_push=True)


@dataclass
class Push:
    """One list of keys, planned: the same on every rank."""

    call: Call
    entries: tuple[Entry, ...]
    buckets: tuple[Bucket, ...]
    windowed: tuple[Bucket, ...] = ()  # the same keys for pushes of the store's own arrays
    ready_for: Updater | None = None  # for whose updates memory has been taken

    def __post_init__(self) -> None:
        self.has_small_floats = any(bucket.is_small_float for bucket in self.buckets)
        self.sparse = tuple(bucket for bucket in self.buckets if bucket.is_sparse)
        self.dense = tuple(bucket for bucket in self.buckets if not bucket.is_sparse)

    @cached_property
    def joined(self) -> tuple[Bucket, ...]:
        """The same keys in as few buckets as can be, for what needs no memory to be packed."""
        n_bytes = sum(entry.value.nbytes for entry in self.entries) + 1
        return tuple(plan_buckets(self.entries, n_bytes, n_bytes))


@final
class _WithUpdater:
    """What a push is in words, its updater last; written only if the ranks differ."""

    def __init__(self, items: Iterable[str], updater: Updater) -> None:
        self._items, self._updater = items, updater

    def __iter__(self) -> Iterator[str]:
        yield from self._items
        yield self._updater.describe()


@final
class Engine:
    """Runs the calls of one store on one transport.

    Parameters
    ----------
    transport : Transport
    agreement : Agreement
    tree : bool, default False
        Whether the transport adds in a binary tree over the ranks.
    apart : bool, default False
        Whether sums are complete before a stored value is touched.

    Attributes
    ----------
    version : int
        How many pushes are wholly in the replica.
    steps : int
        The same, counted as finely as pushes may be interrupted.
    is_whole : bool
        Whether the replica holds that, and not a part of what comes next.
    home : Place, optional
        Where values lie and are summed; to be set anew only while there are none.
    """

    def __init__(
        self,
        transport: Transport,
        agreement: Agreement,
        *,
        tree: bool = False,
        apart: bool = False,
        home: Place = HOST,
    ) -> None:
        self._transport = transport
        self._tree, self.apart = tree, apart
        self.home = home
        self._order = order_of(transport.topology.hosts, tree=tree)
        self._agreement = agreement
        self.version = self.steps = 0
        self.is_whole = True
        self._scratch: dict[DType, Array] = {}
        self._apart: dict[DType, Array] = {}  # sums of one push that nothing has been done with
        self._values: dict[Chunk, Window] = {}  # where the stored values lie
        self._windows: dict[Chunk, Window] = {}  # where the arrays lie that `empty` gives
        self._last: tuple[Push | None, int, Call] = (None, 0, _AFTER_UPDATE)
        self._compressor: Compressor | None = None
        self._idle_compressor: Compressor | None = None  # its residuals outlive a pause

    def reserve(self, push: Push, updater: Updater, values: list[list[Array]]) -> Call:
        """Take the memory that a push needs, and say what to agree on.

        What can fail here alone fails here, where the ranks do not wait yet.
        """
        if push.ready_for is not updater:
            self._take_memory(push, updater)
        if self._compressor is not None:
            self._compressor.pack(push.dense, values)
        return self._call(push, updater)

    def draft_compressor(self, compression: Compression, specs: Iterable[Spec]) -> Compressor:
        """Take what compression needs, for `compress`.

        Raises
        ------
        ArgumentError
            Gradients of one of these keys cannot be compressed.
        """
        for spec in specs:
            compression.check(spec)
        before = self._compressor or self._idle_compressor
        return Compressor(self._transport, compression, before)

    def compress(self, compressor: Compressor | None) -> None:
        """Let gradients travel as codes from the next push on; None to send them as they are."""
        if compressor is None:
            self._idle_compressor = self._compressor or self._idle_compressor
        else:
            compressor.start()
        self._compressor = compressor

    @property
    def compressor(self) -> tuple[Compressor | None, bool]:
        """What compresses, or has until it was paused, and whether it does so now."""
        return self._compressor or self._idle_compressor, self._compressor is not None

    def draft_restored(
        self, compression: Compression | None, residuals: Sequence[tuple[Entry, Array]]
    ) -> Compressor | None:
        """Take what compression needs that goes on with these residuals, for `restore`.

        Parameters
        ----------
        compression : Compression or None
            None for that of now, with no residuals.
        residuals : sequence of (Entry, numpy.ndarray)
        """
        if compression is None:
            if self._compressor is None:
                return None
            compression = self._compressor.compression
        compressor = Compressor(self._transport, compression, None)
        for entry, residual in residuals:
            compressor.residuals.adopt(entry, residual)
        return compressor

    def restore(self, compressor: Compressor | None, *, is_on: bool) -> None:
        """Go on with a compressor, or with one that is paused."""
        self._compressor = compressor if is_on else None
        self._idle_compressor = None if is_on else compressor

    def draft_move(
        self, transport: Transport, agreement: Agreement, places: Sequence[int], place: int
    ) -> Callable[[], None]:
        """Take what sums over other ranks need; give what moves to them, and cannot fail.

        Parameters
        ----------
        transport : Transport
            Over some of the ranks.
        agreement : Agreement
        places : sequence of int
            Of those on this host their places among the ranks that it had.
        place : int
            This rank's among `places`.
        """
        on, idle = self._compressor, self._idle_compressor
        moved = [
            None if one is None else Compressor(transport, one.compression, one)
            for one in (on, idle)
        ]
        order = order_of(transport.topology.hosts, tree=self._tree)
        values, windows = (
            {chunk: window.of_survivors(places, place) for chunk, window in of_chunk.items()}
            for of_chunk in (self._values, self._windows)
        )

        def move() -> None:
            self._transport, self._agreement, self._order = transport, agreement, order
            self._values, self._windows = values, windows
            self._compressor, self._idle_compressor = moved

        return move

    def forget_values(self) -> None:
        """Let go of memory for keys that are in the store no more."""
        self._values.clear()

    def packed(self, bucket: Bucket) -> Array | None:
        """Give a bucket's values where they have been packed already, to be compressed."""
        return None if self._compressor is None else self._compressor.packed(bucket)

    def copy_lent(self, push: Push, values: list[list[Array]]) -> None:
        """Copy what lies in the store's own memory, which an updater has seen and kept."""
        own = [*self._scratch.values(), *self._apart.values()]
        own += [window.own for window in self._values.values()]
        for arrays in values:
            arrays[:] = [self._without_a_share_in(own, array) for array in arrays]

    def _take_memory(self, push: Push, updater: Updater) -> None:
        updater.prepare(push.buckets)
        if self.apart:
            apart: dict[DType, int] = {}
            for bucket in push.dense:
                apart[bucket.dtype] = apart.get(bucket.dtype, 0) + bucket.n_elements
            for dtype, n_elements in apart.items():
                if dtype not in self._apart or self._apart[dtype].size < n_elements:
                    self._apart[dtype] = self.home.empty(n_elements, dtype)
        for bucket in push.buckets:
            if bucket.is_sparse:
                # Settings decide whether one of ours takes rows, and may be changed.
                takes_rows = updater.may_raise and updater.takes_rows
                self._reserve(bucket.dtype, _spread_elements(bucket, updater), unless=takes_rows)
                continue
            self._reserve(bucket.dtype, bucket.n_elements, unless=_sums_in_place(bucket, updater))
            self._reserve(bucket.wide_dtype, bucket.n_elements, unless=not bucket.is_small_float)
        for bucket in push.windowed:
            in_pieces = not (updater.may_raise or updater.needs_whole_keys)
            self._reserve(bucket.dtype, bucket.n_elements, unless=in_pieces)
        push.ready_for = updater

    def place(self, drafted: Sequence[Entry]) -> None:
        """Find for new chunks the memory that suits the transport best; collective."""
        for entry in drafted:
            if entry.chunk not in self._values:
                window = self._transport.window(entry.chunk.flat)
                self._values[entry.chunk] = window
                entry.chunk.flat = window.own

    def draft_windows(self, entries: Sequence[Entry]) -> dict[Chunk, Array]:
        """Take the memory that `open_windows` may need."""
        new = {entry.chunk: entry.chunk.flat for entry in entries}
        return {
            chunk: self.home.empty(flat.size, flat.dtype)
            for chunk, flat in new.items()
            if chunk not in self._windows
        }

    def open_windows(self, entries: Sequence[Entry], drafted: dict[Chunk, Array]) -> list[Array]:
        """Give for each key an array of its shape from which pushes need not be packed.

        Collective; the arrays of a key are the same at each call.
        """
        for chunk, private in drafted.items():
            self._windows[chunk] = self._transport.window(private)
        return [
            self._windows[entry.chunk].own[entry.start : entry.stop].reshape(entry.spec.shape)
            for entry in entries
        ]

    def forget_windows(self, drafted: Iterable[Chunk]) -> None:
        """Let go of windows that not all ranks have."""
        for chunk in drafted:
            self._windows.pop(chunk, None)

    def agree(self, push: Push, call: Call, values: list[list[Array]], *, plain: bool) -> int:
        """Return once all ranks make this push; see `push`.

        Returns
        -------
        int
            Flags of all ranks, for `push_agreed` and `packed_dtype`.
        """
        flags = _PLAIN if plain or self._compressor is not None else 0
        if push.has_small_floats and wants_wide(push.entries, values):
            flags |= _WIDE
        try:
            return self._agreement.confirm(call, flags)
        except (KeyboardInterrupt, SystemExit) as error:
            self.abort(push.call.name, error)  # the others may have agreed already
            raise

    def push_agreed(
        self,
        push: Push,
        values: list[list[Array]],
        updater: Updater,
        flags: int,
        rows: Sequence[Rows] = (),
    ) -> None:
        """Sum the values of each key, over the ranks too, and update the stored ones.

        Parameters
        ----------
        push : Push
        values : list of list of numpy.ndarray
            For each key of `push` what this rank pushes.
        updater : Updater
        flags : int
            What `agree` gave.
        rows : sequence of Rows, optional
            For each of `push.sparse` what this rank pushes.
        """
        buckets = push.buckets if flags & _PLAIN else push.windowed
        if updater.may_raise:
            self._push_guarded(push, buckets, values, updater, flags, rows)
            return
        try:
            totals = iter(self.sum_rows(push, rows) if push.sparse else ())
            if self._needs_no_sum(push, values):
                self._update_each(push, values, updater)
                buckets = ()
            if self.apart:
                sums = self._sum_all(buckets, values, flags)
                self.is_whole = False
                for bucket, total in zip(buckets, sums, strict=True):
                    if total is None:
                        self.begin_rows(bucket, updater)(next(totals))
                    else:
                        _update(updater, bucket, total)
            else:
                self.is_whole = False
                for bucket in buckets:
                    if bucket.is_sparse:
                        self.begin_rows(bucket, updater)(next(totals))
                    else:
                        self._run(bucket, values, updater, flags)
        except BaseException as error:
            self.abort(push.call.name, error)
            raise
        self.is_whole = True
        self.steps += 1
        self.version += 1

    def _sum_all(
        self, buckets: Sequence[Bucket], values: list[list[Array]], flags: int
    ) -> list[Array | None]:
        """Sum all buckets, each into memory of its own; None for one of which rows are pushed."""
        used: dict[DType, int] = {}
        sums: list[Array | None] = []
        for bucket in buckets:
            if bucket.is_sparse:
                sums.append(None)
                continue
            start = used.get(bucket.dtype, 0)
            stop = used[bucket.dtype] = start + bucket.n_elements
            sums.append(self._sum(bucket, values, flags, self._apart[bucket.dtype][start:stop]))
        self._transport.wait()
        return sums

    def sum_rows(self, push: Push, rows: Sequence[Rows]) -> list[Rows]:
        """Sum the rows of the keys of which only rows are pushed: one exchange for all."""
        dtypes = [bucket.dtype for bucket in push.sparse]
        return sum_rows(self._transport, self._order, rows, dtypes)

    def begin_rows(self, bucket: Bucket, updater: Updater) -> RowsSink:
        """Begin the update of a key by rows, or by the array that they stand for."""
        if updater.takes_rows:
            return updater.begin_rows(bucket)
        sink, n = updater.begin(bucket), bucket.n_elements
        piece = self._scratch[bucket.dtype][: _spread_elements(bucket, updater)]
        return lambda rows: spread(rows, n, piece, sink)

    def packed_dtype(self, bucket: Bucket, flags: int) -> DType:
        """Say in which dtype the ranks pack a bucket, given the flags of `agree`."""
        return bucket.wide_dtype if flags & _WIDE else bucket.dtype

    def sum_packed(self, bucket: Bucket, source: Array, sink: Sink) -> None:
        """Sum a bucket that was packed before, and hand the sum over piece by piece."""
        if self._compressor is not None:
            self._compressor.sum(bucket, source, sink)
        elif bucket.n_elements:
            self._transport.all_reduce_pieces(source, bucket.dtype, sink)

    def sum_packed_whole(self, bucket: Bucket, source: Array, total: Array) -> None:
        """Sum a bucket that was packed before into `total`, which may be `source`."""
        if self._compressor is not None:
            self._compressor.sum(bucket, source, copies_to(total))
        elif bucket.n_elements:
            self._transport.all_reduce(source, total)

    def from_rank_0(self, number: int) -> int:
        """Give on all ranks the number that rank 0 gave."""
        told = np.array([number], np.int64)
        self._transport.broadcast(told)
        return int(told[0])

    def _push_guarded(
        self,
        push: Push,
        buckets: tuple[Bucket, ...],
        values: list[list[Array]],
        updater: Updater,
        flags: int,
        rows: Sequence[Rows],
    ) -> None:
        """Sum and update where the user's code may raise on one rank and not on another."""
        failure: BaseException | None = None
        try:
            totals = iter(self.sum_rows(push, rows))
            sums = self._sum_all(buckets, values, flags) if self.apart else None
            self.is_whole = False
            for number, bucket in enumerate(buckets):
                if bucket.is_sparse:
                    update = partial(self._update_rows, updater, bucket, next(totals))
                else:
                    total = None if sums is None else sums[number]
                    if total is None:
                        total = self._sum(bucket, values, flags)
                    update = partial(_update, updater, bucket, total)
                if failure is None:  # else the others still wait for this rank's share of the sum
                    failure = self.try_update(update)
            self.count_updated(failure)
            error = self.mend(push, updater, failure)
        except BaseException as error:
            self.abort(push.call.name, error)
            raise
        if error is not None:
            raise error

    def _update_rows(self, updater: Updater, bucket: Bucket, total: Rows) -> None:
        self.begin_rows(bucket, updater)(total)

    def try_update(self, update: Callable[[], None]) -> BaseException | None:
        """Run an update that may raise; give what it has raised."""
        try:
            with self._agreement.held():
                update()
        except BaseException as error:  # the user's own code: all must hear of sys.exit, too
            return error
        return None

    def count_updated(self, failure: BaseException | None) -> None:
        """Take note that a push's updates have come to their end, on this rank."""
        if failure is None:
            self.steps += 1
            self.version += 1
            self.is_whole = True

    def abort(self, call_name: str, error: BaseException) -> None:
        """End the job: the others wait in a sum that this rank has left.

        Unless they, too, have been told to wait no more.
        """
        if isinstance(error, WaitEndedError):
            return
        said = f"{type(error).__name__}: {text_of(error)}".removesuffix(": ")
        self._transport.abort(f"{said} in the midst of {call_name}")

    def broadcast(self, entries: Sequence[Entry]) -> None:
        """Replace each rank's values by those of rank 0; neighbours as one array."""
        while entries:
            chunk, start, stop = entries[0].chunk, entries[0].start, entries[0].stop
            n = 1
            while n < len(entries) and (entries[n].chunk, entries[n].start) == (chunk, stop):
                stop = entries[n].stop
                n += 1
            self._transport.broadcast(chunk.flat[start:stop])
            entries = entries[n:]
        if self.apart:
            self._transport.wait()

    def without_a_share(self, array: Array) -> Array:
        """Give an array that shares no memory with those that `open_windows` gave."""
        return self._without_a_share_in([w.own for w in self._windows.values()], array)

    def _without_a_share_in(self, own: list[Array], array: Array) -> Array:
        home = self.home
        return home.clone(array) if any(home.share_memory(array, o) for o in own) else array

    def close(self) -> None:
        """Let go of all memory."""
        self._values.clear()
        self._windows.clear()
        self._compressor = self._idle_compressor = None
        self._last = None, 0, _AFTER_UPDATE  # its push holds the keys' memory, too
        self._scratch.clear()
        self._apart.clear()

    def _call(self, push: Push, updater: Updater) -> Call:
        """Add to a push what its updater does: ranks must not update in different ways."""
        own = updater.digest(push.buckets)
        if push is not self._last[0] or own != self._last[1]:
            items = _WithUpdater(push.call.items, updater)
            call = Call(push.call.name, push.call.digest ^ own, items, push.call.keys)
            self._last = push, own, call
        return self._last[2]

    def _reserve(self, dtype: DType, n_elements: int, *, unless: bool) -> None:
        if not unless and (dtype not in self._scratch or self._scratch[dtype].size < n_elements):
            self._scratch[dtype] = self.home.empty(n_elements, dtype)

    def _run(self, bucket: Bucket, values: list[list[Array]], updater: Updater, flags: int) -> None:
        """Sum and update one bucket, a piece at a time where the updater allows it."""
        if updater.needs_whole_keys:
            total = self._sum(bucket, values, flags)
            updater.begin(bucket)(0, bucket.n_elements, total)
        elif self._compressor is not None:
            self._compressor.sum(bucket, self._compressor.packed(bucket), updater.begin(bucket))
        elif updater.assigns and not flags & _PLAIN:
            for run in bucket.runs:
                if run.start < run.stop:
                    source, out = self._windows[run.chunk], self._values[run.chunk]
                    stop = run.chunk_start + run.stop - run.start
                    self._transport.all_reduce_windows(source, out, run.chunk_start, stop)
        elif _sums_in_place(bucket, updater):
            self._assign(bucket, values, flags)
        else:
            self._sum_pieces(bucket, values, flags, updater.begin(bucket))

    def _needs_no_sum(self, push: Push, values: list[list[Array]]) -> bool:
        """Say whether values on a GPU are the sums already, each where it lies."""
        if self.home.is_host or self._transport.topology.size > 1:
            return False
        if isinstance(values, ListsAt):
            return True
        return all(
            len(arrays) == 1
            and arrays[0].dtype is entry.spec.dtype
            and self.home.is_flat(arrays[0])
            for arrays, entry in zip(values, push.entries, strict=True)
        )

    def _update_each(self, push: Push, values: list[list[Array]], updater: Updater) -> None:
        """Update from the arrays pushed, without packing them: as few launches as can be."""
        sums: Any = values.arrays if isinstance(values, ListsAt) else [own[0] for own in values]
        with self.home.joined():
            for bucket in push.joined:
                updater.update_each(bucket, sums[bucket.first : bucket.last])

    def _assign(self, bucket: Bucket, values: list[list[Array]], flags: int) -> None:
        """Sum one bucket where its values lie."""
        if bucket.n_elements:
            run = bucket.runs[0]
            out, stop = self._values[run.chunk], run.chunk_start + bucket.n_elements
            stored = out.own[run.chunk_start : stop]
            packed = self._pack(bucket, values, flags, stored)
            source = None if packed is stored else packed
            self._transport.all_reduce_to_window(source, out, run.chunk_start, stop)

    def _sum(
        self,
        bucket: Bucket,
        values: list[list[Array]],
        flags: int,
        total: Array | None = None,
    ) -> Array:
        """Sum one bucket into memory apart, by default scratch memory."""
        if total is None:
            total = self._scratch[bucket.dtype][: bucket.n_elements]
        if self._compressor is not None:
            self._compressor.sum(bucket, self._compressor.packed(bucket), copies_to(total))
        elif flags & _PLAIN and bucket.n_elements:
            self._transport.all_reduce(self._pack(bucket, values, flags, total), total)
        elif bucket.n_elements:
            self._sum_pieces(bucket, values, flags, copies_to(total))
        return total

    def _sum_pieces(
        self, bucket: Bucket, values: list[list[Array]], flags: int, sink: Sink
    ) -> None:
        if bucket.n_elements == 0:
            return
        if flags & _PLAIN:
            packed = self._scratch[bucket.dtype]
            source = self._pack(bucket, values, flags, packed)
            self._transport.all_reduce_pieces(source, bucket.dtype, sink)
            return
        for run in bucket.runs:
            if run.start < run.stop:
                window = self._windows[run.chunk]
                stop = run.chunk_start + run.stop - run.start
                shifted = sink if run.start == 0 else _shifted(sink, run.start)
                self._transport.all_reduce_window(window, run.chunk_start, stop, shifted)

    def _pack(self, bucket: Bucket, values: list[list[Array]], flags: int, packed: Array) -> Array:
        """Bring what this rank pushes into one flat array, without a copy if it is one."""
        dtype = self.packed_dtype(bucket, flags)
        if dtype is not bucket.dtype:
            packed = self._scratch[dtype]
        flat = as_flat(bucket, values, dtype, self.home)
        if flat is not None:
            return flat
        if packed.size > bucket.n_elements:
            packed = packed[: bucket.n_elements]
        pack_into(bucket, values, packed, self.home)
        return packed

    def mend(
        self, push: Push, updater: Updater, failure: BaseException | None
    ) -> BaseException | None:
        """Agree whether all updaters have come through; if not, bring the replicas in step.

        Parameters
        ----------
        push : Push
        updater : Updater
        failure : BaseException or None
            What it has raised on this rank.

        Returns
        -------
        BaseException or None
            What to raise on this rank; None if no rank failed.
        """
        if not self._agreement.confirm(_AFTER_UPDATE, _FAILED if failure else 0) & _FAILED:
            return None
        said = "" if failure is None else f"{type(failure).__name__}: {text_of(failure)}"
        reports = self._agreement.tell(said)
        failed = [rank for rank, text in enumerate(reports) if text]
        root = next((rank for rank, text in enumerate(reports) if not text), 0)
        self.is_whole = False
        for bucket in push.buckets:
            for array in [*(m.entry.flat for m in bucket.members), *updater.states(bucket)]:
                self._transport.broadcast(array, root)
        self._transport.wait()
        if failure is not None:
            self.count_updated(None)
        self.version -= 1  # a push that raises does not count
        self.is_whole = True
        if failure is not None:
            return failure
        return UpdaterError(
            f"the updater raised on {name_ranks(failed)} in {push.call.name} "
            f"({reports[failed[0]]}); all replicas hold the values of rank {root} now"
        )


def _shifted(sink: Sink, by: int) -> Sink:
    def shifted(start: int, stop: int, total: Array) -> None:
        sink(start + by, stop + by, total)

    return shifted


def _spread_elements(bucket: Bucket, updater: Updater) -> int:
    """Say in pieces of what size an updater that takes no rows gets a key's sum."""
    if updater.may_raise or updater.needs_whole_keys:
        return bucket.n_elements
    n_rows = bucket.members[0].entry.spec.shape[0]
    width = bucket.n_elements // max(1, n_rows)
    return min(bucket.n_elements, max(width, _SPREAD_ELEMENTS // max(1, width) * width))


def _update(updater: Updater, bucket: Bucket, total: Array) -> None:
    updater.begin(bucket)(0, bucket.n_elements, total)


def _sums_in_place(bucket: Bucket, updater: Updater) -> bool:
    """Say whether plain arrays are packed, and summed, where the values lie."""
    return updater.assigns and len(bucket.runs) == 1
