"""Optimizers whose settings differ between ranks, or go wrong on one, between two pushes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from raised_by_all import raised_by_all

import kvcoll
from kvcoll import KVStore
from kvcoll.errors import RanksDisagreeError

Array = npt.NDArray[Any]

pytestmark = [pytest.mark.ranks(at_least=2), pytest.mark.limit(10)]


def f32(*numbers: float) -> Array:
    return np.array(numbers, np.float32)


X, Y = f32(8, 9), f32(8)


@pytest.fixture
def kv(comm: object) -> Iterator[KVStore]:
    """Give a store with key 3 = [1, 2] and key 4 = [5]."""
    with kvcoll.create("dist_sync") as store:
        store.init([3, 4], [f32(1, 2), f32(5)])
        yield store


def test_a_learning_rate_changed_on_one_rank_is_an_error_of_the_push(
    kv: KVStore, comm: Any
) -> None:
    sgd = kvcoll.optimizer.SGD(learning_rate=0.5)
    kv.set_optimizer(sgd)
    if kv.rank == 1:
        sgd.lr = 0.25
    raised = raised_by_all(comm, lambda: kv.push(3, X))
    assert type(raised) is RanksDisagreeError
    assert "0.25" in str(raised)
    np.testing.assert_array_equal(kv.pull(3), f32(1, 2))
    sgd.lr = 0.5
    kv.push(3, f32(2, 4))
    np.testing.assert_array_equal(kv.pull(3), f32(1, 2) - f32(1, 2) * kv.num_workers)


@pytest.mark.parametrize("setting", ["lr_mult", "wd_mult"])
def test_multipliers_set_on_one_rank_are_an_error_of_the_push(
    kv: KVStore, comm: Any, setting: str
) -> None:
    sgd = kvcoll.optimizer.SGD(learning_rate=0.5, wd=0.5)
    kv.set_optimizer(sgd)
    if kv.rank == 1:
        (sgd.set_lr_mult if setting == "lr_mult" else sgd.set_wd_mult)({3: 10.0})
    assert type(raised_by_all(comm, lambda: kv.push(3, X))) is RanksDisagreeError
    np.testing.assert_array_equal(kv.pull(3), f32(1, 2))


def test_a_learning_rate_that_is_no_number_on_one_rank_is_told_to_all(
    kv: KVStore, comm: Any
) -> None:
    sgd = kvcoll.optimizer.SGD(learning_rate=0.5)
    kv.set_optimizer(sgd)

    def push() -> None:
        if kv.rank == 1:
            sgd.lr = "slow"  # type: ignore[assignment]
        kv.push(3, X)

    assert "slow" in str(raised_by_all(comm, push)) or kv.rank == 0
    sgd.lr = 0.5
    kv.push(3, f32(2, 4))
    np.testing.assert_array_equal(kv.pull(3), f32(1, 2) - f32(1, 2) * kv.num_workers)


def test_a_schedule_that_raises_on_one_rank_is_told_to_all(kv: KVStore, comm: Any) -> None:
    def schedule(n: int) -> float:
        if n > 1 and kv.rank == 1:
            raise LookupError("no learning rate for this step")
        return 1.0

    kv.set_optimizer("sgd", lr_scheduler=schedule)
    kv.push([3, 4], [X, Y])
    with pytest.raises(Exception, match="no learning rate"):  # noqa: PT012
        for _ in range(3):
            kv.push([3, 4], [X, Y])
    everyones = comm.allgather(kv.pull(3).tobytes() + kv.pull(4).tobytes())
    assert set(everyones) == {everyones[0]}
