"""Compressed pushes: what SEMANTICS of the store become once gradients travel as codes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from raised_by_all import raised_by_all

import kvcoll
from kvcoll import KVStore
from kvcoll.errors import ArgumentError, RanksDisagreeError

T2 = {"type": "2bit", "threshold": 0.5}


def f32(*numbers: float) -> Any:
    return np.array(numbers, np.float32)


def pull(kv: KVStore, key: str = "w") -> Any:
    kv.wait(key)
    return kv.pull(key)


def test_two_bits_are_thresholds_and_what_is_left_comes_with_the_next_push(kv: KVStore) -> None:
    n = kv.num_workers
    gradient = f32(-1.2, -0.5, -0.4, 0.3, 0.5, 2)
    kv.init("w", np.zeros(6, np.float32))
    kv.set_gradient_compression(T2)
    kv.push("w", gradient)
    np.testing.assert_array_equal(pull(kv), n * f32(-0.5, -0.5, 0, 0, 0.5, 0.5))
    kv.push("w", np.zeros(6, np.float32))
    np.testing.assert_array_equal(pull(kv), n * f32(-0.5, 0, 0, 0, 0, 0.5))
    kv.push("w", [np.full(6, 0.3, np.float32)] * 2)
    np.testing.assert_array_equal(pull(kv), n * f32(0, 0.5, 0, 0.5, 0.5, 0.5))


def test_one_bit_is_one_or_minus_one_whatever_the_threshold(kv: KVStore) -> None:
    n = kv.num_workers
    kv.init("w", np.zeros(3, np.float32))
    kv.set_gradient_compression({"type": "1bit", "threshold": 0.25})
    kv.push("w", f32(0.2, 0.3, -5))
    np.testing.assert_array_equal(pull(kv), n * f32(-1, 1, -1))
    kv.push("w", f32(0, 0, 0))  # what was left: 1.2, -0.7, -4
    np.testing.assert_array_equal(pull(kv), n * f32(1, -1, -1))


@pytest.mark.parametrize(("kind", "eps"), [("fp16", 2.0**-10), ("bf16", 2.0**-7)])
def test_sixteen_bits_travel_and_sums_are_taken_in_32(kv: KVStore, kind: str, eps: float) -> None:
    """The sum of the ranks' exact codes is rounded to 16 bits once."""
    n = kv.num_workers
    kv.init("w", np.zeros(5000, np.float32))
    kv.set_gradient_compression({"type": kind})
    kv.push("w", np.full(5000, 1 + eps, np.float32))
    expected = 1 + eps if n == 1 else n  # n times eps is less than half of what is rounded away
    if n in (2, 4):
        expected = n * (1 + eps)
    stored = pull(kv)
    assert stored.dtype == np.float32
    if n != 3:
        np.testing.assert_array_equal(stored, np.full(5000, expected, np.float32))
    else:
        np.testing.assert_allclose(stored, 3 * (1 + eps), rtol=eps)


@pytest.mark.parametrize("params", [T2, {"type": "1bit"}, {"type": "fp16", "error_feedback": True}])
def test_a_list_of_keys_gives_the_bits_of_single_pushes(comm: Any, params: Any) -> None:
    rng = np.random.default_rng(comm.rank)
    shapes = [(3,), (700, 31), (), (0, 2), (300_000,)]
    keys = [f"k{number}" for number in range(len(shapes))]
    ways: list[bool | str] = [False, False, "always"]
    stores = [kvcoll.create("dist_sync", overlap=overlap) for overlap in ways]
    for kv in stores:
        kv.init(keys, [np.ones(shape, np.float32) for shape in shapes])
        kv.set_optimizer("sgd", learning_rate=0.1, momentum=0.9)
        kv.set_gradient_compression(params)
    for _ in range(3):
        grads = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
        for number, kv in enumerate(stores):
            if number == 0:
                kv.push(keys, grads)
            else:
                for key, grad in zip(keys, grads, strict=True):
                    kv.push(key, grad)
    first, *others = [[value.tobytes() for value in kv.pull(keys)] for kv in stores]
    assert all(other == first for other in others)
    assert set(comm.allgather(tuple(first))) == {tuple(first)}
    for kv in stores:
        kv.close()


def test_a_late_store_goes_through_the_same_bits(comm: Any) -> None:
    rng = np.random.default_rng(comm.rank)
    stores = [kvcoll.create(name) for name in ("dist_sync", "dist_async")]
    for kv in stores:
        kv.init("w", np.ones(50_000, np.float16))
        kv.set_optimizer("sgd", learning_rate=0.1)
        kv.set_gradient_compression(T2)
    for _ in range(4):
        grad = rng.standard_normal(50_000).astype(np.float16)
        for kv in stores:
            kv.push("w", [grad, grad])
    stores[1].barrier()
    assert stores[0].pull("w").tobytes() == stores[1].pull("w").tobytes()
    for kv in stores:
        kv.close()


