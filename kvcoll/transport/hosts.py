"""The ranks of several hosts: through shared memory within a host, by a leg between hosts.

An array goes in pieces. Of each piece every rank writes its elements to its own staging
memory; the carriers, as many on each host, add the segment that is theirs over the ranks of
the host, in their order, send it on its leg, and write its sum over the hosts where all
ranks of the host read it. So all carriers have their share of what crosses the network, no
byte crosses it twice, and all of this goes on at once for some pieces.

Rules of the file: a rank writes only its own staging, its own segments of the sums and its
own counters; counters only grow, and say how many pieces ever have passed a stage; a slot is
written again once the counters say that all have read it; a rank that can do nothing waits.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import final

import numpy as np

from ..arrays import Array, DType, wide
from ..sums import Adder
from ..topology import Topology
from .contract import Sink, Transport, Window, copies_to
from .leg import Leg, LegSizes
from .memory import SharedMemory
from .sharing import LINE_BYTES, SharingTransport
from .waiting import Waiting

_STAGES = 3


@final
class Stage:
    """How many pieces have passed a stage on each rank of the host.

    Parameters
    ----------
    raw : numpy.ndarray, shape (n_ranks * 64,)
        Shared memory of uint8, zeroed.
    rank : int
        Which of the counts this rank raises.
    counted : int
        How many ranks pass this stage, the first ones.
    """

    def __init__(self, raw: Array, rank: int, counted: int) -> None:
        words, step = raw.view(np.int64).data, LINE_BYTES // 8
        self._mine = words[rank * step : rank * step + 1]
        self._words = [words[k * step : k * step + 1] for k in range(counted)]
        self._least = 0

    def pass_to(self, count: int) -> None:
        """Say that this rank has passed as many."""
        self._mine[0] = count

    def all_passed(self, count: int) -> bool:
        """Say whether all ranks that count have passed as many."""
        if self._least < count:
            self._least = min(word[0] for word in self._words)
        return self._least >= count


@final
class HostsTransport(SharingTransport):
    """Sums over the ranks of a host through shared memory, and over hosts by a leg.

    Parameters
    ----------
    topology : Topology
        Of all ranks.
    memory : SharedMemory
        Of `bytes_for` bytes, mapped by all ranks of this host.
    beside : Transport
        Another transport over all ranks, for broadcasts and small arrays.
    leg : Leg or None
        Over this rank and those of the same local rank on the other hosts; None on a rank
        whose local rank the smallest host does not have.
    share : callable
        Gives that many bytes of further shared memory, or None, on all ranks alike.
    waiting : Waiting
        How to wait for the other ranks.
    sizes : LegSizes
        Of the leg; the same on all ranks.
    small_bytes : int
        Up to how many bytes of all ranks together go by the transport beside.
    tree : bool, default False
        Add in a binary tree over the ranks.

    Notes
    -----
    Counters and data are written in this order by one core and seen in it by others,
    as x86-64 guarantees; elsewhere this transport is not used.
    """

    def __init__(
        self,
        topology: Topology,
        memory: SharedMemory,
        beside: Transport,
        leg: Leg | None,
        share: Callable[[int], SharedMemory | None],
        *,
        waiting: Waiting,
        sizes: LegSizes,
        small_bytes: int,
        tree: bool = False,
    ) -> None:
        super().__init__(topology, beside, share)
        self._lanes = min(len(ranks) for ranks in topology.hosts)
        self._leg, self._waiting = leg, waiting
        segment_bytes = self._segment_bytes = sizes.segment_bytes
        self._depth = sizes.depth
        self._small_bytes = small_bytes // topology.size
        self._slots = self._slots_for(sizes.depth)
        lines = LINE_BYTES * self._size
        raw, rank = memory.raw, self._rank
        self._staged = Stage(raw[:lines], rank, self._size)
        self._added = Stage(raw[lines : 2 * lines], rank, self._lanes)
        self._used = Stage(raw[2 * lines : 3 * lines], rank, self._size)
        slots = raw[_STAGES * lines :].reshape(self._size + 1, self._slots, -1)
        self._sums, self._staging = slots[0], slots[1:]
        self._passed = 0
        self._adder = Adder([range(self._size)], segment_bytes, tree=tree)
        # Of 16-byte elements, so that it is aligned for every dtype.
        self._of_host = np.empty((self._slots, -(-segment_bytes // 16)), np.complex128)

    @classmethod
    def bytes_for(cls, size: int, lanes: int, sizes: LegSizes) -> int:
        """Say how much memory the ranks of a host must share.

        Parameters
        ----------
        size : int
            How many ranks the host has.
        lanes : int
            How many ranks the smallest host has.
        sizes : LegSizes
            Of the leg.
        """
        slot_bytes = lanes * sizes.segment_bytes
        n_slots = (size + 1) * cls._slots_for(sizes.depth)
        return _STAGES * LINE_BYTES * size + n_slots * slot_bytes

    @staticmethod
    def _slots_for(depth: int) -> int:
        """Leave a slot for the piece that is staged, and one for that which is given out."""
        return depth + 2

    def all_reduce(self, source: Array, out: Array) -> None:
        """Sum piece by piece; see `Transport.all_reduce`."""
        if source.nbytes <= self._small_bytes:
            self._beside.all_reduce(source, out)
            return
        self.all_reduce_pieces(source, out.dtype, copies_to(out))

    def all_reduce_pieces(self, source: Array, dtype: DType, sink: Sink) -> None:
        """Stage and sum piece by piece; see `Transport.all_reduce_pieces`."""
        if source.nbytes <= self._small_bytes:
            self._beside.all_reduce_pieces(source, dtype, sink)
            return
        pieces = _Plain(source, self._step(source.dtype), self._rank)
        self._run(pieces, dtype, sink)

    def all_reduce_window(self, window: Window, start: int, stop: int, sink: Sink) -> None:
        """Sum what lies in shared memory already; see `Transport.all_reduce_window`."""
        n_bytes = (stop - start) * window.own.itemsize
        if not window.is_shared or n_bytes <= self._small_bytes:
            self.all_reduce_pieces(window.own[start:stop], window.own.dtype, sink)
            return
        parts = [row[start:stop] for row in window.rows]
        dtype = window.own.dtype
        self._run(_InWindow(parts, self._step(dtype)), dtype, sink)

    def _run(self, pieces: _Pieces, dtype: DType, sink: Sink) -> None:
        """Bring all pieces through their stages, each as soon as it may."""
        at = _Stages(self._passed, carries=self._leg is not None, count=pieces.count)
        self._passed = at.end
        self._waiting.begin()
        try:
            while at.given < at.end:
                before = at.sum()
                self._finish(at)
                self._start(at, pieces, dtype)
                self._give(at, pieces, dtype, sink)
                self._stage(at, pieces)
                if before == at.sum():
                    self._waiting.pause()
        except BaseException:
            if self._leg is not None:
                self._leg.cut()
            raise

    def _stage(self, at: _Stages, pieces: _Pieces) -> None:
        """Show this rank's elements to the others, where what they added is in the way no more."""
        if at.staged < at.end and self._added.all_passed(at.staged + 1 - self._slots):
            staged = self._staging[self._rank][at.staged % self._slots]
            at.staged += pieces.stage(at.staged - at.first, staged, self._segment)
            self._staged.pass_to(at.staged)

    def _start(self, at: _Stages, pieces: _Pieces, dtype: DType) -> None:
        """Add a segment over this host, and send it on its way to the others."""
        ahead = at.started - at.finished
        if at.started == at.end or ahead == self._depth or self._leg is None:
            return
        number, slot = at.started, at.started % self._slots
        # The leg may write the sum from now on: all must have used that which lies there.
        if self._staged.all_passed(number + 1) and self._used.all_passed(number + 1 - self._slots):
            low, high = pieces.bounds(number - at.first)
            mine = self._segment(high - low)
            staged = [row[slot] for row in self._staging]
            rows = pieces.rows(number - at.first, staged, mine)
            self._leg.start(
                self._add(rows, slot, dtype), self._total(slot, high - low, dtype)[mine]
            )
            at.started += 1

    def _finish(self, at: _Stages) -> None:
        """Say that the oldest segment's sum is there."""
        if at.finished < at.started and self._leg is not None and self._leg.finish_one():
            at.finished += 1
            self._added.pass_to(at.finished)

    def _give(self, at: _Stages, pieces: _Pieces, dtype: DType, sink: Sink) -> None:
        """Hand over a sum to which all carriers have added."""
        if self._added.all_passed(at.given + 1):
            low, high = pieces.bounds(at.given - at.first)
            sink(low, high, self._total(at.given % self._slots, high - low, dtype))
            at.given += 1
            self._used.pass_to(at.given)

    def _add(self, rows: list[Array], slot: int, dtype: DType) -> Array:
        """Add rows of this host, in the dtype in which all sums are taken."""
        total: Array = self._of_host[slot].view(wide(dtype))[: rows[0].size]
        if len(rows) == 1 and rows[0].dtype == total.dtype:
            return rows[0]
        self._adder.add(rows, total)
        return total

    def _step(self, dtype: DType) -> int:
        """Say how many elements a piece has."""
        return self._lanes * (self._segment_bytes // wide(dtype).itemsize)

    def _total(self, slot: int, n: int, dtype: DType) -> Array:
        total: Array = self._sums[slot][: n * dtype.itemsize].view(dtype)
        return total

    def _segment(self, n: int) -> slice:
        """Find which part of a piece this rank carries; none on a rank without a leg."""
        low, high = min(self._rank, self._lanes), min(self._rank + 1, self._lanes)
        return slice(n * low // self._lanes, n * high // self._lanes)


@final
class _Stages:
    """How many pieces have passed each stage on this rank, of all there ever were."""

    def __init__(self, first: int, *, carries: bool, count: int) -> None:
        self.first, self.end = first, first + count
        self.staged = self.given = first
        self.started = self.finished = first if carries else self.end

    def sum(self) -> int:
        """Give a number that grows when a piece moves on."""
        return self.staged + self.started + self.finished + self.given


class _Pieces(ABC):
    """An array's pieces, as this rank can see them."""

    def __init__(self, n: int, step: int) -> None:
        self._n, self._step = n, step
        self.count = -(-n // step)

    @final
    def bounds(self, number: int) -> tuple[int, int]:
        low = number * self._step
        return low, min(low + self._step, self._n)

    @abstractmethod
    def stage(self, number: int, staged: Array, segment: Callable[[int], slice]) -> int:
        """Show what others add of a piece; say how many pieces they can see now."""

    @abstractmethod
    def rows(self, number: int, staged: list[Array], mine: slice) -> list[Array]:
        """Give the local ranks' elements of a segment of a piece."""


@final
class _Plain(_Pieces):
    """Of an array that only this rank sees."""

    def __init__(self, source: Array, step: int, rank: int) -> None:
        super().__init__(source.size, step)
        self._source, self._rank = source, rank

    def stage(self, number: int, staged: Array, segment: Callable[[int], slice]) -> int:
        low, high = self.bounds(number)
        piece, mine = self._source[low:high], segment(high - low)
        row = staged.view(piece.dtype)
        row[: mine.start] = piece[: mine.start]
        row[mine.stop : piece.size] = piece[mine.stop :]
        return 1

    def rows(self, number: int, staged: list[Array], mine: slice) -> list[Array]:
        low, high = self.bounds(number)
        rows = [row.view(self._source.dtype)[mine] for row in staged]
        rows[self._rank] = self._source[low:high][mine]
        return rows


@final
class _InWindow(_Pieces):
    """Of a part of a window: all local ranks see all of it."""

    def __init__(self, parts: list[Array], step: int) -> None:
        super().__init__(parts[0].size, step)
        self._parts = parts

    def stage(self, number: int, staged: Array, segment: Callable[[int], slice]) -> int:
        return self.count

    def rows(self, number: int, staged: list[Array], mine: slice) -> list[Array]:
        low, high = self.bounds(number)
        return [part[low:high][mine] for part in self._parts]
