"""What an array is: every kind of array goes in and out, and nothing else does."""

from __future__ import annotations

import ctypes
import sys
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from dlpack_object import CUDA, CUDA_HOST, Foreign

from kvcoll.arrays import as_array, as_output, describe, fill_device
from kvcoll.errors import ArrayError, MissingDependencyError

pytestmark = pytest.mark.single

BF16 = np.dtype(ml_dtypes.bfloat16)
F16, F32 = np.dtype("f2"), np.dtype("f4")

BASE = np.arange(24, dtype=np.float32).reshape(4, 6)
LAYOUTS: dict[str, npt.NDArray[Any]] = {
    "contiguous": BASE,
    "strided": BASE[::2, 1::3],
    "negative strides": BASE[::-1, ::-2],
    "Fortran order": BASE.T,
    "0-d": np.asarray(np.float32(7)),
    "empty": np.empty((0, 3), np.float32),
    "complex": np.array([1 + 2j, 3 - 4j], np.complex64),
    "int8": np.array([-128, 127], np.int8),
    "bool": np.array([True, False, True]),
}
layouts = pytest.mark.parametrize("array", LAYOUTS.values(), ids=LAYOUTS.keys())
both_versions = pytest.mark.parametrize(
    "knows_versions", [False, True], ids=["legacy capsule", "versioned capsule"]
)


class Named(np.ndarray[Any, Any]):
    """A subclass that changes what arithmetic means."""

    def __add__(self, other: Any) -> Any:
        raise AssertionError("kvcoll must add as NumPy does")


def test_a_numpy_array_is_viewed_and_not_copied() -> None:
    array = BASE.copy()
    assert np.shares_memory(as_array(array), array)
    np.testing.assert_array_equal(as_array(array), BASE)


def test_a_subclass_becomes_a_plain_array_on_the_same_memory() -> None:
    array = BASE.copy().view(Named)
    plain, (output, device) = as_array(array), as_output(array)
    assert type(plain) is type(output) is np.ndarray
    assert device is None
    output[0, 0] = 99
    assert array[0, 0] == plain[0, 0] == 99


def test_a_numpy_scalar_is_a_0_d_array() -> None:
    array = as_array(np.float16(2.5))
    assert array.shape == ()
    assert array.dtype == F16
    assert array[()] == 2.5


def test_a_masked_array_is_refused() -> None:
    masked = np.ma.array([1.0, 2.0], mask=[True, False])
    with pytest.raises(ArrayError, match=r"^a masked array has no one sum: push its \.filled"):
        as_array(masked)


@pytest.mark.parametrize("value", [None, 3, 2.5, "w", b"w", [1.0, 2.0], {"a": 1}, object()])
def test_what_is_no_array_is_refused(value: object) -> None:
    kind = type(value).__name__
    with pytest.raises(ArrayError) as raised:
        as_array(value)
    assert str(raised.value) == (
        f"expected an array of NumPy, CuPy or DLPack, got {kind}: "
        "make it one, for example with numpy.asarray"
    )
    with pytest.raises(ArrayError, match=f"^an output must be an array, got {kind}$"):
        as_output(value)


def test_a_read_only_array_goes_in_but_not_out() -> None:
    array = BASE.copy()
    array.flags.writeable = False
    np.testing.assert_array_equal(as_array(array), BASE)
    with pytest.raises(ArrayError) as raised:
        as_output(array)
    assert str(raised.value) == (
        "the output float32[4, 6] is read-only: give one that can be written"
    )


@both_versions
@layouts
def test_a_dlpack_array_is_read_in_place(array: npt.NDArray[Any], knows_versions: bool) -> None:
    foreign = Foreign(array, knows_versions=knows_versions)
    seen = as_array(foreign)
    assert (seen.dtype, seen.shape) == (array.dtype, array.shape)
    np.testing.assert_array_equal(seen, array)
    if array.size:
        assert seen.__array_interface__["data"][0] == array.__array_interface__["data"][0]
        assert seen.strides == array.strides
    del seen
    assert (foreign.n_given, foreign.n_freed) == (1, 1)


@both_versions
@layouts
def test_a_dlpack_output_is_written_in_the_producers_memory(
    array: npt.NDArray[Any], knows_versions: bool
) -> None:
    memory = array.copy() if array.ndim == 0 else BASE.astype(array.dtype)
    around = memory.copy()
    view: Any = memory if array.ndim == 0 else memory[::-2, 1::2]
    if array.size == 0:
        view = memory[:0]
    output, device = as_output(Foreign(view, knows_versions=knows_versions))
    assert device is None
    assert (output.shape, output.dtype) == (view.shape, view.dtype)
    output[...] = 1
    expected = around
    if array.ndim == 0:
        expected[...] = 1
    elif array.size:
        expected[::-2, 1::2] = 1  # and nothing around it
    np.testing.assert_array_equal(memory, expected)


def test_a_read_only_dlpack_array_goes_in_but_not_out() -> None:
    # It gives a legacy capsule to who does not ask for a versioned one, and that
    # cannot say that it is read-only: the refusal must not depend on it.
    memory = BASE.copy()
    foreign = Foreign(memory, knows_versions=True, read_only=True)
    np.testing.assert_array_equal(as_array(foreign), BASE)
    with pytest.raises(ArrayError, match=r"^the output float32\[4, 6\] is read-only"):
        as_output(foreign)


def test_pinned_host_memory_is_read_as_the_cpus() -> None:
    foreign = Foreign(BASE, knows_versions=False, device=CUDA_HOST)
    np.testing.assert_array_equal(as_array(foreign), BASE)


