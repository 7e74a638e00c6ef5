"""GPUs that a test can have anywhere: the host does their work, and the rules of streams hold.

Every piece of work says what it reads and writes. Each stream has a vector clock, and so has
the host: two pieces of work that touch the same bytes, one of them writing, must be ordered by
one stream, by events, or by the host having seen the first one done. Else it is an error where
the second one is put on its stream, whatever the order in which they would happen to run.

What the host must not do before work is done shows, too: a copy to the host fills its target
with rubbish, and with the numbers only once the host has seen that the copy is done; the source
of a copy from the host is compared when the copy is seen done; memory that goes while work
which its stream does not wait for may still use it is an error. Memory that is exposed to MPI
counts as used by a stream of MPI's own, from when the host hands it over until it is withdrawn,
and what MPI is to write holds rubbish at first.
"""

from __future__ import annotations

import bisect
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias, final

import numpy as np
import numpy.typing as npt
from host_kernel import HostKernel
from numpy.lib.mixins import NDArrayOperatorsMixin

from kvcoll.errors import ArrayError, DeviceError
from kvcoll.gpu.array import DeviceArray
from kvcoll.gpu.device import Device, Event, Exposed, Gpus, HostArray, Stream
from kvcoll.gpu.kernel import Access, Argument, Kernel, KernelSource
from kvcoll.nccl.watch import THREAD_NAME

Clock: TypeAlias = dict[int, int]  # for each stream how much of its work is known to be before
Span: TypeAlias = tuple[int, int]  # addresses: from, to

_RUBBISH = 0xA7
_SPOILED_BYTES = 1 << 20  # of new memory, for what reads it before it is written
_LINE_BYTES = 256  # memory is aligned as CUDA aligns it


class RuleBrokenError(AssertionError):
    """What would be a race, a hang or a crash on a GPU."""


def numpy_of(array: DeviceArray) -> npt.NDArray[Any]:
    """View the memory of a fake GPU as the work on it does; a test looks by `FakeGpus.read`."""
    memory = _memory_of(array)
    raw = memory.raw[array.address - memory.start :][: array.nbytes]
    return raw.view(array.dtype).reshape(array.shape)


def _memory_of(array: DeviceArray) -> _Memory:
    memory = array.owner
    while isinstance(memory, FakeArray):
        memory = memory.device_array.owner
    assert isinstance(memory, _Memory)
    return memory


def span_of(array: DeviceArray | HostArray) -> Span:
    """Say where an array's bytes are."""
    if isinstance(array, DeviceArray):
        return array.address, array.address + array.nbytes
    assert array.flags.c_contiguous, "an array of the host must be contiguous"
    address = int(array.__array_interface__["data"][0])
    return address, address + array.nbytes


@dataclass
class _Touch:
    """That some bytes were read or written."""

    span: Span
    is_write: bool
    stream: int
    tick: int
    label: str


@final
class _Memory:
    """One allocation."""

    def __init__(self, n_bytes: int, fill: int) -> None:
        whole = np.empty(n_bytes + _LINE_BYTES, np.uint8)
        whole[:_SPOILED_BYTES] = fill
        offset = -int(whole.ctypes.data) % _LINE_BYTES
        self.raw = whole[offset : offset + n_bytes]
        self.start = int(whole.ctypes.data) + offset
        # Arrays made of this one keep it.
        shape, data = (n_bytes,), (self.start, False)
        self.__array_interface__ = {"data": data, "shape": shape, "typestr": "|u1", "version": 3}


@dataclass
class _Record:
    """What is known of an allocation, without keeping it."""

    start: int
    stop: int
    device: int | None  # None for pinned memory of the host
    stream: FakeStream | None
    touches: list[_Touch] = field(default_factory=list)


@dataclass
class _Work:
    stream: int
    tick: int
    label: str
    run: Callable[[], bool]
    # Its bytes, not what frees them: memory may go before work of its stream, which on a GPU is
    # done before that of those who get it next.
    bytes_used: Sequence[npt.NDArray[np.uint8]]
    is_done: bool = False


@dataclass
class _Download:
    work: _Work
    out: HostArray
    numbers: HostArray

    def lay_over(self, raw: npt.NDArray[np.uint8], span: Span) -> None:
        """Write what came down into a copy of the bytes of a span, where both meet."""
        own, start = span_of(self.out), span[0]
        low, high = max(own[0], start), min(own[1], span[1])
        came = self.numbers.reshape(-1).view(np.uint8)
        raw[low - start : high - start] = came[low - own[0] : high - own[0]]


