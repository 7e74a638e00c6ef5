"""Kernels that move and add give the bits of the host's packing and casts."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from host_kernel import HostKernel, needs_compiler
from quick_first import quick_first
from test_kernels_fused import assert_same_bits, awkward

from kvcoll.arrays import can_cast, round_to, sum_in_order, wide
from kvcoll.gpu.kernel import KernelSource
from kvcoll.kernels.moves import ADDED, MOVED, added, code_of, moved
from kvcoll.kernels.table import Piece, n_lanes, rows_of

pytestmark = [pytest.mark.single, needs_compiler]

NAMES = "float32 float64 float16 int64 complex64 bool int8 uint8 int16 uint16 int32 uint32 uint64"
DTYPES = [*map(np.dtype, NAMES.split()), np.dtype("c16"), np.dtype(ml_dtypes.bfloat16)]
SIZES = (1, 1023, 0, 1024, 2049)


def numbers(n: int, dtype: np.dtype[Any], seed: int) -> Any:
    """Give numbers of a dtype, among them those that are awkward for it."""
    if dtype.kind in "biu":
        random = np.random.default_rng(seed)
        return (
            random.integers(0, 256, n * dtype.itemsize, np.uint8)
            .view(np.uint8 if dtype.kind == "b" else dtype)[:n]
            .astype(dtype)
        )
    if dtype.kind == "c":
        part = np.dtype(f"f{dtype.itemsize // 2}")
        return np.ascontiguousarray(awkward(2 * max(n, 12), part, seed)[: 2 * n]).view(dtype)
    return awkward(max(n, 12), dtype, seed)[:n].copy()


def run(source: KernelSource, table: Any, more: list[int]) -> None:
    words = np.concatenate([table.reshape(-1), np.array(more, np.int64)])
    HostKernel(source)(n_lanes(table), [words.ctypes.data, np.int64(len(table))])


def assert_equal_parts(got: Any, expected: Any) -> None:
    if expected.dtype.kind == "c":
        part = np.dtype(f"f{expected.itemsize // 2}")
        got, expected = got.view(part), expected.view(part)
    assert_same_bits(got, expected)


@pytest.mark.parametrize("source", quick_first(DTYPES, 2), ids=lambda dtype: dtype.name)
def test_arrays_are_cast_as_the_host_casts_them(source: np.dtype[Any]) -> None:
    for target in DTYPES:
        if not can_cast(source, target):
            continue
        given = [numbers(n, source, n) for n in SIZES]
        got = [np.full(n, 7).astype(target) for n in SIZES]
        pieces = [
            Piece(len(a), (a.ctypes.data, b.ctypes.data)) for a, b in zip(given, got, strict=True)
        ]
        run(moved(source, target), rows_of(MOVED, pieces), [])
        for a, b in zip(given, got, strict=True):
            expected = np.empty(a.shape, target)
            round_to(a, expected)
            assert_equal_parts(b, expected)


@pytest.mark.parametrize("target", quick_first(DTYPES, 5), ids=lambda dtype: dtype.name)
def test_lists_of_any_dtypes_are_added_as_the_host_adds_them(target: np.dtype[Any]) -> None:
    sources = [dtype for dtype in DTYPES if can_cast(dtype, target)]
    for of in ([target], sources):
        for into in {target, wide(target)}:
            lists = [
                [numbers(n, of[(n + k) % len(of)], 10 * k + n) for k in range(1 + number)]
                for number, n in enumerate(SIZES)
            ]
            mixed = of is sources or into != target
            got = [np.zeros(n, into) for n in SIZES]
            n_rows = sum(n > 0 for n in SIZES)
            pieces, more = [], list[int]()
            for values, to in zip(lists, got, strict=True):
                first = n_rows * ADDED.n_words + len(more)
                pieces.append(Piece(to.size, (to.ctypes.data, len(values), first)))
                for value in values:
                    more += [value.ctypes.data, code_of(value.dtype)]
            run(added(into, mixed=mixed), rows_of(ADDED, pieces), more)
            for values, to in zip(lists, got, strict=True):
                total, expected = np.empty(to.size, wide(into)), np.empty(to.size, into)
                sum_in_order(values, total)
                round_to(total, expected)
                assert_equal_parts(to, expected)
