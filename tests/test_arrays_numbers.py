"""Which dtypes there are, what casts to what, and in which precision sums are taken."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from kvcoll.arrays import can_cast, is_small_float, native, sum_in_order, wide
from kvcoll.errors import DTypeMismatchError

pytestmark = pytest.mark.single

BF16 = np.dtype(ml_dtypes.bfloat16)
E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
E5M2 = np.dtype(ml_dtypes.float8_e5m2)
F16, F32, F64 = np.dtype("f2"), np.dtype("f4"), np.dtype("f8")


@pytest.mark.parametrize(
    ("source", "target", "may"),
    [
        (F64, F32, True),
        (F64, F16, True),
        (F32, np.dtype("c8"), True),
        (np.dtype("c16"), np.dtype("c8"), True),
        (np.dtype("c8"), F64, False),
        (F32, np.dtype("i8"), False),
        (np.dtype("i8"), F32, True),
        (np.dtype("i8"), np.dtype("i1"), True),
        (np.dtype("i4"), np.dtype("u4"), False),
        (np.dtype("u4"), np.dtype("i4"), True),
        (np.dtype("?"), np.dtype("i4"), True),
        (np.dtype("i4"), np.dtype("?"), False),
        (np.dtype(">f4"), F32, True),
        (BF16, F32, True),
        (F64, BF16, True),
        (F16, BF16, True),
        (BF16, F16, True),
        (np.dtype("i8"), BF16, True),
        (np.dtype("?"), BF16, True),
        (BF16, np.dtype("i8"), False),
        (BF16, np.dtype("c8"), True),
        (np.dtype("c8"), BF16, False),
        (E4M3, BF16, True),
        (BF16, E4M3, True),
        (E5M2, E4M3, True),
        (E5M2, np.dtype("i1"), False),
    ],
    ids=str,
)
def test_casts_follow_numpys_same_kind_rule(
    source: np.dtype[Any], target: np.dtype[Any], may: bool
) -> None:
    assert can_cast(source, target) is may
    if may:  # and what is allowed works
        out = np.full(2, 5).astype(wide(target))
        sum_in_order([np.ones(2).astype(source)] * 2, out)
        np.testing.assert_array_equal(out.astype(target).astype(np.complex128), [2, 2])


@pytest.mark.parametrize("letter", ["f2", "f4", "f8", "c8", "c16", "i2", "i4", "i8", "u4", "g"])
def test_values_are_stored_in_this_machines_byte_order(letter: str) -> None:
    dtype = np.dtype(letter)
    assert native(dtype.newbyteorder()) == native(dtype) == dtype
    assert native(dtype.newbyteorder()).isnative


@pytest.mark.parametrize("dtype", [BF16, E4M3, E5M2, np.dtype("?"), np.dtype("u1")], ids=str)
def test_dtypes_without_byte_order_are_stored_as_they_are(dtype: np.dtype[Any]) -> None:
    assert native(dtype) == dtype


@pytest.mark.parametrize(
    "dtype",
    [
        np.dtype(object),
        np.dtype("U3"),
        np.dtype("S3"),
        np.dtype("M8[s]"),
        np.dtype("m8[s]"),
        np.dtype([("a", "f4")]),
        np.dtype("V4"),
        np.dtype(ml_dtypes.int4),
    ],
    ids=str,
)
def test_what_cannot_be_summed_is_refused(dtype: np.dtype[Any]) -> None:
    with pytest.raises(DTypeMismatchError) as raised:
        native(dtype)
    assert str(raised.value) == (
        f"values of dtype {dtype} cannot be summed: use a float, complex, integer or bool dtype"
    )


def test_sums_of_16_and_8_bits_are_taken_in_float32() -> None:
    assert {dtype: wide(dtype) for dtype in (F16, BF16, E4M3, E5M2)} == dict.fromkeys(
        (F16, BF16, E4M3, E5M2), F32
    )
    for dtype in (F32, F64, np.dtype("g"), np.dtype("c8"), np.dtype("i2"), np.dtype("u1")):
        assert wide(dtype) == dtype
        assert not is_small_float(dtype)


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_a_16_bit_sum_does_not_lose_small_terms(dtype: np.dtype[Any]) -> None:
    # From here on the dtype's neighbours are 2 apart: a sum in it would stay where it is.
    large = {F16: 2048, BF16: 256}[dtype]
    values = [np.array([n], dtype) for n in (large, 1, 1, 1, 1)]
    out = np.empty(1, np.float32)
    sum_in_order(values, out)
    assert out[0] == large + 4
    assert out.astype(dtype)[0] == large + 4


def test_values_are_added_left_to_right() -> None:
    values = [np.array([x]) for x in (1.0, 1e16, -1e16, 1.0)]
    out = np.empty(1)
    sum_in_order(values, out)
    assert out[0] == ((1.0 + 1e16) + -1e16) + 1.0 == 1.0


def test_integers_wrap_and_every_layout_is_added() -> None:
    out = np.empty((2, 3), np.int8)
    swapped = np.full((2, 3), 100, ">i2")
    fortran = np.full((3, 2), 100, np.int8).T
    strided = np.arange(24, dtype=np.int8).reshape(4, 6)[::-2, ::2]
    sum_in_order([swapped, fortran, strided], out)
    np.testing.assert_array_equal(out, 200 - 256 + np.array([[18, 20, 22], [6, 8, 10]]))
