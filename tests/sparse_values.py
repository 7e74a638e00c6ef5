"""Numbers and rows for the tests of row-sparse values."""

from __future__ import annotations

from typing import Any

import numpy as np

from kvcoll import RowSparse

F32, F16 = np.dtype("f4"), np.dtype("f2")
SHAPE = (40, 3)


def numbers(shape: Any, seed: int, dtype: Any = F32) -> Any:
    """Give numbers whose sums depend on the order in which they are added."""
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(shape) * 2.0 ** rng.integers(-6, 6, shape)).astype(dtype)


def rows_of(rank: int, turn: int = 0, shape: tuple[int, ...] = SHAPE) -> RowSparse:
    """Give what a rank pushes: other rows on each, other numbers of them, none on rank 1.

    Their sums are exact, so that it does not matter on which hosts the ranks are.
    """
    rng = np.random.default_rng([rank, turn])
    n = 0 if (rank + turn) % 3 == 1 else 5 + 4 * rank
    indices = rng.integers(0, shape[0], n)
    data = rng.integers(-999, 999, (n, *shape[1:])) / F32.type(8)
    return RowSparse(data.astype(F32), indices, shape)


def add_to(out: Any, value: RowSparse) -> Any:
    """Add rows one by one."""
    for index, row in zip(value.indices.tolist(), value.data, strict=True):
        out[index] += row
    return out


def total(size: int, turn: int = 0) -> Any:
    """Sum `rows_of` over the ranks."""
    expected = np.zeros(SHAPE, F32)
    for rank in range(size):
        expected += add_to(np.zeros(SHAPE, F32), rows_of(rank, turn))
    return expected
