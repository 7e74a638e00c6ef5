"""A CuPy whose GPUs are the host: what `kvcoll/cuda` calls of it, done at once in its memory.

It lets the ports run that the fakes of `fake_gpu` and `fake_nccl` stand in for. It enforces what
CUDA and CuPy do of a call: memory that a call is given lies on the device which it is for, events
are recorded on streams of their own device, a stream is entered on its own device only, and
kernels are the text that nvrtc would get, compiled by g++. Work is done at once; which stream has
waited for which is kept by clocks, so that a test can ask. Its NCCL joins GPUs of one process, or
those of several by files in the folder that FAKE_CUPY_FOLDER names.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace, TracebackType
from typing import Any, TypeAlias, final

import numpy as np
import numpy.typing as npt
import pytest
from dlpack_object import CUDA, Foreign
from host_kernel import library_of
from numpy.lib.mixins import NDArrayOperatorsMixin

from kvcoll import on_gpus
from kvcoll.cuda import find
from kvcoll.errors import DeviceError

Place: TypeAlias = "tuple[int, int]"  # of a stream: its device, and its handle
Clock: TypeAlias = "dict[Place, int]"

FOLDER_VARIABLE = "FAKE_CUPY_FOLDER"
NULL = 0
_LINE_BYTES = 256
_LIMIT_S = 60.0
# CUDA's words, for one thread that goes over all elements.
_AS_CUDA = """
#define __global__
#define __device__
struct kv_extent { unsigned x; };
static const kv_extent blockIdx = {0}, threadIdx = {0}, blockDim = {1}, gridDim = {1};
"""
_ARGUMENTS: dict[str, Any] = {
    "b1": ctypes.c_bool,
    "i1": ctypes.c_int8,
    "u1": ctypes.c_uint8,
    "i2": ctypes.c_int16,
    "u2": ctypes.c_uint16,
    "i4": ctypes.c_int32,
    "u4": ctypes.c_uint32,
    "i8": ctypes.c_int64,
    "u8": ctypes.c_uint64,
    "f4": ctypes.c_float,
    "f8": ctypes.c_double,
}


class CUDARuntimeError(RuntimeError):
    """An error of CUDA's, by its number."""

    def __init__(self, status: int) -> None:
        super().__init__(f"cudaError {status}")
        self.status = status


class NcclError(RuntimeError):
    """An error of NCCL's."""


class CompileError(Exception):
    """What nvrtc says of a source."""


class BrokenRuleError(AssertionError):
    """What CUDA would refuse, or do wrong in silence."""


def check(holds: object, what: str) -> None:
    if not holds:
        raise BrokenRuleError(what)


@final
class Memory:
    """Memory of one device, or of the host."""

    def __init__(self, world: World, n_bytes: int, device: int | None) -> None:
        whole = np.zeros(n_bytes + _LINE_BYTES, np.uint8)
        whole[: 1 << 16] = 0xC5
        offset = -int(whole.ctypes.data) % _LINE_BYTES
        self.raw = whole[offset : offset + n_bytes]
        self.ptr = int(whole.ctypes.data) + offset
        self.size, self.device_id = n_bytes, device
        world.spans[self.ptr] = self.ptr + n_bytes, device
        weakref.finalize(whole, world.spans.pop, self.ptr).atexit = False


