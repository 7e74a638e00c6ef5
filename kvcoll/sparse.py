"""Row-sparse values: some rows of an array, whose other rows are 0.

Rules of the file: nothing here takes memory or time of the whole array's size, but what
makes an array of one; a sum of rows is taken row by row, in the order in which they are
given, whatever other rows there are.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, final

import numpy as np

from .arrays import Array, DType, as_array, describe, native, round_to, signature, wide
from .errors import ArgumentError, DTypeMismatchError, ShapeMismatchError

# A row that is named more often than this is summed in a call of its own.
_MOST_ROUNDS = 16
_BLOCK_ELEMENTS = 1 << 16


@final
class RowSparse:
    """Some rows of an array of `shape`; the rows that are not named are 0.

    Parameters
    ----------
    data : array, shape (n, *shape[1:])
        The rows, of NumPy or of any library that speaks DLPack. Not copied, unless it
        lies on a GPU.
    indices : array of int, shape (n,), or list of int
        Which rows they are, in any order. The rows of an index that stands several times
        are added, in the order in which they stand.
    shape : tuple of int
        Of the whole array; at least one dimension.

    Raises
    ------
    IndexError
        An index is below 0, or not below ``shape[0]``.
    ShapeMismatchError
        `data`, `indices` and `shape` do not fit together.
    DTypeMismatchError
        Indices that are no integers, or data that are no numbers.
    ArgumentError, ArrayError
        `shape` is no shape, or `data` no array.
    """

    __slots__ = ("_data", "_indices", "_shape")

    def __init__(self, data: Any, indices: Any, shape: Sequence[int]) -> None:
        self._shape = _as_shape(shape)
        self._data = as_array(data)
        native(self._data.dtype)
        self._indices = as_indices(indices)
        expected = (self._indices.size, *self._shape[1:])
        if self._data.shape != expected:
            raise ShapeMismatchError(
                f"{self._indices.size} rows of an array of shape {self._shape} are "
                f"{signature(expected, self._data.dtype)}, got {describe(self._data)}: "
                "give one row of data for each index"
            )
        self.check()

    @classmethod
    def empty(cls, shape: Sequence[int], dtype: Any) -> RowSparse:
        """Give an array of zeros: no row is named; as an output it takes any rows."""
        own = _as_shape(shape)
        return cls(np.empty((0, *own[1:]), dtype), np.empty(0, np.int64), own)

    @classmethod
    def from_dense(cls, array: Any) -> RowSparse:
        """Take the rows of an array that are not all 0.

        Parameters
        ----------
        array : array
            Of one dimension or more.

        Notes
        -----
        Cost: a pass over the array.
        """
        dense = as_array(array)
        if dense.ndim == 0:
            raise ShapeMismatchError("an array of no dimension has no rows: reshape it")
        flat = dense.reshape(dense.shape[0], _row_elements(dense.shape))
        indices = np.flatnonzero((flat != 0).any(axis=1))
        return cls(dense[indices], indices, dense.shape)

    @property
    def data(self) -> Array:
        """The rows."""
        return self._data

    @property
    def indices(self) -> Array:
        """Which rows they are, int64."""
        return self._indices

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the whole array."""
        return self._shape

    @property
    def dtype(self) -> DType:
        """The dtype of the rows."""
        return self._data.dtype

    def to_dense(self) -> Array:
        """Make the whole array."""
        dense: Array = np.empty(self._shape, native(self.dtype))
        combine([self], dense.dtype).write_to(dense)
        return dense

    def check(self) -> None:
        """Raise IndexError if an index is out of range: they can be written to."""
        check_range(self._indices, self._shape, self.dtype)

    def __repr__(self) -> str:
        return f"<RowSparse {describe(self._data)} of {signature(self._shape, self.dtype)}>"

    def _replace(self, data: Array, indices: Array) -> None:
        self._data, self._indices = data, indices