def test_own_arrays_and_updaters_see_what_the_codes_stand_for(kv: KVStore) -> None:
    seen: list[Any] = []

    def update(key: object, value: Any, stored: Any) -> None:
        seen.append(value.copy())
        stored += value

    kv.init("w", np.zeros(4, np.float32))
    kv.set_updater(update)
    kv.set_gradient_compression(T2)
    own = kv.empty("w")
    own[...] = f32(0.7, -0.7, 0.1, 0.45)
    for _ in range(2):
        kv.push("w", own)
    np.testing.assert_array_equal(seen[0], kv.num_workers * f32(0.5, -0.5, 0, 0))
    np.testing.assert_array_equal(seen[1], kv.num_workers * f32(0.5, -0.5, 0, 0.5))
    np.testing.assert_array_equal(own, f32(0.7, -0.7, 0.1, 0.45))


def test_pushpull_is_compressed_and_init_never_is(kv: KVStore) -> None:
    kv.set_gradient_compression(T2)
    kv.init("w", f32(0.1, 7))
    np.testing.assert_array_equal(pull(kv), f32(0.1, 7))
    out = np.zeros(2, np.float32)
    kv.pushpull("w", f32(0.1, 7), out=out)
    np.testing.assert_array_equal(out, kv.num_workers * f32(0, 0.5))


def test_what_is_left_outlives_a_changed_threshold_and_a_pause(kv: KVStore) -> None:
    n = kv.num_workers
    kv.init("w", np.zeros(2, np.float32))
    kv.set_gradient_compression(T2)
    kv.push("w", f32(1.5, 0.25))  # leaves 1, 0.25
    kv.set_gradient_compression({"type": "2bit", "threshold": 0.25})
    kv.push("w", f32(0, 0))  # leaves 0.75, 0
    np.testing.assert_array_equal(pull(kv), n * f32(0.25, 0.25))
    kv.set_gradient_compression({"type": "none"})
    kv.push("w", f32(3, 4))
    np.testing.assert_array_equal(pull(kv), n * f32(3, 4))
    kv.set_gradient_compression(T2)
    kv.push("w", f32(0, 0))
    np.testing.assert_array_equal(pull(kv), n * f32(0.5, 0))


def test_a_gradient_with_a_nan_on_one_rank_is_an_error_that_names_the_key(
    kv: KVStore, comm: Any
) -> None:
    kv.init(["a", "b"], [np.zeros(3, np.float32)] * 2)
    kv.set_gradient_compression(T2)
    kv.push(["a", "b"], [f32(0.7, 0, 0)] * 2)
    bad = f32(0, np.nan, 0) if kv.rank == kv.num_workers - 1 else f32(0.4, 0, 0)
    error = raised_by_all(comm, lambda: kv.push(["a", "b"], [f32(0.4, 0, 0), bad]))
    assert isinstance(error, ArgumentError)
    assert "key 'b' holds float32[3], pushed NaN" in str(error)
    kv.push("a", f32(0, 0, 0))  # 0.2 is left: the push that failed has changed nothing
    np.testing.assert_array_equal(pull(kv, "a"), f32(0, 0, 0))


def test_keys_that_hold_no_floats_are_refused(kv: KVStore) -> None:
    kv.init("n", np.zeros(3, np.int32))
    with pytest.raises(ArgumentError, match=r"key 'n' holds int32\[3\]"):
        kv.set_gradient_compression(T2)
    kv.push("n", np.ones(3, np.int32))
    np.testing.assert_array_equal(pull(kv, "n"), [kv.num_workers] * 3)


@pytest.mark.parametrize("params", [{"type": "3bit"}, {"type": "2bit", "threshold": 0}, "2bit"])
def test_unknown_settings_are_an_error_and_change_nothing(kv: KVStore, params: Any) -> None:
    kv.init("w", np.zeros(2, np.float32))
    with pytest.raises(ValueError, match="compression"):
        kv.set_gradient_compression(params)
    kv.push("w", f32(3, 4))
    np.testing.assert_array_equal(pull(kv), kv.num_workers * f32(3, 4))


@pytest.mark.ranks(at_least=2)
def test_settings_that_differ_between_ranks_are_an_error_on_all(comm: Any) -> None:
    with kvcoll.create("dist_sync") as kv:
        kv.init("w", np.zeros(2, np.float32))
        mine = {"type": "2bit", "threshold": 0.5 if comm.rank else 0.25}
        error = raised_by_all(comm, lambda: kv.set_gradient_compression(mine))
        assert isinstance(error, RanksDisagreeError)
        assert "2bit compression with threshold 0.25" in str(error)


def test_a_rank_at_the_end_of_join_sends_what_it_has_left(comm: Any) -> None:
    with kvcoll.create("dist_sync") as kv:
        kv.init("w", np.zeros(1, np.float32))
        kv.set_gradient_compression(T2)
        with kv.join():
            kv.push("w", f32(1.0))  # leaves 0.5
            if comm.rank == 0:
                kv.push("w", f32(0))
        np.testing.assert_array_equal(kv.pull("w"), comm.size * f32(0.5))
