"""Calls from several threads: safe in stores of one process, a named error in distributed ones."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import kvcoll
from kvcoll import KVStore
from kvcoll.errors import KVCollError, ThreadError

Array = npt.NDArray[Any]
N_THREADS, N_STEPS = 8, 60


@pytest.fixture(params=["local", "device"])
def local(request: pytest.FixtureRequest) -> Iterator[KVStore]:
    with kvcoll.create(request.param) as store:
        yield store


@pytest.fixture
def dist(comm: object) -> Iterator[KVStore]:
    with kvcoll.create("dist_sync") as store:
        store.init(3, f32(1, 2))
        yield store


def f32(*numbers: float) -> Array:
    return np.array(numbers, np.float32)


def add(key: object, input: Array, stored: Array) -> None:
    stored += input


def in_threads(work: Callable[[int], object]) -> None:
    """Run a function in all threads at once, and raise what any of them has raised."""
    start = threading.Barrier(N_THREADS)

    def begin(number: int) -> None:
        start.wait()
        work(number)

    with ThreadPoolExecutor(N_THREADS) as pool:
        for done in [pool.submit(begin, number) for number in range(N_THREADS)]:
            done.result()


def in_another_thread(call: Callable[[], object]) -> BaseException | None:
    """Give what a call raises in a thread of its own."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).exception()


@pytest.mark.parametrize("size", [1, 3000])
def test_no_push_of_eight_threads_is_lost(local: KVStore, size: int) -> None:
    local.init([1, 2], [np.zeros(size, np.int64)] * 2)
    local.set_updater(add)

    def work(number: int) -> None:
        for step in range(N_STEPS):
            local.push([1, 2], [np.full(size, number + step), [np.full(size, 1)] * 2])

    in_threads(work)
    total = sum(number + step for number in range(N_THREADS) for step in range(N_STEPS))
    np.testing.assert_array_equal(local.pull(1), np.full(size, total))
    np.testing.assert_array_equal(local.pull(2), np.full(size, 2 * N_THREADS * N_STEPS))


def test_a_pull_never_sees_half_of_a_push(local: KVStore) -> None:
    size = 20_000
    local.init([1, 2], [np.zeros(size, np.float32)] * 2)

    def work(number: int) -> None:
        value, out = np.full(size, number, np.float32), np.empty(size, np.float32)
        for _ in range(N_STEPS):
            local.push([1, 2], [value, value])
            local.pull(1, out=out)
            assert (out == out[0]).all()
            first, second = local.pull([1, 2])
            assert (first == first[0]).all()
            np.testing.assert_array_equal(first, second)

    in_threads(work)


def test_threads_may_have_keys_and_dtypes_of_their_own(local: KVStore) -> None:
    dtypes = [np.float16, np.float32, np.float64, np.int8, np.int64, np.complex64, np.uint16, bool]

    def work(number: int) -> None:
        dtype = dtypes[number]
        local.init(number, np.zeros((number, 3), dtype))
        for step in range(N_STEPS):
            values = [np.full((number, 3), step % 2, dtype)] * (1 + step % 3)
            local.pushpull(number, values, out=[np.empty((number, 3), dtype)])
            expected = (step % 2) * (1 + step % 3)
            np.testing.assert_array_equal(local.pull(number), np.full((number, 3), expected, dtype))

    in_threads(work)


def test_an_optimizer_sees_the_pushes_of_all_threads(local: KVStore) -> None:
    local.init(3, np.zeros(100_000, np.float32))
    local.set_optimizer("test")

    def work(number: int) -> None:
        for _ in range(10):
            local.push(3, np.ones(100_000, np.float32))

    in_threads(work)
    np.testing.assert_array_equal(local.pull(3), np.full(100_000, 10 * N_THREADS))


def test_a_mistake_in_one_thread_leaves_the_others_alone(local: KVStore) -> None:
    local.init(3, f32(0))
    local.set_updater(add)

    def work(number: int) -> None:
        for _ in range(N_STEPS):
            if number % 2:
                with pytest.raises(KVCollError):
                    local.push(3, f32(1, 2))
            else:
                local.push(3, f32(1))

    in_threads(work)
    np.testing.assert_array_equal(local.pull(3), f32(N_STEPS * N_THREADS / 2))


def test_a_store_may_be_closed_by_another_thread(local: KVStore) -> None:
    local.init(3, f32(0))
    assert in_another_thread(local.close) is None
    assert local.closed


