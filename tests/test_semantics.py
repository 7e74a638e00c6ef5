"""What each call of a store does, sentence by sentence as the semantics say it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from one_process import DEVICE, LOCAL

import kvcoll
from kvcoll import KVStore

Array = npt.NDArray[Any]
LOCAL_NAMES = (
    "local",
    "local_update_cpu",
    "local_allreduce_cpu",
    "device",
    "local_allreduce_device",
)


@pytest.fixture(params=[LOCAL, DEVICE, "dist_sync"])
def kv(request: pytest.FixtureRequest) -> Iterator[KVStore]:
    if request.param.startswith("dist"):
        request.getfixturevalue("comm")
    with kvcoll.create(request.param) as store:
        yield store


def f32(*numbers: float) -> Array:
    return np.array(numbers, np.float32)


def equal(array: Array, *numbers: float) -> None:
    np.testing.assert_array_equal(array, f32(*numbers))


def weights(kv: KVStore) -> int:
    """Sum what `kv.rank + 1` is on each rank of the store."""
    return sum(range(1, kv.num_workers + 1))


@pytest.mark.parametrize("name", [*LOCAL_NAMES, "Local", "DEVICE", "LOCAL_Allreduce_CPU"])
def test_a_store_of_one_process_gives_its_type_in_lower_case(name: str) -> None:
    kv = kvcoll.create(name)
    assert kv.type == name.lower()
    assert (kv.rank, kv.num_workers, kv.local_rank, kv.num_hosts) == (0, 1, 0, 1)


@pytest.mark.parametrize("name", ["dist", "dist_sync", "Dist_Sync"])
def test_a_distributed_store_spans_all_ranks(
    name: str, host_of: tuple[int, ...], rank: int, size: int
) -> None:
    with kvcoll.create(name) as kv:
        assert kv.type == name.lower()
        assert (kv.rank, kv.num_workers) == (rank, size)
        before_on_host = host_of[:rank].count(host_of[rank])
        assert (kv.local_rank, kv.num_hosts) == (before_on_host, len(set(host_of)))


def test_the_default_store_is_local() -> None:
    assert kvcoll.create().type == "local"


@pytest.mark.parametrize("word", ["optimizer", "Optimizer", "OPTIMIZER"])
def test_a_store_is_capable_of_an_optimizer_in_any_case(kv: KVStore, word: str) -> None:
    assert kv.is_capable(word) is True


def test_init_stores_a_copy_of_rank_0s_value(kv: KVStore) -> None:
    value = f32(10, 20) + kv.rank
    kv.init(3, value)
    value[:] = -1
    equal(kv.pull(3), 10, 20)


def test_init_takes_a_list_of_one_value(kv: KVStore) -> None:
    kv.init("a", [f32(1, 2)])
    kv.init(["b", "c"], [[f32(3)], (f32(4),)])
    equal(kv.pull("a"), 1, 2)
    equal(kv.pull("b"), 3)
    equal(kv.pull("c"), 4)


def test_without_an_updater_the_sum_replaces_the_value(kv: KVStore) -> None:
    kv.init(3, f32(100, 200))
    kv.push(3, f32(1, 2) * (kv.rank + 1))
    equal(kv.pull(3), weights(kv), 2 * weights(kv))
    kv.push(3, f32(5, 6))
    equal(kv.pull(3), 5 * kv.num_workers, 6 * kv.num_workers)


def test_a_list_of_values_is_summed_and_may_grow_and_shrink(kv: KVStore) -> None:
    kv.init(3, f32(0))
    for length in (1, 4, 2, 7, 1):
        kv.push(3, [f32(10 * kv.rank + k) for k in range(length)])
        expected = sum(10 * r + k for r in range(kv.num_workers) for k in range(length))
        equal(kv.pull(3), expected)


def test_lists_may_have_another_length_on_each_rank(kv: KVStore) -> None:
    kv.init([3, 4], [f32(0), f32(0)])
    kv.push([3, 4], [[f32(1)] * (kv.rank + 1), f32(7)])
    equal(kv.pull(3), weights(kv))
    equal(kv.pull(4), 7 * kv.num_workers)


def test_lists_may_be_tuples(kv: KVStore) -> None:
    kv.init((3, 4), (f32(1), f32(2)))
    kv.push((3, 4), ((f32(1), f32(2)), f32(5)))
    out = (np.zeros(1, np.float32), (np.zeros(1, np.float32), np.zeros(1, np.float32)))
    assert kv.pull((3, 4), out=out) is out
    equal(out[0], 3 * kv.num_workers)
    equal(out[1][0], 5 * kv.num_workers)
    equal(out[1][1], 5 * kv.num_workers)


def test_the_values_of_a_key_that_stands_twice_are_summed_together(kv: KVStore) -> None:
    runs: list[int] = []

    def update(key: Any, input: Array, stored: Array) -> None:
        runs.append(key)
        stored += input

    kv.init([1, 2], [f32(0), f32(0)])
    kv.set_updater(update)
    kv.push([2, 1, 2], [f32(10), f32(1), [f32(200), f32(3000)]])
    equal(kv.pull(1), kv.num_workers)
    equal(kv.pull(2), 3210 * kv.num_workers)
    assert runs == [1, 2]


def test_one_array_may_stand_under_several_keys_and_devices(kv: KVStore) -> None:
    one = f32(1, 2)
    kv.init([1, 2], [one, one])
    kv.push([1, 2], [[one, one, one], one])
    equal(kv.pull(1), 3 * kv.num_workers, 6 * kv.num_workers)
    equal(kv.pull(2), kv.num_workers, 2 * kv.num_workers)
    equal(one, 1, 2)


@pytest.mark.parametrize("priority", [0, 1, -7, 10**9])
def test_every_call_takes_a_priority(kv: KVStore, priority: int) -> None:
    out = f32(0)
    kv.broadcast(3, f32(4), out, priority=priority)
    equal(out, 4)
    kv.push(3, f32(1), priority=priority)
    kv.pull(3, out=out, priority=priority, ignore_sparse=False)
    equal(out, kv.num_workers)
    kv.pushpull(3, f32(2), out=out, priority=priority)
    equal(out, 2 * kv.num_workers)


def test_arrays_may_be_changed_as_soon_as_push_returns(kv: KVStore) -> None:
    kv.init([3, 4], [np.zeros(50_000, np.float32), f32(0)])
    for step in range(1, 5):
        values = [np.full(50_000, step * (kv.rank + 1), np.float32), f32(step)]
        kv.push([3, 4], values)
        for value in values:
            value[:] = -99
        np.testing.assert_array_equal(kv.pull(3), np.full(50_000, step * weights(kv), np.float32))
        equal(kv.pull(4), step * kv.num_workers)


@pytest.mark.parametrize("length", [1, 2, 3])
def test_a_push_never_changes_what_is_pushed(kv: KVStore, length: int) -> None:
    def update(key: Any, input: Array, stored: Array) -> None:
        stored += input
        input[...] = -1  # the updater may write to its input, and nobody else sees that

    kv.init([1, 2, 3], [f32(0, 0), f32(0), np.zeros(20_000, np.float32)])
    for updater in (None, update):
        if updater:
            kv.set_updater(updater)
        values = [[f32(1, 2), f32(3), np.full(20_000, 4, np.float32)] for _ in range(length)]
        kv.push([1, 2, 3], [list(of_key) for of_key in zip(*values, strict=True)])
        kv.push(3, values[0][2])
        for a, b, c in values:
            equal(a, 1, 2)
            equal(b, 3)
            assert (c == 4).all()


def test_an_input_that_the_updater_overwrites_is_fresh_at_the_next_key(kv: KVStore) -> None:
    seen: list[Array] = []

    def update(key: Any, input: Array, stored: Array) -> None:
        seen.append(input.copy())
        stored += input
        input[...] = 1e9

    kv.init([1, 2, 3], [f32(0), f32(0, 0), f32(0)])
    kv.set_updater(update)
    for _ in range(2):
        kv.push([1, 2, 3], [f32(1), f32(2, 3), f32(4)])
    n = kv.num_workers
    for array, expected in zip(seen, 2 * [f32(n), f32(2 * n, 3 * n), f32(4 * n)], strict=True):
        np.testing.assert_array_equal(array, expected)
    equal(kv.pull(2), 4 * n, 6 * n)


def test_pull_returns_what_it_has_filled(kv: KVStore) -> None:
    kv.init([3, 4], [f32(5, 6), f32(7)])
    out = f32(0, 0)
    assert kv.pull(3, out=out) is out
    equal(out, 5, 6)
    nested = [[f32(0, 0), f32(0, 0)], f32(0)]
    assert kv.pull([3, 4], out=nested) is nested
    equal(nested[0][0], 5, 6)
    equal(nested[0][1], 5, 6)
    equal(nested[1], 7)


def test_pull_without_out_gives_new_arrays(kv: KVStore) -> None:
    kv.init([3, 4], [f32(5, 6), f32(7)])
    first, second = kv.pull(3), kv.pull(3)
    first[:] = -1
    equal(second, 5, 6)
    equal(kv.pull(3), 5, 6)
    pulled = kv.pull([4, 3])
    assert isinstance(pulled, list)
    equal(pulled[0], 7)
    equal(pulled[1], 5, 6)
    assert kv.pull([]) == []


def test_pull_casts_as_numpys_same_kind_rule_allows(kv: KVStore) -> None:
    kv.init(3, f32(1.5, -2))
    for dtype in (np.float16, np.float64, np.complex64):
        out = np.zeros(2, dtype)
        kv.pull(3, out=out)
        np.testing.assert_array_equal(out, np.array([1.5, -2], dtype))


def test_pushpull_fills_out_and_leaves_the_value(kv: KVStore) -> None:
    kv.init(3, f32(0, 0))
    value, out = f32(1, 2), f32(0, 0)
    assert kv.pushpull(3, value, out=out) is out
    equal(out, kv.num_workers, 2 * kv.num_workers)
    equal(value, 1, 2)


def test_pushpull_without_out_works_in_place(kv: KVStore) -> None:
    kv.init([3, 4], [f32(0), f32(0)])
    values = [[f32(1), f32(20)], f32(3)]
    assert kv.pushpull([3, 4], values) is values
    n = kv.num_workers
    equal(values[0][0], 21 * n)
    equal(values[0][1], 21 * n)
    equal(values[1], 3 * n)


def test_broadcast_inits_and_pulls(kv: KVStore) -> None:
    out = [f32(0), f32(0, 0)]
    values = [f32(1) + 10 * kv.rank, f32(2, 3) + 10 * kv.rank]
    assert kv.broadcast([3, 4], values, out) is out
    equal(out[0], 1)
    equal(out[1], 2, 3)
    kv.push(3, f32(5))
    equal(kv.pull(3), 5 * kv.num_workers)


def test_both_names_set_the_updater_and_the_last_one_counts(kv: KVStore) -> None:
    def add(key: Any, input: Array, stored: Array) -> None:
        stored += input

    def subtract(key: Any, input: Array, stored: Array) -> None:
        stored -= input

    kv.init(3, f32(100))
    kv._set_updater(add)
    kv.push(3, f32(1))
    equal(kv.pull(3), 100 + kv.num_workers)
    kv.set_updater(subtract)
    kv.push(3, f32(10))
    equal(kv.pull(3), 100 - 9 * kv.num_workers)


def test_barrier_has_both_its_names(kv: KVStore) -> None:
    kv.barrier()
    kv._barrier()


def test_pushes_are_complete_when_the_barrier_returns(kv: KVStore) -> None:
    kv.init("w", f32(0))
    kv.push("w", f32(2))
    kv.barrier()
    equal(kv.pull("w"), 2 * kv.num_workers)


def test_an_empty_list_of_keys_does_nothing(kv: KVStore) -> None:
    kv.init([], [])
    kv.push([], [])
    kv.push((), ())
    assert kv.pushpull([], []) == []
    kv.init("still any kind", f32(1))
    kv.push([], [])
    equal(kv.pull("still any kind"), 1)


def test_the_bits_that_a_pull_gives_are_those_of_the_last_push_of_its_key(kv: KVStore) -> None:
    kv.init([1, 2], [f32(0), f32(0)])
    for step in range(20):
        kv.push(1 + step % 2, f32(step))
    equal(kv.pull(1), 18 * kv.num_workers)
    equal(kv.pull(2), 19 * kv.num_workers)