@dataclass
class _Upload:
    work: _Work
    source: HostArray
    numbers: HostArray


@final
class FakeEvent(Event):
    def __init__(self, gpus: FakeGpus, clock: Clock, work: _Work | None) -> None:
        self._gpus, self.clock, self._work = gpus, clock, work
        self._was_asked = False

    def done(self) -> bool:
        """Say no at least once: nobody may rely on work being quick."""
        self._gpus.pump()
        was_asked, self._was_asked = self._was_asked, True
        if not was_asked or (self._work is not None and not self._work.is_done):
            return False
        self._gpus.seen_by_host(self.clock)
        return True

    def synchronize(self) -> None:
        self._gpus.wait_for(self._work)
        self._gpus.seen_by_host(self.clock)


@final
class FakeStream(Stream):
    def __init__(self, gpus: FakeGpus, device: int, handle: int) -> None:
        self.device, self.handle = device, handle
        self.clock: Clock = {handle: 0}
        self.last: _Work | None = None
        self._gpus = gpus

    def record(self) -> Event:
        return FakeEvent(self._gpus, dict(self.clock), self.last)

    def wait(self, event: Event) -> None:
        assert isinstance(event, FakeEvent)
        merge(self.clock, event.clock)

    def synchronize(self) -> None:
        self.record().synchronize()


@final
class FakeExposed(Exposed):
    def __init__(self, gpus: FakeGpus, array: DeviceArray, stream: int, tick: int) -> None:
        self.address, self.n_bytes = array.address, array.nbytes
        self.stream, self.tick = stream, tick
        self._gpus, self._array = gpus, array

    def withdraw(self) -> None:
        self._gpus.withdraw(self)


def merge(clock: Clock, other: Clock) -> None:
    """Let what is before `other` be before `clock`, too."""
    for stream, tick in other.items():
        clock[stream] = max(clock.get(stream, 0), tick)


