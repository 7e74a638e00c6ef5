"""The ports to GPUs and NCCL as CuPy fills them, on a CuPy whose GPUs are the host."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, final

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from arrays_of import f32
from dlpack_object import CUDA, Foreign
from fake_cupy import (
    Device,
    Event,
    NcclError,
    Place,
    Stream,
    World,
    check,
    forget,
    shown,
)
from host_kernel import library_of, needs_compiler
from mpi_job import clean_environment

import kvcoll
from kvcoll.arrays import as_array, as_output
from kvcoll.cuda import find
from kvcoll.cuda.nccl import CupyNccl
from kvcoll.errors import (
    ArrayError,
    CollectiveError,
    DeviceError,
    DTypeMismatchError,
    MissingDependencyError,
)

pytestmark = [pytest.mark.single, needs_compiler]

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
ON_GPU_1: dict[str, Any] = {"knows_versions": True, "device": CUDA, "number": 1}


@pytest.fixture
def world() -> Iterator[World]:
    with shown(2) as made:
        yield made


@final
class Tensor:
    """What a tensor of torch's on a GPU is to others: it is handed out on its own GPU only."""

    def __init__(self, world: World, array: Any, stream: Stream) -> None:
        self.array, self.device = array, SimpleNamespace(index=array.device.id)
        self._world, self._stream = world, stream
        self.n_given = 0

    def fill(self, values: npt.ArrayLike) -> None:
        """Put work on torch's stream that writes these numbers."""
        with Device(self._world, self.device.index):
            self._world.work(self._stream.ptr)
        self.array.numbers[...] = values

    def __dlpack_device__(self) -> tuple[int, int]:
        return CUDA, self.device.index

    def __dlpack__(self, *, stream: int, max_version: Any = None) -> Any:
        if self._world.current != self.device.index:
            raise BufferError("Can't export tensors on a different CUDA device index")
        check(self._world.stream_of(stream)[0] == self.device.index, "a stream of another GPU")
        event = Event(self._world)
        event.record(self._stream)
        self._world.wait(stream, event.ptr)
        self.n_given += 1
        foreign = Foreign(
            self.array.numbers, knows_versions=True, device=CUDA, number=self.device.index
        )
        return foreign.__dlpack__(stream=stream, max_version=max_version)


@final
class Torch:
    """A torch of which all work is on one stream a GPU, which is not CuPy's."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.streams = [Stream(world, world.new_handle(), k) for k in range(world.n_devices)]
        self.Tensor = Tensor
        self.cuda = SimpleNamespace(current_stream=self._current_stream)

    def _current_stream(self, device: Any) -> Any:
        return SimpleNamespace(cuda_stream=self.streams[device.index].ptr)

    def place(self, device: int) -> Place:
        return device, self.streams[device].ptr

    def tensor(self, values: npt.NDArray[Any], device: int = 0) -> Tensor:
        array = on_gpu(self._world, values, device)
        return Tensor(self._world, array, self.streams[device])


@pytest.fixture
def torch(world: World, monkeypatch: pytest.MonkeyPatch) -> Torch:
    made = Torch(world)
    monkeypatch.setitem(sys.modules, "torch", made)
    return made


def on_gpu(world: World, values: npt.NDArray[Any], device: int = 0) -> Any:
    """Give an array of CuPy's."""
    with Device(world, device):
        return sys.modules["cupy"].asarray(values)


# What is missing is said


NONE: list[tuple[int, int, str]] = [
    (0, 35, "there is no NVIDIA driver here: GPU stores need one; 'dist_sync' needs none"),
    (
        11080,
        35,
        "the NVIDIA driver knows CUDA up to 11.8, and CuPy here is for 12.9: update the driver, or "
        "install the CuPy that fits (cupy-cuda12x)",
    ),
    (12040, 100, "CUDA shows no GPU here: nvidia-smi and CUDA_VISIBLE_DEVICES say why"),
    (12040, 999, "CUDA does not work here: cudaError 999"),
]


