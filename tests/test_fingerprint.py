"""Fingerprints: every change of a few bits is seen, and only what an array holds counts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kvcoll import fingerprint

pytestmark = pytest.mark.single

BLOCK = fingerprint.BLOCK_BYTES // 8
# Hashed as they are; of one block, with words that are in no whole row; of two and a half.
SIZES = [1, 7, 1000, 2049, 70_001, 2 * BLOCK + 70_001]


def words(n: int) -> Any:
    return np.random.default_rng(n).integers(0, 2**64, n, np.uint64)


@pytest.mark.parametrize("n", SIZES)
def test_a_flip_of_any_bit_is_seen(n: int) -> None:
    array = words(n)
    before = fingerprint.of(array)
    places = {0, n // 3, n // 2, max(0, n - 2), n - 1, min(n - 1, 511), min(n - 1, BLOCK)}
    for place in places:
        for bit in (0, 31, 63):
            array[place] ^= np.uint64(1 << bit)
            assert fingerprint.of(array) != before
            array[place] ^= np.uint64(1 << bit)
    assert fingerprint.of(array) == before


@pytest.mark.parametrize("apart", [1, 2, 511, 512, 513, 1024, 1026, BLOCK, BLOCK - 512, 60_000])
@pytest.mark.parametrize("bit", [0, 31, 63])
def test_equal_flips_in_two_places_are_seen(apart: int, bit: int) -> None:
    array = np.zeros(2 * BLOCK, np.uint64)
    before = fingerprint.of(array)
    for first in (0, 512, 3000):
        for signs in ((1, 1), (1, -1)):
            changed = array.copy()
            changed[first] += np.uint64(1 << bit)
            changed[first + apart] += np.uint64(signs[1] * (1 << bit) % 2**64)
            assert fingerprint.of(changed) != before


@pytest.mark.parametrize("width", [64, 512, 513, 1024, 3000])
def test_swapped_rows_of_a_matrix_are_seen_even_if_each_is_one_hot(width: int) -> None:
    array = np.eye(600, width, dtype=np.float32)
    before = fingerprint.of(array.reshape(-1))
    for first, second in [(0, 1), (0, 2), (5, 9), (1, 513), (0, 512), (3, 515), (2, 599)]:
        swapped = array.copy()
        swapped[[first, second]] = array[[second, first]]
        if not np.array_equal(swapped, array):
            assert fingerprint.of(swapped.reshape(-1)) != before


def test_rows_of_the_blocks_own_width_are_not_lost_when_they_are_swapped() -> None:
    rows = np.zeros((513, 512), np.uint64)
    rows[:, :300] = words(300)  # all rows are equal
    rows[7] = rows[7, ::-1]  # but one, which has the same sum
    before = fingerprint.of(rows.reshape(-1))
    for other in (0, 6, 8, 512):
        swapped = rows.copy()
        swapped[[7, other]] = rows[[other, 7]]
        assert fingerprint.of(swapped.reshape(-1)) != before


def test_no_change_of_four_words_in_a_small_block_escapes_both_matrices() -> None:
    # The corners of a rectangle keep all sums of rows and columns of the first matrix.
    n_rows, generator = 40, np.random.default_rng(5)
    array = words(n_rows * 512)
    before = fingerprint.of(array)
    for _ in range(300):
        (top, bottom) = generator.choice(n_rows, 2, replace=False)
        (left, right) = generator.choice(512, 2, replace=False)
        by = generator.integers(1, 2**63, 1, np.uint64)  # an array, which wraps without a word
        changed = array.reshape(n_rows, 512).copy()
        changed[[top, bottom], [left, right]] += by
        changed[[top, bottom], [right, left]] -= by
        assert fingerprint.of(changed.reshape(-1)) != before


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int8", "complex64", "bool"])
def test_where_an_array_lies_does_not_count(dtype: str) -> None:
    array = (np.arange(50_001) % 2).astype(dtype)
    before = fingerprint.of(array)
    for shift in range(1, 9):
        moved = np.empty(array.size + shift, dtype)[shift:]
        moved[:] = array
        assert fingerprint.of(moved) == before


def test_dtype_size_and_words_count() -> None:
    array = np.zeros(64, np.float32)
    told = [
        fingerprint.of(array),
        fingerprint.of(array, "value:w"),
        fingerprint.of(array, "value:v"),
        fingerprint.of(array, "value:w", (64,)),
        fingerprint.of(array, "value:w", (8, 8)),
        fingerprint.of(array.view(np.int32)),
        fingerprint.of(array[:63]),
        fingerprint.of(array[:0]),
    ]
    assert len(set(told)) == len(told)
    assert {len(one) for one in told} == {32}


def test_the_padding_of_extended_floats_does_not_count() -> None:
    for dtype in (np.longdouble, np.clongdouble):
        array = np.arange(3000).astype(dtype)
        before = fingerprint.of(array)
        raw = array.view(np.uint8)
        if array.dtype.itemsize % 16:
            pytest.skip("extended floats have no padding here")
        raw[15] ^= 7
        assert fingerprint.of(array) == before
        raw[3] ^= 7
        assert fingerprint.of(array) != before


def test_the_fingerprint_of_all_goes_by_names_and_not_by_their_order() -> None:
    one, other = fingerprint.of(words(3)), fingerprint.of(words(5))
    all_ = fingerprint.of_all({"a": one, "b": other})
    assert all_ == fingerprint.of_all({"b": other, "a": one})
    assert all_ != fingerprint.of_all({"a": other, "b": one})
    assert all_ != fingerprint.of_all({"a": one})