@final
class FakeGpus(Gpus):
    """So many GPUs.

    Parameters
    ----------
    count : int
    uuids : sequence of str, optional
    driver_version : int, optional
    """

    def __init__(
        self, count: int, uuids: Sequence[str] | None = None, driver_version: int = 13000
    ) -> None:
        self.driver_version = driver_version
        self._lock = threading.RLock()
        self._records: dict[int, _Record] = {}
        self._starts: list[int] = []
        self._queue: deque[_Work] = deque()
        self._host: Clock = {}
        self._downloads: list[_Download] = []
        self._uploads: list[_Upload] = []
        self._n_streams = 0
        self.exposed: list[FakeExposed] = []
        self._mpi_streams: dict[int, int] = {}  # those that MPI does not use now, with their ticks
        self.n_host_waits = 0  # for work that was not known to be done
        self._ticker: threading.Thread | None = None
        self.is_finished = False
        self.failure: Exception | None = None  # of a device: all that waits raises it
        self.broken: list[str] = []
        self.launches: list[str] = []  # what was put on streams, in this order
        names = uuids or [f"fake-{k}" for k in range(count)]
        self.devices: Sequence[FakeDevice] = [FakeDevice(self, k, names[k]) for k in range(count)]

    # ---- what the ports ask for

    def pinned(self, n_bytes: int) -> HostArray:
        return np.asarray(self.take(n_bytes, None, None))

    def is_on_gpu(self, value: object) -> bool:
        return isinstance(value, FakeArray)

    def adopt(self, value: object, on: Stream, *, to_write: bool = False) -> DeviceArray:
        if not isinstance(value, FakeArray):
            raise ArrayError(f"not on a GPU: {type(value).__name__}")
        on.wait(self.devices[value.device_array.device].current_stream().record())
        array = value.device_array
        return DeviceArray(array.address, array.dtype, array.shape, array.device, value)

    def addresses(
        self,
        values: Sequence[object],
        device: int,
        shapes: Sequence[tuple[int, ...]],
        dtypes: Sequence[np.dtype[Any]],
        on: Stream,
    ) -> list[int] | None:
        arrays = [value for value in values if isinstance(value, FakeArray)]
        own = [value.device_array for value in arrays]
        fit = [a.shape for a in own] == shapes and [a.dtype for a in own] == dtypes
        if len(own) < len(values) or not fit or any(a.device != device for a in own):
            return None
        on.wait(self.devices[device].current_stream().record())
        return [a.address for a in own]

    def give_back(self, value: object, on: Stream) -> None:
        assert isinstance(value, FakeArray)
        self.devices[value.device_array.device].current_stream().wait(on.record())

    def lend(self, array: DeviceArray) -> FakeArray:
        return FakeArray(self, array)

    # ---- what tests ask for

    def array(self, values: npt.ArrayLike, device: int = 0) -> FakeArray:
        """Make an array of the user's, written on the current stream of its device."""
        numbers = np.ascontiguousarray(values)
        stream = self.devices[device].current_stream()
        out = self.devices[device].empty(np.shape(values), numbers.dtype, stream)
        made = FakeArray(self, out)
        made[...] = numbers.reshape(out.shape)
        return made

    def write(self, array: DeviceArray, values: npt.ArrayLike, on: Stream) -> None:
        """Put work on a stream that writes these numbers."""
        numbers = np.array(values).astype(array.dtype)

        def run() -> None:
            numpy_of(array)[...] = numbers

        self.put(on, run, (), (array,), "write")

    def read(self, array: DeviceArray, on: Stream) -> npt.NDArray[Any]:
        """Wait for a stream, and give the numbers as work on it sees them."""
        seen: list[npt.NDArray[Any]] = []
        self.put(on, lambda: seen.append(numpy_of(array).copy()), (array,), (), "read")
        on.synchronize()
        return seen[0]

    @contextmanager
    def held_up(self) -> Iterator[Callable[[], bool]]:
        """Let no work be done in the block; a host that waits for some goes on after a while.

        Gives what says whether all is held up still.
        """
        may_go_on: list[bool] = []
        end = time.monotonic() + 20
        stream = self.devices[0].current_stream()

        def is_late() -> bool:
            return bool(may_go_on) or time.monotonic() > end

        work = self.put_part(stream, is_late, (), (), "what other ranks are late for")
        try:
            yield lambda: not work.is_done
        finally:
            may_go_on.append(True)
            self.pump()

    def finish(self) -> None:
        """Check that all has come to its end and that no rule was broken."""
        assert not self.exposed, "memory was left exposed to MPI"
        self.wait_for(self._queue[-1] if self._queue else None)
        self.is_finished = True
        with self._lock:
            for upload in self._uploads:
                self._compare(upload)
            self._uploads.clear()
        assert not self.broken, "; ".join(self.broken)
        if self.failure is not None:
            raise self.failure

    # ---- what makes it work

    def take(self, n_bytes: int, device: int | None, stream: FakeStream | None) -> _Memory:
        memory = _Memory(n_bytes, 0xC5)
        record = _Record(memory.start, memory.start + n_bytes, device, stream)
        with self._lock:
            self._records[memory.start] = record
            bisect.insort(self._starts, memory.start)
        weakref.finalize(memory, self._free, memory.start).atexit = False
        return memory

    def put(
        self,
        on: Stream,
        run: Callable[[], object],
        reads: Sequence[DeviceArray | HostArray],
        writes: Sequence[DeviceArray | HostArray],
        label: str,
    ) -> _Work:
        """Put on a stream what is done at once."""

        def run_whole() -> bool:
            run()
            return True

        return self.put_part(on, run_whole, reads, writes, label)

    def put_part(
        self,
        on: Stream,
        run: Callable[[], bool],
        reads: Sequence[DeviceArray | HostArray],
        writes: Sequence[DeviceArray | HostArray],
        label: str,
    ) -> _Work:
        """Put on a stream what may have to be tried again until it says True."""
        assert isinstance(on, FakeStream)
        with self._lock:
            merge(on.clock, self._host)
            on.clock[on.handle] += 1
            tick = on.clock[on.handle]
            for arrays, is_write in ((reads, False), (writes, True)):
                for array in arrays:
                    self._touch(_Touch(span_of(array), is_write, on.handle, tick, label), on, array)
            used = [_memory_of(a).raw for a in (*reads, *writes) if isinstance(a, DeviceArray)]
            work = on.last = _Work(on.handle, tick, label, run, used)
            self.launches.append(label)
            self._queue.append(work)
        self.pump()
        return work

    def pump(self) -> None:
        """Do what can be done, in the order in which it was put on streams."""
        with self._lock:
            while self._queue and self.failure is None:
                try:
                    if not self._queue[0].run():
                        return
                except Exception as error:  # whatever it is, it is the device's
                    self.failure = DeviceError(f"{self._queue[0].label}: {error}")
                    self.failure.__cause__ = error
                    return
                done = self._queue.popleft()
                done.is_done, done.run, done.bytes_used = True, _nothing, ()  # which may go

    def pump_in_background(self) -> None:
        """Go on also while the host does something else, as other processes may wait."""
        if self._ticker is None:

            def tick(gpus: Callable[[], FakeGpus | None]) -> None:
                while (own := gpus()) is not None and not own.is_finished:
                    own.pump()
                    del own
                    time.sleep(0.001)

            self._ticker = threading.Thread(target=tick, args=(weakref.ref(self),), daemon=True)
            self._ticker.start()

    def wait_for(self, work: _Work | None) -> None:
        """Wait on the host, as a program that must not wait says how often it did."""
        self.n_host_waits += 1
        while work is not None and not work.is_done:
            self.pump()
            if self.failure is not None:
                raise self.failure
            if not work.is_done:
                time.sleep(0.0002)

    def seen_by_host(self, clock: Clock) -> None:
        if threading.current_thread().name == THREAD_NAME:
            return  # what a watch sees orders nothing: it may look at any time, or never
        with self._lock:
            merge(self._host, clock)
            for download in [d for d in self._downloads if self._is_seen(d.work)]:
                download.out[...] = download.numbers
                self._downloads.remove(download)
            for upload in [u for u in self._uploads if self._is_seen(u.work)]:
                self._compare(upload)
                self._uploads.remove(upload)

    def download(self, source: DeviceArray, out: HostArray, on: Stream) -> None:
        with self._lock:
            for upload in [u for u in self._uploads if _overlap(u.source, out)]:
                self._compare(upload)
                self._uploads.remove(upload)
            numbers = np.empty_like(out, subok=False)
            raw = numbers.reshape(-1).view(np.uint8)

            def run() -> None:
                raw[...] = numpy_of(source).reshape(-1).view(np.uint8)

            work = self.put(on, run, (source,), (out,), "download")
            out.reshape(-1).view(np.uint8)[...] = _RUBBISH
            self._downloads = [d for d in self._downloads if not _overlap(d.out, out)]
            self._downloads.append(_Download(work, out, numbers))

    def upload(self, source: HostArray, out: DeviceArray, on: Stream) -> None:
        with self._lock:
            numbers = np.array(source, subok=False)
            raw = numbers.reshape(-1).view(np.uint8)
            # What came down, unseen by the host: this copy finds it, in the order of streams.
            unseen = [d for d in self._downloads if _overlap(d.out, source)]

            def run() -> None:
                for download in unseen:
                    download.lay_over(raw, span_of(source))
                numpy_of(out).reshape(-1).view(np.uint8)[...] = raw

            work = self.put(on, run, (source,), (out,), "upload")
            self._uploads.append(_Upload(work, source, numbers))

    def expose(self, array: DeviceArray, *, to_write: bool) -> FakeExposed:
        """Let MPI use memory, as a piece of work of one stream more."""
        with self._lock:
            handle, tick = self._mpi_streams.popitem() if self._mpi_streams else (0, 0)
            if not handle:
                self._n_streams += 1
                handle = self._n_streams
            stream = FakeStream(self, array.device, handle)
            stream.clock = {**self._host, handle: tick + 1}
            start = self._starts[bisect.bisect_right(self._starts, array.address) - 1]
            if self._records[start].stream is not None:
                self.break_rule(f"MPI gets {array!r}, which is a pool's")
            touch = _Touch(span_of(array), to_write, handle, tick + 1, "MPI")
            self._touch(touch, stream, array)
            if to_write:
                numpy_of(array).reshape(-1).view(np.uint8)[...] = _RUBBISH
            made = FakeExposed(self, array, handle, tick + 1)
            self.exposed.append(made)
            return made

    def withdraw(self, exposed: FakeExposed) -> None:
        with self._lock:
            if exposed not in self.exposed:
                self.break_rule("memory is withdrawn from MPI twice")
            self.exposed.remove(exposed)
            self._host[exposed.stream] = exposed.tick
            self._mpi_streams[exposed.stream] = exposed.tick

    def break_rule(self, what: str) -> None:
        self.broken.append(what)
        raise RuleBrokenError(what)

    def _is_seen(self, work: _Work) -> bool:
        return work.is_done and self._host.get(work.stream, 0) >= work.tick

    def _compare(self, upload: _Upload) -> None:
        if upload.source.tobytes() != upload.numbers.tobytes():
            self.break_rule("the host changed memory while a copy to a GPU read it")

    def _touch(self, touch: _Touch, on: FakeStream, array: DeviceArray | HostArray) -> None:
        low, high = touch.span
        if low == high:
            return
        place = bisect.bisect_right(self._starts, low) - 1
        record = self._records[self._starts[place]] if place >= 0 else None
        if record is None or high > record.stop:
            self.break_rule(f"{touch.label}: memory that is neither a GPU's nor pinned")
            return
        if isinstance(array, DeviceArray) and record.device != array.device:
            self.break_rule(f"{touch.label}: {array!r} lies on GPU {record.device}")
        kept = []
        for other in record.touches:
            meets = other.span[0] < high and low < other.span[1]
            is_before = on.clock.get(other.stream, 0) >= other.tick
            if meets and not is_before and (other.is_write or touch.is_write):
                self.break_rule(
                    f"{touch.label} on stream {touch.stream} {_verb(touch)} what {other.label} on "
                    f"stream {other.stream} {_verb(other)}, and nothing says which is first"
                )
            inside = low <= other.span[0] and other.span[1] <= high
            same_reader = not touch.is_write and not other.is_write and other.stream == on.handle
            # What is before a write of all its bytes is before all that comes after that write.
            if not (inside and is_before and (touch.is_write or same_reader)):
                kept.append(other)
        record.touches = [*kept, touch]

    def _free(self, start: int) -> None:
        with self._lock:
            record = self._records.pop(start)
            self._starts.remove(start)
            known = dict(self._host)
            if record.stream is not None:
                merge(known, record.stream.clock)
            late = [t for t in record.touches if known.get(t.stream, 0) < t.tick]
        if late:
            self.broken.append(
                f"memory went while {late[0].label} on stream {late[0].stream} may still use it"
            )


