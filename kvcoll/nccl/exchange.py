"""Sums over GPUs of one host: each adds its segment of all rows, then gives it to the others.

So `(n - 1) / n` of the bytes go each way twice, as in a ring, but they are added in the order
that `sums` says: ncclAllReduce adds an element in an order that depends on its place. A ring of
two would give the same bits for most dtypes, and carries the same bytes: it is not taken.

Rules of the file: all is put on streams, and nothing waits; every member of a clique makes
the same calls, which depend on sizes and dtypes only; a group of NCCL's holds nothing but
NCCL's calls, so that no thread waits inside it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias, final

import numpy as np

from ..arrays import DType
from ..gpu.array import DeviceArray
from ..gpu.device import Device, Stream
from ..gpu.nccl import Communicator, Nccl
from ..kernels.adding import added_rows
from ..sums import Order

#: Places in an array, in elements: from, to. Of each lane the part that it adds.
Bounds: TypeAlias = "Sequence[tuple[int, int]]"

_ALIGNED_BYTES = 256
SCRATCH_BYTES = 64 << 20


@dataclass(frozen=True)
class Member:
    """One GPU of this process in a clique.

    Attributes
    ----------
    rank : int
        Its place in the clique.
    device : Device
    stream : Stream
        On which its part is done.
    comm : Communicator or None
        None in a clique of one.
    """

    rank: int
    device: Device
    stream: Stream
    comm: Communicator | None


@final
class Clique:
    """GPUs that add together: each its segment, those of the first `lanes` members.

    Parameters
    ----------
    nccl : Nccl or None
        None in a clique of one.
    members : sequence of Member
        Those of this process.
    size : int
        How many members there are in all processes.
    lanes : int, optional
        How many of them add; all, unless told otherwise.
    scratch_bytes : int, optional
        How much memory each member takes, at least 256 a row; larger sums go in as many
        rounds as they need.
    """

    def __init__(
        self,
        nccl: Nccl | None,
        members: Sequence[Member],
        size: int,
        *,
        lanes: int | None = None,
        scratch_bytes: int = SCRATCH_BYTES,
    ) -> None:
        self.members, self.size, self.lanes = members, size, size if lanes is None else lanes
        self._nccl, self._scratch_bytes = nccl, scratch_bytes
        self._scratch = {
            m.rank: m.device.empty(scratch_bytes if size > 1 else 0, np.uint8, m.stream)
            for m in members
        }

    def step(self, n_rows: int, itemsize: int) -> int:
        """Say how many elements one round takes of rows of which each member has a segment."""
        return self._slot_bytes(n_rows) // itemsize * self.lanes

    def bounds(self, n: int, itemsize: int) -> list[tuple[int, int]]:
        """Cut n elements into a segment a lane, at places that are aligned.

        The first ones are equal; the last ones have what is left, or nothing.
        """
        unit = max(1, _ALIGNED_BYTES // itemsize)
        longest = -(-n // (self.lanes * unit)) * unit
        return [(min(n, k * longest), min(n, (k + 1) * longest)) for k in range(self.lanes)]

    def exchange(
        self, owners: Sequence[int], rows: Sequence[DeviceArray | None], bounds: Bounds
    ) -> dict[int, list[DeviceArray]]:
        """Bring each lane its segment of all rows.

        Parameters
        ----------
        owners : sequence of int
            Of each row which member has it.
        rows : sequence of DeviceArray or None
            Of each row what it is, where this process has it; all of one size and dtype.
        bounds : sequence of (int, int)

        Returns
        -------
        dict of int to list of DeviceArray
            Of each lane of this process its segment of each row; on its stream.
        """
        own = next(row for row in rows if row is not None)
        calls: list[Callable[[], None]] = []
        segments: dict[int, list[DeviceArray]] = {}
        for member in self.members:
            for owner, row in zip(owners, rows, strict=True):
                if owner == member.rank and row is not None:
                    calls += _sends(member, row, bounds)
            if member.rank < self.lanes:
                low, high = bounds[member.rank]
                parts = segments[member.rank] = []
                for number, (owner, row) in enumerate(zip(owners, rows, strict=True)):
                    if owner == member.rank and row is not None:
                        parts.append(row[low:high])
                        continue
                    part = self._slot(member, number, len(rows), high - low, own.dtype)
                    parts.append(part)
                    if high > low:
                        calls.append(_receive(member, part, owner))
        self._group(calls)
        return segments

    def give(self, outs: Mapping[int, DeviceArray], bounds: Bounds) -> None:
        """Give each lane's segment of its `out` to that of every member.

        Parameters
        ----------
        outs : mapping of int to DeviceArray
            Of each member of this process.
        bounds : sequence of (int, int)
        """
        calls: list[Callable[[], None]] = []
        for member in self.members:
            out = outs[member.rank]
            if member.rank < self.lanes:
                low, high = bounds[member.rank]
                others = [k for k in range(self.size) if k != member.rank]
                calls += [_send(member, out[low:high], k) for k in others if high > low]
            for lane, (low, high) in enumerate(bounds):
                if lane != member.rank and high > low:
                    calls.append(_receive(member, out[low:high], lane))
        self._group(calls)

    def collect(
        self, segments: Mapping[int, DeviceArray], out: DeviceArray, bounds: Bounds
    ) -> None:
        """Bring the lanes' segments to the first member, all of which are of this process.

        Parameters
        ----------
        segments : mapping of int to DeviceArray
            Of each lane; that of the first lies in `out`.
        out : DeviceArray
            Of the first member.
        bounds : sequence of (int, int)
        """
        first = self.members[0]
        calls: list[Callable[[], None]] = []
        for member in self.members[1 : self.lanes]:
            low, high = bounds[member.rank]
            if high > low:
                calls.append(_send(member, segments[member.rank], first.rank))
                calls.append(_receive(first, out[low:high], member.rank))
        self._group(calls)

    def gather(self, member: Member, row: DeviceArray) -> list[DeviceArray]:
        """Bring every member's row to all (ncclAllGather); small ones, which the scratch holds."""
        if member.comm is None:
            return [row]
        out = self._scratch[member.rank][: self.size * row.nbytes].view(row.dtype)
        member.comm.all_gather(row, out, member.stream)
        n = row.size
        return [out[k * n : (k + 1) * n] for k in range(self.size)]

    def gathers(self, n_bytes: int) -> bool:
        """Say whether `gather` has room for rows of so many bytes."""
        return self.size * n_bytes <= self._scratch_bytes

    def _slot(self, member: Member, number: int, n_rows: int, n: int, dtype: DType) -> DeviceArray:
        start = number * self._slot_bytes(n_rows)
        return self._scratch[member.rank][start : start + n * dtype.itemsize].view(dtype)

    def _slot_bytes(self, n_rows: int) -> int:
        return self._scratch_bytes // n_rows // _ALIGNED_BYTES * _ALIGNED_BYTES

    def _group(self, calls: Sequence[Callable[[], None]]) -> None:
        if calls and self._nccl is not None:
            with self._nccl.group():
                for call in calls:
                    call()


def add(member: Member, order: Order, rows: Sequence[DeviceArray], out: DeviceArray) -> None:
    """Add rows in an order, and round once; on the member's stream."""
    kernel = member.device.compile(added_rows(order, rows[0].dtype, out.dtype))
    kernel.launch(out.size, (*rows, out), member.stream)


def _sends(member: Member, row: DeviceArray, bounds: Bounds) -> list[Callable[[], None]]:
    return [
        _send(member, row[low:high], lane)
        for lane, (low, high) in enumerate(bounds)
        if lane != member.rank and high > low
    ]


def _send(member: Member, part: DeviceArray, peer: int) -> Callable[[], None]:
    comm = member.comm
    assert comm is not None  # a clique of one sends nothing
    return lambda: comm.send(part, peer, member.stream)


def _receive(member: Member, part: DeviceArray, peer: int) -> Callable[[], None]:
    comm = member.comm
    assert comm is not None
    return lambda: comm.receive(part, peer, member.stream)
