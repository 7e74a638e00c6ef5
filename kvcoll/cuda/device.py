"""Devices, streams, memory and kernels by CuPy 13 or newer.

Rules of the file: every call that is about a device makes it the current one for its duration,
as CUDA wants it; the caller's current device and stream stay what they are. CuPy's dtypes are
not asked: memory is bytes with a dtype of NumPy's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, final

import numpy as np
import numpy.typing as npt

from ..errors import DeviceError
from ..gpu.array import DeviceArray
from ..gpu.device import Device, Event, Exposed, HostArray, Stream
from ..gpu.kernel import Argument, Kernel, KernelSource

_SUCCESS, _NOT_READY, _PEER_IS_ENABLED = 0, 600, 704  # cudaError_t
_BLOCK_THREADS = 256
_MOST_BLOCKS = 1 << 20
# As g++ and NumPy compute: each operation rounds by itself, subnormal numbers stay. CuPy's own
# RawKernel flushes them to zero whatever it is told (-ftz=true), so that it is not used.
_OPTIONS = ("--std=c++17", "--fmad=false", "--ftz=false", "--prec-div=true", "--prec-sqrt=true")


@final
class CupyEvent(Event):
    """A ``cupy.cuda.Event``."""

    def __init__(self, cupy: Any, event: Any) -> None:
        self._runtime, self.event = cupy.cuda.runtime, event

    def done(self) -> bool:
        """Ask the driver (cudaEventQuery); see `Event.done`."""
        code = self._runtime.eventQuery(self.event.ptr)
        if code in (_SUCCESS, _NOT_READY):
            return bool(code == _SUCCESS)
        raise DeviceError(f"work on a GPU has failed: {self._runtime.CUDARuntimeError(code)}")

    def synchronize(self) -> None:
        """Wait (cudaEventSynchronize)."""
        try:
            self.event.synchronize()
        except self._runtime.CUDARuntimeError as error:
            raise DeviceError(f"work on a GPU has failed: {error}") from error


@final
class CupyStream(Stream):
    """A ``cupy.cuda.Stream``."""

    def __init__(self, cupy: Any, stream: Any, device: int) -> None:
        self._cupy, self.stream = cupy, stream
        self.device, self.handle = device, stream.ptr

    def record(self) -> Event:
        """Record an event (cudaEventRecord); see `Stream.record`."""
        with self._cupy.cuda.Device(self.device):
            event = self._cupy.cuda.Event(disable_timing=True)
            event.record(self.stream)
        return CupyEvent(self._cupy, event)

    def wait(self, event: Event) -> None:
        """Let later work wait (cudaStreamWaitEvent); see `Stream.wait`."""
        if not isinstance(event, CupyEvent):
            raise TypeError(f"an event of CuPy's is needed, got {type(event).__name__}")
        with self._cupy.cuda.Device(self.device):
            self.stream.wait_event(event.event)

    def synchronize(self) -> None:
        """Wait for what is on the stream now."""
        self.record().synchronize()


@final
class CupyExposed(Exposed):
    """CUDA needs to know nothing of it."""

    def __init__(self, array: DeviceArray) -> None:
        self.address, self.n_bytes, self._array = array.address, array.nbytes, array

    def withdraw(self) -> None:
        """Do nothing."""


@final
class CupyDevice(Device):
    """One GPU.

    Parameters
    ----------
    cupy : module
    index : int
    used : callable
        Gets its number when work is put on it.
    """

    def __init__(self, cupy: Any, index: int, used: Callable[[int], object]) -> None:
        self._cupy, self._runtime, self._used = cupy, cupy.cuda.runtime, used
        self.index = index
        properties = self._runtime.getDeviceProperties(index)
        self.uuid = _uuid_text(properties["uuid"])
        self.name = properties["name"].decode(errors="replace")
        self._kernels: dict[KernelSource, Kernel] = {}
        self._peers: set[int] = {index}

    def stream(self) -> Stream:
        """Make a stream (cudaStreamCreateWithFlags); see `Device.stream`."""
        self._used(self.index)
        with self.here():
            return CupyStream(self._cupy, self._cupy.cuda.Stream(non_blocking=True), self.index)

    def current_stream(self) -> Stream:
        """Give CuPy's current stream of this thread."""
        own = self._cupy.cuda.get_current_stream(self.index)
        return CupyStream(self._cupy, own, self.index)

    def empty(self, shape: tuple[int, ...] | int, dtype: npt.DTypeLike, on: Stream) -> DeviceArray:
        """Take memory from CuPy's pool; see `Device.empty`."""
        shape = shape if isinstance(shape, tuple) else (shape,)
        n_bytes = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        with self.here(), _stream_of(on):
            memory = self._cupy.cuda.alloc(n_bytes)
        return DeviceArray(memory.ptr, np.dtype(dtype), shape, self.index, memory)

    def plain(self, n_bytes: int) -> DeviceArray:
        """Take memory of no pool (cudaMalloc); see `Device.plain`."""
        try:
            with self.here():
                memory = self._cupy.cuda.Memory(n_bytes)
        except self._runtime.CUDARuntimeError as error:  # a pool would have made it a MemoryError
            raise MemoryError(f"{self.name} has no {n_bytes} bytes more: {error}") from error
        return DeviceArray(memory.ptr, np.dtype(np.uint8), (n_bytes,), self.index, memory)

    def expose(self, array: DeviceArray, *, to_write: bool) -> Exposed:
        """Give the address."""
        return CupyExposed(array)

    def copy(self, source: DeviceArray, out: DeviceArray, on: Stream) -> None:
        """Copy on the device, or from another (cudaMemcpyPeerAsync)."""
        _check_bytes(source.nbytes, out.nbytes)
        with self.here():
            if source.device == self.index:
                kind = self._runtime.memcpyDeviceToDevice
                self._runtime.memcpyAsync(out.address, source.address, out.nbytes, kind, on.handle)
                return
            self._see(source.device)
            self._runtime.memcpyPeerAsync(
                out.address, self.index, source.address, source.device, out.nbytes, on.handle
            )

    def upload(self, source: HostArray, out: DeviceArray, on: Stream) -> None:
        """Copy from pinned memory (cudaMemcpyAsync)."""
        _check_bytes(source.nbytes, out.nbytes)
        with self.here():
            kind = self._runtime.memcpyHostToDevice
            self._runtime.memcpyAsync(out.address, source.ctypes.data, out.nbytes, kind, on.handle)

    def download(self, source: DeviceArray, out: HostArray, on: Stream) -> None:
        """Copy to pinned memory (cudaMemcpyAsync)."""
        _check_bytes(source.nbytes, out.nbytes)
        with self.here():
            kind = self._runtime.memcpyDeviceToHost
            self._runtime.memcpyAsync(out.ctypes.data, source.address, out.nbytes, kind, on.handle)

    def zero(self, out: DeviceArray, on: Stream) -> None:
        """Set bytes to 0 (cudaMemsetAsync)."""
        with self.here():
            self._runtime.memsetAsync(out.address, 0, out.nbytes, on.handle)

    def compile(self, source: KernelSource) -> Kernel:
        """Compile by nvrtc, once; see `Device.compile`."""
        kernel = self._kernels.get(source)
        if kernel is None:
            with self.here():
                kernel = self._kernels[source] = CupyKernel(self._cupy, self.index, source)
        return kernel

    def here(self) -> Any:
        """Make it current (cudaSetDevice); the one of before is so again at the end."""
        return self._cupy.cuda.Device(self.index)

    def use(self) -> None:
        """Make it current (cudaSetDevice, which brings its context into the thread)."""
        self._runtime.setDevice(self.index)

    def _see(self, other: int) -> None:
        """Let copies from another GPU go directly, where the hardware can."""
        if other in self._peers:
            return
        self._peers.add(other)
        if self._runtime.deviceCanAccessPeer(self.index, other):
            try:
                self._runtime.deviceEnablePeerAccess(other)
            except self._runtime.CUDARuntimeError as error:
                if error.status != _PEER_IS_ENABLED:  # NCCL or the user may have done it
                    raise


