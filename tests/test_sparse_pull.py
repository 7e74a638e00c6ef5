"""Rows of stored values copied into row-sparse ones, and pulls of row-sparse keys."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sparse_values import F16, F32, SHAPE, numbers

import kvcoll
from kvcoll import KVStore, RowSparse
from kvcoll.errors import (
    ArgumentError,
    ArrayError,
    DTypeMismatchError,
    KeyNotFoundError,
    ShapeMismatchError,
)

VALUE = numbers(SHAPE, 1)


@pytest.fixture
def filled(kv: KVStore) -> KVStore:
    kv.init(["w", "d"], [RowSparse(VALUE, np.arange(40), SHAPE), VALUE + 1])
    return kv


def check(out: RowSparse, rows: list[int], value: Any = VALUE) -> None:
    np.testing.assert_array_equal(out.indices, rows)
    assert out.data.tobytes() == value[rows].tobytes()


@pytest.mark.parametrize(
    "row_ids", [[7, 3, 7, 0], np.array([7, 3, 7, 0], np.uint8), (np.int64(7), 3, 0)], ids=str
)
def test_rows_are_copied_ascending_and_each_once(filled: KVStore, row_ids: Any) -> None:
    out = RowSparse.empty(SHAPE, F32)
    assert filled.row_sparse_pull("w", out=out, row_ids=row_ids) is out
    check(out, [0, 3, 7])
    check(filled.row_sparse_pull("d", row_ids=row_ids), [0, 3, 7], VALUE + 1)


def test_an_output_gets_memory_of_its_own(filled: KVStore) -> None:
    data = np.zeros((2, 3), F32)
    out = RowSparse(data, [0, 1], SHAPE)
    filled.row_sparse_pull("w", out, row_ids=[5])
    assert not data.any()
    out.data[...] = 7
    check(filled.row_sparse_pull("w", row_ids=[5]), [5])


def test_each_output_may_have_rows_of_its_own(filled: KVStore) -> None:
    outs = [RowSparse.empty(SHAPE, F32) for _ in range(2)]
    filled.row_sparse_pull("w", outs, row_ids=[np.array([3]), np.array([2, 1])])
    check(outs[0], [3])
    check(outs[1], [1, 2])
    filled.row_sparse_pull("w", outs, row_ids=np.array([4]))
    check(outs[0], [4])
    check(outs[1], [4])
    filled.row_sparse_pull("w", outs, row_ids=[[6]])
    check(outs[1], [6])


def test_lists_of_keys_take_one_array_for_all_or_one_for_each(filled: KVStore) -> None:
    for first, second in [([5, 6], [5, 6]), ([1], [2, 0])]:
        row_ids: Any = [first, second] if first != second else np.array(first)
        w, d = filled.row_sparse_pull(["w", "d"], row_ids=row_ids)
        check(w, first)
        check(d, sorted(second), VALUE + 1)
    w, (d, e) = filled.row_sparse_pull(["w", "d"], row_ids=[[1], [np.array([2]), [3, 0]]])
    check(w, [1])
    check(d, [2], VALUE + 1)
    check(e, [0, 3], VALUE + 1)


def test_no_rows_can_be_asked_for(filled: KVStore) -> None:
    check(filled.row_sparse_pull("w", row_ids=[]), [])
    out = RowSparse(np.ones((1, 3), F32), [4], SHAPE)
    filled.row_sparse_pull("w", out, row_ids=np.empty(0, np.int32))
    check(out, [])


def test_rows_are_cast_to_the_outputs_dtype(filled: KVStore) -> None:
    out = RowSparse.empty(SHAPE, F16)
    filled.row_sparse_pull("w", out, row_ids=[2, 9])
    assert out.data.tobytes() == VALUE[[2, 9]].astype(F16).tobytes()


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        ({"row_ids": [3, 40]}, IndexError, "row 40 is not in float32[40, 3]: rows are 0 to 39"),
        ({"row_ids": [-1]}, IndexError, "row -1 is not in"),
        ({}, ArgumentError, "needs row_ids"),
        ({"row_ids": np.array([1.0])}, DTypeMismatchError, "are integers, got float64[1]"),
        (
            {"row_ids": [[1], [2], [3]], "out": [RowSparse.empty(SHAPE, F32)] * 2},
            ArgumentError,
            "2 outputs but 3",
        ),
        ({"row_ids": [1], "out": np.zeros(SHAPE, F32)}, ArrayError, "is a RowSparse, got ndarray"),
        (
            {"row_ids": [1], "out": RowSparse.empty((9, 3), F32)},
            ShapeMismatchError,
            "holds row-sparse float32[40, 3], the output is float32[9, 3]",
        ),
        ({"row_ids": [1], "out": RowSparse.empty(SHAPE, "i4")}, DTypeMismatchError, "int32"),
        ({"row_ids": [1], "key": "q"}, KeyNotFoundError, "'q' is not in the store"),
        ({"row_ids": [1], "key": "s"}, ShapeMismatchError, "has no rows"),
        ({"row_ids": [[1]], "key": ["w", "d"]}, ArgumentError, "2 keys but 1 entries"),
        ({"row_ids": [1], "out": []}, ArgumentError, "list of outputs is empty"),
    ],
)
def test_mistakes_are_raised_before_anything_is_filled(
    filled: KVStore, call: dict[str, Any], error: type[Exception], said: str
) -> None:
    filled.init("s", np.float32(3))
    with pytest.raises(error) as raised:
        filled.row_sparse_pull(**({"key": "w"} | call))
    assert said in str(raised.value)
    good = RowSparse.empty(SHAPE, F32)
    with pytest.raises(IndexError):
        filled.row_sparse_pull("w", [good, good], row_ids=[[1], [99]])
    assert good.indices.size == 0


def test_a_pull_of_a_row_sparse_key_must_ask_for_all_of_it(filled: KVStore) -> None:
    out = np.zeros(SHAPE, F32)
    for keys, outs in [("w", out), (["d", "w"], [out, out])]:
        with pytest.raises(ArgumentError, match=r"'w' holds row-sparse .*ignore_sparse=False"):
            filled.pull(keys, outs)
    assert not out.any()
    filled.pull("w", out, ignore_sparse=False)
    assert out.tobytes() == VALUE.tobytes()
    assert filled.pull("d", ignore_sparse=True).tobytes() == (VALUE + 1).tobytes()


def test_pull_and_broadcast_fill_arrays_only(filled: KVStore) -> None:
    out = RowSparse.empty(SHAPE, F32)
    with pytest.raises(ArrayError, match="row_sparse_pull"):
        filled.pull("w", out, ignore_sparse=False)
    with pytest.raises(ArrayError, match="row_sparse_pull"):
        filled.broadcast("new", RowSparse.empty(SHAPE, F32), out)
    array = np.zeros(SHAPE, F32)
    filled.broadcast("new", RowSparse(VALUE[:2], [8, 6], SHAPE), array)
    expected = np.zeros(SHAPE)
    expected[[8, 6]] = VALUE[:2]
    np.testing.assert_array_equal(array, expected)


def test_pushpull_gives_back_the_rows_that_were_pushed(kv: KVStore) -> None:
    kv.init("w", RowSparse(np.ones((1, 3), F32), [0], SHAPE))
    kv.set_optimizer("sgd", learning_rate=1)
    own = RowSparse(np.full((3, 3), 2, F32), [kv.rank, 30, kv.rank], SHAPE)
    other = RowSparse(np.zeros((1, 3), F32), [0], SHAPE)
    assert kv.pushpull("w", own) is own
    expected = np.zeros(SHAPE)
    expected[0] = 1
    for rank in range(kv.num_workers):
        expected[30] -= 2
        expected[kv.rank if kv.num_workers == 1 else rank] -= 4
    np.testing.assert_array_equal(own.data, expected[[kv.rank, 30, kv.rank]])
    out = np.zeros(SHAPE, F32)
    kv.pushpull("w", [other, other], out=[out, other])
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_array_equal(other.data, expected[[0]])


@pytest.mark.single
def test_rows_are_pulled_while_pushes_run_late(comm: Any) -> None:
    with kvcoll.create("dist_async") as kv:
        kv.init("w", RowSparse.empty(SHAPE, F32))
        kv.set_optimizer("sgd", learning_rate=1)
        for _ in range(3):
            kv.push("w", RowSparse(np.ones((1, 3), F32), [4], SHAPE))
            assert kv.row_sparse_pull("w", row_ids=[4]).data[0, 0] in (0, -1, -2, -3)
        kv.barrier()
        assert kv.row_sparse_pull("w", row_ids=[4]).data[0, 0] == -3