@pytest.mark.parametrize("device", [4, 7, 8, 10, 14])
def test_another_device_is_refused_by_its_number(device: int) -> None:
    foreign = Foreign(BASE, knows_versions=True, device=device)
    for door in (as_array, as_output):
        with pytest.raises(ArrayError) as raised:
            door(foreign)
        assert str(raised.value) == (
            f"Foreign lies on a device of DLPack type {device}: "
            "kvcoll reads the memory of the CPU and of CUDA"
        )


def test_a_producer_that_refuses_is_named_with_its_reason() -> None:
    class Refuses:
        def __dlpack_device__(self) -> tuple[int, int]:
            return 1, 0

        def __dlpack__(self, **asked: object) -> Any:
            raise BufferError("it requires a gradient")

    for door in (as_array, as_output):
        with pytest.raises(ArrayError) as raised:
            door(Refuses())
        assert str(raised.value) == "Refuses cannot be read by DLPack: it requires a gradient"


def test_an_array_on_a_gpu_without_cupy_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    foreign = Foreign(BASE, knows_versions=True, device=CUDA)
    for door in (as_array, as_output):
        with pytest.raises(MissingDependencyError, match=r"pip install 'kvcoll\[gpu\]' \(or"):
            door(foreign)


class OnDevice:
    """What a fake CuPy makes: memory that only `get` and assignment reach."""

    def __init__(self, memory: npt.NDArray[Any]) -> None:
        self.memory, self.shape, self.dtype = memory, memory.shape, memory.dtype

    def get(self) -> npt.NDArray[Any]:
        host: npt.NDArray[Any] = self.memory.copy()
        return host

    def __setitem__(self, index: Any, value: OnDevice) -> None:
        self.memory[index] = value.memory


@pytest.mark.parametrize("device", [2, 13], ids=["device memory", "managed memory"])
def test_an_array_on_a_gpu_goes_in_and_out_through_cupy(
    monkeypatch: pytest.MonkeyPatch, device: int
) -> None:
    cupy: Any = ModuleType("cupy")
    cupy.from_dlpack = lambda foreign: OnDevice(foreign.array)
    cupy.asarray = lambda host: OnDevice(host.copy())
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    memory = BASE[:, ::2].copy()
    foreign = Foreign(memory, knows_versions=True, device=device)

    pushed = as_array(foreign)
    np.testing.assert_array_equal(pushed, BASE[:, ::2])
    assert not np.shares_memory(pushed, memory)

    host, on_device = as_output(foreign)
    assert on_device is not None
    assert (host.shape, host.dtype) == ((4, 3), F32)
    host[...] = BASE[:, 1::2]
    fill_device(on_device, host)
    np.testing.assert_array_equal(memory, BASE[:, 1::2])


def test_torch_tensors_on_the_cpu_go_in_and_out() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    tensor = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    np.testing.assert_array_equal(as_array(tensor[:, ::2]), [[0, 2], [4, 6], [8, 10]])
    output, _ = as_output(tensor[:, ::2])
    output[...] = -1
    assert tensor[:, ::2].eq(-1).all()
    assert tensor[:, 1].tolist() == [1, 5, 9]
    with pytest.raises(ArrayError, match="Tensor cannot be read by DLPack"):
        as_array(tensor.clone().requires_grad_())


def test_arrays_are_written_in_one_notation() -> None:
    shown: dict[str, npt.NDArray[Any]] = {
        "float32[2, 3]": np.zeros((2, 3), np.float32),
        "float64[]": np.zeros(()),
        "bfloat16[0]": np.zeros(0, BF16),
        "int16[1, 1, 1]": np.zeros((1, 1, 1), np.int16),
    }
    for text, array in shown.items():
        assert describe(array) == text


class Bfloat16Tensor:
    """A bfloat16 tensor of another library: NumPy does not read its dtype."""

    def __init__(self, values: Any, *, versioned: bool, read_only: bool = False) -> None:
        # As unsigned words it goes through NumPy's own DLPack; the dtype code is set then.
        self.words = values.view(np.uint16)
        self.words.flags.writeable = not read_only
        self.versioned = versioned

    def __dlpack__(self, *, stream: Any = None, max_version: Any = None) -> Any:
        if max_version is not None and not self.versioned:
            raise TypeError("older than DLPack 1.0")
        version = {"max_version": max_version} if self.versioned else {}
        capsule = self.words.__dlpack__(**version)
        name = b"dltensor_versioned" if max_version and self.versioned else b"dltensor"
        pointer = ctypes.pythonapi.PyCapsule_GetPointer
        pointer.restype, pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
        tensor = pointer(capsule, name) + (32 if name.endswith(b"versioned") else 0)
        ctypes.c_uint8.from_address(tensor + 20).value = 4  # kDLBfloat
        return capsule

    def __dlpack_device__(self) -> tuple[int, int]:
        return (1, 0)


@pytest.mark.parametrize("versioned", [False, True], ids=["legacy", "versioned"])
def test_a_bfloat16_tensor_is_read_and_written_in_place(versioned: bool) -> None:
    values = np.arange(12, dtype=np.float32).reshape(3, 4).astype(BF16)
    for part in (values, values.T, values[::2, 1:], values[1, 2:2], values[2, 3]):
        tensor = Bfloat16Tensor(np.asarray(part), versioned=versioned)
        read = as_array(tensor)
        assert read.dtype == BF16
        np.testing.assert_array_equal(read.astype(np.float32), part.astype(np.float32))
    out, _ = as_output(Bfloat16Tensor(values, versioned=versioned))
    out[1] = 7
    assert values[1].astype(np.float32).tolist() == [7, 7, 7, 7]


def test_a_read_only_bfloat16_tensor_is_no_output() -> None:
    values = np.ones(3, BF16)
    with pytest.raises(ArrayError, match="read-only"):
        as_output(Bfloat16Tensor(values, versioned=True, read_only=True))