@final
class CupyKernel(Kernel):
    """A kernel, compiled by nvrtc for the current device."""

    def __init__(self, cupy: Any, device: int, source: KernelSource) -> None:
        self._cupy, self._device = cupy, device
        compiler = cupy.cuda.compiler
        try:
            compiled, _ = compiler.compile_using_nvrtc(source.for_cuda(), _OPTIONS)
        except compiler.CompileException as error:
            raise DeviceError(f"the kernel {source.name} does not compile: {error}") from error
        self._module = cupy.cuda.function.Module()  # the function lives as long as it does
        self._module.load(compiled)
        self._function = self._module.get_function(source.name)

    def launch(
        self,
        n: int,
        arguments: Sequence[Argument],
        on: Stream,
        *,
        reads: Sequence[DeviceArray] = (),
        writes: Sequence[DeviceArray] = (),
    ) -> None:
        """Launch a thread an element, or a loop of them (cuLaunchKernel); see `Kernel.launch`."""
        if n == 0:
            return
        given = [np.uint64(a.address) if isinstance(a, DeviceArray) else a for a in arguments]
        blocks = min(-(-n // _BLOCK_THREADS), _MOST_BLOCKS)
        with self._cupy.cuda.Device(self._device):
            self._function(
                (blocks,), (_BLOCK_THREADS,), (np.int64(n), *given), stream=_stream_of(on)
            )


def _stream_of(on: Stream) -> Any:
    if not isinstance(on, CupyStream):
        raise TypeError(f"a stream of CuPy's is needed, got {type(on).__name__}")
    return on.stream


def _check_bytes(source: int, out: int) -> None:
    if source != out:
        raise ValueError(f"a copy of {source} bytes into {out}")


def _uuid_text(raw: bytes) -> str:
    """Write a UUID as nvidia-smi does, without ``GPU-``."""
    digits = bytes(raw)[:16].hex()
    return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))
