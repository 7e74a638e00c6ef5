"""Ranks with different numbers of batches: who has run out lets the others go on."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from raised_by_all import raised_by_all

import kvcoll
from kvcoll import KVStore, optimizer
from kvcoll.errors import RankLeftError, RanksDisagreeError, ShapeMismatchError

WAYS = ["dist_sync", "dist_sync overlap", "dist_async"]


@pytest.fixture(params=WAYS)
def kv(request: pytest.FixtureRequest, comm: Any) -> Any:
    name, *overlap = request.param.split()
    with kvcoll.create(name, overlap="always" if overlap else False) as store:
        store.init(["a", "b"], [np.zeros(5000, np.float32), np.zeros((2, 3), np.float32)])
        yield store


def add(key: object, value: Any, stored: Any) -> None:
    stored += value


def pushed(rank: int, step: int) -> int:
    return (rank + 1) * int(10**step)


def test_a_rank_that_has_run_out_adds_zeros_and_keeps_its_replica_in_step(
    kv: KVStore, comm: Any
) -> None:
    """Rank r makes r + 1 pushes."""
    kv.set_updater(add)
    active = []
    with kv.join():
        for step in range(comm.rank + 1):
            kv.push("a", np.full(5000, pushed(comm.rank, step), np.float32))
            kv.wait()
            active.append(kv.num_active)
    expected = sum(pushed(rank, step) for rank in range(comm.size) for step in range(rank + 1))
    assert np.all(kv.pull("a") == expected)
    assert active == [comm.size - step for step in range(comm.rank + 1)]
    kv.push("a", np.full(5000, 1, np.float32))
    kv.barrier()
    assert np.all(kv.pull("a") == expected + comm.size)
    assert kv.num_active == comm.size


def test_lists_single_keys_and_pushpull_of_the_others_are_followed(kv: KVStore, comm: Any) -> None:
    kv.set_updater(add)
    first = comm.rank == 0
    with kv.join():
        if first:
            kv.push(["b", "a"], [np.full((2, 3), 2, np.float32), np.full(5000, 3, np.float32)])
            kv.barrier()
            out = np.zeros((2, 3), np.float32)
            kv.pushpull("b", np.full((2, 3), 5, np.float32), out=out)
    kv.barrier()
    assert np.all(kv.pull("a") == 3)
    assert np.all(kv.pull("b") == 7)


def test_optimizers_count_the_same_updates_on_all_ranks(kv: KVStore, comm: Any) -> None:
    kv.set_optimizer("adam", learning_rate=0.1)
    rng = np.random.default_rng(comm.rank)
    with kv.join():
        for _ in range(2 + comm.rank):
            kv.push("a", rng.standard_normal(5000).astype(np.float32))
    assert len(set(comm.allgather(kv.pull("a").tobytes()))) == 1


@pytest.mark.ranks(at_least=2)
def test_nothing_but_pushes_and_barriers_goes_on_without_a_rank(kv: KVStore, comm: Any) -> None:
    def work() -> None:
        with kv.join():
            if comm.rank:
                kv.init("c", np.zeros(3, np.float32))

    error = raised_by_all(comm, work)
    assert isinstance(error, RanksDisagreeError)
    assert "rank 0 is at the end of join(), others called init('c' float32[3])" in str(error)


@pytest.mark.ranks(at_least=2)
def test_a_setting_that_a_joined_rank_does_not_know_of_is_an_error(kv: KVStore, comm: Any) -> None:
    sgd = optimizer.SGD(learning_rate=0.5)
    kv.set_optimizer(sgd)

    def work() -> None:
        with kv.join():
            if comm.rank:
                sgd.lr = 0.25
                kv.push("a", np.ones(5000, np.float32))
                kv.barrier()

    assert isinstance(raised_by_all(comm, work), RanksDisagreeError)


@pytest.mark.ranks(at_least=2)
def test_a_mistake_of_a_rank_that_goes_on_is_raised_on_all(kv: KVStore, comm: Any) -> None:
    kv.set_updater(add)

    def work() -> None:
        with kv.join():
            if comm.rank:
                kv.push("b", np.ones(7 if comm.rank == 1 else (2, 3), np.float32))
                kv.barrier()

    assert isinstance(raised_by_all(comm, work), ShapeMismatchError)


@pytest.mark.ranks(at_least=2)
def test_other_stores_are_not_followed(comm: Any) -> None:
    stores = [kvcoll.create("dist_sync") for _ in range(2)]
    for kv in stores:
        kv.init("a", np.zeros(3, np.float32))

    def work() -> None:
        with stores[0].join():
            if comm.rank:
                stores[1].push("a", np.ones(3, np.float32))

    error = raised_by_all(comm, work)
    assert isinstance(error, RanksDisagreeError)
    assert "of another store" in str(error)
    for kv in stores:
        kv.close()


@pytest.mark.ranks(at_least=2)
def test_a_rank_that_leaves_the_block_by_an_exception_is_named(comm: Any) -> None:
    kv = kvcoll.create("dist_sync")
    kv.init("a", np.zeros(3, np.float32))

    def work() -> None:
        with kv, kv.join():
            if comm.rank == 1:
                raise ValueError("a broken batch")
            kv.push("a", np.ones(3, np.float32))

    with pytest.raises(ValueError if comm.rank == 1 else RankLeftError, match="a broken batch"):
        work()


def test_one_process_leaves_at_once() -> None:
    with kvcoll.create("local") as kv:
        kv.init("a", np.zeros(3, np.float32))
        with kv.join():
            kv.push("a", np.ones(3, np.float32))
        assert kv.num_active == 1