@final
class World:
    """The devices of a process.

    Parameters
    ----------
    n_devices : int
    folder : Path, optional
        Where ranks of several processes find one another.

    Attributes
    ----------
    driver, runtime : int
        The newest CUDA that the driver knows, and the one that CuPy is for.
    no_devices_status : int
        The error of cudaGetDeviceCount, if it is not 0.
    nccl_version : int
    clocks : dict
        For each stream how much of the work of each is before its next.
    done : list of (stream, clock)
        All work, and what was before it.
    n_host_waits : int
        How often the host waited for an event.
    """

    def __init__(self, n_devices: int, folder: Path | None = None) -> None:
        self.n_devices, self.folder = n_devices, folder
        self.driver, self.runtime, self.no_devices_status = 13000, 12090, 0
        self.nccl_version = 23003
        self.spans: dict[int, tuple[int, int | None]] = {}
        self.clocks: dict[Place, Clock] = {}
        self.done: list[tuple[Place, Clock]] = []
        self.n_host_waits = 0
        self.events: weakref.WeakValueDictionary[int, Event] = weakref.WeakValueDictionary()
        self.opened: list[Any] = []  # communicators
        self.n_allocated = 0  # from CuPy's pool
        self._handles = 1000
        self._own = threading.local()
        self.devices_of_streams: dict[int, int] = {}

    @property
    def current(self) -> int:
        """The current device of this thread."""
        return int(vars(self._own).get("device", 0))

    @current.setter
    def current(self, device: int) -> None:
        check(0 <= device < self.n_devices, f"there is no device {device}")
        self._own.device = device

    def current_streams(self) -> dict[int, list[Stream]]:
        made: dict[int, list[Stream]] = vars(self._own).setdefault("streams", {})
        return made

    def new_handle(self) -> int:
        self._handles += 16
        return self._handles

    def stream_of(self, handle: int) -> Place:
        """Give the stream that a handle means now: that of 0 is the current device's."""
        return (self.current, NULL) if handle == NULL else (self.devices_of_streams[handle], handle)

    def work(self, handle: int) -> None:
        """Count work on a stream, which must be of the current device."""
        own = self.stream_of(handle)
        check(own[0] == self.current, f"a stream of device {own[0]} is used on {self.current}")
        clock = self.clocks.setdefault(own, {})
        clock[own] = clock.get(own, 0) + 1
        self.done.append((own, dict(clock)))

    def wait(self, handle: int, event: int) -> None:
        """Let a stream wait; it may be of any device."""
        clock = self.clocks.setdefault(self.stream_of(handle), {})
        for stream, tick in self.events[event].clock.items():
            clock[stream] = max(clock.get(stream, 0), tick)

    def tick(self, stream: Place) -> int:
        """Say how much work a stream has got."""
        return self.clocks.get(stream, {}).get(stream, 0)

    def is_behind(self, one: Place, other: Place) -> bool:
        """Say whether the next work of one stream comes after all that is on another."""
        return self.clocks.get(one, {}).get(other, 0) >= self.tick(other)

    def find(self, address: int, n_bytes: int) -> int | None:
        """Give the device whose memory it is; None for the host's."""
        for start, (stop, device) in self.spans.items():
            if start <= address and address + n_bytes <= stop:
                return device
        raise BrokenRuleError(f"{n_bytes} bytes at {address} are nobody's")


@final
class Stream:
    def __init__(self, world: World, ptr: int, device: int) -> None:
        self._world, self.ptr, self.device_id = world, ptr, device
        if ptr != NULL:
            world.devices_of_streams[ptr] = device

    def __enter__(self) -> Stream:
        world = self._world
        device = world.current if self.device_id == -1 else self.device_id
        if device != world.current:  # as CuPy's does
            raise RuntimeError(f"the stream is of device {device}, current is {world.current}")
        world.current_streams().setdefault(device, []).append(self)
        return self

    def __exit__(self, *_: object) -> None:
        device = self._world.current if self.device_id == -1 else self.device_id
        self._world.current_streams()[device].pop()

    def use(self) -> Stream:
        self.__enter__()
        return self

    def wait_event(self, event: Event) -> None:
        self._world.wait(self.ptr, event.ptr)

    def synchronize(self) -> None:
        pass


@final
class Event:
    def __init__(self, world: World) -> None:
        self._world, self.ptr, self._device = world, world.new_handle(), world.current
        self.clock: Clock = {}
        world.events[self.ptr] = self

    def record(self, stream: Stream) -> None:
        own = self._world.stream_of(stream.ptr)
        check(own[0] == self._device, f"an event of device {self._device} on a stream of {own[0]}")
        self.clock = dict(self._world.clocks.get(own, {}))

    def synchronize(self) -> None:
        self._world.n_host_waits += 1


@final
class Device:
    def __init__(self, world: World, number: int | None = None) -> None:
        self._world, self.id = world, world.current if number is None else int(number)
        self._before: list[int] = []

    def __enter__(self) -> Device:
        self._before.append(self._world.current)
        self._world.current = self.id
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._world.current = self._before.pop()

    def use(self) -> Device:
        self._world.current = self.id
        return self

    def synchronize(self) -> None:
        pass


@final
class MemoryPointer:
    def __init__(self, mem: Any, offset: int) -> None:
        self.mem, self.ptr, self.device_id = mem, mem.ptr + offset, mem.device_id