@pytest.mark.parametrize(("driver", "status", "text"), NONE)
def test_without_a_gpu_or_a_driver_for_it_a_store_says_which(
    world: World, driver: int, status: int, text: str
) -> None:
    world.driver, world.no_devices_status = driver, status
    with pytest.raises(DeviceError) as raised:
        kvcoll.create("nccl")
    assert str(raised.value) == text


def test_an_nccl_that_is_missing_is_named_with_its_cure(world: World) -> None:
    vars(sys.modules["cupy.cuda.nccl"])["available"] = False
    with pytest.raises(
        MissingDependencyError, match=r"CuPy finds no NCCL.*nvidia-nccl-cu12 .*cu13"
    ):
        kvcoll.create("nccl")
    kv = kvcoll.create("device")  # which needs none
    kv.init("w", on_gpu(world, f32([1, 2])))
    assert kv.pull("w").get().tolist() == [1, 2]


@pytest.mark.parametrize("n_devices", [1, 2])
def test_an_nccl_that_is_too_old_is_named_where_there_are_several_gpus(
    monkeypatch: pytest.MonkeyPatch, world: World, n_devices: int
) -> None:
    world.nccl_version, world.n_devices = 20708, n_devices
    kv = kvcoll.create("nccl")
    if n_devices == 1:
        kv.init("w", f32([1]))
        return
    with pytest.raises(DeviceError, match=r"this process has NCCL 2\.7\.8, and 2\.13\.0 or newer"):
        kv.init("w", f32([1]))


@pytest.mark.parametrize(
    ("code", "text"),
    [
        (None, "CuPy is not installed: pip install 'kvcoll[gpu]' (or 'kvcoll[gpu13]', where"),
        (
            "raise ImportError('CuPy failed to load\\nlibnvrtc.so.12')",
            "CuPy does not import: CuPy failed to load libnvrtc.so.12: pip install",
        ),
        ("import no_such_fastrlock", "CuPy does not import: No module named 'no_such_fastrlock'"),
    ],
)
def test_a_cupy_that_is_missing_and_one_that_is_broken_are_told_apart(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any, code: str | None, text: str
) -> None:
    forget()
    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    if code is None:
        monkeypatch.setitem(sys.modules, "cupy", None)
    else:
        (tmp_path / "cupy.py").write_text(code)
        monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(MissingDependencyError) as raised:
        kvcoll.create("nccl")
    assert text in str(raised.value)


# torch and others, in and out


@pytest.mark.parametrize("kind", ["device", "nccl"])
@pytest.mark.parametrize("device", [0, 1])
def test_tensors_are_pushed_and_filled_where_they_are(
    world: World, torch: Torch, kind: str, device: int
) -> None:
    kv = kvcoll.create(kind)
    grad, out = (torch.tensor(np.zeros((2, 3), np.float32), device) for _ in range(2))
    kv.init("w", torch.tensor(np.full((2, 3), 5, np.float32), device))
    assert kv._border is not None
    assert kv._border.place.device.index == device  # that of its first value
    grad.fill(np.arange(6).reshape(2, 3))
    kv.push("w", grad)
    grad.fill(100)  # which comes after the push
    assert kv.pull("w", out=out) is out
    np.testing.assert_array_equal(out.array.get(), np.arange(6).reshape(2, 3))
    n_allocated = world.n_allocated
    for turn in (7, 8):
        grad.fill(turn)
        kv.push("w", grad)
        kv.pull("w", out=out)
        assert (out.array.get() == turn).all()
    assert world.n_allocated == n_allocated  # no copy in between
    assert (grad.n_given, out.n_given) == (3, 3)


@pytest.mark.parametrize("device", [0, 1])
def test_pushes_and_pulls_are_in_the_order_of_torchs_stream(
    world: World, torch: Torch, device: int
) -> None:
    kv = kvcoll.create("device")
    kv.init("w", on_gpu(world, f32([0, 0])))
    users = torch.place(device)
    grad, out = (torch.tensor(f32([0, 0]), device) for _ in range(2))
    for call in (lambda: kv.push("w", grad), lambda: kv.pull("w", out=out)):
        grad.fill([1, 2])
        out.fill([0, 0])
        n_done, before = len(world.done), world.tick(users)
        call()
        work = world.done[n_done:]
        assert work
        for stream, clock in work:
            assert clock[users] == before  # what the store does comes after torch's work
            assert world.is_behind(users, stream)  # and what torch does next after the store's
    assert out.array.get().tolist() == [1, 2]
    assert world.n_host_waits == 0


