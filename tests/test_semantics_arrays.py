"""Arrays of every dtype, shape, layout and library go through a store, in and out."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

import kvcoll
from kvcoll import KVStore

Array = npt.NDArray[Any]
FLOATS = ["f2", "f4", "f8", "g", "c8", "c16", "G"]
INTEGERS = ["b", "B", "h", "H", "i", "I", "l", "L", "q", "Q"]
BF16 = np.dtype(ml_dtypes.bfloat16)
E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
DTYPES = [np.dtype(letter) for letter in FLOATS + INTEGERS] + [BF16]
SHAPES = [(), (0,), (1,), (3, 0, 2), (0, 0), (2, 3), (1, 1, 1, 1), (5, 4, 3)]


def numbers(shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
    """Make 1, 2, 3, … of a shape."""
    size = int(np.prod(shape))
    array: Array = np.arange(1, size + 1).reshape(shape).astype(dtype)
    return array


def total(kv: KVStore, *factors: int) -> int:
    """Sum, over the ranks, what each pushes in factors of its rank and one."""
    return sum(factor * (rank + 1) for rank in range(kv.num_workers) for factor in factors)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_that_numpy_sums_is_stored_summed_and_pulled(
    kv: KVStore, dtype: np.dtype[Any]
) -> None:
    base = numbers((2, 2), dtype)
    weight = np.array(kv.rank + 1).astype(dtype)
    kv.init(3, base)
    kv.push(3, base * weight)
    pulled = kv.pull(3)
    assert pulled.dtype == dtype
    expected = numbers((2, 2), np.int64) * total(kv, 1)
    np.testing.assert_array_equal(pulled.astype(np.complex128).real, expected)
    kv.push([3, 3], [[base * weight, base], base])
    expected = numbers((2, 2), np.int64) * (total(kv, 1) + 2 * kv.num_workers)
    np.testing.assert_array_equal(kv.pull(3).astype(np.complex128).real, expected)


@pytest.mark.parametrize("dtype", [np.complex64, np.complex128, np.clongdouble])
def test_imaginary_parts_are_summed(kv: KVStore, dtype: Any) -> None:
    kv.init(3, np.zeros(2, dtype))
    kv.push(3, np.array([1 + 2j, -3j], dtype) * (kv.rank + 1))
    np.testing.assert_array_equal(kv.pull(3), np.array([1 + 2j, -3j]) * total(kv, 1))


def test_bool_is_summed_as_numpy_does(kv: KVStore) -> None:
    kv.init(3, np.zeros(4, bool))
    first = np.array([True, False, kv.rank == 0, False])
    kv.push(3, [first, np.array([True, True, False, False])])
    np.testing.assert_array_equal(kv.pull(3), [True, True, True, False])


def test_longdouble_keeps_all_of_its_bits(kv: KVStore) -> None:
    fine = np.longdouble(1) + np.finfo(np.longdouble).eps
    kv.init(3, np.zeros(3, np.longdouble))
    kv.push(3, np.full(3, fine))
    np.testing.assert_array_equal(kv.pull(3), np.full(3, fine * kv.num_workers))


def test_float8_is_summed_in_float32(kv: KVStore) -> None:
    kv.init(3, np.zeros(5, E4M3))
    terms = [np.full(5, x, E4M3) for x in (16, 1, 1)]  # from 16 on neighbours are 2 apart
    kv.push(3, terms if kv.rank == 0 else np.zeros(5, E4M3))
    np.testing.assert_array_equal(kv.pull(3).astype(np.float32), np.full(5, 18))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", ["f4", "f2", "i8"])
def test_every_shape_goes_through_every_call(
    kv: KVStore, shape: tuple[int, ...], dtype: str
) -> None:
    base = numbers(shape, dtype)
    out = np.zeros(shape, dtype)
    kv.broadcast(1, base, out)
    np.testing.assert_array_equal(out, base)
    kv.init(2, base)
    for keys, value in ((1, base), (1, [base, base]), ([2, 1], [base, [base, base]])):
        kv.push(keys, value)
    np.testing.assert_array_equal(kv.pull(1), numbers(shape, dtype) * 2 * kv.num_workers)
    assert kv.pull(1).shape == shape
    np.testing.assert_array_equal(kv.pull(2), numbers(shape, dtype) * kv.num_workers)
    kv.pushpull(1, base)
    np.testing.assert_array_equal(base, numbers(shape, dtype) * kv.num_workers)
    kv.set_updater(lambda key, input, stored: np.add(stored, input, out=stored))
    kv.push(1, numbers(shape, dtype))
    np.testing.assert_array_equal(kv.pull(1), numbers(shape, dtype) * 2 * kv.num_workers)
    kv.set_optimizer("test")
    if dtype != "i8":
        kv.push(1, numbers(shape, dtype))
        np.testing.assert_array_equal(kv.pull(1), numbers(shape, dtype) * 3 * kv.num_workers)


def laid_out(kind: str, values: Array) -> Array:
    """Put the values of a (4, 6) array into memory in another way."""
    dtype = values.dtype.newbyteorder() if kind == "byte-swapped" else values.dtype
    places: dict[str, Array] = {
        "contiguous": np.empty((4, 6), dtype),
        "byte-swapped": np.empty((4, 6), dtype),
        "Fortran order": np.empty((4, 6), dtype, order="F"),
        "transposed": np.empty((6, 4), dtype).T,
        "strided": np.full((8, 18), 77, dtype)[::2, ::3],
        "negative strides": np.empty((4, 6), dtype)[::-1, ::-1],
        "unaligned": np.ndarray((4, 6), dtype, np.empty(values.nbytes + 1, np.uint8), 1),
    }
    places[kind][...] = values
    return places[kind]


LAYOUTS = [
    "contiguous",
    "Fortran order",
    "transposed",
    "strided",
    "negative strides",
    "byte-swapped",
    "unaligned",
]


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("dtype", ["f4", "f2", "i4", "c8"])
def test_every_layout_goes_in_and_out(kv: KVStore, kind: str, dtype: str) -> None:
    values = numbers((4, 6), dtype)
    given = laid_out(kind, values)
    kv.init(1, given)
    kv.init(2, values)
    np.testing.assert_array_equal(kv.pull(1), values)
    assert kv.pull(1).dtype == values.dtype
    assert kv.pull(1).dtype.isnative
    n = kv.num_workers
    for keys, value, expected in (
        (1, given, n),
        (1, [given, values], 2 * n),
        ([1, 2], [given, given], n),
        ([1, 2], [[given, given, given], values], 3 * n),
    ):
        kv.push(keys, value)
        np.testing.assert_array_equal(kv.pull(1), values * expected)
    out = laid_out(kind, np.zeros_like(values))
    kv.pull(1, out=out)
    np.testing.assert_array_equal(out, values * 3 * n)
    if kind == "strided":
        assert out.base is not None
        assert (out.base[1::2] == 77).all()  # nothing beside the output is written
    kv.pushpull(2, given)
    np.testing.assert_array_equal(given, values * n)


@pytest.mark.parametrize("kind", LAYOUTS)
def test_another_layout_on_each_rank_makes_no_difference(kv: KVStore, kind: str) -> None:
    values = numbers((4, 6), "f4") * np.float32(kv.rank + 1)
    kv.init(1, laid_out(kind if kv.rank else "contiguous", values))
    kv.push(1, laid_out(LAYOUTS[(LAYOUTS.index(kind) + kv.rank) % len(LAYOUTS)], values))
    np.testing.assert_array_equal(kv.pull(1), numbers((4, 6), "f4") * total(kv, 1))


def test_a_read_only_array_can_be_stored_and_pushed(kv: KVStore) -> None:
    value = numbers((3, 3), "f4")
    value.flags.writeable = False
    kv.init(1, value)
    kv.push(1, value)
    kv.push(1, [value, value])
    kv.set_updater(lambda key, input, stored: stored.__iadd__(input))
    kv.push(1, value)
    np.testing.assert_array_equal(kv.pull(1), numbers((3, 3), "f4") * 3 * kv.num_workers)


@pytest.mark.parametrize(
    ("key", "given"),
    [("f4", "f8"), ("f8", "f4"), ("f4", "i8"), ("f2", "f8"), ("c8", "f8"), ("i2", "i8")],
)
def test_a_dtype_that_casts_by_same_kind_is_cast(kv: KVStore, key: str, given: str) -> None:
    kv.init(1, np.zeros(3, key))
    kv.push(1, numbers((3,), given))
    kv.push(1, [numbers((3,), given), numbers((3,), key)])
    pulled = kv.pull(1)
    assert pulled.dtype == np.dtype(key)
    np.testing.assert_array_equal(pulled, numbers((3,), key) * 2 * kv.num_workers)


def test_another_dtype_on_each_rank_is_cast_to_the_keys(kv: KVStore) -> None:
    kv.init(1, np.zeros(3, "f4"))
    kv.push(1, numbers((3,), ["f4", "f8", "f2", "i4"][kv.rank % 4]))
    np.testing.assert_array_equal(kv.pull(1), numbers((3,), "f4") * kv.num_workers)


def test_a_numpy_scalar_is_a_0_d_array(kv: KVStore) -> None:
    kv.init(1, np.float32(3))
    kv.push(1, [np.float32(4), np.float64(0.5)])
    assert kv.pull(1).shape == ()
    np.testing.assert_array_equal(kv.pull(1), np.float32(4.5 * kv.num_workers))


@pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning")
def test_a_subclass_is_taken_as_the_array_it_is(kv: KVStore) -> None:
    kv.init(1, np.matrix([[1.0, 2.0]]))
    kv.push(1, [np.matrix([[1.0, 2.0]])] * 2)
    pulled = kv.pull(1)
    assert type(pulled) is np.ndarray
    np.testing.assert_array_equal(pulled, np.array([[2.0, 4.0]]) * kv.num_workers)


class Foreign:
    """An array of another library: it speaks DLPack, and nothing else."""

    def __init__(self, array: Array) -> None:
        self.array = array

    def __dlpack__(self, **asked: Any) -> Any:
        return self.array.__dlpack__(**asked)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.array.__dlpack_device__()


def test_a_dlpack_array_goes_through_every_call(kv: KVStore) -> None:
    memory = numbers((2, 3), "f4")
    kv.init(1, Foreign(memory))
    kv.push(1, [Foreign(memory), memory])
    np.testing.assert_array_equal(memory, numbers((2, 3), "f4"))
    out = Foreign(np.zeros((2, 3), np.float32))
    assert kv.pull(1, out=out) is out
    np.testing.assert_array_equal(out.array, numbers((2, 3), "f4") * 2 * kv.num_workers)
    kv.pushpull(1, Foreign(memory))
    np.testing.assert_array_equal(memory, numbers((2, 3), "f4") * kv.num_workers)


def test_a_read_only_dlpack_array_cannot_be_an_output(kv: KVStore) -> None:
    memory = numbers((3,), "f4")
    kv.init(1, memory)
    memory.flags.writeable = False
    with pytest.raises(kvcoll.errors.ArrayError):
        kv.pull(1, out=Foreign(memory))
    kv.push(1, numbers((3,), "f4"))
    np.testing.assert_array_equal(kv.pull(1), numbers((3,), "f4") * kv.num_workers)


def test_torch_tensors_go_through_every_call(kv: KVStore) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    tensor = torch.arange(6, dtype=torch.float32).reshape(2, 3)
    kv.init(1, tensor)
    kv.push(1, [tensor, tensor])
    out = torch.zeros(2, 3)
    kv.pull(1, out=out)
    np.testing.assert_array_equal(out.numpy(), np.arange(6).reshape(2, 3) * 2 * kv.num_workers)
