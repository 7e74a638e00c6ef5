"""The leg between hosts of an MPI that takes memory of GPUs, where kernels add what it brings.

Rules of the file: MPI gets an address only once the host has seen, by an event, that the work
which made the bytes is done, and a kernel reads what MPI has brought only once MPI has said that
it is complete; until then the memory is exposed, and no work is put on a stream that touches it.
Whoever calls a leg has made its GPU the current one, for as long as a segment is under way.
Segments, parts, tags and the order of a sum are those of `DirectLeg`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, final

from ..arrays import Array
from ..gpu.array import DeviceArray, as_device
from ..gpu.device import Device, Event, Exposed
from ..kernels.adding import added_rows
from ..sums import order_of
from ..transport.leg import LegSizes, MpiLeg, parts_of
from ..transport.losses import Losses

if TYPE_CHECKING:
    from mpi4py import MPI

_SCATTER, _GATHER = 3, 4  # tags
_ALIGNED_BYTES = 256

#: Of each rank what it gets, or gives.
Parts: TypeAlias = "Sequence[tuple[int, DeviceArray]]"


@dataclass(slots=True)
class _Segment:
    mine: DeviceArray
    out: DeviceArray
    rows: list[DeviceArray]
    is_whole: bool  # every peer gets all of it, and adds all of it
    requests: list[MPI.Request]
    exposed: list[Exposed]
    added: Event | None = None


@final
class GpuLeg(MpiLeg):
    """Sends each peer its part, adds the own one, and sends the sum to each, all on the GPU.

    Parameters
    ----------
    comm : mpi4py.MPI.Intracomm
        Of the peers, by host.
    mpi : module
        ``mpi4py.MPI``.
    device : Device
        In whose memory the segments are, taken by `Device.plain`.
    sizes : LegSizes
    losses : Losses
        What an error of MPI means.
    tree : bool, default False
        Add in a binary tree over the peers.
    """

    def __init__(
        self,
        comm: MPI.Intracomm,
        mpi: Any,
        device: Device,
        sizes: LegSizes,
        losses: Losses,
        *,
        tree: bool = False,
    ) -> None:
        super().__init__(mpi, losses)
        self.sizes = sizes
        self._comm, self._mpi, self._test_all = comm, mpi, mpi.Request.Testall
        self._rank, self._size, self._device = comm.rank, comm.size, device
        self._order = order_of([[k] for k in range(comm.size)], tree=tree)
        self._stream = device.stream()
        # From the next peer on: not all to the first at once.
        self._others = [(self._rank + k) % self._size for k in range(1, self._size)]
        self._row_bytes = -(-sizes.row_bytes(self._size) // _ALIGNED_BYTES) * _ALIGNED_BYTES
        block_bytes = len(self._others) * self._row_bytes
        memory = device.plain(sizes.depth * block_bytes)
        self._free = [memory[k * block_bytes :][:block_bytes] for k in range(sizes.depth)]
        self._used: deque[DeviceArray] = deque()
        self._scattering: deque[_Segment] = deque()
        self._adding: deque[_Segment] = deque()
        self._gathering: deque[_Segment] = deque()

    def start(self, mine: Array, out: Array) -> None:
        """Send each peer its part; see `Leg.start`. The host has seen that `mine` is there."""
        given, to = as_device(mine), as_device(out)
        room = self._free.pop()
        self._used.append(room)
        # What is rounded in the sum has fewer bytes then: worth the second phase.
        whole = given.itemsize == to.itemsize and given.nbytes <= self.sizes.whole_bytes
        n = given.size
        parts = [slice(0, n)] * self._size if whole else parts_of(n, self._size)
        own = given[parts[self._rank]]
        rows = [own] * self._size
        for place, k in enumerate(self._others):
            row = room[place * self._row_bytes :][: own.nbytes]
            rows[k] = row.view(given.dtype)
        segment = _Segment(given, to, rows, whole, [], [])
        received = [(k, rows[k]) for k in self._others]
        sent = [(k, given[parts[k]]) for k in self._others]
        self._scattering.append(segment)  # before: what fails halfway has begun to receive
        with self._losses:
            self._exchange(segment, received, sent, _SCATTER)

    def _finish_one(self) -> bool:
        while self._scattering and self._is_through(self._scattering[0]):
            self._add(self._scattering[0])
            self._adding.append(self._scattering.popleft())
        while self._adding and _is_added(self._adding[0]):
            self._give_out(self._adding[0])
            self._gathering.append(self._adding.popleft())
        if self._gathering and self._is_through(self._gathering[0]):
            self._gathering.popleft()
            self._free.append(self._used.popleft())
            return True
        return False

    def _is_through(self, segment: _Segment) -> bool:
        """Say whether MPI is done with a segment's memory, which then is the GPU's again."""
        if not self._test_all(segment.requests):
            return False
        for exposed in segment.exposed:
            exposed.withdraw()
        segment.exposed = []
        return True

    def _add(self, segment: _Segment) -> None:
        """Put on the stream what adds the own part."""
        out = self._own(segment)
        kernel = self._device.compile(added_rows(self._order, segment.mine.dtype, out.dtype))
        kernel.launch(out.size, (*segment.rows, out), self._stream)
        segment.added = self._stream.record()

    def _give_out(self, segment: _Segment) -> None:
        """Begin to give out the own part, which the host has seen to be there."""
        segment.requests = []
        if not segment.is_whole:
            out, own = segment.out, self._own(segment)
            parts = parts_of(out.size, self._size)
            received = [(k, out[parts[k]]) for k in self._others]
            self._exchange(segment, received, [(k, own) for k in self._others], _GATHER)

    def _own(self, segment: _Segment) -> DeviceArray:
        out = segment.out
        return out if segment.is_whole else out[parts_of(out.size, self._size)[self._rank]]

    def _exchange(self, segment: _Segment, received: Parts, sent: Parts, tag: int) -> None:
        """Begin to receive and to send; the segment has each request as soon as it is there."""
        ways = ((self._comm.Irecv, received, True), (self._comm.Isend, sent, False))
        for start_one, parts, to_write in ways:
            for rank, part in parts:
                for message in self._messages(part):
                    exposed = self._device.expose(message, to_write=to_write)
                    segment.exposed.append(exposed)
                    at = self._mpi.buffer.fromaddress(exposed.address, exposed.n_bytes)
                    segment.requests.append(start_one([at, self._mpi.BYTE], rank, tag))

    def _messages(self, part: DeviceArray) -> list[DeviceArray]:
        raw = part.view("u1")
        step = self.sizes.message_bytes
        return [raw[low : low + step] for low in range(0, raw.size, step)]


def _is_added(segment: _Segment) -> bool:
    return segment.added is not None and segment.added.done()