@pytest.mark.parametrize("device", [0, 1])
def test_a_library_whose_stream_nobody_knows_is_waited_for(world: World, device: int) -> None:
    kv = kvcoll.create("device")
    kv.init("w", on_gpu(world, f32([0, 0])))
    array = on_gpu(world, f32([3, 4]), device)
    other = Foreign(array.numbers, knows_versions=False, device=CUDA, number=device)
    kv.push("w", other)
    assert world.n_host_waits == 1
    (stream,) = other.streams
    assert world.devices_of_streams[stream] == device  # type: ignore[index]
    array.numbers[...] = 0
    assert kv.pull("w", out=other) is other
    assert array.get().tolist() == [3, 4]
    assert world.n_host_waits == 2


def test_a_list_of_tensors_of_several_gpus_and_of_others_is_one_sum(
    world: World, torch: Torch
) -> None:
    kv = kvcoll.create("nccl")
    parts = [f32([2.0**-k, 3, k]) for k in (20, 1, 0, 2)]
    kv.init("w", f32([0, 0, 0]))
    there = torch.tensor(parts[0], 1), torch.tensor(parts[2]), on_gpu(world, parts[3], 1)
    kv.push("w", [there[0], parts[1], there[1], there[2]])
    outs = [torch.tensor(f32([0, 0, 0]), k) for k in (1, 0)]
    host = np.zeros(3, np.float32)
    kv.pull("w", out=[outs[0], host, outs[1]])
    expected = ((parts[0] + parts[1]) + parts[2]) + parts[3]
    for got in (outs[0].array.get(), host, outs[1].array.get()):
        assert got.tolist() == expected.tolist()


@pytest.mark.parametrize("device", [0, 1])
def test_tensors_of_bfloat16_go_in_and_out(world: World, torch: Torch, device: int) -> None:
    values = [np.array([1, 2.5, 1 + 2**-7], BFLOAT16), np.array([2**-9, 4, 1], BFLOAT16)]
    kv = kvcoll.create("device")
    kv.init("w", torch.tensor(np.zeros(3, BFLOAT16)))
    kv.push("w", [torch.tensor(value, device) for value in values])
    out = torch.tensor(np.zeros(3, BFLOAT16), device)
    kv.pull("w", out=out)
    wide = [value.astype(np.float32) for value in values]
    assert out.array.get().tobytes() == (wide[0] + wide[1]).astype(BFLOAT16).tobytes()
    both = [torch.tensor(value, device) for value in values]
    kv.pushpull("w", both)
    assert both[0].array.get().tobytes() == both[1].array.get().tobytes()


@pytest.mark.parametrize("device", [0, 1])
def test_values_that_are_not_contiguous_are_copied_on_their_gpu(
    world: World, torch: Torch, device: int
) -> None:
    kv = kvcoll.create("device")
    kv.init("w", on_gpu(world, np.zeros((3, 2), np.float32)))
    whole = np.arange(24, dtype=np.float32).reshape(4, 6)
    array = on_gpu(world, whole, device)
    part = array[1:3, ::2]
    with Device(world, device):
        turned = sys.modules["cupy"].ndarray(
            (3, 2), np.float32, memptr=part.data, strides=part.strides[::-1]
        )
    expected = whole[1:3, ::2].T
    tensor = Tensor(world, turned, torch.streams[device])
    kv.push("w", tensor)
    np.testing.assert_array_equal(kv.pull("w").get(), expected)
    kv.push("w", [turned, turned])
    np.testing.assert_array_equal(kv.pull("w").get(), 2 * expected)
    assert world.n_host_waits == 0
    with pytest.raises(ArrayError, match=r"float32\[3, 2\] on GPU .> is not contiguous"):
        kv.pull("w", out=tensor)


