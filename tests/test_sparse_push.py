"""Pushes of rows: their sums over lists and ranks, and what updaters see of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sparse_values import F16, F32, SHAPE, add_to, numbers, rows_of, total

import kvcoll
from kvcoll import KVStore, RowSparse


def whole(kv: KVStore, key: Any) -> Any:
    return kv.pull(key, ignore_sparse=False)


def test_a_row_sparse_key_begins_with_the_rows_of_rank_0(kv: KVStore) -> None:
    value = RowSparse(np.full((3, 3), kv.rank + 1, F32), [1, 5, 1], SHAPE)
    kv.init("w", value)
    expected = np.zeros(SHAPE, F32)
    expected[1], expected[5] = 2, 1
    np.testing.assert_array_equal(whole(kv, "w"), expected)


def test_without_an_updater_the_sum_replaces_the_value_and_other_rows_become_0(
    kv: KVStore,
) -> None:
    for key, value in {
        "w": RowSparse(np.ones((1, 3), F32), [7], SHAPE),
        "d": np.ones(SHAPE, F32),
    }.items():
        kv.init(key, value)
        for turn in range(4):
            kv.push(key, rows_of(kv.rank, turn))
            np.testing.assert_array_equal(whole(kv, key), total(kv.num_workers, turn))


def test_arrays_and_rows_may_take_turns(kv: KVStore) -> None:
    kv.init("w", RowSparse.empty(SHAPE, F32))
    kv.push("w", rows_of(kv.rank))
    for turn in (1, 2):
        kv.push("w", np.full(SHAPE, kv.rank + turn, F32))
        expected = np.full(SHAPE, sum(rank + turn for rank in range(kv.num_workers)))
        np.testing.assert_array_equal(whole(kv, "w"), expected)
        kv.push("w", rows_of(kv.rank, turn))
        np.testing.assert_array_equal(whole(kv, "w"), total(kv.num_workers, turn))


def test_lists_of_rows_are_summed_first_and_may_differ_in_length(kv: KVStore) -> None:
    kv.init("w", RowSparse.empty(SHAPE, F32))
    kv.push("w", [rows_of(rank) for rank in range(kv.rank + 1)])
    expected = np.zeros(SHAPE, F32)
    for rank in range(kv.num_workers):
        own = np.zeros(SHAPE, F32)
        for other in range(rank + 1):
            add_to(own, rows_of(other))
        expected += own
    assert np.any(expected)
    np.testing.assert_array_equal(whole(kv, "w"), expected)


def test_a_list_with_rows_and_arrays_is_summed_as_arrays(kv: KVStore) -> None:
    kv.init("w", RowSparse.empty(SHAPE, F32))
    kv.set_updater(lambda key, grad, stored: np.add(stored, grad, out=stored))
    own = [np.full(SHAPE, 2, F32), RowSparse(np.full((2, 3), 1 + kv.rank, F32), [4, 4], SHAPE)]
    kv.push("w", own if kv.rank else own[::-1])
    expected = np.full(SHAPE, 2.0 * kv.num_workers)
    expected[4] += sum(2 * (1 + rank) for rank in range(kv.num_workers))
    np.testing.assert_array_equal(whole(kv, "w"), expected)


def test_a_key_that_stands_twice_gets_all_its_rows(kv: KVStore) -> None:
    kv.init(["w", "v"], [RowSparse.empty(SHAPE, F32), np.zeros(2, F32)])
    one = RowSparse(np.full((1, 3), 1 + kv.rank, F32), [4], SHAPE)
    kv.push(["w", "v", "w"], [one, np.ones(2, F32), [one, one]])
    expected = 3 * sum(1 + rank for rank in range(kv.num_workers))
    np.testing.assert_array_equal(whole(kv, "w")[4], [expected] * 3)


def test_a_users_updater_sees_ascending_rows_each_once_and_keys_in_their_order(
    kv: KVStore,
) -> None:
    seen = []

    def update(key: Any, grad: Any, stored: Any) -> None:
        seen.append(key)
        if isinstance(grad, RowSparse):
            assert (np.diff(grad.indices) > 0).all()
            assert grad.shape == stored.shape
            stored[grad.indices] += 2 * grad.data
            grad.data[...] = 77  # it may write to it
        else:
            stored += grad

    kv.init(
        [7, 3, 5, 4],
        [RowSparse.empty(SHAPE, F32), np.zeros(2, F32), np.zeros(SHAPE, F32), np.zeros(4, F32)],
    )
    kv.set_updater(update)
    own = rows_of(kv.rank)
    before = own.data.copy()
    kv.push([7, 4, 5, 3], [own, np.ones(4, F32), own, np.ones(2, F32)])
    assert seen == [3, 4, 5, 7]
    np.testing.assert_array_equal(own.data, before)
    for key in (5, 7):
        np.testing.assert_array_equal(whole(kv, key), 2 * total(kv.num_workers))
    np.testing.assert_array_equal(kv.pull(4), [kv.num_workers] * 4)


def test_the_sum_does_not_depend_on_what_travels_with_it(kv: KVStore) -> None:
    keys = [f"{n}" for n in range(5)]
    kv.init(
        keys, [RowSparse.empty(SHAPE, F32) if n % 2 else np.zeros(SHAPE, F32) for n in range(5)]
    )
    together = [rows_of(kv.rank, n) for n in range(5)]
    kv.push(keys, together)
    first = [whole(kv, key) for key in keys]
    for key, rows in zip(keys, together, strict=True):
        kv.push(key, rows)
    for turn, (key, array) in enumerate(zip(keys, first, strict=True)):
        assert whole(kv, key).tobytes() == array.tobytes()
        np.testing.assert_array_equal(array, total(kv.num_workers, turn))


def test_sums_of_16_bits_are_rounded_once(kv: KVStore) -> None:
    kv.init("w", RowSparse.empty((4, 1), F16))
    first, others = np.array([[2048]], F16), np.ones((4, 1), F16)
    own = [RowSparse(others, [2] * 4, (4, 1))]
    if kv.rank == 0:
        own.insert(0, RowSparse(first, [2], (4, 1)))
    kv.push("w", own)
    expected = np.float32(2048 + 4 * kv.num_workers).astype(F16)
    assert whole(kv, "w")[2, 0] == expected
    kv.push("w", RowSparse(first if kv.rank == 0 else others[:1], [2], (4, 1)))
    assert whole(kv, "w")[2, 0] == np.float32(2048 + kv.num_workers - 1).astype(F16)


def test_rows_of_another_dtype_and_infinities_go_through(kv: KVStore) -> None:
    kv.init("w", RowSparse.empty((4, 2), F32))
    big = np.array([[np.inf, 1e300], [np.nan, 1]])
    with np.errstate(all="raise"):
        kv.push("w", RowSparse(big, [3, 0], (4, 2)))
    np.testing.assert_array_equal(
        whole(kv, "w"), [[np.nan, kv.num_workers], [0, 0], [0, 0], [np.inf, np.inf]]
    )


@pytest.mark.parametrize("shape", [(0, 3), (4, 0), (5,)], ids=str)
def test_keys_without_elements_and_of_one_dimension_work(
    kv: KVStore, shape: tuple[int, ...]
) -> None:
    kv.init("w", RowSparse.empty(shape, F32))
    kv.init("d", np.zeros(shape, F32))
    n = min(2, shape[0])
    own = RowSparse(np.ones((n, *shape[1:]), F32), [0, 3][:n], shape)
    for updater in (None, "sgd", "lamb"):
        if updater:
            kv.set_optimizer(updater, learning_rate=1)
        kv.push(["w", "d"], [own, own])
    assert whole(kv, "w").shape == shape
    np.testing.assert_array_equal(whole(kv, "w"), kv.pull("d"))


def test_the_caller_may_change_its_rows_at_once(comm: Any) -> None:
    ways: list[tuple[str, bool | str]] = [("dist_sync", "always"), ("dist_async", False)]
    for name, overlap in ways:
        with kvcoll.create(name, overlap=overlap) as kv:
            kv.init(["w", "d"], [RowSparse.empty(SHAPE, F32), np.zeros(3, F32)])
            kv.set_optimizer("sgd", learning_rate=1)
            expected = np.zeros(SHAPE, F32)
            for turn in range(6):
                own, array = rows_of(comm.rank, turn), np.ones(3, F32)
                kv.push(["w", "d"], [own, array])
                own.data[...], own.indices[...], array[...] = np.nan, 0, np.nan
                expected -= total(comm.size, turn)
            kv.barrier()
            np.testing.assert_array_equal(whole(kv, "w"), expected)
            np.testing.assert_array_equal(kv.pull("d"), [-6 * comm.size] * 3)


def test_rows_of_the_stores_own_memory_may_be_pushed(kv: KVStore) -> None:
    kv.init("w", RowSparse(np.ones((2, 3), F32), [1, 4], SHAPE))
    kv.set_optimizer("sgd", learning_rate=1)
    kv.push("w", RowSparse(kv.view("w")[1:3], [4, 1], SHAPE))
    expected = np.zeros(SHAPE)
    expected[1], expected[4] = 1, 1 - kv.num_workers
    np.testing.assert_array_equal(whole(kv, "w"), expected)


@pytest.mark.ranks(at_least=3)
def test_reproducible_sums_are_taken_over_a_tree(comm: Any) -> None:
    with kvcoll.create("dist_sync", reproducible=True) as kv:
        kv.init("w", RowSparse.empty(SHAPE, F32))
        every = [RowSparse(numbers(SHAPE, rank), np.arange(40), SHAPE) for rank in range(comm.size)]
        kv.push("w", every[comm.rank])
        a = [value.data for value in every]
        expected = (a[0] + a[1]) + (a[2] if comm.size == 3 else a[2] + a[3])
        assert whole(kv, "w").tobytes() == expected.tobytes()
        assert comm.size == 3 or expected.tobytes() != (a[0] + a[1] + a[2] + a[3]).tobytes()


@pytest.mark.parametrize("name", ["dist_sync", "dist_sync overlap", "dist_async"])
def test_a_rank_that_has_joined_pushes_no_rows(comm: Any, name: str) -> None:
    name, *overlap = name.split()
    with kvcoll.create(name, overlap="always" if overlap else False) as kv:
        kv.init(["w", "d"], [RowSparse.empty(SHAPE, F32), np.zeros(SHAPE, F32)])
        kv.set_optimizer("sgd", learning_rate=1)
        one = RowSparse(np.ones((1, 3), F32), [comm.rank], SHAPE)
        with kv.join():
            for _ in range(comm.rank + 1):
                kv.push(["w", "d"], [one, np.ones(SHAPE, F32)])
                kv.push("w", one)
        expected = np.zeros(SHAPE)
        for rank in range(comm.size):
            expected[rank] = -2 * (rank + 1)
        np.testing.assert_array_equal(whole(kv, "w"), expected)
        n_dense = sum(rank + 1 for rank in range(comm.size))
        np.testing.assert_array_equal(kv.pull("d"), np.full(SHAPE, -n_dense))
