"""What can be wrong with a push of rows: the same error on every rank, and nothing is applied."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
from raised_by_all import raised_by_all
from sparse_values import F32, SHAPE

import kvcoll
from kvcoll import KVStore, RowSparse
from kvcoll.errors import (
    ArrayError,
    DTypeMismatchError,
    RanksDisagreeError,
    ShapeMismatchError,
    UpdaterError,
)

ONE = RowSparse(np.ones((1, 3), F32), [4], SHAPE)


@pytest.fixture(params=[False, "always"])
def kv(request: pytest.FixtureRequest, comm: Any) -> Iterator[KVStore]:
    with kvcoll.create("dist_sync", overlap=request.param) as store:
        store.init(["d", "w"], [np.zeros(SHAPE, F32), RowSparse.empty(SHAPE, F32)])
        yield store


def out_of_range() -> RowSparse:
    value = RowSparse(np.ones((2, 3), F32), [1, 2], SHAPE)
    value.indices[1] = 40
    return value


@pytest.mark.parametrize(
    ("value", "error", "said"),
    [
        (
            RowSparse.empty((41, 3), F32),
            ShapeMismatchError,
            "holds row-sparse float32[40, 3], pushed float32[41, 3]",
        ),
        (RowSparse.empty(SHAPE, "c8"), DTypeMismatchError, "complex64 does not cast"),
        (out_of_range(), IndexError, "row 40 is not in float32[40, 3]"),
        ([ONE, out_of_range()], IndexError, "row 40 is not in float32[40, 3]"),
        ([np.ones(SHAPE, F32), out_of_range()], IndexError, "row 40 is not in float32[40, 3]"),
    ],
)
def test_a_mistake_of_the_last_rank_is_raised_on_all(
    kv: KVStore, comm: Any, value: Any, error: type[Exception], said: str
) -> None:
    bad = comm.rank == comm.size - 1
    raised = raised_by_all(comm, lambda: kv.push(["d", "w"], [ONE, value if bad else ONE]))
    assert isinstance(raised, error)
    assert said in str(raised)
    for key in ("d", "w"):
        assert not kv.pull(key, ignore_sparse=False).any()
    kv.push("w", ONE)
    assert kv.row_sparse_pull("w", row_ids=[4]).data[0, 0] == comm.size


@pytest.mark.ranks(at_least=2)
@pytest.mark.parametrize("key", ["d", "w"])
def test_rows_on_one_rank_and_an_array_on_another_are_told_apart(
    kv: KVStore, comm: Any, key: str
) -> None:
    own = ONE if comm.rank else np.ones(SHAPE, F32)
    error = raised_by_all(comm, lambda: kv.push(key, own))
    assert isinstance(error, RanksDisagreeError)
    assert "as rows" in str(error)
    assert not kv.pull(key, ignore_sparse=False).any()


@pytest.mark.ranks(at_least=2)
def test_a_key_is_row_sparse_on_all_ranks_or_on_none(kv: KVStore, comm: Any) -> None:
    own = ONE if comm.rank else np.ones(SHAPE, F32)
    error = raised_by_all(comm, lambda: kv.init("n", own))
    assert isinstance(error, RanksDisagreeError)
    assert "holds row-sparse float32[40, 3]" in str(error)
    error = raised_by_all(comm, lambda: kv.init("n", out_of_range() if comm.rank else ONE))
    assert isinstance(error, IndexError)
    kv.init("n", ONE)


def test_outputs_of_pushpull_are_checked_before_anything_is_sent(kv: KVStore, comm: Any) -> None:
    data = np.ones((1, 3), F32)
    fixed = RowSparse(data, [4], SHAPE)
    fixed.data.flags.writeable = False
    for out, error in [(fixed, ArrayError), (out_of_range(), IndexError)]:
        raised = raised_by_all(comm, partial(kv.pushpull, "w", ONE, out=out))
        assert isinstance(raised, error)
    assert isinstance(raised_by_all(comm, lambda: kv.pushpull("w", fixed)), ArrayError)
    assert not kv.pull("w", ignore_sparse=False).any()


def test_an_updater_that_raises_over_rows_leaves_replicas_in_step(kv: KVStore, comm: Any) -> None:
    def update(key: Any, grad: Any, stored: Any) -> None:
        stored[grad.indices] += grad.data
        if comm.rank == comm.size - 1:
            raise KeyError("no such row")

    kv.set_updater(update)
    last = comm.rank == comm.size - 1
    with pytest.raises(KeyError if last else UpdaterError, match="no such row"):
        kv.push("w", ONE)
    assert len(set(comm.allgather(kv.pull("w", ignore_sparse=False).tobytes()))) == 1


def test_integer_keys_with_an_optimizer_are_refused(kv: KVStore, comm: Any) -> None:
    kv.init("i", RowSparse.empty(SHAPE, "i4"))
    kv.set_optimizer("sgd", learning_rate=1)
    ints = RowSparse(np.ones((1, 3), "i4"), [4], SHAPE)
    assert isinstance(raised_by_all(comm, lambda: kv.push("i", ints)), DTypeMismatchError)


def test_no_rows_without_an_updater_are_an_error_in_dist_async(comm: Any) -> None:
    with kvcoll.create("dist_async") as kv:
        kv.init("w", ONE)
        with pytest.raises(ValueError, match="needs an updater"):
            kv.push("w", ONE)
