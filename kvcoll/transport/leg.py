"""The leg between hosts: what carries one rank's part of a sum across, several parts at once.

Rules of the file: a leg knows its peers, one a host, and flat arrays; it never waits. All
peers start the same segments in the same order, and a segment's sum is that of its
elements in the order of the peers, whatever else is under way.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

import numpy as np

from ..arrays import Array
from ..sums import Adder

if TYPE_CHECKING:
    from mpi4py import MPI

_SCATTER, _GATHER = 3, 4  # tags; others use the communicator with tags of their own
# Longer messages ask first (Open MPI's btl_tcp_eager_limit is 64 KiB), and question and answer
# queue behind megabytes of data in both directions: 40 MB took 410 to 550 ms instead of 335.
MESSAGE_BYTES = 60 << 10
# What is under way fills the wire while a rank naps or adds, but not the queues of a switch:
# there 4 MB a host were 10 % slower than 1 MB, with 3 peers that send to one.
_SEGMENT_BYTES = 4 * MESSAGE_BYTES
_SMALLEST_PART_BYTES = 16 << 10
_DEPTH = 4
# Up to so many bytes of all peers everything goes to everyone: more bytes, but one phase.
_SMALL_BYTES = 16 << 10


class Leg(ABC):
    """Sums over the peers of one rank, one on each host.

    Attributes
    ----------
    segment_bytes : int
        The longest segment, in bytes of the dtype in which sums are taken.
    depth : int
        How many segments may be under way at once.
    """

    segment_bytes: int
    depth: int

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


@dataclass(slots=True)
class _Segment:
    mine: Array
    out: Array
    rows: list[Array]
    requests: list[MPI.Request]
    is_whole: bool  # every peer gets all of it, and adds all of it


@final
class DirectLeg(Leg):
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
        Of one row a peer; its rows must hold `row_bytes_for` bytes.
    segment_bytes, message_bytes : int
        The longest segment, and the longest message.
    """

    def __init__(
        self,
        comm: MPI.Intracomm,
        mpi: Any,
        adder: Adder,
        *,
        segment_bytes: int,
        message_bytes: int = MESSAGE_BYTES,
    ) -> None:
        self.segment_bytes = segment_bytes
        self._comm, self._byte, self._test_all = comm, mpi.BYTE, mpi.Request.Testall
        self._adder, self._message_bytes = adder, message_bytes
        self._rank, self._size = comm.rank, comm.size
        self.depth = depth_for(self._size)
        # From the next peer on: not all to the first at once.
        self._others = [(self._rank + k) % self._size for k in range(1, self._size)]
        n_16 = -(-self.row_bytes_for(self._size, segment_bytes) // 16)
        # Of 16-byte elements, so that rows are aligned for every dtype.
        self._free = [np.empty((self._size, n_16), np.complex128) for _ in range(self.depth)]
        self._used: deque[Array] = deque()
        self._scattering: deque[_Segment] = deque()
        self._gathering: deque[_Segment] = deque()

    @staticmethod
    def row_bytes_for(size: int, segment_bytes: int) -> int:
        """Say how long the longest row is that one of `size` peers adds."""
        if size == 2:
            return segment_bytes
        return max(-(-segment_bytes // size) + 32, _SMALL_BYTES // size)

    def start(self, mine: Array, out: Array) -> None:
        """Send each peer its part; see `Leg.start`."""
        rows = self._free.pop()
        self._used.append(rows)
        # What is rounded in the sum has fewer bytes then: worth the second phase.
        if self._size == 2:
            whole = mine.itemsize == out.itemsize
        else:
            whole = mine.nbytes * self._size <= _SMALL_BYTES
        parts = [slice(0, mine.size)] * self._size if whole else self._parts(mine.size)
        own = parts[self._rank]
        n = own.stop - own.start
        views = [row.view(mine.dtype)[:n] for row in rows]
        views[self._rank] = mine[own]
        received = [(k, views[k]) for k in self._others]
        sent = [(k, mine[parts[k]]) for k in self._others]
        requests = self._exchange(received, sent, _SCATTER)
        self._scattering.append(_Segment(mine, out, views, requests, whole))

    def finish_one(self) -> bool:
        """Add what has come, and send it on; see `Leg.finish_one`."""
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
        """Say which part of a segment each peer adds."""
        bounds = [n * k // self._size for k in range(self._size + 1)]
        return [slice(bounds[k], bounds[k + 1]) for k in range(self._size)]

    def _exchange(
        self, received: list[tuple[int, Array]], sent: list[tuple[int, Array]], tag: int
    ) -> list[MPI.Request]:
        """Post messages: to and from each peer its first, then its second ones."""
        byte, step = self._byte, self._message_bytes
        receive, send = self._comm.Irecv, self._comm.Isend
        into = [(k, array.view(np.uint8)) for k, array in received]
        requests = []
        for start in range(0, max((raw.size for _, raw in into), default=0), step):
            for k, raw in into:
                if start < raw.size:
                    requests.append(receive([raw[start : start + step], byte], k, tag))
        out_of = [(k, array.view(np.uint8)) for k, array in sent]
        for start in range(0, max((raw.size for _, raw in out_of), default=0), step):
            for k, raw in out_of:
                if start < raw.size:
                    requests.append(send([raw[start : start + step], byte], k, tag))
        return requests


def segment_bytes_for(size: int, lanes: int = 1) -> int:
    """Choose how much one of `lanes` ranks of a host carries at once to `size` hosts."""
    most = max(_SEGMENT_BYTES, size * _SMALLEST_PART_BYTES)
    return min(most, max(_SMALLEST_PART_BYTES, 4 * _SEGMENT_BYTES // lanes // 64 * 64))


def depth_for(size: int) -> int:
    """Say how many segments are under way: in two phases each is for twice as long."""
    return _DEPTH if size == 2 else 2 * _DEPTH
