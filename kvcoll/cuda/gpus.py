"""The GPUs that this process sees, by CuPy; arrays of users', of CuPy or whatever speaks DLPack."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, final

import numpy as np

from ..arrays import SupportsDLPack
from ..dlpack import DeviceTensor, device_tensor
from ..errors import ArrayError, DeviceError, DTypeMismatchError
from ..gpu.array import DeviceArray
from ..gpu.device import Device, Gpus, HostArray, Stream
from ..gpu.door import import_cupy
from .device import CupyDevice, CupyEvent, CupyStream

_CUDA_KINDS = (2, 13)  # kDLCUDA and kDLCUDAManaged
_OLD_DRIVER = 35  # cudaErrorInsufficientDriver: also where there is no driver
_NO_DEVICE = 100


@final
class CupyGpus(Gpus):
    """The GPUs that CUDA shows this process.

    Raises
    ------
    MissingDependencyError
        CuPy is not installed.
    DeviceError
        There is no driver, or one that is older than CuPy's CUDA, or no GPU.
    """

    def __init__(self) -> None:
        self._cupy = import_cupy()
        runtime = self._cupy.cuda.runtime
        self.driver_version: int = runtime.driverGetVersion()
        try:
            count = runtime.getDeviceCount()
        except runtime.CUDARuntimeError as error:
            raise DeviceError(_why_none(error, self.driver_version, self._cupy)) from error
        self._home = 0
        self._beside: dict[tuple[int, int], Stream] = {}  # by device, and the stream that waits
        self.devices: Sequence[Device] = [
            CupyDevice(self._cupy, k, self._take_note) for k in range(count)
        ]

    def pinned(self, n_bytes: int) -> HostArray:
        """Take pinned memory from CuPy's pool."""
        # All GPUs can use it, but taking it opens the current one, at some 500 MB of its memory:
        # that must not be GPU 0 for the ranks of all others.
        with self._cupy.cuda.Device(self._home):
            memory = self._cupy.cuda.alloc_pinned_memory(max(1, n_bytes))
        return np.frombuffer(memory, np.uint8, n_bytes)

    def is_on_gpu(self, value: object) -> bool:
        """Ask the array itself (DLPack)."""
        return isinstance(value, SupportsDLPack) and value.__dlpack_device__()[0] in _CUDA_KINDS

    def adopt(self, value: object, on: Stream, *, to_write: bool = False) -> DeviceArray:
        """View an array, after what its library does with it; see `Gpus.adopt`."""
        if isinstance(value, self._cupy.ndarray):
            device = value.device.id
            on.wait(self.devices[device].current_stream().record())
            array = DeviceArray(value.data.ptr, value.dtype, value.shape, device, value)
            is_packed, strides, is_read_only = value.flags.c_contiguous, value.strides, False
        elif isinstance(value, SupportsDLPack):
            tensor = self._tensor(value, on)
            array = DeviceArray(tensor.address, tensor.dtype, tensor.shape, tensor.device, tensor)
            is_packed, strides = _is_packed(tensor), tensor.strides
            is_read_only = tensor.is_read_only
        else:
            raise ArrayError(f"no array on a GPU: {type(value).__name__}")
        if to_write and not (is_packed and not is_read_only):
            why = "read-only" if is_read_only else "not contiguous"
            raise ArrayError(f"the output {array!r} is {why}: give one that can be written")
        return array if is_packed else self._packed(array, strides, on)

    def addresses(
        self,
        values: Sequence[object],
        device: int,
        shapes: Sequence[tuple[int, ...]],
        dtypes: Sequence[np.dtype[Any]],
        on: Stream,
    ) -> list[int] | None:
        """Ask CuPy's arrays, in few calls for all; see `Gpus.addresses`."""
        if set(map(type, values)) != {self._cupy.ndarray}:
            return None
        arrays: Sequence[Any] = values
        fit = [a.shape for a in arrays] == shapes and [a.dtype for a in arrays] == dtypes
        if not fit or {a.device.id for a in arrays} != {device}:
            return None
        if not all(a.flags.c_contiguous for a in arrays):
            return None
        on.wait(self.devices[device].current_stream().record())
        return [a.data.ptr for a in arrays]

    def give_back(self, value: object, on: Stream) -> None:
        """Let the current stream of the array's library wait; see `Gpus.give_back`."""
        event = on.record()
        if isinstance(value, self._cupy.ndarray):
            self.devices[value.device.id].current_stream().wait(event)
            return
        torch: Any = sys.modules.get("torch")
        if torch is not None and isinstance(value, torch.Tensor) and isinstance(event, CupyEvent):
            handle = torch.cuda.current_stream(value.device).cuda_stream
            with self._cupy.cuda.Device(value.device.index):
                self._cupy.cuda.runtime.streamWaitEvent(handle, event.event.ptr)
            return
        event.synchronize()

    def lend(self, array: DeviceArray) -> Any:
        """Give a ``cupy.ndarray``; see `Gpus.lend`."""
        try:
            return self._viewed(array, array.dtype, None)
        except (TypeError, ValueError) as error:
            raise DTypeMismatchError(
                f"CuPy {self._cupy.__version__} has no arrays of {array.dtype.name}: {error}"
            ) from error

    def _take_note(self, device: int) -> None:
        self._home = device

    def _viewed(self, array: DeviceArray, dtype: Any, strides: tuple[int, ...] | None) -> Any:
        cuda = self._cupy.cuda
        # Where strides go backwards or apart, CuPy asks for no more than the address.
        memory = cuda.UnownedMemory(array.address, array.nbytes, array, array.device)
        pointer = cuda.MemoryPointer(memory, 0)
        return self._cupy.ndarray(array.shape, dtype, memptr=pointer, strides=strides)

    def _tensor(self, value: SupportsDLPack, on: Stream) -> DeviceTensor:
        """Ask an array's library for it, on a stream of the array's own GPU."""
        index = value.__dlpack_device__()[1]
        own = self._stream_there(index, on)
        with self.devices[index].here():  # torch hands out nothing of another GPU
            tensor = device_tensor(value, own.handle)
        if own is not on:
            on.wait(own.record())
        return tensor

    def _packed(self, array: DeviceArray, strides: tuple[int, ...], on: Stream) -> DeviceArray:
        """Copy an array that is not contiguous, on its GPU; its dtype need not be CuPy's."""
        words: Any = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64, 16: np.complex128}
        dtype = words[array.itemsize]
        own = self._stream_there(array.device, on)
        if not isinstance(own, CupyStream):
            raise TypeError(f"a stream of CuPy's is needed, got {type(own).__name__}")
        out = self.devices[array.device].empty(array.shape, array.dtype, own)
        with self._cupy.cuda.Device(array.device), own.stream:
            self._viewed(out, dtype, None)[...] = self._viewed(array, dtype, strides)
        if own is not on:
            on.wait(own.record())
        return out

    def _stream_there(self, index: int, on: Stream) -> Stream:
        """Give a stream of a GPU: `on`, or on another GPU one that comes after it.

        So what was taken of that GPU's memory for work on `on`, and is free again, is not
        written by others before that work has read it.
        """
        if index == on.device:
            return on
        key = index, on.handle
        if key not in self._beside:
            self._beside[key] = self.devices[index].stream()
        own = self._beside[key]
        own.wait(on.record())
        return own


def _is_packed(tensor: DeviceTensor) -> bool:
    step = tensor.dtype.itemsize
    for extent, stride in zip(reversed(tensor.shape), reversed(tensor.strides), strict=True):
        if extent != 1 and stride != step:
            return 0 in tensor.shape
        step *= extent
    return True


def _why_none(error: Any, driver: int, cupy: Any) -> str:
    needed = cupy.cuda.runtime.runtimeGetVersion()
    if error.status == _OLD_DRIVER and driver == 0:
        return "there is no NVIDIA driver here: GPU stores need one; 'dist_sync' needs none"
    if error.status == _OLD_DRIVER:
        return (
            f"the NVIDIA driver knows CUDA up to {_dotted(driver)}, and CuPy here is for "
            f"{_dotted(needed)}: update the driver, or install the CuPy that fits (cupy-cuda12x)"
        )
    if error.status == _NO_DEVICE:
        return "CUDA shows no GPU here: nvidia-smi and CUDA_VISIBLE_DEVICES say why"
    return f"CUDA does not work here: {error}"


def _dotted(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"
