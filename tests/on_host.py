"""A transport over GPUs as one of the host's: arrays go up first, and then down."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

import numpy as np
import numpy.typing as npt

from kvcoll.gpu.array import DeviceArray, as_any, as_device
from kvcoll.gpu.device import Gpus
from kvcoll.gpu.staging import Staging
from kvcoll.nccl.transport import GpuTransport
from kvcoll.transport.contract import Exchange, Sink, Transport, Window

Array = npt.NDArray[Any]


@final
class OnHost(Transport):
    """What the shared suite of transports asks, asked of a transport over GPUs."""

    def __init__(self, own: GpuTransport, gpus: Gpus) -> None:
        self.topology, self.own = own.topology, own
        self._staging = Staging(gpus, own.device, own.stream)

    def all_reduce(self, source: Array, out: Array) -> None:
        given = self.up(source)
        to = given if out is source else self.up(out)
        self.own.all_reduce(as_any(given), as_any(to))
        if out is not source:
            assert self.down(given).tobytes() == source.tobytes(), "a push changed its source"
        out[...] = self.down(to)

    def all_reduce_pieces(self, source: Array, dtype: np.dtype[Any], sink: Sink) -> None:
        given, pieces = self.up(source), list[tuple[int, int, DeviceArray]]()

        def keep(start: int, stop: int, total: Array) -> None:
            of_piece = as_device(total)
            copy = self.own.device.empty(of_piece.size, dtype, self.own.stream)
            self.own.device.copy(of_piece, copy, self.own.stream)
            pieces.append((start, stop, copy))

        self.own.all_reduce_pieces(as_any(given), dtype, keep)
        for start, stop, copy in pieces:
            sink(start, stop, self.down(copy))

    def window(self, private: Array) -> Window:
        return self.own.window(private)

    def all_reduce_window(self, window: Window, start: int, stop: int, sink: Sink) -> None:
        self.all_reduce_pieces(window.own[start:stop], window.own.dtype, sink)

    def all_reduce_to_window(
        self, source: Array | None, out: Window, start: int, stop: int
    ) -> None:
        to = self.up(out.own)
        given = None if source is None else as_any(self.up(source))
        self.own.all_reduce_to_window(given, Window((as_any(to),)), start, stop)
        out.own[...] = self.down(to)

    def all_reduce_windows(self, source: Window, out: Window, start: int, stop: int) -> None:
        given, to = self.up(source.own), self.up(out.own)
        windows = Window((as_any(given),)), Window((as_any(to),))
        self.own.all_reduce_windows(*windows, start, stop)
        out.own[...] = self.down(to)

    def broadcast(self, buffer: Array, root: int = 0) -> None:
        given = self.up(buffer)
        self.own.broadcast(as_any(given), root)
        buffer[...] = self.down(given)

    def start_all_to_all(
        self, sent: Mapping[int, Array], received: Mapping[int, Array]
    ) -> Exchange:
        return self.own.start_all_to_all(sent, received)

    def abort(self, why: str) -> None:
        self.own.abort(why)

    def close(self) -> None:
        self.own.close()

    def up(self, values: Array) -> DeviceArray:
        """Copy to the GPU, at a place that suits the dtype and nothing longer."""
        room = self.own.device.empty(values.size + 1, values.dtype, self.own.stream)
        array = room[1:].reshape(values.shape)
        self._staging.upload(values, array)
        return array

    def down(self, array: DeviceArray) -> Array:
        values = np.empty(array.shape, array.dtype)
        self._staging.download(array, values)
        return values
