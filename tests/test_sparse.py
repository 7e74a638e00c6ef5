"""Row-sparse values by themselves: what is checked, and in which order rows are added."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from sparse_values import F16, F32, numbers

import kvcoll
from kvcoll import RowSparse
from kvcoll.errors import ArgumentError, ArrayError, DTypeMismatchError, ShapeMismatchError
from kvcoll.sparse import Rows, add_rows, combine, rounded, spread
from kvcoll.sums import Adder, Order, order_of

pytestmark = pytest.mark.single

BF16 = np.dtype(ml_dtypes.bfloat16)


def one_by_one(values: Sequence[RowSparse], wide: Any) -> dict[int, Any]:
    """Add rows as a person would."""
    total: dict[int, Any] = {}
    for value in values:
        for index, row in zip(value.indices.tolist(), value.data, strict=True):
            wider = row.astype(wide)
            total[index] = total[index] + wider if index in total else wider
    return total


def test_a_value_shows_its_rows_and_makes_the_array_that_they_stand_for() -> None:
    value = RowSparse(np.array([[4, 5], [1, 2]], np.float32), [3, 1], (5, 2))
    assert value.shape == (5, 2)
    assert value.dtype == np.float32
    assert value.indices.dtype == np.int64
    expected = [[0, 0], [1, 2], [0, 0], [4, 5], [0, 0]]
    np.testing.assert_array_equal(value.to_dense(), expected)
    assert repr(value) == "<RowSparse float32[2, 2] of float32[5, 2]>"


def test_rows_that_are_not_all_zero_are_taken_from_an_array() -> None:
    dense = np.array([[0, 0], [0, np.nan], [-0.0, 0], [1, 0]])
    value = RowSparse.from_dense(dense)
    np.testing.assert_array_equal(value.indices, [1, 3])
    np.testing.assert_array_equal(value.to_dense(), dense)
    dense[3] = 7
    np.testing.assert_array_equal(value.data[1], [1, 0])


@pytest.mark.parametrize("shape", [(4,), (4, 1), (4, 2, 3), (4, 0), (0, 3), (0,)], ids=str)
def test_shapes_of_all_kinds_go_there_and_back(shape: tuple[int, ...]) -> None:
    dense = numbers(shape, 1)
    np.testing.assert_array_equal(RowSparse.from_dense(dense).to_dense(), dense)
    assert not RowSparse.empty(shape, F32).to_dense().any()


def test_data_and_indices_may_be_of_other_kinds() -> None:
    data = np.arange(12, dtype=">f4").reshape(3, 4)[:, ::2]
    value = RowSparse(data, np.array([2, 0, 1], np.uint8), [3, np.int32(2)])
    np.testing.assert_array_equal(value.to_dense(), data[[1, 2, 0]])
    assert value.to_dense().dtype == np.dtype("f4")


@pytest.mark.parametrize(
    ("data", "indices", "shape", "error", "said"),
    [
        (np.ones((1, 2)), [5], (5, 2), IndexError, "row 5 is not in float64[5, 2]: rows are 0 to"),
        (np.ones((2, 2)), [0, -1], (5, 2), IndexError, "row -1 is not in float64[5, 2]"),
        (np.ones((1, 2)), [0], (0, 2), IndexError, "float64[0, 2], which has no rows"),
        (np.ones((1, 2)), np.array([2**64 - 1], "u8"), (5, 2), IndexError, "18446744073709551615"),
        (np.ones((1, 3)), [0], (5, 2), ShapeMismatchError, "are float64[1, 2], got float64[1, 3]"),
        (np.ones((2, 2)), [0], (5, 2), ShapeMismatchError, "one row of data for each index"),
        (np.ones((1, 2)), [[0]], (5, 2), ShapeMismatchError, "one dimension, got int64[1, 1]"),
        (np.ones((1, 2)), [1.5], (5, 2), DTypeMismatchError, "are integers, got float64[1]"),
        (np.ones((1, 2)), [True], (5, 2), DTypeMismatchError, "are integers, got bool[1]"),
        (np.array([["a", "b"]]), [0], (5, 2), DTypeMismatchError, "cannot be summed"),
        ([[1, 2]], [0], (5, 2), ArrayError, "expected an array"),
        (np.ones(1), [0], (), ArgumentError, "one or more sizes, got ()"),
        (np.ones((1, 2)), [0], (-5, 2), ArgumentError, "got (-5, 2)"),
        (np.ones((1, 2)), [0], 5, ArgumentError, "got 5"),
        (np.ones((1, 2)), [0], (5.0, 2), ArgumentError, "got (5.0, 2)"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(
    data: Any, indices: Any, shape: Any, error: type[Exception], said: str
) -> None:
    with pytest.raises(error) as raised:
        RowSparse(data, indices, shape)
    assert said in str(raised.value)


def test_a_scalar_has_no_rows() -> None:
    with pytest.raises(ShapeMismatchError, match="no dimension"):
        RowSparse.from_dense(np.float32(3))


@pytest.mark.parametrize("dtype", [F32, F16, BF16, np.dtype("c8"), np.dtype("i1")], ids=str)
@pytest.mark.parametrize("width", [1, 2, 3, 64])
def test_rows_of_lists_and_of_one_index_are_added_left_to_right(width: int, dtype: Any) -> None:
    rng = np.random.default_rng(width)
    # Some rows stand once, one 500 times, others a few times.
    lists = [
        RowSparse(numbers((n, width), n, dtype), rng.integers(0, most, n), (50, width))
        for n, most in [(500, 40), (0, 50), (700, 9), (1, 50), (480, 1)]
    ]
    wide = F32 if dtype.itemsize == 2 else dtype
    rows, expected = combine(lists, dtype), one_by_one(lists, wide)
    np.testing.assert_array_equal(rows.indices, sorted(expected))
    assert rows.data.dtype == wide
    for index, row in zip(rows.indices.tolist(), rows.data, strict=True):
        assert row.tobytes() == expected[index].tobytes()


@pytest.mark.parametrize("layout", ["F", "strided", "reversed"])
def test_rows_may_lie_in_memory_in_any_way(layout: str) -> None:
    data = numbers((100, 4), 1)
    indices = np.arange(100) % 3
    laid = {"F": np.asfortranarray(data), "strided": np.repeat(data, 2, 1)[:, ::2]}
    laid["reversed"] = data[::-1].copy()[::-1]
    rows = combine([RowSparse(laid[layout], indices, (5, 4))], F32)
    assert rows.data.flags.c_contiguous
    assert rows.data.tobytes() == combine([RowSparse(data, indices, (5, 4))], F32).data.tobytes()


def test_one_value_of_16_bits_travels_as_it_is_in_memory_of_its_own() -> None:
    data = numbers((3, 4), 1, F16)
    for indices in ([0, 2, 4], [4, 0, 2]):
        rows = combine([RowSparse(data, indices, (5, 4))], F16)
        assert rows.data.dtype == F16
        assert not np.may_share_memory(rows.data, data)
        assert rows.data.tobytes() == data[np.argsort(indices)].tobytes()


def test_values_of_another_dtype_are_cast_before_they_are_added() -> None:
    data = np.array([[1 + 2**-40, 1e300]])
    rows = combine([RowSparse(data, [1], (3, 2))] * 2, F32)
    np.testing.assert_array_equal(rows.data, [[2, np.inf]])
    assert combine([RowSparse(data, [1], (3, 2))], F16).data.dtype == F32


def dense_of(rows: Rows, n_rows: int) -> Any:
    dense = np.zeros((n_rows, rows.data.shape[1]), rows.data.dtype)
    dense[rows.indices] = rows.data
    return dense


def added(order: Order, parts: list[Rows], dtype: Any) -> Rows:
    if isinstance(order, int):
        return parts[order]
    return add_rows([added(one, parts, dtype) for one in order], dtype)


@pytest.mark.parametrize("tree", [False, True])
@pytest.mark.parametrize("dtype", [F32, F16, np.dtype("c8"), np.dtype("?")], ids=str)
@pytest.mark.parametrize("hosts", [[[0]], [[0, 1, 2]], [[0, 2], [1, 3, 4]]], ids=str)
def test_rows_are_added_over_ranks_and_hosts_as_arrays_are(
    hosts: list[list[int]], dtype: Any, tree: bool
) -> None:
    size, n_rows = sum(map(len, hosts)), 300
    parts = []
    for rank in range(size):
        rng = np.random.default_rng(rank)
        indices = np.sort(rng.choice(n_rows, rng.integers(0, 200), replace=False))
        parts.append(Rows(indices, numbers((indices.size, 5), rank, dtype)))
    wide = F32 if dtype == F16 else dtype
    total = rounded(added(order_of(hosts, tree=tree), parts, wide), dtype)
    dense = [dense_of(part, n_rows).reshape(-1) for part in parts]
    expected = np.zeros(n_rows * 5, dtype)
    Adder(hosts, n_rows * 40, tree=tree).add(dense, expected)
    assert dense_of(total, n_rows).tobytes() == expected.tobytes()


def test_the_order_of_a_tree_is_written_down() -> None:
    assert order_of([[0, 2], [1]], tree=False) == ((0, 2), (1,))
    assert order_of([[0, 2], [1]], tree=True) == ((0, 1), 2)
    assert order_of([[4, 3, 2, 1, 0, 5]], tree=True) == (((0, 1), (2, 3)), (4, 5))


@pytest.mark.parametrize("piece_rows", [1, 3, 7, 20])
def test_rows_are_spread_over_an_array_piece_by_piece(piece_rows: int) -> None:
    rows = Rows(np.array([0, 2, 3, 6]), numbers((4, 5), 3))
    out, ends = np.full(35, 9, F32), [0]

    def sink(start: int, stop: int, values: Any) -> None:
        assert start == ends[-1]
        ends.append(stop)
        out[start:stop] = values

    spread(rows, 35, np.full(min(35, 5 * piece_rows), np.nan, F32), sink)
    assert ends[-1] == 35
    np.testing.assert_array_equal(out.reshape(7, 5), dense_of(rows, 7))


def test_it_is_part_of_the_package() -> None:
    assert kvcoll.RowSparse is RowSparse
