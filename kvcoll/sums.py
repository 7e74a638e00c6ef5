"""The order in which the ranks' numbers are added: the one place that decides it.

Rules of the file: an element's sum depends on the ranks' elements and on nothing
else, not on its place in an array nor on who adds it; nothing is allocated in a sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import numpy as np

from .arrays import Array, DType, wide


@final
class Adder:
    """Adds one row a rank: one by one from rank 0 on, or in a tree.

    Parameters
    ----------
    n_rows : int
        How many ranks there are.
    row_bytes : int
        The longest row, in bytes of the dtype in which sums are taken.
    tree : bool, default False
        Add in a binary tree over the ranks, ``(0 + 1) + (2 + 3)``.
    """

    def __init__(self, n_rows: int, row_bytes: int, *, tree: bool = False) -> None:
        self._tree = tree
        depth = (n_rows - 1).bit_length() + 1 if tree else 1
        # Of 16-byte elements, so that it is aligned for every dtype.
        self._scratch = np.empty((depth, -(-row_bytes // 16)), np.complex128)

    def add(self, rows: Sequence[Array] | Array, out: Array) -> None:
        """Add rows of one dtype into `out`, which may be one of them.

        Parameters
        ----------
        rows : sequence of numpy.ndarray, shape (n,)
            By rank.
        out : numpy.ndarray, shape (n,)
            Of the rows' dtype, or of the one that their sum is rounded to.
        """
        dtype = wide(rows[0].dtype)
        if len(rows) == 2 and dtype is rows[0].dtype is out.dtype:
            np.add(rows[0], rows[1], out=out)
            return
        if self._tree:
            total = self._add_tree(rows, dtype, 0)
        else:
            total = self._row(0, dtype, out.size)
            np.copyto(total, rows[0])
            for row in rows[1:]:
                np.add(total, row, out=total, dtype=dtype)
        np.copyto(out, total, casting="unsafe")

    def _add_tree(self, rows: Sequence[Array] | Array, dtype: DType, depth: int) -> Array:
        """Add as many rows as a power of two holds, and the rest, and both sums."""
        if len(rows) == 1:
            return rows[0]
        half = 1 << (len(rows) - 1).bit_length() - 1
        left = self._add_tree(rows[:half], dtype, depth)
        right = self._add_tree(rows[half:], dtype, depth + 1)
        total: Array = self._row(depth, dtype, left.size)
        np.add(left, right, out=total, dtype=dtype)
        return total

    def _row(self, depth: int, dtype: DType, n: int) -> Array:
        row: Array = self._scratch[depth].view(dtype)
        return row[:n]
