"""The leg between hosts: what carries one rank's part of a sum across, several parts at once.

Rules of the file: a leg knows its peers, one a host, and flat arrays; it never waits. All
peers start the same segments in the same order, and a segment's sum is that of its
elements in the order of the peers, whatever else is under way.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, final

import numpy as np

from ..arrays import Array
from ..sums import Adder
from .losses import Losses

if TYPE_CHECKING:
    from mpi4py import MPI

_SCATTER, _GATHER = 3, 4  # tags; others use the communicator with tags of their own
# Longer messages ask first (Open MPI's btl_tcp_eager_limit is 64 KiB), and question and answer
# queue behind megabytes of data in both directions: 40 MB took 410 to 550 ms instead of 335.
_MESSAGE_BYTES = 60 << 10
# What is under way fills the wire while a rank naps or adds, but not the queues of a switch:
# there 4 MB a host were 10 % slower than 1 MB, with 3 peers that send to one.
_SEGMENT_BYTES = 4 * _MESSAGE_BYTES
_SMALLEST_PART_BYTES = 16 << 10
_DEPTH = 4
_SMALL_BYTES = 16 << 10
# On one machine there is no wire to fill, and each message costs: with Open MPI short ones
# took four times as long.
_MEMORY_MESSAGE_BYTES, _MEMORY_SCRATCH_BYTES, _MEMORY_DEPTH = 2 << 20, 64 << 20, 1
_GPU_SEGMENT_BYTES, _SMALLEST_GPU_PART_BYTES, _GPU_DEPTH = 1 << 20, 64 << 10, 8


@dataclass(frozen=True)
class LegSizes:
    """How a leg cuts what it carries; the same on all peers.

    Attributes
    ----------
    segment_bytes : int
        The longest segment, in bytes of the dtype in which sums are taken.
    message_bytes : int
        The longest message.
    depth : int
        How many segments are under way at once.
    whole_bytes : int
        Up to how many bytes of one peer everything goes to everyone, and everyone adds it
        all: more bytes, but one phase instead of two. What is rounded goes in two.
    """

    segment_bytes: int
    message_bytes: int
    depth: int
    whole_bytes: int

    @classmethod
    def between_hosts(cls, size: int, lanes: int = 1) -> LegSizes:
        """Choose for one of `lanes` ranks of each of `size` hosts."""
        most = max(_SEGMENT_BYTES, size * _SMALLEST_PART_BYTES)
        segment_bytes = max(_SMALLEST_PART_BYTES, 4 * _SEGMENT_BYTES // lanes // 64 * 64)
        segment_bytes = min(most, segment_bytes)
        if size == 2:  # everything is as many bytes as both halves
            return cls(segment_bytes, _MESSAGE_BYTES, _DEPTH, segment_bytes)
        # In two phases each segment is under way for twice as long.
        return cls(segment_bytes, _MESSAGE_BYTES, 2 * _DEPTH, _SMALL_BYTES // size)

    @classmethod
    def in_memory(cls, size: int) -> LegSizes:
        """Choose for `size` ranks of one host."""
        part_bytes = min(_MEMORY_MESSAGE_BYTES, _MEMORY_SCRATCH_BYTES // size)
        return cls(size * part_bytes, _MEMORY_MESSAGE_BYTES, _MEMORY_DEPTH, 0)

    @classmethod
    def on_gpus(cls, size: int) -> LegSizes:
        """Choose for one rank of each of `size` hosts, whose MPI reads and writes its GPU.

        Not measured: long enough that a message costs less than its bytes, and short enough that
        several are under way in what a round brings.
        """
        segment_bytes = max(_GPU_SEGMENT_BYTES, size * _SMALLEST_GPU_PART_BYTES)
        whole_bytes = segment_bytes if size == 2 else _SMALL_BYTES // size
        return cls(segment_bytes, segment_bytes, _GPU_DEPTH, whole_bytes)

    def row_bytes(self, size: int) -> int:
        """Say how long the longest row is that one of `size` peers adds."""
        return max(-(-self.segment_bytes // size) + 32, self.whole_bytes)


class Leg(ABC):
    """Sums over the peers of one rank, one on each host.

    Attributes
    ----------
    sizes : LegSizes
        A segment is at most that long, and at most so many are under way.
    """

    sizes: LegSizes

    @abstractmethod
    def start(self, mine: Array, out: Array) -> None:
        """Begin to sum a segment.

        Parameters
        ----------
        mine : numpy.ndarray, shape (n,)
            Contiguous; of the dtype of `out`, or the dtype in which its sums are taken.
            It must stay as it is until the segment is finished.
        out : numpy.ndarray, shape (n,)
            Contiguous; of any contents until then. May be `mine` itself.
        """

    @abstractmethod
    def finish_one(self) -> bool:
        """Push everything on; say whether the oldest segment is complete, and forget it."""

    @abstractmethod
    def cut(self) -> None:
        """Keep for ever what MPI may still write to: a sum has ended in its midst."""


class MpiLeg(Leg):
    """A leg whose messages are MPI's: what its errors mean, and what outlives them.

    Parameters
    ----------
    mpi : module
        ``mpi4py.MPI``.
    losses : Losses
    """

    def __init__(self, mpi: Any, losses: Losses) -> None:
        self._losses, self._error = losses, mpi.Exception

    def finish_one(self) -> bool:
        """Add what has come, and send it on; see `Leg.finish_one`."""
        try:
            return self._finish_one()
        except self._error as error:
            self.cut()
            raise self._losses.meaning(error) from error

    def cut(self) -> None:
        """Hold itself, with all segments that are under way."""
        self._losses.hold(self)

    @abstractmethod
    def _finish_one(self) -> bool:
        """Do as `finish_one`, and raise what MPI raises."""


@dataclass(slots=True)
class _Segment:
    mine: Array
    out: Array
    rows: list[Array]
    requests: list[MPI.Request]
    is_whole: bool  # every peer gets all of it, and adds all of it


@final
class DirectLeg(MpiLeg):
    """Sends each peer its part, adds the own one, and sends the sum to each.

    So ``2 (n - 1) / n`` of a segment's bytes cross the wire each way, as in the best
    all-reduce (Rabenseifner 2004), in two phases. Two peers send each other everything
    instead: as many bytes, in one phase.

    Parameters
    ----------
    comm : mpi4py.MPI.Intracomm
        Of the peers, by host.
    mpi : module
        ``mpi4py.MPI``.
    adder : Adder
        Of one row a peer; its rows must hold `LegSizes.row_bytes`.
    sizes : LegSizes
    losses : Losses
        What an error of MPI means.
    """

    def __init__(
        self, comm: MPI.Intracomm, mpi: Any, adder: Adder, sizes: LegSizes, losses: Losses
    ) -> None:
        super().__init__(mpi, losses)
        self.sizes = sizes
        self._comm, self._byte, self._test_all = comm, mpi.BYTE, mpi.Request.Testall
        self._adder = adder
        self._rank, self._size = comm.rank, comm.size
        # From the next peer on: not all to the first at once.
        self._others = [(self._rank + k) % self._size for k in range(1, self._size)]
        n_16 = -(-sizes.row_bytes(self._size) // 16)
        # Of 16-byte elements, so that rows are aligned for every dtype.
        self._free = [np.empty((self._size, n_16), np.complex128) for _ in range(sizes.depth)]
        self._used: deque[Array] = deque()
        self._scattering: deque[_Segment] = deque()
        self._gathering: deque[_Segment] = deque()

    def start(self, mine: Array, out: Array) -> None:
        """Send each peer its part; see `Leg.start`."""
        rows = self._free.pop()
        self._used.append(rows)
        # What is rounded in the sum has fewer bytes then: worth the second phase.
        whole = mine.itemsize == out.itemsize and mine.nbytes <= self.sizes.whole_bytes
        parts = [slice(0, mine.size)] * self._size if whole else self._parts(mine.size)
        own = parts[self._rank]
        n = own.stop - own.start
        views = [row.view(mine.dtype)[:n] for row in rows]
        views[self._rank] = mine[own]
        received = [(k, views[k]) for k in self._others]
        sent = [(k, mine[parts[k]]) for k in self._others]
        with self._losses:
            requests = self._exchange(received, sent, _SCATTER)
        self._scattering.append(_Segment(mine, out, views, requests, whole))

    def _finish_one(self) -> bool:
        while self._scattering and self._test_all(self._scattering[0].requests):
            self._gathering.append(self._added(self._scattering.popleft()))
        if self._gathering and self._test_all(self._gathering[0].requests):
            self._gathering.popleft()
            self._free.append(self._used.popleft())
            return True
        return False

    def _added(self, segment: _Segment) -> _Segment:
        """Add the own part, and begin to give it out."""
        out = segment.out
        if segment.is_whole:
            self._adder.add(segment.rows, out)
            segment.requests = []
            return segment
        parts = self._parts(out.size)
        mine = out[parts[self._rank]]
        self._adder.add(segment.rows, mine)
        received = [(k, out[parts[k]]) for k in self._others]
        segment.requests = self._exchange(received, [(k, mine) for k in self._others], _GATHER)
        return segment

    def _parts(self, n: int) -> list[slice]:
        return parts_of(n, self._size)

    def _exchange(
        self, received: list[tuple[int, Array]], sent: list[tuple[int, Array]], tag: int
    ) -> list[MPI.Request]:
        n_bytes = self.sizes.message_bytes
        return post(self._comm, self._byte, received, sent, tag, n_bytes, self._losses)


def parts_of(n: int, size: int) -> list[slice]:
    """Say which part of a segment of n elements each of `size` peers adds."""
    bounds = [n * k // size for k in range(size + 1)]
    return [slice(low, high) for low, high in pairwise(bounds)]


def post(
    comm: MPI.Intracomm,
    byte: MPI.Datatype,
    received: Iterable[tuple[int, Array]],
    sent: Iterable[tuple[int, Array]],
    tag: int,
    message_bytes: int,
    losses: Losses,
) -> list[MPI.Request]:
    """Begin to receive and to send contiguous arrays in messages of at most `message_bytes`.

    To and from every rank the first message goes first, then every second one. What has begun
    when one fails keeps its memory.
    """
    requests: list[MPI.Request] = []
    ways: list[tuple[Any, Iterable[tuple[int, Array]]]]
    ways = [(comm.Irecv, received), (comm.Isend, sent)]
    try:
        for start_one, arrays in ways:
            for rank, message in _messages(arrays, message_bytes):
                requests.append(start_one([message, byte], rank, tag))
    except BaseException:
        losses.hold(requests)
        raise
    return requests


def _messages(
    arrays: Iterable[tuple[int, Array]], message_bytes: int
) -> Iterator[tuple[int, Array]]:
    """Cut arrays into messages: the first of every rank, then every second one."""
    raws = [(rank, array.view(np.uint8)) for rank, array in arrays]
    for low in range(0, max((raw.size for _, raw in raws), default=0), message_bytes):
        for rank, raw in raws:
            if low < raw.size:
                yield rank, raw[low : low + message_bytes]