def array_class(world: World, current_stream: Callable[[], Stream]) -> Any:
    """Make CuPy's ndarray: NumPy's functions on a device's memory."""

    @final
    class Ndarray(NDArrayOperatorsMixin):
        def __init__(
            self,
            shape: tuple[int, ...],
            dtype: Any = np.float64,
            memptr: Any = None,
            strides: tuple[int, ...] | None = None,
        ) -> None:
            self.shape, self.dtype = shape, np.dtype(dtype)
            if self.dtype.type.__module__ == "ml_dtypes" and self.dtype.name != "bfloat16":
                raise TypeError(f"data type {self.dtype} not understood")
            n_bytes = int(np.prod(shape, dtype=np.int64)) * self.dtype.itemsize
            if memptr is None:
                memptr = MemoryPointer(Memory(world, n_bytes, world.current), 0)
            self.data, self.device = memptr, SimpleNamespace(id=memptr.device_id)
            compact = np.ndarray(shape, self.dtype, np.empty(n_bytes, np.uint8)).strides
            self.strides = compact if strides is None else strides
            self.size, self.ndim = int(np.prod(shape, dtype=np.int64)), len(shape)

        @property
        def flags(self) -> Any:
            return self.numbers.flags

        @property
        def numbers(self) -> npt.NDArray[Any]:
            """The memory, as the work of a device sees it."""
            if self.size == 0:
                return np.empty(self.shape, self.dtype)
            reach = [(n - 1) * s for n, s in zip(self.shape, self.strides, strict=True)]
            low = self.data.ptr + sum(min(0, r) for r in reach)
            high = self.data.ptr + sum(max(0, r) for r in reach) + self.dtype.itemsize
            memory = (ctypes.c_char * (high - low)).from_address(low)
            offset = self.data.ptr - low
            seen: npt.NDArray[Any] = np.ndarray(
                self.shape, self.dtype, memory, offset, self.strides
            )
            return seen

        def get(self) -> npt.NDArray[Any]:
            host: npt.NDArray[Any] = self.numbers.copy()
            return host

        def __float__(self) -> float:
            return float(self.numbers)

        def __bool__(self) -> bool:
            return bool(self.numbers)

        def __dlpack_device__(self) -> tuple[int, int]:
            return CUDA, self.device.id

        def __dlpack__(self, *, stream: Any = None, **asked: Any) -> Any:
            foreign = Foreign(self.numbers, knows_versions=True, device=CUDA, number=self.device.id)
            return foreign.__dlpack__(**asked)

        def __array__(self, *_: Any, **__: Any) -> Any:
            raise TypeError("Implicit conversion to a NumPy array is not allowed")  # as CuPy's

        def __getitem__(self, place: Any) -> Any:
            own = self.numbers
            part = own[plain(place)]
            is_view = isinstance(part, np.ndarray) and np.may_share_memory(own, part)
            return self._view(part) if is_view else made(part)

        def _view(self, part: npt.NDArray[Any]) -> Any:
            pointer = MemoryPointer(self.data.mem, 0)
            pointer.ptr = part.__array_interface__["data"][0]
            return Ndarray(part.shape, part.dtype, pointer, part.strides)

        @property
        def T(self) -> Any:  # noqa: N802
            return self._view(self.numbers.T)

        def __len__(self) -> int:
            return int(self.shape[0])

        def sum(self, **options: Any) -> Any:
            return made(self.numbers.sum(**options))

        def max(self, **options: Any) -> Any:
            return made(self.numbers.max(**options))

        def argmax(self, **options: Any) -> Any:
            return made(self.numbers.argmax(**options))

        def __setitem__(self, place: Any, value: Any) -> None:
            with Device(world, self.device.id):
                world.work(current_stream().ptr)
            self.numbers[place] = plain(value)

        def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **options: Any) -> Any:
            outs = options.pop("out", ())
            if outs:
                options["out"] = tuple(plain(out) for out in outs)
            with Device(world, self.device.id):
                world.work(current_stream().ptr)
                result = getattr(ufunc, method)(*map(plain, inputs), **options)
                return outs[0] if outs else made(result)

    def plain(value: Any) -> Any:
        return value.numbers if isinstance(value, Ndarray) else value

    def made(numbers: Any) -> Any:
        array = Ndarray(np.shape(numbers), np.asarray(numbers).dtype)
        array.numbers[...] = numbers
        return array

    Ndarray.made = made  # type: ignore[attr-defined]
    return Ndarray