class Rows(NamedTuple):
    """Rows ready to be added: ascending, each index once."""

    indices: Array  # int64[n]
    data: Array  # T[n, elements of a row], contiguous

    @np.errstate(all="ignore")  # a cast that overflows may not raise on one rank alone
    def write_to(self, dense: Array) -> None:
        """Write the rows into an array of any dtype, and 0 elsewhere."""
        dense.fill(0)
        dense[self.indices] = self.data.reshape(self.indices.size, *dense.shape[1:])

    def as_row_sparse(self, shape: tuple[int, ...]) -> RowSparse:
        """Show the same rows as a user knows them, without a copy."""
        return RowSparse(self.data.reshape(self.indices.size, *shape[1:]), self.indices, shape)


def as_indices(indices: object) -> Array:
    """Take integers of any kind as a flat int64 array; their range is not looked at.

    Raises
    ------
    DTypeMismatchError
        They are no integers.
    ShapeMismatchError
        They have not one dimension.
    """
    array = np.asarray(indices) if isinstance(indices, (list, tuple)) else as_array(indices)
    if array.size == 0 and array.ndim == 1:
        return np.empty(0, np.int64)
    if array.dtype.kind not in "iu":
        raise DTypeMismatchError(
            f"row indices are integers, got {describe(array)}: convert them with astype('int64')"
        )
    if array.ndim != 1:
        raise ShapeMismatchError(f"row indices have one dimension, got {describe(array)}")
    if array.dtype.itemsize == 8 and array.dtype.kind == "u" and array.max() >= 2**63:
        raise IndexError(f"row {array.max()} does not fit into 64 bits")
    return array.astype(np.int64, copy=False)


def check_range(indices: Array, shape: tuple[int, ...], dtype: DType) -> None:
    """Raise IndexError unless all are rows of an array of this shape."""
    if indices.size:
        low, high = int(indices.min()), int(indices.max())
        if low < 0 or high >= shape[0]:
            wrong = low if low < 0 else high
            raise IndexError(
                f"row {wrong} is not in {signature(shape, dtype)}: rows are 0 to {shape[0] - 1}"
                if shape[0]
                else f"row {wrong} is not in {signature(shape, dtype)}, which has no rows"
            )


@np.errstate(all="ignore")  # infinities go through, and nothing may raise on one rank alone
def combine(values: Sequence[RowSparse], dtype: DType) -> Rows:
    """Add the rows of a list, left to right, into memory of their own.

    Parameters
    ----------
    values : sequence of RowSparse
        One or more, of one shape, whose dtypes cast to `dtype`.
    dtype : numpy.dtype
        Of the sum.

    Returns
    -------
    Rows
        Of `dtype` where no two rows were added nor rounded, else of the dtype in which
        its sums are taken.
    """
    indices = np.concatenate([value.indices for value in values])
    order = np.argsort(indices, kind="stable")
    ordered = indices[order]
    starts = _starts(ordered)
    if starts.size < ordered.size or len(values) > 1 or values[0].dtype != dtype:
        dtype = wide(dtype)
    parts = [value.data.reshape(value.indices.size, _row_elements(value.shape)) for value in values]
    source = np.ascontiguousarray(parts[0])
    if len(parts) > 1:
        source = np.empty((indices.size, source.shape[1]), dtype)
        np.concatenate(parts, out=source, casting="unsafe")
    return Rows(ordered[starts], _sum_runs(source, order, starts, dtype))


@np.errstate(all="ignore")  # as above
def add_rows(parts: Sequence[Rows], dtype: DType) -> Rows:
    """Add rows of several origins, in their order.

    Parameters
    ----------
    parts : sequence of Rows
        One or more; of `dtype`, or of one whose sums are taken in it.
    dtype : numpy.dtype
        Of the sum.

    Notes
    -----
    Cost: in proportion to the rows of all parts.
    """
    if len(parts) == 1:
        return Rows(parts[0].indices, parts[0].data.astype(dtype, copy=False))
    # A stable sort is quick for what is sorted in parts.
    together = np.sort(np.concatenate([part.indices for part in parts]), kind="stable")
    indices = together[_starts(together)]
    total = np.zeros((indices.size, parts[0].data.shape[1]), dtype)
    for number, part in enumerate(parts):
        places = np.searchsorted(indices, part.indices)
        if number == 0:
            total[places] = part.data
            continue
        for block in blocks(part.data):
            sums = total[places[block]]
            np.add(sums, part.data[block], out=sums, dtype=dtype)
            total[places[block]] = sums
    return Rows(indices, total)


