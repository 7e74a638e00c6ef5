"""What ranks can do wrong together: every rank gets the same error, and nothing is applied."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from raised_by_all import raised_by_all

import kvcoll
from kvcoll import KVStore
from kvcoll.errors import (
    ArgumentError,
    ArrayError,
    DTypeMismatchError,
    KeyExistsError,
    KeyKindError,
    KeyNotFoundError,
    RanksDisagreeError,
    ShapeMismatchError,
)

Array = npt.NDArray[Any]
Call = Callable[[KVStore], object]

pytestmark = [pytest.mark.ranks(at_least=2), pytest.mark.limit(10)]


def f32(*numbers: float) -> Array:
    return np.array(numbers, np.float32)


def add(key: object, input: Array, stored: Array) -> None:
    stored += input


@pytest.fixture
def kv(comm: object) -> Iterator[KVStore]:
    """Give a store with key 3 = [1, 2] and key 4 = [5]."""
    with kvcoll.create("dist_sync") as store:
        store.init([3, 4], [f32(1, 2), f32(5)])
        yield store


def assert_unharmed(kv: KVStore) -> None:
    """Check that nothing was applied on any rank, and that the store still works."""
    np.testing.assert_array_equal(kv.pull(3), f32(1, 2))
    np.testing.assert_array_equal(kv.pull(4), f32(5))
    for key in (6, 7):
        with pytest.raises(KeyNotFoundError):
            kv.pull(key)
    kv.push([4, 3], [f32(10 * kv.rank), f32(kv.rank, 7)])
    ranks = sum(range(kv.num_workers))
    np.testing.assert_array_equal(kv.pull(3), f32(ranks, 7 * kv.num_workers))
    np.testing.assert_array_equal(kv.pull(4), f32(10 * ranks))
    kv.init([7, 6], [f32(7), f32(6)])
    np.testing.assert_array_equal(kv.pull(6), f32(6))


X, Y = f32(8, 9), f32(8)


def push(kv: KVStore) -> None:
    kv.push(3, X)


def push_both(kv: KVStore) -> None:
    kv.push([3, 4], [X, Y])


def pull_and_wait(kv: KVStore) -> None:
    kv.pull(3)
    kv.barrier()


def init(kv: KVStore) -> None:
    kv.init([6, 7], [X, Y])


def sgd(**settings: Any) -> Call:
    return lambda kv: kv.set_optimizer("sgd", **settings)


# What one rank does, what the others do, and the error, with {r} for the one rank.
# fmt: off
ONE_RANK: dict[str, tuple[Call, Call, type[Exception], str]] = {
    # A mistake that this rank finds by itself
    "unknown key": (lambda kv: kv.push(6, X), push, KeyNotFoundError, "rank {r}: key 6 is not in"),
    "no key": (lambda kv: kv.push(3.5, X), push, KeyKindError, "rank {r}: a key is an int or"),
    "kind of key": (lambda kv: kv.push("w", X), push, KeyKindError, "rank {r}: key 'w' is of type"),
    "shape": (
        lambda kv: kv.push(3, Y), push, ShapeMismatchError,
        "rank {r}: key 3 holds float32[2], pushed float32[1]"),
    "shape in a list": (lambda kv: kv.push(3, [X, X, Y]), push, ShapeMismatchError, "float32[1]"),
    "dtype": (lambda kv: kv.push(3, X * 1j), push, DTypeMismatchError, "rank {r}: key 3 holds"),
    "no array": (lambda kv: kv.push(3, None), push, ArrayError, "rank {r}: expected an array"),
    "empty list": (lambda kv: kv.push(3, []), push, ArgumentError, "rank {r}: key 3: the list of"),
    "value missing": (
        lambda kv: kv.push([3, 4], [X]), push_both, ArgumentError, "rank {r}: 2 keys but 1 values"),
    "out of another shape": (
        lambda kv: kv.pushpull(3, X, out=Y), lambda kv: kv.pushpull(3, X.copy()),
        ShapeMismatchError, "rank {r}: key 3 holds float32[2], the output"),
    "init of a key that exists": (
        lambda kv: kv.init([6, 3], [X, X]), init, KeyExistsError, "rank {r}: key 3 holds"),
    "init of a key twice": (
        lambda kv: kv.init([6, 6], [X, X]), init, KeyExistsError, "rank {r}: key 6 stands twice"),
    "init of no array": (lambda kv: kv.init([6, 7], [X, 1]), init, ArrayError, "got int"),
    "broadcast to a wrong output": (
        lambda kv: kv.broadcast(6, X, Y), lambda kv: kv.broadcast(6, X, X.copy()),
        ShapeMismatchError, "rank {r}: key 6"),
    "no updater": (
        lambda kv: kv.set_updater(None), lambda kv: kv.set_updater(add),  # type: ignore[arg-type]
        TypeError, "rank {r}: an updater must be callable"),
    "no optimizer": (
        lambda kv: kv.set_optimizer("nope"), sgd(), ArgumentError, "rank {r}: unknown optimizer"),
    # Calls that differ
    "another key": (
        lambda kv: kv.push(4, Y), push, RanksDisagreeError, "rank {r} called push(4 float32[1])"),
    "another order of keys": (
        lambda kv: kv.push([4, 3], [Y, X]), push_both, RanksDisagreeError,
        "rank {r} called push(keys [4, 3])"),
    "a key more": (push_both, push, RanksDisagreeError, "rank {r} called push(keys [3, 4])"),
    "a key twice": (
        lambda kv: kv.push([3, 3], [X, X]), push, RanksDisagreeError, "rank {r} called push(keys"),
    "nothing to push": (lambda kv: kv.push([], []), push, RanksDisagreeError, "rank {r} called"),
    "a barrier": (lambda kv: kv.barrier(), push, RanksDisagreeError, "rank {r} called barrier()"),
    "a pull, then a barrier": (
        pull_and_wait, push, RanksDisagreeError, "rank {r} called barrier"),
    "init for push": (
        lambda kv: kv.init(6, X), push, RanksDisagreeError, "rank {r} called init(6 float32[2])"),
    "push for init": (push, init, RanksDisagreeError, "rank {r} called push(3 float32[2])"),
    "set_updater for push": (
        lambda kv: kv.set_updater(add), push, RanksDisagreeError, "rank {r} called set_updater()"),
    "set_optimizer for set_updater": (
        sgd(learning_rate=0.5), lambda kv: kv.set_updater(add), RanksDisagreeError,
        "rank {r} called set_optimizer(SGD("),
    "empty for push": (lambda kv: kv.empty(3), push, RanksDisagreeError, "rank {r} called empty("),
    "init of another key": (
        lambda kv: kv.init([6, 8], [X, Y]), init, RanksDisagreeError, "rank {r} called init(keys"),
    "init of another shape": (
        lambda kv: kv.init([6, 7], [X, X]), init, RanksDisagreeError, "key 7 holds float32[2]"),
    "init of another dtype": (
        lambda kv: kv.init([6, 7], [X, Y.astype(float)]), init, RanksDisagreeError,
        "key 7 holds float64[1]"),
    "init of fewer keys": (
        lambda kv: kv.init([6], [X]), init, RanksDisagreeError, "rank {r} called init(6 float32"),
    "another optimizer": (
        lambda kv: kv.set_optimizer("adam"), sgd(), RanksDisagreeError, "set_optimizer(Adam("),
    "another learning rate": (
        sgd(learning_rate=0.5), sgd(learning_rate=0.25), RanksDisagreeError, "set_optimizer(SGD("),
    "a learning rate that differs in its last digits": (
        sgd(learning_rate=0.1 + 1e-12), sgd(learning_rate=0.1), RanksDisagreeError,
        "0.100000000001"),
    "another momentum": (
        sgd(momentum=0.5), sgd(momentum=0.25), RanksDisagreeError, "set_optimizer(SGD("),
    "another rescale_grad": (
        sgd(rescale_grad=0.5), sgd(rescale_grad=0.25), RanksDisagreeError, "set_optimizer(SGD("),
    "another clip_gradient": (
        sgd(clip_gradient=0.5), sgd(), RanksDisagreeError, "set_optimizer(SGD("),
    "multi_precision": (
        sgd(multi_precision=True), sgd(), RanksDisagreeError, "set_optimizer(SGD("),
    "names of the keys": (
        sgd(wd=0.1, param_idx2name={3: "a_bias"}), sgd(wd=0.1), RanksDisagreeError, "SGD("),
}
# fmt: on


@pytest.mark.parametrize("culprit", ["the first rank", "the last rank"])
@pytest.mark.parametrize(
    ("wrong", "others", "error", "piece"), ONE_RANK.values(), ids=ONE_RANK.keys()
)
def test_what_one_rank_does_wrong_is_the_same_error_on_all(
    kv: KVStore,
    comm: Any,
    wrong: Call,
    others: Call,
    error: type[Exception],
    piece: str,
    culprit: str,
) -> None:
    one = 0 if culprit == "the first rank" else kv.num_workers - 1
    raised = raised_by_all(comm, lambda: (wrong if kv.rank == one else others)(kv))
    assert type(raised) is error
    assert piece.format(r=one) in str(raised)
    assert_unharmed(kv)


# fmt: off
ALL_RANKS: dict[str, tuple[Call, type[Exception], str]] = {
    "unknown key": (lambda kv: kv.push(6, X), KeyNotFoundError, "key 6 is not in the store"),
    "shape": (lambda kv: kv.push(3, Y), ShapeMismatchError, "key 3 holds float32[2], pushed"),
    "another shape on each rank": (
        lambda kv: kv.push(3, np.zeros(5 + kv.rank, np.float32)), ShapeMismatchError,
        "rank 0: key 3 holds float32[2], pushed float32[5]"),
    "another mistake on each rank": (
        lambda kv: kv.push(3, Y) if kv.rank else kv.push(6, X), KeyNotFoundError,
        "rank 0: key 6 is not in the store: init it first; rank"),
    "a generator": (lambda kv: kv.push((k for k in [3]), X), KeyKindError, "generator"),
    "each rank its own key": (
        lambda kv: kv.push(3 + kv.rank % 2, Y if kv.rank % 2 else X),
        RanksDisagreeError, "called push(3 float32[2]), rank"),
    "each rank its own shape in init": (
        lambda kv: kv.init(6, np.zeros(kv.rank)), RanksDisagreeError,
        "rank 0 called init(6 float64[0]), rank 1 called init(6 float64[1])"),
    "no callable": (lambda kv: kv.set_updater(3), TypeError, "got int"),  # type: ignore[arg-type]
}
# fmt: on


@pytest.mark.parametrize(("call", "error", "piece"), ALL_RANKS.values(), ids=ALL_RANKS.keys())
def test_what_all_ranks_do_wrong_is_the_same_error_on_all(
    kv: KVStore, comm: Any, call: Call, error: type[Exception], piece: str
) -> None:
    raised = raised_by_all(comm, lambda: call(kv))
    assert type(raised) is error
    assert piece in re.sub(" of store [0-9]+", "", str(raised))
    assert_unharmed(kv)


SAME: dict[str, tuple[Call, Call]] = {
    "a key alone and in a list": (push, lambda kv: kv.push([3], [X])),
    "push and pushpull": (push, lambda kv: kv.pushpull(3, X.copy())),
    "tuples and lists": (push_both, lambda kv: kv.push((3, 4), (X, [Y]))),
    "NumPy's integers and int": (push, lambda kv: kv.push(np.int16(3), X)),
}


@pytest.mark.parametrize(("one", "others"), SAME.values(), ids=SAME.keys())
def test_what_means_the_same_is_no_mistake(kv: KVStore, one: Call, others: Call) -> None:
    (one if kv.rank == 0 else others)(kv)
    np.testing.assert_array_equal(kv.pull(3), X * kv.num_workers)


def test_int_keys_of_an_init_may_come_in_any_order(kv: KVStore) -> None:
    keys = [6, 7, 8] if kv.rank == 0 else [8, 6, 7]  # they are updated in ascending order
    kv.init(keys, [f32(key) for key in keys])
    kv.push([6, 7, 8], [f32(60), f32(70), f32(80)])
    for key in keys:
        np.testing.assert_array_equal(kv.pull(key), f32(10 * key) * kv.num_workers)


def test_str_keys_of_an_init_in_another_order_are_an_error(comm: Any, rank: int) -> None:
    with kvcoll.create("dist_sync") as kv:  # their order is that of the updates
        keys = ["a", "b"] if rank == 0 else ["b", "a"]
        raised = raised_by_all(comm, lambda: kv.init(keys, [X, X]))
        assert type(raised) is RanksDisagreeError
        assert "rank 0 called init(keys ['a', 'b'])" in str(raised)


@pytest.mark.parametrize("seed", range(3))
def test_whatever_the_ranks_call_they_agree_on_what_has_happened(
    kv: KVStore, comm: Any, seed: int
) -> None:
    good: list[Call] = [
        lambda kv: kv.push(3, f32(kv.rank, 1)),
        lambda kv: kv.push([4, 3], [f32(2), [f32(3, kv.rank), f32(1, 1)]]),
        lambda kv: kv.barrier(),
    ]
    bad: list[Call] = [
        lambda kv: kv.push(3, Y),
        lambda kv: kv.push(9, Y),
        lambda kv: kv.init(3, X),
        lambda kv: kv.push([3, 4], [X]),
        lambda kv: kv.set_updater(0),  # type: ignore[arg-type]
    ]
    n, ranks = kv.num_workers, sum(range(kv.num_workers))
    value3, value4 = f32(1, 2), f32(5)
    random = np.random.default_rng([seed, n])
    for _ in range(60):
        if random.random() < 0.5:
            choice = [int(random.integers(3))] * n
        else:
            choice = [int(c) for c in random.integers(len(good + bad), size=n)]
        mine = (good + bad)[choice[kv.rank]]
        if set(choice) == {choice[0]} and choice[0] < len(good):
            mine(kv)
            if choice[0] == 0:
                value3 = f32(ranks, n)
            elif choice[0] == 1:
                value3, value4 = f32(4 * n, ranks + n), f32(2 * n)
        else:
            raised_by_all(comm, lambda mine=mine: mine(kv))  # type: ignore[misc]
        np.testing.assert_array_equal(kv.pull(3), value3)
        np.testing.assert_array_equal(kv.pull(4), value4)