def runtime_of(world: World) -> ModuleType:
    """Make ``cupy.cuda.runtime``."""
    down, up, here = 2, 1, 3
    peers: set[tuple[int, int]] = set()

    def device_count() -> int:
        if world.no_devices_status:
            raise CUDARuntimeError(world.no_devices_status)
        return world.n_devices

    def memcpy(out: int, source: int, n_bytes: int, kind: int, stream: int) -> None:
        world.work(stream)
        places = world.find(out, n_bytes), world.find(source, n_bytes)
        own = world.current
        expected = {down: (None, own), up: (own, None), here: (own, own)}[kind]
        check(places == expected, f"a copy of kind {kind} from {places[1]} to {places[0]}")
        ctypes.memmove(out, source, n_bytes)

    def memcpy_peer(
        out: int, out_device: int, source: int, device: int, n_bytes: int, stream: int
    ) -> None:
        world.work(stream)
        places = world.find(out, n_bytes), world.find(source, n_bytes)
        check(places == (out_device, device), f"a copy from {places[1]} to {places[0]}")
        ctypes.memmove(out, source, n_bytes)

    def memset(address: int, value: int, n_bytes: int, stream: int) -> None:
        world.work(stream)
        check(world.find(address, n_bytes) == world.current, "memory of another device is cleared")
        ctypes.memset(address, value, n_bytes)

    def properties(number: int) -> dict[str, Any]:
        return {"uuid": bytes([number + 1] * 16), "name": b"Fake GPU"}

    def enable_peer(other: int) -> None:
        if (world.current, other) in peers:
            raise CUDARuntimeError(704)
        peers.add((world.current, other))

    def set_device(number: int) -> None:
        world.current = number

    module = ModuleType("cupy.cuda.runtime")
    vars(module).update(
        CUDARuntimeError=CUDARuntimeError,
        memcpyHostToDevice=up,
        memcpyDeviceToHost=down,
        memcpyDeviceToDevice=here,
        driverGetVersion=lambda: world.driver,
        runtimeGetVersion=lambda: world.runtime,
        getDeviceCount=device_count,
        getDeviceProperties=properties,
        setDevice=set_device,
        eventQuery=lambda event: 0,
        streamWaitEvent=world.wait,
        memcpyAsync=memcpy,
        memcpyPeerAsync=memcpy_peer,
        memsetAsync=memset,
        deviceCanAccessPeer=lambda one, other: 1,
        deviceEnablePeerAccess=enable_peer,
    )
    return module


@final
class Module:
    """A library of kernels."""

    def __init__(self, world: World) -> None:
        self._world = world

    def load(self, compiled: bytes) -> None:
        self._library = ctypes.CDLL(compiled.decode())

    def get_function(self, name: str) -> Any:
        function = self._library[name]
        function.restype = None

        def launch(
            grid: tuple[int], block: tuple[int], arguments: Sequence[Any], stream: Stream
        ) -> None:
            check(0 < grid[0] <= 1 << 31 and 0 < block[0] <= 1024, f"{name} on {grid} x {block}")
            self._world.work(stream.ptr)
            given = []
            for argument in arguments:
                check(isinstance(argument, np.generic), f"{name} gets {argument!r}")
                given.append(_ARGUMENTS[argument.dtype.str.lstrip("<|=")](argument.item()))
            function(*given)

        return launch


def compile_using_nvrtc(source: str, options: Sequence[str]) -> tuple[bytes, Any]:
    check("--fmad=false" in options, "a product and a sum would be one")
    try:
        return str(library_of(_AS_CUDA + source)).encode(), None
    except DeviceError as error:
        raise CompileError(str(error)) from error


# NCCL


@final
class Call:
    """What one member does in a group: sends or fills some bytes."""

    def __init__(self, comm: Any, is_send: bool, peer: int, at: tuple[int, int], on: int) -> None:
        self.comm, self.is_send, self.peer, self.at, self.on = comm, is_send, peer, at, on