def rounded(rows: Rows, dtype: DType) -> Rows:
    """Round a sum to the dtype that is stored."""
    if rows.data.dtype == dtype:
        return rows
    data = np.empty(rows.data.shape, dtype)
    round_to(rows.data, data)
    return Rows(rows.indices, data)


def fill_rows(stored: Array, out: RowSparse) -> None:
    """Copy rows of a stored array into those that `out` names, in place."""
    round_to(stored[out.indices], out.data)


def pull_rows(stored: Array, indices: Array, out: RowSparse) -> None:
    """Let `out` hold these rows of a stored array, ascending and each once."""
    ordered = np.sort(indices)
    ordered = ordered[_starts(ordered)]
    data = stored[ordered]
    if data.dtype != out.dtype:
        rounded_data = np.empty(data.shape, out.dtype)
        round_to(data, rounded_data)
        data = rounded_data
    out._replace(data, ordered)


def spread(
    rows: Rows, n_elements: int, piece: Array, sink: Callable[[int, int, Array], None]
) -> None:
    """Hand over the array that the rows are of, zeros elsewhere, piece by piece.

    Parameters
    ----------
    rows : Rows
    n_elements : int
        Of the whole array.
    piece : numpy.ndarray, shape (of one row or more,)
        Memory for one piece.
    sink : callable
        ``sink(start, stop, values)``.
    """
    width = rows.data.shape[1]
    if n_elements == 0:
        return
    step = piece.size // width
    for low in range(0, n_elements // width, step):
        high = min(low + step, n_elements // width)
        flat = piece[: (high - low) * width]
        flat.fill(0)
        first, last = np.searchsorted(rows.indices, [low, high])
        flat.reshape(-1, width)[rows.indices[first:last] - low] = rows.data[first:last]
        sink(low * width, high * width, flat)


def blocks(data: Array) -> Iterable[slice]:
    """Cut rows into blocks that stay in cache."""
    step = max(1, _BLOCK_ELEMENTS // max(1, data.shape[1]))
    return (slice(first, first + step) for first in range(0, data.shape[0], step))


def _sum_runs(source: Array, order: Array, starts: Array, dtype: DType) -> Array:
    """Add rows that have one index, from the first on.

    Parameters
    ----------
    source : numpy.ndarray, shape (n, elements of a row)
    order : numpy.ndarray of int, shape (n,)
        The rows of one index beside one another.
    starts : numpy.ndarray of int
        Where in `order` each index begins.
    dtype : numpy.dtype
        Of the sum.
    """
    counts = np.diff(starts, append=order.size)
    total: Array = source[order[starts]].astype(dtype, copy=False)
    few = counts <= _MOST_ROUNDS
    for turn in range(1, int(counts[few].max(initial=1))):
        some = np.flatnonzero(few & (counts > turn))
        more = source[order[starts[some] + turn]].astype(dtype, copy=False)
        total[some] = np.add(total[some], more)
    for many in np.flatnonzero(~few):
        run = source[order[starts[many] : starts[many] + counts[many]]].astype(dtype, copy=False)
        # Rows of one element would be added pairwise by a reduction.
        add: Any = np.add
        total[many] = add.accumulate(run, axis=0)[-1] if run.shape[1] == 1 else add.reduce(run)
    return total


def _starts(ordered: Array) -> Array:
    """Find where each number stands first."""
    is_first = np.empty(ordered.size, np.bool_)
    is_first[:1] = True
    np.not_equal(ordered[1:], ordered[:-1], out=is_first[1:])
    return np.flatnonzero(is_first)


def _row_elements(shape: tuple[int, ...]) -> int:
    return math.prod(shape[1:])


def _as_shape(shape: object) -> tuple[int, ...]:
    if isinstance(shape, (tuple, list)):
        try:
            own = tuple(map(operator.index, shape))
        except TypeError:
            own = ()
        if own and min(own) >= 0:
            return own
    raise ArgumentError(
        f"the shape of a row-sparse value is a tuple of one or more sizes, got {shape!r}"
    )