def test_a_copy_on_another_gpu_is_in_the_order_of_the_stores_work(world: World) -> None:
    cupy = sys.modules["cupy"]
    kv = kvcoll.create("device")
    kv.init("w", on_gpu(world, np.zeros((2, 3), np.float32)))
    stream = kv._border.place.stream  # type: ignore[union-attr]
    own = stream.device, stream.handle
    array = on_gpu(world, np.arange(12, dtype=np.float32).reshape(2, 6), 1)
    for value in (array[:, ::2], Foreign(array[:, 1::2].numbers, **ON_GPU_1)):
        n_done, before = len(world.done), world.tick(own)
        kv.push("w", value)
        (there, packed), *others = world.done[n_done:]
        assert there[0] == 1
        assert packed[own] == before  # which may have read the same memory until then
        here = next(clock for stream, clock in others if stream == own)
        assert here[there] == packed[there]
    np.testing.assert_array_equal(cupy.asnumpy(kv.pull("w")), [[1, 3, 5], [7, 9, 11]])


def test_what_cannot_be_read_or_written_is_named(world: World) -> None:
    kv = kvcoll.create("device")
    array = on_gpu(world, f32([1, 2]))
    kv.init("w", array)
    fixed = Foreign(array.numbers, knows_versions=True, read_only=True, device=CUDA)
    kv.push("w", fixed)
    with pytest.raises(ArrayError, match=r"float32\[2\] on GPU 0> is read-only"):
        kv.pull("w", out=fixed)

    class Grows:
        def __dlpack_device__(self) -> tuple[int, int]:
            return CUDA, 0

        def __dlpack__(self, **_: Any) -> Any:
            raise BufferError("it requires a gradient")

    for call in (lambda: kv.push("w", Grows()), lambda: kv.pull("w", out=Grows())):
        with pytest.raises(ArrayError, match="Grows cannot be read by DLPack: it requires a grad"):
            call()
    assert kv.pull("w").get().tolist() == [1, 2]


def test_a_dtype_that_cupy_lacks_is_named_where_its_arrays_are_asked_for(
    world: World, torch: Torch, monkeypatch: pytest.MonkeyPatch
) -> None:
    ndarray = sys.modules["cupy"].ndarray
    honest = ndarray.__init__

    def init(own: Any, shape: Any, dtype: Any = np.float64, **given: Any) -> None:
        if np.dtype(dtype) == BFLOAT16:
            raise TypeError("no such type")
        honest(own, shape, dtype, **given)

    value = torch.tensor(np.array([1, 2], BFLOAT16))
    monkeypatch.setattr(ndarray, "__init__", init)
    kv = kvcoll.create("device")
    kv.init("w", value)
    kv.push("w", value)
    assert kv.pull("w", out=value) is value
    with pytest.raises(
        DTypeMismatchError, match=r"CuPy .* has no arrays of bfloat16: no such type"
    ):
        kv.pull("w")


def test_a_store_of_the_host_names_what_cupy_cannot_bring_there(world: World) -> None:
    def refuses(value: object) -> Any:
        raise TypeError("Unsupported dtype. dtype code: 4")

    vars(sys.modules["cupy"])["from_dlpack"] = refuses
    value = Foreign(np.zeros(2, BFLOAT16), knows_versions=True, device=CUDA)
    for door in (as_array, as_output):
        with pytest.raises(
            ArrayError, match=r"cannot be read by CuPy .*dtype code: 4\. Push a copy"
        ):
            door(value)


# NCCL


def test_large_values_on_two_gpus_are_summed_by_nccl(world: World) -> None:
    random = np.random.default_rng(3)
    parts = [random.standard_normal(200_000).astype(np.float32) for _ in range(4)]
    kv = kvcoll.create("nccl")
    kv.init("w", on_gpu(world, np.zeros(200_000, np.float32)))
    kv.push("w", [on_gpu(world, part, k % 2) for k, part in enumerate(parts)])
    expected = ((parts[0] + parts[1]) + parts[2]) + parts[3]
    assert kv.pull("w").get().tobytes() == expected.tobytes()
    first, second = world.opened
    assert (first.device, second.device) == (0, 1)
    kv.close()
    assert (first.how, second.how) == ("destroyed", "destroyed")