def _nothing() -> bool:
    return True


def _verb(touch: _Touch) -> str:
    return "writes" if touch.is_write else "reads"


def _overlap(one: HostArray, other: HostArray) -> bool:
    return bool(np.may_share_memory(one, other))


@final
class FakeDevice(Device):
    def __init__(self, gpus: FakeGpus, index: int, uuid: str) -> None:
        self.index, self.uuid, self.name = index, uuid, "Fake GPU"
        self._gpus = gpus
        self.users_stream: FakeStream = self.stream()
        self._kernels: dict[KernelSource, Kernel] = {}
        self._is_current = 0
        self.used_in: set[str] = set()  # names of threads in which it is the current one for good

    def stream(self) -> FakeStream:
        self._gpus._n_streams += 1
        return FakeStream(self._gpus, self.index, self._gpus._n_streams)

    def current_stream(self) -> FakeStream:
        return self.users_stream

    def empty(self, shape: tuple[int, ...] | int, dtype: npt.DTypeLike, on: Stream) -> DeviceArray:
        assert isinstance(on, FakeStream)
        self._check(on)
        shape = shape if isinstance(shape, tuple) else (shape,)
        n_bytes = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        memory = self._gpus.take(n_bytes, self.index, on)
        return DeviceArray(memory.start, np.dtype(dtype), shape, self.index, memory)

    def plain(self, n_bytes: int) -> DeviceArray:
        memory = self._gpus.take(n_bytes, self.index, None)
        return DeviceArray(memory.start, np.dtype(np.uint8), (n_bytes,), self.index, memory)

    @contextmanager
    def here(self) -> Iterator[None]:
        self._is_current += 1
        try:
            yield
        finally:
            self._is_current -= 1

    @property
    def is_current(self) -> bool:
        return self._is_current > 0

    def use(self) -> None:
        self.used_in.add(threading.current_thread().name)

    def expose(self, array: DeviceArray, *, to_write: bool) -> Exposed:
        if not self.is_current or array.device != self.index:
            self._gpus.break_rule(f"MPI gets {array!r} while its GPU is not the current one")
        return self._gpus.expose(array, to_write=to_write)

    def copy(self, source: DeviceArray, out: DeviceArray, on: Stream) -> None:
        self._check(on, out)
        self._same_bytes(source.nbytes, out.nbytes)

        def run() -> None:
            numbers = numpy_of(source).reshape(-1).view(np.uint8)
            numpy_of(out).reshape(-1).view(np.uint8)[...] = numbers

        self._gpus.put(on, run, (source,), (out,), "copy")

    def upload(self, source: HostArray, out: DeviceArray, on: Stream) -> None:
        self._check(on, out)
        self._same_bytes(source.nbytes, out.nbytes)
        self._gpus.upload(source, out, on)

    def download(self, source: DeviceArray, out: HostArray, on: Stream) -> None:
        self._check(on, source)
        self._same_bytes(source.nbytes, out.nbytes)
        self._gpus.download(source, out, on)

    def zero(self, out: DeviceArray, on: Stream) -> None:
        self._check(on, out)

        def run() -> None:
            numpy_of(out).reshape(-1).view(np.uint8)[...] = 0

        self._gpus.put(on, run, (), (out,), "zero")

    def compile(self, source: KernelSource) -> Kernel:
        if source not in self._kernels:
            self._kernels[source] = FakeKernel(self._gpus, self.index, source)
        return self._kernels[source]

    def _check(self, on: Stream, *arrays: DeviceArray) -> None:
        if any(device != self.index for device in (on.device, *(a.device for a in arrays))):
            self._gpus.break_rule(f"a stream or one of {arrays} is handed to GPU {self.index}")

    def _same_bytes(self, first: int, second: int) -> None:
        if first != second:
            self._gpus.break_rule(f"a copy of {first} bytes to {second}")


