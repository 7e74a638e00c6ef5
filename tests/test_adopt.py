"""Arrays of the user's whose place the store's own arrays take."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pytest
from one_process import LOCAL
from raised_by_all import raised_by_all

import kvcoll
from kvcoll import KVStore
from kvcoll.errors import (
    ArgumentError,
    DTypeMismatchError,
    KeyNotFoundError,
    ShapeMismatchError,
)

Array: TypeAlias = npt.NDArray[Any]
SHAPES = {1: (3, 4), 2: (), 3: (70_000,), 4: (0,), 5: (5,)}
KEYS = list(SHAPES)


def value(key: int, rank: int) -> Array:
    """Give what a rank has for a key: small whole numbers, so that sums are exact."""
    counted: Array = np.arange(np.prod(SHAPES[key])).reshape(SHAPES[key])
    given: Array = (counted % 7 + 10 * key + rank).astype(np.float32)
    return given


@pytest.fixture(params=[LOCAL, "dist_sync"])
def kv(request: pytest.FixtureRequest, comm: Any) -> Iterator[KVStore]:
    with kvcoll.create(request.param) as store:
        store.init(KEYS, [np.zeros(shape, np.float32) for shape in SHAPES.values()])
        yield store


def test_adopted_arrays_hold_what_was_given_and_are_the_keys_own(kv: KVStore) -> None:
    given = [value(key, kv.rank) for key in KEYS]
    grads = kv.adopt(KEYS, given)
    for key, grad, array in zip(KEYS, grads, given, strict=True):
        np.testing.assert_array_equal(grad, value(key, kv.rank))
        assert grad is kv.empty(key)
        assert not np.shares_memory(grad, array)
    kv.push(KEYS, grads)
    for key in KEYS:
        total = sum(value(key, rank) for rank in range(kv.num_workers))
        np.testing.assert_array_equal(kv.pull(key), total)
    assert kv.adopt(3, [given[2].astype(np.float64)[::-1]]) is grads[2]
    np.testing.assert_array_equal(grads[2], given[2][::-1])


def test_own_arrays_can_be_adopted_again_as_they_are_or_by_other_keys(comm: Any) -> None:
    with kvcoll.create("dist_sync") as kv:
        kv.init([1, 2, 3], [np.zeros(5)] * 3)
        one, two, three = kv.adopt([1, 2, 3], [np.full(5, 10.0 * key) for key in (1, 2, 3)])
        again = kv.adopt([2, 1, 3], [one, two, three])
        assert again[0] is two
        assert again[2] is three
        assert [float(array[0]) for array in (one, two, three)] == [20, 10, 30]
        kv.adopt(1, kv.adopt(2, one))
        assert (float(one[0]), float(two[0])) == (20, 20)


MISTAKES: dict[str, tuple[Any, Any, type[Exception]]] = {
    "a shape": (1, np.zeros((4, 3), np.float32), ShapeMismatchError),
    "a dtype": (1, np.zeros((3, 4), np.complex64), DTypeMismatchError),
    "a new key": (77, np.zeros((3, 4), np.float32), KeyNotFoundError),
    "too few": ([1, 5], [np.zeros((3, 4), np.float32)], ArgumentError),
    "several for a key": (5, [np.zeros(5, np.float32)] * 2, ArgumentError),
    "a key twice": ([5, 5], [np.zeros(5, np.float32)] * 2, ArgumentError),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_what_one_rank_gives_to_adopt_is_told_to_all(
    kv: KVStore, comm: Any, mistake: str
) -> None:
    keys, arrays, kind = MISTAKES[mistake]
    grads = kv.empty([1, 5])
    for key, grad in zip([1, 5], grads, strict=True):
        grad[...] = value(key, kv.rank)
    right = ([1, 5], [np.zeros((3, 4), np.float32), np.zeros(5, np.float32)])
    is_wrong = kv.type == "local" or kv.rank == kv.num_workers - 1
    raised = raised_by_all(comm, lambda: kv.adopt(*((keys, arrays) if is_wrong else right)))
    assert type(raised) is kind
    for key, grad in zip([1, 5], grads, strict=True):
        np.testing.assert_array_equal(grad, value(key, kv.rank))