@pytest.mark.long
def test_communicators_are_closed_when_the_interpreter_ends() -> None:
    code = """
import atexit
opened = []
atexit.register(lambda: print([one.how for one in opened], len(world.opened)))  # after kvcoll's
import fake_cupy
world = fake_cupy.install()
import cupy, kvcoll, numpy as np
ones, parts = np.ones(100_000, np.float32), []
for k in range(2):
    with cupy.cuda.Device(k):
        parts.append(cupy.asarray(ones))
kv = kvcoll.create("nccl")
kv.init("w", ones)
kv.push("w", parts)
opened += world.opened
print((kv.pull("w").get() == 2).all())
"""
    paths = [str(Path(__file__).parent), str(Path(kvcoll.__file__).parents[1])]
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=clean_environment() | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout.splitlines() == ["True", "['destroyed', 'destroyed'] 0"], done.stderr


@pytest.fixture
def nccl(world: World, monkeypatch: pytest.MonkeyPatch) -> CupyNccl:
    said = 'extern "C" const char *ncclGetLastError(void *) { return "no route to GPU 1\\n"; }'
    monkeypatch.setattr("kvcoll.cuda.nccl._LIBRARY", str(library_of(said)))
    return CupyNccl()


def test_what_nccl_says_of_itself_is_read(nccl: CupyNccl) -> None:
    assert nccl.version == (2, 30, 3)
    assert len(nccl.unique_id()) == 128


def test_an_id_is_given_as_the_cupy_at_hand_takes_it(
    nccl: CupyNccl, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = sys.modules["cupy.cuda.nccl"]
    given: list[Any] = []

    def communicator(size: int, unique_id: Any, rank: int) -> Any:
        if not isinstance(unique_id, tuple):
            raise TypeError("Expected tuple, got bytes")
        given.append(unique_id)

    unique_id = bytes(range(128, 256))
    monkeypatch.setattr(library, "get_unique_id", lambda: tuple(range(-128, 0)))  # CuPy 13
    assert nccl.unique_id() == unique_id
    monkeypatch.setattr(library, "NcclCommunicator", communicator)
    nccl.init_rank(2, unique_id, 0, find.find_gpus().devices[1])
    assert given == [tuple(range(-128, 0))]


def test_errors_of_nccl_come_with_its_last_words(
    nccl: CupyNccl, monkeypatch: pytest.MonkeyPatch
) -> None:
    comms = nccl.init_all(find.find_gpus().devices)
    member = comms[0]._comm  # type: ignore[attr-defined]
    for error, text in [
        (NcclError("NCCL_ERROR_REMOTE_ERROR: remote process exited"), "remote process exited"),
        (KeyError(9), "NCCL: result 9"),  # newer than CuPy, which has no name for it
    ]:
        member.error = error
        with pytest.raises(CollectiveError, match=rf"{text} \(no route to GPU 1\)$"):
            comms[0].check()
    member.error = KeyError(7)  # in progress: no error
    comms[0].check()

    def fails(*_: object) -> None:
        raise NcclError("NCCL_ERROR_SYSTEM_ERROR")

    library = sys.modules["cupy.cuda.nccl"]
    for name, call in (
        ("get_unique_id", nccl.unique_id),
        ("NcclCommunicator", lambda: nccl.init_rank(2, b"", 0, find.find_gpus().devices[0])),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(library, name, fails)
            with pytest.raises(CollectiveError, match=r"^nccl\w+: .*SYSTEM_ERROR \(no route"):
                call()
    with monkeypatch.context() as patched:
        patched.setattr(library, "groupEnd", fails)
        with pytest.raises(CollectiveError, match=r"ncclGroupEnd: .*SYSTEM_ERROR"), nccl.group():
            pass
    for comm in comms:
        comm.abort()


def test_a_group_in_which_a_call_fails_is_ended_and_the_first_error_told(
    nccl: CupyNccl, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[bool] = []
    library = sys.modules["cupy.cuda.nccl"]

    def end() -> None:
        ended.append(True)
        raise NcclError("invalid usage")

    monkeypatch.setattr(library, "groupEnd", end)
    with pytest.raises(ValueError, match="the first"), nccl.group():
        raise ValueError("the first")
    assert ended == [True]