def nccl_of(world: World) -> ModuleType:
    """Make ``cupy.cuda.nccl``."""
    group: list[Call] = []
    depth = [0]

    def group_start() -> None:
        depth[0] += 1

    def group_end() -> None:
        depth[0] -= 1
        if depth[0]:
            return
        calls = group[:]
        group.clear()
        for call in calls:
            with Device(world, call.comm.device):
                world.work(call.on)
        for call in calls:  # those who wait get what is sent here, or in another process
            if call.is_send:
                call.comm.post(call, calls)
        for call in calls:
            if not call.is_send:
                call.comm.fetch(call)

    @final
    class NcclCommunicator:
        def __init__(self, size: int, unique_id: Any, rank: int) -> None:
            if not isinstance(unique_id, bytes):
                raise TypeError("an id is bytes")
            self.size, self.rank, self.device = size, rank, world.current
            self.error: Exception | None = None
            self.clique: list[NcclCommunicator] = []
            self.how = ""
            self._here: dict[int, list[bytes]] = {}
            self._counts: dict[tuple[int, int], int] = {}
            self._mail: Path | None = None
            world.opened.append(self)
            if size > 1 and unique_id:
                check(world.folder is not None, "ranks of several processes need a folder")
                assert world.folder is not None
                self._mail = world.folder / unique_id.rstrip(b"\0").decode()
                self._mail.mkdir(exist_ok=True)
                (self._mail / f"member-{rank}").touch()
                for k in range(size):
                    self._await(self._mail / f"member-{k}")

        @staticmethod
        def initAll(devices: Sequence[int]) -> list[NcclCommunicator]:  # noqa: N802
            members = []
            for rank, device in enumerate(devices):
                with Device(world, device):
                    members.append(NcclCommunicator(len(devices), b"", rank))
            for member in members:
                member.clique = members
            return members

        def send(self, source: int, n: int, kind: int, peer: int, stream: int) -> None:
            self._add(True, peer, source, n, stream)

        def recv(self, out: int, n: int, kind: int, peer: int, stream: int) -> None:
            self._add(False, peer, out, n, stream)

        def allGather(  # noqa: N802
            self, source: int, out: int, n: int, kind: int, stream: int
        ) -> None:
            group_start()
            for peer in range(self.size):
                if peer == self.rank:
                    ctypes.memmove(out + peer * n, source, n)
                    continue
                self._add(True, peer, source, n, stream)
                self._add(False, peer, out + peer * n, n, stream)
            group_end()

        def broadcast(
            self, source: int, out: int, n: int, kind: int, root: int, stream: int
        ) -> None:
            group_start()
            for peer in range(self.size):
                if peer != self.rank and root in (peer, self.rank):
                    is_root = root == self.rank
                    self._add(is_root, peer, source if is_root else out, n, stream)
            group_end()

        def check_async_error(self) -> None:
            if self.error is not None:
                raise self.error

        def abort(self) -> None:
            self._close("aborted")

        def destroy(self) -> None:
            self._close("destroyed")

        def _close(self, how: str) -> None:
            check(not self.how, f"a communicator that is {self.how} is {how}")
            self.how = how
            world.opened.remove(self)

        def _add(self, is_send: bool, peer: int, at: int, n: int, stream: int) -> None:
            check(not self.how, f"a call on a communicator that is {self.how}")
            check(world.current == self.device, "a call while another device is the current one")
            check(world.find(at, n) == self.device, "memory of another device")
            check(0 <= peer < self.size and peer != self.rank, f"{peer} of {self.size}")
            group_start()
            group.append(Call(self, is_send, peer, (at, n), stream))
            group_end()

        def post(self, call: Call, calls: Sequence[Call]) -> None:
            raw = ctypes.string_at(*call.at)
            if self._mail is None:
                self.clique[call.peer]._here.setdefault(self.rank, []).append(raw)
                sender = world.clocks[(self.device, call.on)]
                for other in calls:
                    if other.comm is self.clique[call.peer]:
                        clock = world.clocks[(other.comm.device, other.on)]
                        clock.update({k: max(t, clock.get(k, 0)) for k, t in sender.items()})
                return
            path = self._path(self.rank, call.peer)
            path.with_suffix(".part").write_bytes(raw)
            path.with_suffix(".part").replace(path)

        def fetch(self, call: Call) -> None:
            address, n = call.at
            if self._mail is None:
                waiting = self._here.get(call.peer)
                check(waiting, f"{self.rank} waits for {call.peer} for ever")
                raw = (waiting or [b""]).pop(0)
            else:
                path = self._path(call.peer, self.rank)
                self._await(path)
                raw = path.read_bytes()
                path.unlink()
            check(len(raw) == n, f"{len(raw)} bytes came, {n} are awaited")
            ctypes.memmove(address, raw, n)

        def _path(self, source: int, dest: int) -> Path:
            assert self._mail is not None
            number = self._counts[source, dest] = self._counts.get((source, dest), 0) + 1
            return self._mail / f"{source}-{dest}-{number}"

        @staticmethod
        def _await(path: Path) -> None:
            end = time.monotonic() + _LIMIT_S
            while not path.exists():
                if time.monotonic() > end:
                    raise NcclError(f"{path.name} did not come")
                time.sleep(0.0002)

    module = ModuleType("cupy.cuda.nccl")
    vars(module).update(
        available=True,
        NcclError=NcclError,
        NCCL_UINT8=1,
        NcclCommunicator=NcclCommunicator,
        get_version=lambda: world.nccl_version,
        get_unique_id=lambda: os.urandom(16).hex().encode().ljust(128, b"\0"),
        groupStart=group_start,
        groupEnd=group_end,
    )
    return module


