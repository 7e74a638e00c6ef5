"""Copies between any memory of the host and a GPU, through little pinned memory.

Rules of the file: large arrays go in pieces through two buffers, so that the host fills or
empties one while the GPU copies the other.
"""

from __future__ import annotations

from typing import Any, final

import numpy as np

from .array import DeviceArray
from .device import Device, Event, Gpus, HostArray, Stream
from .patience import Patience, Trusting

_PIECE_BYTES = 8 << 20


@final
class Staging:
    """Two pinned buffers of one stream.

    Parameters
    ----------
    gpus : Gpus
    device : Device
    stream : Stream
        Of that device.
    piece_bytes : int, optional
        The size of a buffer.
    patience : Patience, optional
        How to wait.
    """

    def __init__(
        self,
        gpus: Gpus,
        device: Device,
        stream: Stream,
        piece_bytes: int = _PIECE_BYTES,
        *,
        patience: Patience | None = None,
    ) -> None:
        self.patience = Trusting() if patience is None else patience
        self._gpus, self._device, self._stream = gpus, device, stream
        self._piece_bytes = piece_bytes
        self._buffers: list[HostArray] = []
        self._busy: list[Event | None] = [None, None]
        self._next = 0

    def upload(self, source: HostArray, out: DeviceArray) -> None:
        """Copy to the GPU, casting if need be; returns once the source may be changed.

        Parameters
        ----------
        source : numpy.ndarray
            Of any layout, and of the shape of `out`.
        out : DeviceArray
        """
        given, flat = _flat(source), out.reshape(-1)
        step = self._piece_bytes // out.itemsize
        for start in range(0, out.size, step):
            number = self._take()
            n = min(step, out.size - start)
            piece = self._buffers[number][: n * out.itemsize].view(out.dtype)
            with np.errstate(all="ignore"):  # what overflows becomes infinite, on all ranks
                np.copyto(piece, given[start : start + n], casting="unsafe")
            self._device.upload(piece, flat[start : start + n], self._stream)
            self._busy[number] = self._stream.record()

    def download(self, source: DeviceArray, out: HostArray) -> None:
        """Copy from the GPU, casting if need be; returns once all is there.

        Parameters
        ----------
        source : DeviceArray
        out : numpy.ndarray
            Of any layout, and of the shape of the source.
        """
        flat = source.reshape(-1)
        target = out.reshape(-1) if out.flags.c_contiguous else np.empty(out.size, out.dtype)
        step = self._piece_bytes // source.itemsize
        waiting: list[tuple[int, int, int]] = []
        for start in range(0, source.size, step):
            number = self._take()
            n = min(step, source.size - start)
            piece = self._buffers[number][: n * source.itemsize].view(source.dtype)
            self._device.download(flat[start : start + n], piece, self._stream)
            self._busy[number] = self._stream.record()
            waiting.append((number, start, n))
            if len(waiting) == len(self._buffers):
                self._empty_into(target, source.dtype, *waiting.pop(0))
        for one in waiting:
            self._empty_into(target, source.dtype, *one)
        if not out.flags.c_contiguous:
            np.copyto(out, target.reshape(out.shape))

    def _empty_into(
        self, target: HostArray, dtype: np.dtype[Any], number: int, start: int, n: int
    ) -> None:
        busy = self._busy[number]
        if busy is not None:
            self.patience.wait(busy)
        self._busy[number] = None
        piece = self._buffers[number][: n * dtype.itemsize].view(dtype)
        with np.errstate(all="ignore"):
            np.copyto(target[start : start + n], piece, casting="unsafe")

    def _take(self) -> int:
        """Give the number of a buffer that the GPU does not use any more."""
        if not self._buffers:
            self._buffers = [self._gpus.pinned(self._piece_bytes) for _ in range(2)]
        number, self._next = self._next, 1 - self._next
        busy = self._busy[number]
        if busy is not None:
            self.patience.wait(busy)
            self._busy[number] = None
        return number


def _flat(array: HostArray) -> HostArray:
    return array.reshape(-1)  # a copy where it is not contiguous
