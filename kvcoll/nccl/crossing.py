"""The way of a rank's segment across hosts: to where MPI reads, by MPI, and back, in pieces.

MPI's memory is pinned memory of the host, or where this MPI takes it (`mpi_takes`) memory of the
GPU which is taken for that alone: so MPI registers the same few megabytes once, and a copy within
the GPU is next to nothing. Rules of the file: copies down, MPI and copies up each have their own
pieces under way, so that all three are busy at once; a piece's place is used again only once its
last copy is done. The host thread looks at all of them in turn and waits in none; the GPU is its
current one meanwhile, whatever the caller's is.

MPI and NCCL are never both blocked on each other. MPI's part begins only when the host has
seen, by an event, that the segment was added; NCCL's calls that this needs have been put on
their streams by all ranks of the host before any of them looks at MPI; none of them is inside
a group then; and no kernel of NCCL's waits for a message of MPI's: what gives the sums to the
other GPUs is put on the stream after the last piece has come up. The same holds where MPI reads
the GPU: it gets an address only once the host has seen that what lies there is complete, and its
own copies wait for nothing of NCCL's.
"""

from __future__ import annotations

from typing import final

from ..arrays import Array, DType
from ..gpu.array import DeviceArray, as_any, as_device
from ..gpu.device import Device, Event, Gpus, Stream
from ..transport.leg import Leg
from ..transport.waiting import Waiting
from .watch import Watch

_MORE_SLOTS = 2  # one that comes down, and one that goes up
_MINE, _SUMS = 0, 1
_cut: list[Crossing] = []  # ended in the midst of a sum: MPI may still write to their memory


@final
class Crossing:
    """Sums of a rank's segment over the peers of other hosts.

    Parameters
    ----------
    leg : Leg
        Over one rank of each host.
    gpus : Gpus
    device : Device
        Where the segments are.
    waiting : Waiting
        How the host passes the time between two looks.
    watch : Watch
        Is asked while there is no progress.
    direct : bool, default False
        Whether the leg's MPI reads and writes memory of the GPU, and not pinned memory.

    Attributes
    ----------
    direct : bool
    """

    def __init__(
        self,
        leg: Leg,
        gpus: Gpus,
        device: Device,
        waiting: Waiting,
        watch: Watch,
        *,
        direct: bool = False,
    ) -> None:
        self._leg, self._device, self._waiting, self._watch = leg, device, waiting, watch
        self.direct = direct
        self._down, self._up = device.stream(), device.stream()
        self._piece_bytes = leg.sizes.segment_bytes
        self._n_slots = leg.sizes.depth + _MORE_SLOTS
        n_bytes = 2 * self._n_slots * self._piece_bytes
        self._memory = as_any(device.plain(n_bytes)) if direct else gpus.pinned(n_bytes)
        self._came_up: list[Event | None] = [None] * self._n_slots
        self._passed = 0  # pieces of all segments so far

    def sum(self, mine: DeviceArray, out: DeviceArray, ready: Event, on: Stream) -> None:
        """Sum a segment; returns when its last piece is on its way up.

        Parameters
        ----------
        mine : DeviceArray, shape (n,)
            Of the dtype in which sums are taken.
        out : DeviceArray, shape (n,)
            Of the sum's dtype; may be `mine`.
        ready : Event
            After it `mine` is there and `out` may be written.
        on : Stream
            Work that is put on it later finds the sum in `out`.
        """
        self._down.wait(ready)
        self._up.wait(ready)
        step = self._leg.sizes.segment_bytes // mine.itemsize
        pieces = [(k, min(k + step, mine.size)) for k in range(0, mine.size, step)]
        try:
            with self._device.here():  # not for copies alone: each call of MPI may move messages on
                self._carry(mine, out, pieces)
        except BaseException:
            _cut.append(self)
            self._leg.cut()
            raise
        on.wait(self._up.record())

    def _carry(self, mine: DeviceArray, out: DeviceArray, pieces: list[tuple[int, int]]) -> None:
        first, down = self._passed, list[Event]()
        started = finished = 0
        self._passed += len(pieces)
        self._waiting.begin()
        while finished < len(pieces):
            before = len(down) + started + finished
            if len(down) < len(pieces) and len(down) - finished < self._n_slots:
                low, high = pieces[len(down)]
                self._bring_down(first + len(down), mine[low:high])
                down.append(self._down.record())
            if started < len(down) and self._may_start(
                started - finished, first + started, down[started]
            ):
                low, high = pieces[started]
                number = first + started
                part = self._place(_MINE, number, high - low, mine.dtype)
                self._leg.start(part, self._place(_SUMS, number, high - low, out.dtype))
                started += 1
            if finished < started and self._leg.finish_one():
                low, high = pieces[finished]
                self._bring_up(first + finished, out[low:high])
                finished += 1
            if before == len(down) + started + finished:
                self._watch.check()
                self._watch.look()
                self._waiting.pause()

    def _may_start(self, under_way: int, number: int, down: Event) -> bool:
        """Say whether the leg has room, the piece is here, and its place for the sum is free."""
        came_up = self._came_up[number % self._n_slots]
        has_room = under_way < self._leg.sizes.depth
        return has_room and down.done() and (came_up is None or came_up.done())

    def _bring_down(self, number: int, mine: DeviceArray) -> None:
        place = self._place(_MINE, number, mine.size, mine.dtype)
        if self.direct:
            self._device.copy(mine, as_device(place), self._down)
        else:
            self._device.download(mine, place, self._down)

    def _bring_up(self, number: int, out: DeviceArray) -> None:
        place = self._place(_SUMS, number, out.size, out.dtype)
        if self.direct:
            self._device.copy(as_device(place), out, self._up)
        else:
            self._device.upload(place, out, self._up)
        self._came_up[number % self._n_slots] = self._up.record()

    def _place(self, which: int, number: int, n: int, dtype: DType) -> Array:
        start = (which * self._n_slots + number % self._n_slots) * self._piece_bytes
        part: Array = self._memory[start : start + n * dtype.itemsize].view(dtype)
        return part