def cupy_of(world: World) -> dict[str, ModuleType]:
    """Make CuPy's modules, by name."""

    def current_stream(device: int = -1) -> Stream:
        own = world.current if device == -1 else device
        stack = world.current_streams().setdefault(own, [])
        return stack[-1] if stack else Stream(world, NULL, -1)

    def stream(*, non_blocking: bool = False) -> Stream:
        check(non_blocking, "a stream that waits for the default one")
        return Stream(world, world.new_handle(), world.current)

    def event(*, disable_timing: bool = False) -> Event:
        return Event(world)

    def alloc(n_bytes: int) -> MemoryPointer:
        world.n_allocated += 1
        return MemoryPointer(Memory(world, n_bytes, world.current), 0)

    def unowned(ptr: int, size: int, owner: object, device_id: int) -> Any:
        return SimpleNamespace(ptr=ptr, size=size, owner=owner, device_id=device_id)

    def asarray(value: Any) -> Any:
        return value if isinstance(value, ndarray) else ndarray.made(value)

    ndarray = array_class(world, current_stream)
    modules = {
        name: ModuleType(name)
        for name in ("cupy", "cupy.cuda", "cupy.cuda.compiler", "cupy.cuda.function")
    }
    modules["cupy.cuda.runtime"], modules["cupy.cuda.nccl"] = runtime_of(world), nccl_of(world)
    vars(modules["cupy.cuda.compiler"]).update(
        compile_using_nvrtc=compile_using_nvrtc, CompileException=CompileError
    )
    vars(modules["cupy.cuda.function"]).update(Module=lambda: Module(world))
    vars(modules["cupy.cuda"]).update(
        Device=lambda number=None: Device(world, number),
        Stream=stream,
        Event=event,
        get_current_stream=current_stream,
        alloc=alloc,
        alloc_pinned_memory=lambda n_bytes: Memory(world, n_bytes, None).raw,
        Memory=lambda n_bytes: Memory(world, n_bytes, world.current),
        UnownedMemory=unowned,
        MemoryPointer=MemoryPointer,
        runtime=modules["cupy.cuda.runtime"],
        compiler=modules["cupy.cuda.compiler"],
        function=modules["cupy.cuda.function"],
        nccl=modules["cupy.cuda.nccl"],
    )
    vars(modules["cupy"]).update(
        __version__="14.0 (fake)",
        __path__=[],
        cuda=modules["cupy.cuda"],
        ndarray=ndarray,
        asarray=asarray,
        asnumpy=lambda array: array.get() if isinstance(array, ndarray) else np.asarray(array),
    )
    return modules


def install(n_devices: int = 2) -> World:
    """Let ``import cupy`` find this one, in this process from now on."""
    folder = os.environ.get(FOLDER_VARIABLE)
    world = World(n_devices, Path(folder) if folder else None)
    sys.modules.update(cupy_of(world))
    return world


@contextmanager
def shown(n_devices: int = 2) -> Iterator[World]:
    """Let this process see such GPUs in the block; at its end no communicator may be open."""
    world = World(n_devices)
    with pytest.MonkeyPatch.context() as patched:
        for name, module in cupy_of(world).items():
            patched.setitem(sys.modules, name, module)
        forget()
        yield world
        on_gpus.end_own()
        assert not world.opened
    forget()


def forget() -> None:
    """Let the next store look for GPUs once more."""
    find.find_gpus.cache_clear()
    find._nccl.cache_clear()


def environment(folder: Path) -> dict[str, str]:
    """Give what lets Python programs and their ranks find it; the folder is theirs alone."""
    (folder / "cupy.py").write_text("import fake_cupy\n\nfake_cupy.install()\n")
    mail = folder / "mail"
    mail.mkdir(exist_ok=True)
    own = Path(__file__).parent
    paths = (str(folder), str(own), str(own.parent), os.environ.get("PYTHONPATH", ""))
    return {"PYTHONPATH": os.pathsep.join(filter(None, paths)), FOLDER_VARIABLE: str(mail)}


def pytest_configure() -> None:
    """Let a whole suite run on it: python -m pytest -p fake_cupy."""
    install()
