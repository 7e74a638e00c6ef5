"""The order in which the ranks' numbers are added: the one place that decides it.

By default the ranks of a host are added in their order, then the hosts' sums in theirs:
so it can be done host by host. With a tree it is ``(0 + 1) + (2 + 3)`` over all ranks,
wherever they are.

Rules of the file: an element's sum depends on the ranks' elements and on nothing
else, not on its place in an array nor on who adds it; nothing is allocated in a sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias, final

import numpy as np

from .arrays import Array, DType, wide

#: A rank, or what is added one after another.
Order: TypeAlias = "int | tuple[Order, ...]"


def order_of(hosts: Sequence[Sequence[int]], *, tree: bool) -> Order:
    """Write down the order for sums that an `Adder` does not take.

    Parameters
    ----------
    hosts : sequence of sequence of int
        The ranks of each host.
    tree : bool
        Add in a binary tree over the ranks.
    """
    if tree:
        return _tree_of(range(sum(map(len, hosts))))
    return tuple(tuple(ranks) for ranks in hosts)


def _tree_of(ranks: Sequence[int]) -> Order:
    if len(ranks) == 1:
        return ranks[0]
    half = 1 << (len(ranks) - 1).bit_length() - 1
    return _tree_of(ranks[:half]), _tree_of(ranks[half:])


@final
class Adder:
    """Adds one row a rank.

    Parameters
    ----------
    groups : sequence of sequence of int
        The rows in the order in which they are added: each group's first, then the
        groups' sums. Every row is in one group.
    row_bytes : int
        The longest row, in bytes of the dtype in which sums are taken.
    tree : bool, default False
        Take no notice of groups, and add in a binary tree over the rows.
    """

    def __init__(
        self, groups: Sequence[Sequence[int]], row_bytes: int, *, tree: bool = False
    ) -> None:
        n_rows = sum(len(group) for group in groups)
        self._tree = tree
        self._groups = groups
        self._two = n_rows == 2 and (tree or [k for group in groups for k in group] == [0, 1])
        depth = (n_rows - 1).bit_length() + 1 if tree else 2
        # Of 16-byte elements, so that it is aligned for every dtype.
        self._scratch = np.empty((depth, -(-row_bytes // 16)), np.complex128)

    @np.errstate(all="ignore")  # infinities go through, and nothing may raise on one rank alone
    def add(self, rows: Sequence[Array] | Array, out: Array) -> None:
        """Add rows of one dtype into `out`, which may be one of them.

        Parameters
        ----------
        rows : sequence of numpy.ndarray, shape (n,)
            By rank.
        out : numpy.ndarray, shape (n,)
            Of the rows' dtype, of the one in which their sums are taken, or of the one
            to which the sum is rounded.
        """
        dtype = wide(rows[0].dtype)
        if self._two and dtype is out.dtype:
            np.add(rows[0], rows[1], out=out, dtype=dtype)
        elif self._tree:
            np.copyto(out, self._add_tree(rows, dtype, 0), casting="unsafe")
        else:
            total = self._row(0, dtype, out.size)
            for number, group in enumerate(self._groups):
                into = total if number == 0 else self._row(1, dtype, out.size)
                np.copyto(into, rows[group[0]])
                for k in group[1:]:
                    np.add(into, rows[k], out=into, dtype=dtype)
                if number:
                    np.add(total, into, out=total)
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