@final
class FakeKernel(Kernel):
    """A kernel of the host, compiled from the same body."""

    def __init__(self, gpus: FakeGpus, device: int, source: KernelSource) -> None:
        self._gpus, self._device, self._source = gpus, device, source
        self._compiled = HostKernel(source)

    def launch(
        self,
        n: int,
        arguments: Sequence[Argument],
        on: Stream,
        *,
        reads: Sequence[DeviceArray] = (),
        writes: Sequence[DeviceArray] = (),
    ) -> None:
        if n == 0:
            return
        if on.device != self._device:
            self._gpus.break_rule(f"{self._source.name} of GPU {self._device} on GPU {on.device}")
        values: list[int | np.generic] = []
        read, written = list(reads), list(writes)
        for parameter, argument in zip(self._source.parameters, arguments, strict=True):
            if isinstance(argument, DeviceArray):
                values.append(argument.address)
                if parameter.access is not Access.WRITE:
                    read.append(argument)
                if parameter.access is not Access.READ:
                    written.append(argument)
            else:
                values.append(argument)
        self._compiled.check(arguments)

        def run() -> None:
            self._compiled(n, values)

        self._gpus.put(on, run, read, written, self._source.name)


@final
class FakeArray(NDArrayOperatorsMixin):
    """An array of the user's on a fake GPU: NumPy's functions, put on the current stream."""

    def __init__(self, gpus: FakeGpus, array: DeviceArray) -> None:
        self._gpus, self.device_array = gpus, array
        self.shape, self.dtype, self.size = array.shape, array.dtype, array.size

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, self.device_array.device

    def __dlpack__(self, *, stream: Any = None, max_version: Any = None) -> Any:
        raise BufferError("this memory is a GPU's, though a fake one's")

    def get(self) -> npt.NDArray[Any]:
        """Copy to the host, which waits for it."""
        return self._gpus.read(self.device_array, self._stream)

    def __getitem__(self, part: slice) -> FakeArray:
        """View a part of a flat array."""
        return FakeArray(self._gpus, self.device_array[part])

    def __setitem__(self, place: Any, value: Any) -> None:
        numbers = self._numbers(value)
        reads = [value.device_array] if isinstance(value, FakeArray) else []

        def run() -> None:
            numpy_of(self.device_array)[place] = numbers

        self._gpus.put(self._stream, run, reads, [self.device_array], "setitem")

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **kwargs: Any) -> Any:
        """Do it on the current stream, which a fake needs not wait for."""
        outs = kwargs.pop("out", ())
        arrays = [x for x in inputs if isinstance(x, FakeArray)]
        reads = [x.device_array for x in arrays]
        results: list[Any] = []

        def run() -> None:
            numbers = [self._numbers(x) for x in inputs]
            if outs:
                kwargs["out"] = tuple(self._numbers(x) for x in outs)
            results.append(getattr(ufunc, method)(*numbers, **kwargs))

        writes = [x.device_array for x in outs if isinstance(x, FakeArray)]
        work = self._gpus.put(self._stream, run, reads, writes, ufunc.__name__)
        self._gpus.wait_for(work)
        if outs:
            return outs[0]
        result = np.asarray(results[0])
        if result.ndim == 0 and self.shape != ():
            return result[()]
        return self._gpus.array(result, self.device_array.device)

    @property
    def _stream(self) -> FakeStream:
        return self._gpus.devices[self.device_array.device].current_stream()

    @staticmethod
    def _numbers(value: Any) -> Any:
        return numpy_of(value.device_array) if isinstance(value, FakeArray) else value
