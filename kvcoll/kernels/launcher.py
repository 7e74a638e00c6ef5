"""Launches of kernels with a table, on one stream.

Rules of the file: a table's memory is written again only once the kernel that reads it is
done; the host waits only where many launches are ahead of the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, final

import numpy as np

from ..arrays import Array
from ..gpu.array import DeviceArray
from ..gpu.device import Device, Event, Gpus, Stream
from ..gpu.kernel import KernelSource
from .table import n_lanes

_SMALLEST_BYTES = 1 << 12
_MOST_SLOTS = 32


@dataclass
class _Slot:
    """A table on the host, where it is written, and on the device, where it is read."""

    host: Array
    device: DeviceArray
    read: Event | None = None


class Stage(NamedTuple):
    """One kernel, how many elements of its index it needs, and what lies at its addresses."""

    source: KernelSource
    n: int
    reads: Sequence[DeviceArray]
    writes: Sequence[DeviceArray]


@final
class Launcher:
    """Puts kernels with tables on a stream.

    Parameters
    ----------
    gpus : Gpus
    device : Device
    stream : Stream
        Of that device.
    """

    def __init__(self, gpus: Gpus, device: Device, stream: Stream) -> None:
        self._gpus, self._device, self._stream = gpus, device, stream
        self._slots: dict[int, list[_Slot]] = {}  # by size, those used longest ago first
        self.n_launches = 0

    def launch(
        self,
        source: KernelSource,
        table: Array,
        *,
        reads: Sequence[DeviceArray],
        writes: Sequence[DeviceArray],
        more: Sequence[int] = (),
        n: int | None = None,
    ) -> None:
        """Run a kernel over the pieces that a table names; nothing where it has no row.

        Parameters
        ----------
        source : KernelSource
            Of the parameters `TABLE_PARAMETERS`.
        table : numpy.ndarray of int64, shape (n, n_words)
        reads, writes : sequence of DeviceArray
            What lies at its addresses.
        more : sequence of int
            Words that follow the table's last row.
        n : int, optional
            How many elements of its index the kernel needs; by default as its tiles need.
        """
        if len(table):
            n = n_lanes(table) if n is None else n
            self.launch_in_turn([Stage(source, n, reads, writes)], table, more)

    def launch_in_turn(
        self, stages: Sequence[Stage], table: Array, more: Sequence[int] = ()
    ) -> None:
        """Run kernels one after the other, all with one table; see `launch`.

        One that does not compile raises before any of them has run.
        """
        kernels = [self._device.compile(stage.source) for stage in stages]
        words = table.reshape(-1)
        slot = self._slot(8 * (words.size + len(more)))
        room = slot.host.view(np.int64)
        room[: words.size] = words
        n_words = words.size + len(more)
        if more:
            room[words.size : n_words] = more
        used = slot.device[: 8 * n_words]
        self._device.upload(slot.host[: 8 * n_words], used, self._stream)
        arguments = (used.view(np.int64), np.int64(len(table)))
        for kernel, (_, n, reads, writes) in zip(kernels, stages, strict=True):
            kernel.launch(n, arguments, self._stream, reads=reads, writes=writes)
        slot.read = self._stream.record()
        self.n_launches += len(stages)

    def _slot(self, n_bytes: int) -> _Slot:
        size = max(_SMALLEST_BYTES, 1 << (n_bytes - 1).bit_length())
        slots = self._slots.setdefault(size, [])
        if slots and len(slots) == _MOST_SLOTS and slots[0].read is not None:
            slots[0].read.synchronize()
        if slots and (slots[0].read is None or slots[0].read.done()):
            slot = slots.pop(0)
        else:
            device = self._device.empty(size, np.uint8, self._stream)
            slot = _Slot(self._gpus.pinned(size), device)
        slots.append(slot)
        return slot