CALLS: dict[str, Callable[[KVStore], object]] = {
    "push": lambda kv: kv.push(3, f32(1, 1)),
    "pushpull": lambda kv: kv.pushpull(3, f32(1, 1)),
    "init": lambda kv: kv.init(4, f32(1)),
    "barrier": lambda kv: kv.barrier(),
    "set_updater": lambda kv: kv.set_updater(add),
    "close": lambda kv: kv.close(),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
@pytest.mark.parametrize("who", ["the first rank", "the last rank", "all ranks"])
def test_a_second_thread_is_refused_and_the_others_hear_of_it(
    dist: KVStore, comm: Any, call: Callable[[KVStore], object], who: str
) -> None:
    last = dist.num_workers - 1
    guilty = {"the first rank": [0], "the last rank": [last]}.get(who, list(range(last + 1)))
    if dist.rank in guilty:
        raised = in_another_thread(lambda: call(dist))
        assert type(raised) is ThreadError
        assert "called from one thread of each rank" in str(raised)
        assert "ThreadPoolExecutor" in str(raised)  # the thread's name
    assert not dist.closed
    with pytest.raises(ThreadError, match="called from one thread of each rank") as told:
        dist.push(3, f32(1, 1))
    said = comm.allgather(str(told.value))
    assert set(said) == {said[0]}
    if 0 < len(guilty) <= last:
        assert f"rank {guilty[0]}: " in said[0]
    # Nothing was applied, and from here on all is well.
    np.testing.assert_array_equal(dist.pull(3), f32(1, 2))
    dist.push(3, f32(5, 6))
    np.testing.assert_array_equal(dist.pull(3), f32(5, 6) * dist.num_workers)


def test_a_store_may_be_used_from_another_thread_than_the_one_that_made_it(comm: Any) -> None:
    kv = kvcoll.create("dist_sync")

    def work() -> None:
        with kv:
            kv.init(3, f32(1))
            kv.push(3, f32(kv.rank + 1))
            expected = sum(range(1, kv.num_workers + 1))
            np.testing.assert_array_equal(kv.pull(3), f32(expected))

    assert in_another_thread(work) is None
    assert kv.closed


def test_what_a_store_is_can_be_asked_from_any_thread(dist: KVStore) -> None:
    assert in_another_thread(lambda: (dist.rank, dist.type, dist.closed, repr(dist))) is None
    dist.push(3, f32(1, 1))


def test_an_updater_may_pull_in_a_local_store_while_other_threads_push(local: KVStore) -> None:
    def update(key: int | str, input: Array, stored: Array) -> None:
        stored += input
        assert (local.pull(key) == stored).all()

    local.init([1, 2], [np.zeros(5)] * 2)
    local.set_updater(update)

    def work(number: int) -> None:
        for _ in range(N_STEPS):
            local.push(1 + number % 2, np.ones(5))

    in_threads(work)
    np.testing.assert_array_equal(local.pull(1), np.full(5, N_STEPS * N_THREADS / 2))


def test_an_updater_that_pushes_in_a_local_store_gets_an_error(local: KVStore) -> None:
    local.init([1, 2], [f32(1), f32(2)])
    local.set_updater(lambda key, input, stored: local.push(2, f32(1)))
    with pytest.raises(ThreadError, match="an updater may pull, but must not"):
        local.push(1, f32(1))
    np.testing.assert_array_equal(local.pull(2), f32(2))


@pytest.mark.parametrize(
    "call", [lambda kv: kv.pull(3), lambda kv: kv.view(3)], ids=["pull", "view"]
)
def test_a_second_thread_that_reads_is_refused_there_only(
    dist: KVStore, call: Callable[[KVStore], object]
) -> None:
    if dist.rank == dist.num_workers - 1:
        assert type(in_another_thread(lambda: call(dist))) is ThreadError
    dist.push(3, f32(5, 6))
    np.testing.assert_array_equal(dist.pull(3), f32(5, 6) * dist.num_workers)


def test_two_local_stores_share_an_optimizer_in_two_threads() -> None:
    sgd = kvcoll.optimizer.SGD(learning_rate=1.0, clip_gradient=1e9)
    stores = [kvcoll.create("local") for _ in range(2)]
    for kv in stores:
        kv.init(0, np.zeros(300_000, np.float32))
        kv.set_optimizer(sgd)

    def work(number: int) -> None:
        for _ in range(25):
            stores[number].push(0, np.full(300_000, 10.0**number, np.float32))

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, range(2)))
    for number, kv in enumerate(stores):
        assert set(kv.pull(0).tolist()) == {-25 * 10.0**number}
