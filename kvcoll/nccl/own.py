"""Lists of values that lie on several GPUs of one process: summed over NCCL, in their order.

Each GPU adds its segment of all values, left to right, and the store's GPU collects the segments:
so the links of all GPUs carry their share, while copies of all values to one GPU would queue
before its link. The store's GPU is a member, whether it holds a value or not.

Rules of the file: the store's stream says when; streams of the other GPUs wait for it before,
and it waits for them after.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import numpy as np

from ..arrays import wide
from ..gpu.array import DeviceArray
from ..gpu.device import Device, Gpus, Stream
from ..gpu.nccl import Nccl
from .exchange import SCRATCH_BYTES, Clique, Member, add
from .watch import Watch

#: Below, copies to the store's GPU take no longer.
SMALL_BYTES = 256 << 10


@final
class OwnGpus:
    """Sums over the GPUs of this process.

    Parameters
    ----------
    gpus : Gpus
    nccl : Nccl
    home : Device
        Where sums go.
    stream : Stream
        The store's, on `home`.
    watch : Watch
        Gets to know the communicators.
    scratch_bytes, small_bytes : int, optional
    """

    def __init__(
        self,
        gpus: Gpus,
        nccl: Nccl,
        home: Device,
        stream: Stream,
        watch: Watch,
        *,
        scratch_bytes: int = SCRATCH_BYTES,
        small_bytes: int = SMALL_BYTES,
    ) -> None:
        self._gpus, self._nccl, self._home, self._stream = gpus, nccl, home, stream
        self._watch = watch
        self._scratch_bytes, self._small_bytes = scratch_bytes, small_bytes
        self._cliques: dict[tuple[int, ...], tuple[Clique, dict[int, DeviceArray]]] = {}

    def suits(self, values: Sequence[DeviceArray]) -> bool:
        """Say whether `add` is for a list: large, on several GPUs, and all of one dtype."""
        return (
            len(values) > 1
            and values[0].nbytes >= self._small_bytes
            and any(value.device != self._home.index for value in values)
            and all(value.dtype == values[0].dtype for value in values)
        )

    def prepare(self, values: Sequence[DeviceArray]) -> None:
        """Do before the first sum over their GPUs what may fail (ncclCommInitAll, memory).

        Raises
        ------
        CollectiveError
            NCCL does not bring the GPUs together.
        MemoryError
            One of them has no more.
        """
        self._clique_of(values)

    def add(self, values: Sequence[DeviceArray], out: DeviceArray) -> None:
        """Add values left to right; on the streams of their GPUs.

        Parameters
        ----------
        values : sequence of DeviceArray, shape (n,)
            Of one dtype; there for the work that is on the store's stream.
        out : DeviceArray, shape (n,)
            On the store's GPU, of the values' dtype or that in which they are added.
        """
        clique, totals = self._clique_of(values)
        place = {member.device.index: member.rank for member in clique.members}
        owners = [place[value.device] for value in values]
        others = clique.members[1:]
        now = self._stream.record()
        for member in others:
            member.stream.wait(now)
        itemsize = max(values[0].itemsize, wide(out.dtype).itemsize)
        step = clique.step(len(values), itemsize)
        for low in range(0, out.size, step):
            parts = [value[low : low + step] for value in values]
            self._round(clique, totals, owners, parts, out[low : low + step])
        for member in others:
            self._stream.wait(member.stream.record())
        name = f"a push of {len(values)} values on {clique.size} GPUs"
        self._watch.expect(name, self._stream.record())

    def _round(
        self,
        clique: Clique,
        totals: dict[int, DeviceArray],
        owners: Sequence[int],
        values: Sequence[DeviceArray],
        out: DeviceArray,
    ) -> None:
        bounds = clique.bounds(out.size, values[0].itemsize)
        rows = clique.exchange(owners, values, bounds)
        order = tuple(range(len(values)))
        segments: dict[int, DeviceArray] = {}
        for member in clique.members:
            low, high = bounds[member.rank]
            total = out[low:high]
            if member.rank:
                total = totals[member.rank][: total.nbytes].view(out.dtype)
            add(member, order, rows[member.rank], total)
            segments[member.rank] = total
        clique.collect(segments, out, bounds)

    def _clique_of(self, values: Sequence[DeviceArray]) -> tuple[Clique, dict[int, DeviceArray]]:
        """Give the clique of these values' GPUs, the store's first, and memory for its sums."""
        others = sorted({value.device for value in values} - {self._home.index})
        key = (self._home.index, *others)
        if key not in self._cliques:
            devices = [self._gpus.devices[index] for index in key]
            comms = self._nccl.init_all(devices)
            self._watch.also(comms)
            streams = [self._stream, *(device.stream() for device in devices[1:])]
            members = [
                Member(rank, device, stream, comm)
                for rank, (device, stream, comm) in enumerate(
                    zip(devices, streams, comms, strict=True)
                )
            ]
            clique = Clique(self._nccl, members, len(key), scratch_bytes=self._scratch_bytes)
            # At least two values share the scratch: a sum is no longer than half of it.
            totals = {
                m.rank: m.device.empty(self._scratch_bytes // 2, np.uint8, m.stream)
                for m in members[1:]
            }
            self._cliques[key] = clique, totals
        return self._cliques[key]

    def end(self, *, ended: bool) -> None:
        """Let go of NCCL: `ended` where all work is done, else it is aborted."""
        for clique, _ in self._cliques.values():
            for member in clique.members:
                if member.comm is not None and not self._watch.failed:
                    (member.comm.destroy if ended else member.comm.abort)()
        self._cliques.clear()
