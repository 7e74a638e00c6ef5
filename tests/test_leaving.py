"""A rank that fails, ends or leaves while others work: a named error on these, and no hang."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import kvcoll
from kvcoll import KVStore
from kvcoll.errors import (
    RankLeftError,
    RanksDisagreeError,
    StoreClosedError,
    ThreadError,
    UpdaterError,
)

Array = npt.NDArray[Any]


@pytest.fixture
def kv(comm: object) -> Iterator[KVStore]:
    with kvcoll.create("dist_sync") as store:
        yield store


def f32(*numbers: float) -> Array:
    return np.array(numbers, np.float32)


class Failing:
    """An updater that adds, and raises on some ranks once it has begun to."""

    def __init__(self, kv: KVStore, ranks: set[int], error: Exception, key: int = 1) -> None:
        self.kv, self.ranks, self.error, self.key = kv, ranks, error, key
        self.armed = True

    def __call__(self, key: Any, input: Array, stored: Array) -> None:
        if self.armed and key == self.key and self.kv.rank in self.ranks:
            stored[...] = -1000 - self.kv.rank  # half of an update
            raise self.error
        stored += input


def init_three(kv: KVStore) -> None:
    # Three buckets, so that others still have sums to take when a rank has failed.
    kv.init([1, 2, 3], [f32(10, 20), np.full(3, 5.0), np.full(400_000, 7, np.float32)])


def push_three(kv: KVStore) -> None:
    kv.push([1, 2, 3], [f32(1, 1), np.full(3, 2.0), np.full(400_000, 3, np.float32)])


@pytest.mark.ranks(at_least=2)
@pytest.mark.parametrize("key", [1, 2, 3])
@pytest.mark.parametrize("who", ["the first rank", "the last rank"])
def test_an_updater_that_raises_on_one_rank_is_an_error_on_all(
    kv: KVStore, comm: Any, key: int, who: str
) -> None:
    one = 0 if who == "the first rank" else kv.num_workers - 1
    error = LookupError("no such thing")
    updater = Failing(kv, {one}, error, key)
    init_three(kv)
    kv.set_updater(updater)
    with pytest.raises((LookupError, UpdaterError)) as raised:
        push_three(kv)
    if kv.rank == one:
        assert raised.value is error
    else:
        assert type(raised.value) is UpdaterError
        assert f"the updater raised on rank {one} in push(keys [1, 2, 3])" in str(raised.value)
        assert "LookupError: no such thing" in str(raised.value)
    n = kv.num_workers
    for times in (1, 2):  # the values of a rank where it went well; then the store works on
        np.testing.assert_array_equal(kv.pull(1), f32(10, 20) + times * n)
        np.testing.assert_array_equal(kv.pull(2), np.full(3, 5.0 + times * 2 * n))
        np.testing.assert_array_equal(kv.pull(3), np.full(400_000, 7 + times * 3 * n))
        updater.armed = False
        if times == 1:
            push_three(kv)


@pytest.mark.ranks(at_least=3)
def test_an_updater_that_raises_on_two_ranks_names_both(kv: KVStore) -> None:
    last = kv.num_workers - 1
    init_three(kv)
    kv.set_updater(Failing(kv, {0, last}, ValueError(f"rank {kv.rank} is bad")))
    with pytest.raises((ValueError, UpdaterError)) as raised:
        push_three(kv)
    if 0 < kv.rank < last:
        assert f"raised on ranks 0, {last} in" in str(raised.value)
        assert "ValueError: rank 0 is bad" in str(raised.value)
    np.testing.assert_array_equal(kv.pull(1), f32(10, 20) + kv.num_workers)


def test_an_updater_that_raises_everywhere_leaves_the_same_bits(kv: KVStore, comm: Any) -> None:
    error = RuntimeError("everywhere")
    updater = Failing(kv, set(range(kv.num_workers)), error)
    init_three(kv)
    kv.set_updater(updater)
    with pytest.raises(RuntimeError) as raised:
        push_three(kv)
    assert raised.value is error
    bits = comm.allgather(b"".join(kv.pull(key).tobytes() for key in (1, 2, 3)))
    assert set(bits) == {bits[0]}
    updater.armed = False
    before = kv.pull(2)
    push_three(kv)
    np.testing.assert_array_equal(kv.pull(2), before + 2 * kv.num_workers)


class MuteError(Exception):
    """An error that cannot be written down."""

    def __str__(self) -> str:
        raise RuntimeError("no text")


ODD_ERRORS: dict[str, Callable[[], Exception]] = {
    "half of a surrogate pair": lambda: ValueError("file \udc80.txt"),
    "no text": ValueError,
    "text that raises": MuteError,
    "a long text": lambda: ValueError("x" * 1_000_000),
    "StopIteration": StopIteration,
    "an error of kvcoll": lambda: kvcoll.errors.ArgumentError("from the updater"),
}


@pytest.mark.ranks(at_least=2)
@pytest.mark.limit(10)
@pytest.mark.parametrize("make", ODD_ERRORS.values(), ids=ODD_ERRORS.keys())
def test_whatever_the_updater_raises_the_others_hear_of_it(
    kv: KVStore, make: Callable[[], Exception]
) -> None:
    error = make()
    init_three(kv)
    kv.set_updater(Failing(kv, {1}, error))
    with pytest.raises(Exception) as raised:  # noqa: PT011
        push_three(kv)
    if kv.rank == 1:
        assert raised.value is error
    else:
        assert type(raised.value) is UpdaterError
        assert "raised on rank 1" in str(raised.value)
        assert type(error).__name__ in str(raised.value)
    np.testing.assert_array_equal(kv.pull(1), f32(10, 20) + kv.num_workers)


@pytest.mark.parametrize("call", ["push", "barrier", "set_updater", "close", "init", "pushpull"])
def test_an_updater_that_calls_a_collective_gets_an_error(kv: KVStore, call: str) -> None:
    calls: dict[str, Callable[[], object]] = {
        "push": lambda: kv.push(1, f32(0, 0)),
        "pushpull": lambda: kv.pushpull(1, f32(0, 0)),
        "init": lambda: kv.init(9, f32(0, 0)),
        "barrier": kv.barrier,
        "close": kv.close,
        "set_updater": lambda: kv.set_updater(update),
    }

    def update(key: Any, input: Array, stored: Array) -> None:
        calls[call]()

    kv.init(1, f32(1, 2))
    kv.set_updater(update)
    with pytest.raises(ThreadError, match="an updater may pull, but must not"):
        kv.push(1, f32(1, 1))
    np.testing.assert_array_equal(kv.pull(1), f32(1, 2))
    kv.set_updater(lambda key, input, stored: np.add(stored, input, out=stored))
    kv.push(1, f32(1, 1))
    np.testing.assert_array_equal(kv.pull(1), f32(1, 2) + kv.num_workers)


@pytest.mark.ranks(at_least=2)
@pytest.mark.parametrize("who", ["the first rank", "the last rank"])
def test_a_rank_that_closes_the_store_is_named_on_those_that_use_it(comm: Any, who: str) -> None:
    kv = kvcoll.create("dist_sync")
    one = 0 if who == "the first rank" else kv.num_workers - 1
    kv.init(3, f32(1))
    with pytest.raises(RanksDisagreeError, match=rf"rank {one} called close\(\)"):
        kv.close() if kv.rank == one else kv.push(3, f32(1))
    assert not kv.closed
    kv.push(3, f32(1))
    np.testing.assert_array_equal(kv.pull(3), f32(1) * kv.num_workers)
    kv.close()
    with pytest.raises(StoreClosedError, match="closed"):
        kv.push(3, f32(1))
    kv.close()


@pytest.mark.ranks(at_least=2)
def test_an_exception_that_leaves_a_with_block_is_told_to_the_others(comm: Any) -> None:
    with pytest.raises((ZeroDivisionError, RankLeftError)) as raised:  # noqa: PT012, SIM117
        with kvcoll.create("dist_sync") as kv:
            kv.init(3, f32(1))
            if kv.rank == 1:
                raise ZeroDivisionError("bad batch")
            kv.push(3, f32(1))
    if kv.rank == 1:
        assert type(raised.value) is ZeroDivisionError
    else:
        assert "rank 1 left the store (ZeroDivisionError: bad batch), while" in str(raised.value)
    assert kv.closed


@pytest.mark.ranks(at_least=2)
@pytest.mark.limit(10)
@pytest.mark.parametrize("used", ["the outer store", "the inner store"])
def test_an_exception_that_leaves_two_stores_at_once_is_told_to_the_others(
    comm: Any, used: str
) -> None:
    with pytest.raises((ZeroDivisionError, RankLeftError)):  # noqa: PT012, SIM117
        with kvcoll.create("dist_sync") as outer, kvcoll.create("dist_sync") as inner:
            outer.init(3, f32(1))
            inner.init(3, f32(1))
            if outer.rank == 1:
                raise ZeroDivisionError("bad batch")
            (outer if used == "the outer store" else inner).push(3, f32(1))
    assert outer.closed
    assert inner.closed


@pytest.mark.ranks(at_least=2)
@pytest.mark.limit(10)
def test_two_stores_closed_in_another_order_on_one_rank_are_an_error(comm: Any, rank: int) -> None:
    stores = [kvcoll.create("dist_sync"), kvcoll.create("dist_sync")]
    first, second = stores if rank else stores[::-1]
    with pytest.raises(RanksDisagreeError, match=r"rank 0 called close\(\) of store"):
        first.close()
    assert not first.closed
    assert not second.closed
    for kv in stores:
        kv.close()
    assert all(kv.closed for kv in stores)


@pytest.mark.limit(20)
@pytest.mark.parametrize("kind", ["dist_sync", "dist_async"])
def test_a_closed_store_gives_its_memory_back_once_another_is_made(comm: Any, kind: str) -> None:
    first = kvcoll.create(kind)
    first.init(3, f32(1))
    first.close()
    closed = weakref.ref(first)
    del first
    with kvcoll.create(kind):
        gc.collect()
        assert closed() is None


@pytest.mark.limit(20)
def test_what_the_stores_of_a_communicator_share_is_let_go_once_others_are_made(comm: Any) -> None:
    links = sys.modules["kvcoll.create"].__dict__["_links"]
    own = comm.Dup()
    for _ in range(2):
        with kvcoll.create("dist_sync", comm=own) as kv:
            kv.init(3, f32(1))
        kept = len(links)
    with kvcoll.create("dist_sync", comm=own), kvcoll.create("dist_async", comm=own):
        assert len(links) == kept + 2  # one for each, that of the late store, and not the last one
    own.Free()
