"""The way of a rank's segment across hosts: down to the host, by MPI, and up again, in pieces.

Rules of the file: copies down, MPI and copies up each have their own pieces under way, so that
all three are busy at once; the memory between is pinned, and a piece's place is used again only
once its last copy is done. The host thread looks at all of them in turn and waits in none.

MPI and NCCL are never both blocked on each other. MPI's part begins only when the host has
seen, by an event, that the segment was added; NCCL's calls that this needs have been put on
their streams by all ranks of the host before any of them looks at MPI; none of them is inside
a group then; and no kernel of NCCL's waits for a message of MPI's: what gives the sums to the
other GPUs is put on the stream after the last piece has come up.
"""

from __future__ import annotations

from typing import final

from ..arrays import Array, DType
from ..gpu.array import DeviceArray
from ..gpu.device import Device, Event, Gpus, Stream
from ..transport.leg import Leg
from ..transport.waiting import Waiting
from .watch import Watch

_MORE_SLOTS = 2  # one that comes down, and one that goes up


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
    """

    def __init__(
        self, leg: Leg, gpus: Gpus, device: Device, waiting: Waiting, watch: Watch
    ) -> None:
        self._leg, self._device, self._waiting, self._watch = leg, device, waiting, watch
        self._down, self._up = device.stream(), device.stream()
        piece_bytes = leg.sizes.segment_bytes
        self._n_slots = leg.sizes.depth + _MORE_SLOTS
        pinned = gpus.pinned(2 * self._n_slots * piece_bytes)
        self._mine, self._sums = pinned.reshape(2, self._n_slots, piece_bytes)
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
        first, down = self._passed, list[Event]()
        started = finished = 0
        self._passed += len(pieces)
        self._waiting.begin()
        while finished < len(pieces):
            before = len(down) + started + finished
            if len(down) < len(pieces) and len(down) - finished < self._n_slots:
                low, high = pieces[len(down)]
                host = self._host(self._mine, first + len(down), high - low, mine.dtype)
                self._device.download(mine[low:high], host, self._down)
                down.append(self._down.record())
            if started < len(down) and self._may_start(
                started - finished, first + started, down[started]
            ):
                low, high = pieces[started]
                number = first + started
                part = self._host(self._mine, number, high - low, mine.dtype)
                self._leg.start(part, self._host(self._sums, number, high - low, out.dtype))
                started += 1
            if finished < started and self._leg.finish_one():
                low, high = pieces[finished]
                self._bring_up(first + finished, out[low:high])
                finished += 1
            if before == len(down) + started + finished:
                self._watch.check()
                self._watch.look()
                self._waiting.pause()
        on.wait(self._up.record())

    def _may_start(self, under_way: int, number: int, down: Event) -> bool:
        """Say whether the leg has room, the piece is here, and its place for the sum is free."""
        came_up = self._came_up[number % self._n_slots]
        has_room = under_way < self._leg.sizes.depth
        return has_room and down.done() and (came_up is None or came_up.done())

    def _bring_up(self, number: int, out: DeviceArray) -> None:
        host = self._host(self._sums, number, out.size, out.dtype)
        self._device.upload(host, out, self._up)
        self._came_up[number % self._n_slots] = self._up.record()

    def _host(self, slots: Array, number: int, n: int, dtype: DType) -> Array:
        part: Array = slots[number % self._n_slots][: n * dtype.itemsize].view(dtype)
        return part
