"""dist_async: pushes that do not wait for other ranks, and replicas that go through one history."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from raised_by_all import raised_by_all

import kvcoll
from kvcoll import KVStore
from kvcoll.errors import (
    ArgumentError,
    RankLeftError,
    RanksDisagreeError,
    ShapeMismatchError,
    StoreClosedError,
    ThreadError,
    UpdaterError,
)

N = 40_000


def add(key: object, value: Any, stored: Any) -> None:
    stored += value


@pytest.fixture
def kv(comm: Any) -> Iterator[KVStore]:
    with kvcoll.create("dist_async") as store:
        store.init(["a", "b"], [np.zeros(N, np.float32), np.zeros(3, np.float32)])
        yield store


def push(kv: KVStore, step: int, key: str = "a") -> None:
    kv.push(key, np.full(N if key == "a" else 3, (kv.rank + 1) * step, np.float32))


def total(kv: KVStore, steps: int) -> int:
    """Give the sum over ranks and steps of what `push` pushes."""
    return kv.num_workers * (kv.num_workers + 1) // 2 * steps * (steps + 1) // 2


def test_after_a_barrier_every_push_is_applied(kv: KVStore) -> None:
    kv.set_updater(add)
    for step in range(1, 8):
        push(kv, step)
        push(kv, step, "b")
    kv.barrier()
    assert np.all(kv.pull("a") == total(kv, 7))
    assert np.all(kv.pull("b") == total(kv, 7))


@pytest.mark.parametrize("staleness", [0, 1, 3])
def test_all_replicas_pass_through_the_same_versions(comm: Any, staleness: int) -> None:
    rng = np.random.default_rng(comm.rank)
    versions: list[bytes] = []

    def note(key: object, value: Any, stored: Any) -> None:
        stored += value
        versions.append(stored.tobytes())

    with kvcoll.create("dist_async", staleness=staleness) as kv:
        kv.init("w", np.zeros(1000, np.float32))
        kv.set_updater(note)
        for _ in range(12):
            time.sleep(rng.random() * 0.003)
            kv.push("w", rng.standard_normal(1000).astype(np.float32))
            if staleness == 0:
                assert kv.pull("w").tobytes() == versions[-1]
        kv.barrier()
    assert len(set(versions)) == 12
    assert set(comm.allgather(tuple(versions))) == {tuple(versions)}


def test_the_optimizer_goes_through_the_same_bits_as_in_a_synchronous_store(comm: Any) -> None:
    keys = ["p", "q"]
    firsts: list[Any] = [np.ones(5000, np.float32), np.ones((3, 2), np.float16)]
    stores = [kvcoll.create(name) for name in ("dist_sync", "dist_async")]
    for kv in stores:
        kv.init(keys, firsts)
        kv.set_optimizer("adam", learning_rate=0.1, multi_precision=True)
    rng = np.random.default_rng(comm.rank)
    for _ in range(5):
        grads = [rng.standard_normal(first.shape).astype(first.dtype) for first in firsts]
        for kv in stores:
            kv.push(keys, [[grad, grad] for grad in grads])
    stores[1].barrier()
    for sync, late in zip(stores[0].pull(keys), stores[1].pull(keys), strict=True):
        assert sync.tobytes() == late.tobytes()
    for kv in stores:
        kv.close()


@pytest.mark.ranks(at_least=2)
def test_a_push_does_not_wait_for_a_slow_rank_until_the_bound_is_reached(
    kv: KVStore, comm: Any
) -> None:
    kv.set_updater(add)
    if comm.rank == 0:
        for rank in range(1, comm.size):  # comes only once their first push has returned
            assert comm.recv(source=rank, tag=1) == "pushed"
        time.sleep(0.1)
        for rank in range(1, comm.size):
            comm.send("I push", dest=rank, tag=2)
        push(kv, 1)
        push(kv, 2)
    else:
        push(kv, 1)
        assert np.all(kv.pull("a") == 0)
        comm.send("pushed", dest=0, tag=1)
        push(kv, 2)  # waits until the first is applied
        assert comm.iprobe(source=0, tag=2)
        assert np.all(kv.pull("a") >= total(kv, 1))
        comm.recv(source=0, tag=2)
    kv.barrier()
    assert np.all(kv.pull("a") == total(kv, 2))


def test_a_pull_shows_one_version_and_never_half_an_update(comm: Any) -> None:
    with kvcoll.create("dist_async", staleness=4) as kv:
        kv.init("w", np.zeros(500_000, np.float32))
        kv.set_optimizer("test")
        ones = np.ones(500_000, np.float32)
        for _ in range(20):
            kv.push("w", ones)
            seen = kv.pull("w")
            assert seen.min() == seen.max()


def test_the_device_store_is_the_same_for_arrays_of_the_host(comm: Any) -> None:
    with kvcoll.create("dist_async_device", staleness=2) as kv:
        assert kv.type == "dist_async_device"
        kv.init("a", np.zeros(N, np.float32))
        kv.set_updater(add)
        push(kv, 1)
        kv.barrier()
        assert np.all(kv.pull("a") == total(kv, 1))


def test_wait_waits_for_what_this_rank_has_pushed(kv: KVStore) -> None:
    kv.set_updater(add)
    push(kv, 1)
    kv.wait("a")
    assert np.all(kv.pull("a") == total(kv, 1))


def test_a_push_without_an_updater_is_an_error(kv: KVStore, comm: Any) -> None:
    error = raised_by_all(comm, lambda: push(kv, 1))
    assert isinstance(error, ArgumentError)
    assert "needs an updater: call set_optimizer or set_updater first" in str(error)


def wrong_shape(kv: KVStore, comm: Any) -> None:
    kv.push("b", np.ones(7 if comm.rank == comm.size - 1 else 3, np.float32))
    kv.barrier()


def other_key(kv: KVStore, comm: Any) -> None:
    push(kv, 1, "a" if comm.rank else "b")
    kv.barrier()


@pytest.mark.ranks(at_least=2)
@pytest.mark.parametrize(
    ("mistake", "kind"), [(wrong_shape, ShapeMismatchError), (other_key, RanksDisagreeError)]
)
def test_a_mistake_is_the_same_error_on_every_rank_and_ends_the_store(
    kv: KVStore, comm: Any, mistake: Callable[[KVStore, Any], None], kind: type[Exception]
) -> None:
    kv.set_updater(add)
    push(kv, 1)
    error = raised_by_all(comm, lambda: mistake(kv, comm))
    assert isinstance(error, kind)
    again = raised_by_all(comm, lambda: push(kv, 1))
    assert isinstance(again, StoreClosedError)
    assert str(error) in str(again)
    assert kv.closed


@pytest.mark.ranks(at_least=2)
def test_an_updater_that_raises_on_one_rank_is_told_to_all(kv: KVStore, comm: Any) -> None:
    def update(key: object, value: Any, stored: Any) -> None:
        if comm.rank == 1:
            raise OSError("no disk")
        stored += value

    def work() -> None:
        for step in range(1, 4):
            push(kv, step)
        kv.barrier()

    kv.set_updater(update)
    with pytest.raises(OSError if comm.rank == 1 else UpdaterError, match="no disk"):
        work()
    assert kv.closed


@pytest.mark.ranks(at_least=2)
def test_an_error_that_nobody_was_told_is_raised_by_close(comm: Any) -> None:
    kv = kvcoll.create("dist_async")
    kv.init(["a", "b"], [np.zeros(N, np.float32), np.zeros(3, np.float32)])
    kv.set_updater(add)
    push(kv, 1, "a" if comm.rank else "b")
    error = raised_by_all(comm, kv.close)
    assert isinstance(error, RanksDisagreeError)
    kv.close()


@pytest.mark.ranks(at_least=2)
def test_a_rank_that_leaves_is_named_by_the_others(comm: Any) -> None:
    kv = kvcoll.create("dist_async")
    kv.init("w", np.zeros(3, np.float32))
    kv.set_updater(add)

    def work(steps: int) -> None:
        with kv:
            for _ in range(steps):
                kv.push("w", np.ones(3, np.float32))
            if comm.rank == comm.size - 1:
                raise ValueError("no more data")

    last = comm.rank == comm.size - 1
    with pytest.raises(ValueError if last else RankLeftError, match="no more data"):
        work(3 if last else 10)
    assert kv.closed


def test_an_updater_may_pull_but_not_push(kv: KVStore) -> None:
    seen: list[object] = []

    def update(key: object, value: Any, stored: Any) -> None:
        stored += value
        seen.append(float(kv.pull(key)[0]))
        try:
            kv.push("b", np.ones(3, np.float32))
        except ThreadError as error:
            seen.append(str(error))

    kv.set_updater(update)
    push(kv, 1)
    kv.barrier()
    assert seen[0] == total(kv, 1)
    assert "an updater may pull" in str(seen[1])
    push(kv, 2)
    kv.barrier()
    assert np.all(kv.pull("a") == total(kv, 2))


@pytest.mark.single
@pytest.mark.parametrize(
    ("name", "staleness", "kind", "text"),
    [
        ("dist_sync", 1, ArgumentError, "staleness goes with 'dist_async', not with 'dist_sync'"),
        ("dist_async", -1, ArgumentError, "staleness must not be below 0, got -1"),
        ("dist_async", True, TypeError, "staleness is an int, got True"),
        ("dist_async", 1.5, TypeError, "staleness is an int, got 1.5"),
    ],
)
def test_a_staleness_that_cannot_be_is_an_error(
    name: str, staleness: Any, kind: type[Exception], text: str
) -> None:
    with pytest.raises(kind, match=text):
        kvcoll.create(name, staleness=staleness)
