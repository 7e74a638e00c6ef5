"""The ranks of one host through memory that they share.

Each rank writes what others need of its array into its own staging memory, adds its
segment of every piece, in the order of the ranks, and all read the sum from a common
place while it is in cache. Into a window, each rank adds its segment where it is to lie
on itself, and copies it from its cache to where it is to lie on the others.

Rules of the file: a rank writes only its own staging, its own segment, of others'
windows too, and its own counters; counters only grow; what a rank may overwrite is
known from the counters alone, as the comments at the waits say.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import final

import numpy as np

from ..arrays import Array, DType, wide
from ..sums import Adder
from ..topology import Topology
from .alarm import Alarm
from .contract import Sink, Transport, Window, copies_to
from .memory import SharedMemory
from .sharing import LINE_BYTES, SharingTransport
from .waiting import Waiting

# Measured with 2 ranks and float32: see scripts/results.
_PIECE_BYTES = 1 << 20
_SMALLEST_PIECE_BYTES = 128 << 10
_SMALL_BYTES = 128 << 10  # of all ranks of the host: each adds them all
_SMALL_WINDOW_BYTES = 12 << 10
# Where sums go to windows nothing waits for a slot, so that pieces may be longer; what is
# added at once is shorter, so that it fits a core's cache with what goes into it.
_LONGER, _SHORTER = 4, 2
_SPINS = 200  # about 20 microseconds; then the core is offered to others


@final
class Counters:
    """A number a rank that only the rank itself raises, and all can wait for.

    Parameters
    ----------
    raw : numpy.ndarray, shape (n_ranks * 64,)
        Shared memory of uint8, zeroed.
    rank : int
    waiting : Waiting
        How to wait.
    spins : int, default 0
        How often to look before.
    """

    def __init__(self, raw: Array, rank: int, waiting: Waiting, spins: int = 0) -> None:
        words = raw.view(np.int64).data
        step = LINE_BYTES // 8
        self._mine = words[rank * step : rank * step + 1]
        others = [k for k in range(raw.size // LINE_BYTES) if k != rank]
        self._others = [words[k * step : k * step + 1] for k in others]
        self._spins, self._pause = spins, waiting.pause
        self.value = 0

    def raise_one(self) -> None:
        """Count one more on this rank."""
        self.value += 1
        self._mine[0] = self.value

    def await_all(self) -> None:
        """Wait until every rank has counted as far as this one."""
        value = self.value
        for other in self._others:
            spins = self._spins
            while other[0] < value:
                if spins:
                    spins -= 1
                else:
                    self._pause()


@final
class HostTransport(SharingTransport):
    """Sums over the ranks of one host through shared memory.

    Parameters
    ----------
    topology : Topology
        Of all ranks, which are on one host.
    memory : SharedMemory
        Of `bytes_for` bytes, mapped by all ranks.
    beside : Transport
        Another transport over all ranks, for broadcasts.
    share : callable
        Gives that many bytes of further shared memory, or None, on all ranks alike.
    waiting : Waiting or None, default None
        How to wait for the other ranks; None for as quick as can be.
    alarm : Alarm or None, default None
        What ends that waiting before time, where `waiting` is None.
    tree : bool, default False
        Add in a binary tree over the ranks.
    piece_bytes : int, optional
        As for `bytes_for`.
    small_bytes : int, optional
        Up to how many bytes of all ranks of the host together each rank adds them all.

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
        share: Callable[[int], SharedMemory | None],
        *,
        waiting: Waiting | None = None,
        alarm: Alarm | None = None,
        tree: bool = False,
        piece_bytes: int = _PIECE_BYTES,
        small_bytes: int = _SMALL_BYTES,
    ) -> None:
        super().__init__(topology, beside, share)
        self._piece_bytes = piece_bytes
        lines = min(small_bytes // self._size, piece_bytes) // LINE_BYTES
        self._small_bytes = small_bytes = lines * LINE_BYTES
        spins = 0 if waiting or self._size > (os.cpu_count() or 1) else _SPINS
        waiting = waiting or Waiting.restless(alarm)
        lines = LINE_BYTES * self._size
        raw = memory.raw
        self._ready = Counters(raw[:lines], self._rank, waiting, spins)
        self._added = Counters(raw[lines : 2 * lines], self._rank, waiting, spins)
        slots = raw[2 * lines :].reshape(2 * (self._size + 1), piece_bytes)
        self._staging = slots[2:].reshape(self._size, 2, piece_bytes)
        self._sums = slots[:2]
        self._flip = 0
        rows = range(self._size)
        self._adder = Adder([rows], max(piece_bytes, 4 * small_bytes), tree=tree)
        self._private = np.empty(small_bytes, np.uint8)

    @staticmethod
    def bytes_for(size: int, piece_bytes: int = _PIECE_BYTES) -> int:
        """Say how much memory the ranks must share.

        Parameters
        ----------
        size : int
            How many ranks.
        piece_bytes : int, optional
            How much is summed at once; a multiple of 64 times the number of ranks is best.
        """
        return 2 * LINE_BYTES * size + 2 * (size + 1) * piece_bytes

    def all_reduce(self, source: Array, out: Array) -> None:
        """Sum through shared memory; see `Transport.all_reduce`."""
        if source.nbytes <= self._small_bytes:
            self._sum_small(source, out)
            return
        self.all_reduce_pieces(source, out.dtype, copies_to(out))

    def all_reduce_pieces(self, source: Array, dtype: DType, sink: Sink) -> None:
        """Sum through shared memory; see `Transport.all_reduce_pieces`."""
        if source.nbytes <= self._small_bytes:
            total = self._private[: source.size * dtype.itemsize].view(dtype)
            self.all_reduce(source, total)
            sink(0, source.size, total)
            return
        step = self._piece_for(source.nbytes) // wide(source.dtype).itemsize
        self._stage(source[:step])
        for start in range(0, source.size, step):
            stop = min(start + step, source.size)
            # When all are ready, all have staged this piece and used the sum before last.
            self._ready.await_all()
            flip = self._flip
            total, mine = self._total(flip, stop - start, dtype)
            rows = [staged[flip].view(source.dtype)[mine] for staged in self._staging]
            rows[self._rank] = source[start:stop][mine]
            self._adder.add(rows, total[mine])
            self._added.raise_one()
            self._flip = 1 - flip
            if stop < source.size:
                # Into the other slot: whoever is ready for this piece has read that one.
                self._stage(source[stop : stop + step])
            self._added.await_all()
            sink(start, stop, total)

    def all_reduce_window(self, window: Window, start: int, stop: int, sink: Sink) -> None:
        """Sum what lies in shared memory already; see `Transport.all_reduce_window`."""
        n_bytes = (stop - start) * window.own.dtype.itemsize
        if not window.is_shared or n_bytes <= self._small_bytes:
            self.all_reduce_pieces(window.own[start:stop], window.own.dtype, sink)
            return
        source = [row[start:stop] for row in window.rows]
        dtype, n = window.own.dtype, stop - start
        step = self._piece_for(n_bytes) // wide(dtype).itemsize
        self._ready.raise_one()
        self._ready.await_all()  # all arrays are complete, and all sums of before are used
        for low in range(0, n, step):
            high = min(low + step, n)
            total, mine = self._total(self._flip, high - low, dtype)
            self._adder.add([row[low:high][mine] for row in source], total[mine])
            self._added.raise_one()
            self._flip = 1 - self._flip
            # When all have added, all have used the sum in the other slot.
            self._added.await_all()
            sink(low, high, total)

    def all_reduce_to_window(
        self, source: Array | None, out: Window, start: int, stop: int
    ) -> None:
        """Sum where the ranks see it; see `Transport.all_reduce_to_window`."""
        own = out.rows[out.place][start:stop]
        if source is None:
            source = own
        n_bytes, is_plain = source.nbytes, source.dtype == own.dtype
        if n_bytes <= self._small_bytes or not is_plain or not out.is_shared:
            self.all_reduce(source, own)
            return
        outs = [row[start:stop] for row in out.rows]
        sources = outs.copy()
        sources[self._rank] = source
        n, step = own.size, _LONGER * self._piece_bytes // wide(own.dtype).itemsize
        self._show(source, own, 0, min(step, n))
        for low in range(0, n, step):
            high = min(low + step, n)
            # When all are ready, all show this piece, and leave my segment of it to me.
            self._ready.await_all()
            self._add_to_all(sources, outs, low, high)
            if high < n:
                self._show(source, own, high, min(high + step, n))
        self._added.raise_one()
        self._added.await_all()  # all segments are here

    def all_reduce_windows(self, source: Window, out: Window, start: int, stop: int) -> None:
        """Sum from window to window; see `Transport.all_reduce_windows`."""
        own = out.own[start:stop]
        if own.nbytes <= _SMALL_WINDOW_BYTES:
            self.all_reduce(source.own[start:stop], own)
            return
        if not source.is_shared or not out.is_shared:
            super().all_reduce_windows(source, out, start, stop)
            return
        sources = [row[start:stop] for row in source.rows]
        outs = [row[start:stop] for row in out.rows]
        self._ready.raise_one()
        self._ready.await_all()  # all arrays are complete, and nobody reads its `out`
        self._add_to_all(sources, outs, 0, own.size)
        self._added.raise_one()
        self._added.await_all()  # all segments are here, and all arrays have been read

    def _piece_for(self, n_bytes: int) -> int:
        """Cut small arrays into a few pieces, too, so that one is staged while one is added."""
        return min(self._piece_bytes, max(_SMALLEST_PIECE_BYTES, n_bytes // 4))

    def _total(self, flip: int, n: int, dtype: DType) -> tuple[Array, slice]:
        """Find where a piece's sum goes, and which part of it this rank adds."""
        total = self._sums[flip][: n * dtype.itemsize].view(dtype)
        return total, self._segment(n)

    def _segment(self, n: int) -> slice:
        """Find which part of a piece this rank adds."""
        return slice(n * self._rank // self._size, n * (self._rank + 1) // self._size)

    def _stage(self, piece: Array) -> None:
        """Copy what other ranks add of this piece, and say that it is there."""
        mine = self._segment(piece.size)
        staged = self._staging[self._rank][self._flip].view(piece.dtype)
        staged[: mine.start] = piece[: mine.start]
        staged[mine.stop : piece.size] = piece[mine.stop :]
        self._ready.raise_one()

    def _show(self, source: Array, own: Array, low: int, high: int) -> None:
        """Copy what other ranks add of a piece to where its sum is to lie, for them to see."""
        if source is not own:
            mine = self._segment(high - low)
            own[low : low + mine.start] = source[low : low + mine.start]
            own[low + mine.stop : high] = source[low + mine.stop : high]
        self._ready.raise_one()

    def _add_to_all(self, sources: list[Array], outs: list[Array], low: int, high: int) -> None:
        """Add this rank's segment, and give it to all ranks while it is in this core's cache."""
        mine = self._segment(high - low)
        own = outs[self._rank]
        others = [out for rank, out in enumerate(outs) if rank != self._rank]
        step = self._piece_bytes // _SHORTER // wide(own.dtype).itemsize
        stop = low + mine.stop
        for start in range(low + mine.start, stop, step):
            part = slice(start, min(start + step, stop))
            total = own[part]
            self._adder.add([source[part] for source in sources], total)
            for other in others:
                other[part] = total

    def _sum_small(self, source: Array, out: Array) -> None:
        """Let every rank add everything: one wait and no second copy."""
        if source.size == 0:
            return
        flip, n_bytes = self._flip, source.nbytes
        self._staging[self._rank][flip][:n_bytes] = source.view(np.uint8)
        self._ready.raise_one()
        self._ready.await_all()  # who has counted has read the slot that comes next
        self._adder.add(self._staging[:, flip, :n_bytes].view(source.dtype), out)
        self._flip = 1 - flip
