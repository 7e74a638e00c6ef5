"""Replicas are compared: a flipped bit is named on every rank, with its rank, key and push."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from raised_by_all import raised_by_all

import kvcoll
from kvcoll import KVStore, RowSparse
from kvcoll.errors import (
    ArgumentError,
    RanksDisagreeError,
    ReplicasDifferError,
    ShapeMismatchError,
)

pytestmark = pytest.mark.ranks(at_least=2)

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "sync": ("dist_sync", {}),
    "overlap": ("dist_sync", {"overlap": "always"}),
    "async": ("dist_async", {"staleness": 2}),
}
KEYS = ["small", "large", "half", "rows"]
CURE = "; call verify(repair='vote') to give all ranks the bits of most of them, or go back to a "


@pytest.fixture(params=KINDS)
def make(request: pytest.FixtureRequest, comm: Any) -> Iterator[Callable[..., KVStore]]:
    """Give what makes a store of four keys with an optimizer; each kind of push in turn."""
    name, options = KINDS[request.param]
    stores = []

    def made(**more: Any) -> KVStore:
        kv: KVStore = kvcoll.create(name, **options, **more)
        stores.append(kv)
        first = [np.ones(7), np.arange(70_000, dtype=np.float32), np.ones((3, 4), np.float16)]
        kv.init(KEYS, [*first, RowSparse.empty((900, 2), np.dtype(np.float32))])
        kv.set_optimizer("sgd", learning_rate=0.25, momentum=0.5, multi_precision=True)
        return kv

    yield made
    for kv in stores:
        kv.close()


def push(kv: KVStore, n: int = 1) -> None:
    for _ in range(n):
        by = kv.rank + 1
        rows = RowSparse(np.full((2, 2), by, np.float32), np.array([3, 400]), (900, 2))
        dense = [np.full(7, by), np.full(70_000, by, np.float32), np.full((3, 4), by, np.float16)]
        kv.push(KEYS, [*dense, rows])


def flip(kv: KVStore, key: str, *, rank: int, state: int | None = None, place: int = 1) -> None:
    """Change a bit of a float, so that updates do not round it away."""
    kv.wait()
    if kv.rank == rank:
        entry = kv._replica.entries[key]
        updater: Any = kv._updater
        flat = entry.flat if state is None else updater.states_of(entry)[state]
        item = flat.view(f"u{flat.itemsize}")
        item[place] ^= item.dtype.type(1 << (8 * flat.itemsize - 4))


def warns_on_rank_0(kv: KVStore) -> AbstractContextManager[Any]:
    return pytest.warns(RuntimeWarning, match="differ") if kv.rank == 0 else nullcontext()


WHAT = {
    "a value": ("large", None, "key 'large'"),
    "a value of 16 bits": ("half", None, "key 'half'"),
    "a row-sparse value": ("rows", None, "key 'rows'"),
    "a state": ("small", 0, "state0 of the optimizer for key 'small'"),
    "a state of a row-sparse key": ("rows", 0, "state0 of the optimizer for key 'rows'"),
    "a master copy": ("half", 1, "the float32 master copy of key 'half'"),
}


@pytest.mark.parametrize(("key", "state", "named"), WHAT.values(), ids=WHAT.keys())
def test_a_flipped_bit_is_named_on_every_rank_and_mended(
    make: Callable[..., KVStore], comm: Any, key: str, state: int | None, named: str
) -> None:
    kv = make()
    push(kv, 3)
    before = kv.verify()
    assert set(comm.allgather(before)) == {before}
    flip(kv, key, rank=1, state=state)
    error = raised_by_all(comm, kv.verify)
    assert type(error) is ReplicasDifferError
    whose = "rank 0" if kv.num_workers == 2 else "most ranks"
    assert str(error).startswith(
        "the replicas differ, though no push has been made since push 3, after which they were "
        f"the same: rank 1: {named} is not that of {whose}{CURE}"
    )
    with warns_on_rank_0(kv):
        mended = kv.verify(repair="vote")
    assert mended == before == kv.verify()
    push(kv)
    assert kv.verify() != before


def test_a_comparison_after_each_push_names_the_push(
    make: Callable[..., KVStore], comm: Any
) -> None:
    kv = make(verify_every=1)
    push(kv, 4)
    flip(kv, "large", rank=kv.num_workers - 1)
    error = raised_by_all(comm, lambda: push(kv))
    assert type(error) is ReplicasDifferError
    assert f"since push 5: rank {kv.num_workers - 1}: key 'large' is not" in str(error)
    with warns_on_rank_0(kv):
        kv.verify(repair="vote")
    push(kv, 2)


def test_samples_name_the_push_of_an_error_that_spreads(
    make: Callable[..., KVStore], comm: Any
) -> None:
    kv = make(verify_every=6)
    push(kv, 8)
    kv.wait()
    if kv.rank == 1:
        kv._replica.entries["large"].flat[:] *= np.float32(1 + 2**-10)
    push(kv)
    flip(kv, "small", rank=1)
    error = raised_by_all(comm, lambda: push(kv, 3))
    assert "differ, since push 9, whose sample shows it, and the same after push 6: rank 1: " in (
        str(error)
    )
    assert "rank 1: key 'large' is not" in str(error)
    assert str(error).index("key 'large'") < str(error).index("key 'small'")


def test_a_lone_bit_is_dated_to_the_sample_that_came_to_it_or_between_comparisons(
    comm: Any,
) -> None:
    with kvcoll.create("dist_sync", verify_every=5) as kv:
        kv.init("w", np.zeros(16 * 8, np.float32))
        kv.set_optimizer("sgd", learning_rate=0.0)
        one = np.ones(16 * 8, np.float32)

        def push_5() -> None:
            for _ in range(5):
                kv.push("w", one)

        push_5()
        flip(kv, "w", rank=1, place=16 * 0 + 3)  # which the sample of every 8th push shows
        error = raised_by_all(comm, push_5)
        assert "since push 8, whose sample shows it, and the same after push 5" in str(error)
        with warns_on_rank_0(kv):
            kv.verify(repair="vote")
        flip(kv, "w", rank=1, place=16 * 2 + 3)
        error = raised_by_all(comm, push_5)
        assert "since a push after push 10 and not after push 15: rank 1" in str(error)


@pytest.mark.ranks(at_least=3)
def test_a_vote_takes_what_most_ranks_hold_and_not_rank_0s(comm: Any) -> None:
    with kvcoll.create("dist_sync") as kv:
        kv.init(["v", "w"], [np.arange(5.0), np.arange(9.0)])
        right = kv.verify()
        flip(kv, "w", rank=0)
        with warns_on_rank_0(kv) as warned:
            assert kv.verify(repair="vote") == right
        np.testing.assert_array_equal(kv.pull("w"), np.arange(9.0))
        if warned is not None:
            assert str(warned[0].message) == (
                "the replicas differ, though no push has been made since init, after which they "
                "were the same: rank 0: key 'w' is not that of most ranks; all ranks hold now what "
                "most of them did"
            )


def test_on_a_tie_rank_0s_is_taken_and_that_is_said(comm: Any) -> None:
    with kvcoll.create("dist_sync") as kv:
        kv.init("w", np.zeros(kv.num_workers))
        for rank in range(kv.num_workers):  # no two ranks hold the same
            flip(kv, "w", rank=rank, place=rank)
        own = comm.bcast(kv.pull("w"))
        with warns_on_rank_0(kv) as warned:
            kv.verify(repair="vote")
        np.testing.assert_array_equal(kv.pull("w"), own)
        if warned is not None:
            assert (
                "hold now what rank 0 did, as no bits were those of most ranks: that it was "
                in (str(warned[0].message))
            )


def test_a_view_shows_what_was_repaired(comm: Any) -> None:
    with kvcoll.create("dist_sync") as kv:
        kv.init("w", np.arange(4.0))
        view = kv.view("w")
        flip(kv, "w", rank=1)
        with warns_on_rank_0(kv):
            kv.verify(repair="vote")
        np.testing.assert_array_equal(view, np.arange(4.0))


def test_the_fingerprint_is_that_of_the_same_bits_in_another_store(comm: Any) -> None:
    told = set()
    for name in ("dist_sync", "local", "dist_sync"):
        with kvcoll.create(name) as kv:
            kv.init(["v", "w"], [np.arange(5.0), np.arange(9.0)])
            if name == "local":
                kv.init("u", np.zeros(2))
            told.add(kv.verify())
    assert len(told) == 2


def test_what_a_user_does_wrong_is_the_same_error_on_every_rank(comm: Any) -> None:
    with kvcoll.create("dist_sync") as kv:
        kv.init("w", np.zeros(3))
        error = raised_by_all(comm, lambda: kv.verify("mean" if kv.rank == 1 else "vote"))
        assert type(error) is ArgumentError
        assert str(error) == "rank 1: repair is 'vote' or None, got 'mean'"
        error = raised_by_all(comm, lambda: kv.verify("vote" if kv.rank == 1 else None))
        assert type(error) is RanksDisagreeError
        assert "rank 1 called verify(repair='vote')" in str(error)
        error = raised_by_all(comm, lambda: kv.verify() if kv.rank else kv.barrier())
        assert "rank 0 called barrier()" in str(error)
        kv.verify()


def test_ranks_that_compare_after_other_numbers_of_pushes_cannot_make_a_store(comm: Any) -> None:
    error = raised_by_all(
        comm, lambda: kvcoll.create("dist_sync", verify_every=2 if comm.rank else 3)
    )
    assert type(error) is RanksDisagreeError
    assert "verify_every=3" in str(error)


def test_a_rank_without_batches_takes_part_in_comparisons(comm: Any) -> None:
    with kvcoll.create("dist_sync", verify_every=2) as kv:
        kv.init("w", np.zeros(3))
        kv.set_optimizer("sgd", learning_rate=1.0)
        with kv.join():
            for _ in range(2 * kv.rank + 1):
                kv.push("w", np.ones(3))
            if kv.rank == kv.num_workers - 1:
                kv.verify()
        kv.verify()
        total = sum(2 * rank + 1 for rank in range(kv.num_workers))
        assert set(kv.pull("w").tolist()) == {-float(total)}


@pytest.mark.parametrize("n", [0, -1, 1.5, True, "2"])
def test_verify_every_is_a_number_of_pushes(n: Any) -> None:
    with pytest.raises((ArgumentError, TypeError), match="verify_every is"):
        kvcoll.create("dist_sync", verify_every=n)


def test_verify_every_goes_with_several_ranks_only() -> None:
    with pytest.raises(ArgumentError, match="verify_every goes with 'dist_sync', not with 'local'"):
        kvcoll.create("local", verify_every=1)
    with pytest.raises(ArgumentError, match="takes no options"):
        kvcoll.create("teststore", verify_every=1)


@pytest.mark.parametrize("overlap", [False, "always"])
def test_a_first_push_that_was_refused_leaves_no_rank_a_state_more_than_others(
    comm: Any, tmp_path: Path, overlap: Any
) -> None:
    path = comm.bcast(str(tmp_path / "run"))
    with kvcoll.create("dist_sync", overlap=overlap) as kv:
        kv.init(["w", "half"], [np.ones(7), np.full(5, 2, np.float16)])
        kv.set_optimizer("sgd", learning_rate=0.5, momentum=0.5, multi_precision=True)
        for key, n in (("w", 7), ("half", 5)):
            with pytest.raises(ShapeMismatchError):
                kv.push(key, np.ones(n + (kv.rank == 1)))
        assert len(kv.verify()) == 32
        kv.save(path)
        kv.push(["half", "w"], [np.ones(5, np.float16), np.ones(7)])
        assert len(kv.verify()) == 32
        assert (kv.pull("half") == 2 - kv.num_workers / 2).all()
        assert (kv.pull("w") == 1 - kv.num_workers / 2).all()
        kv.load(path)
        assert (kv.pull("half") == 2).all()
