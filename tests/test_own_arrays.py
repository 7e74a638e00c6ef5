"""Arrays that the store gives out: pushed from where they lie, and replicas seen without a copy."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from mpi_job import Job
from one_process import LOCAL
from raised_by_all import raised_by_all

import kvcoll
from kvcoll import KVStore
from kvcoll.errors import KeyNotFoundError, RanksDisagreeError

Array: TypeAlias = npt.NDArray[Any]
SHAPES = {1: (3, 4), 2: (), 3: (70_000,), 4: (0,), 5: (5,)}
KEYS = list(SHAPES)


def value(key: int, rank: int, dtype: Any = np.float32) -> Array:
    """Give what a rank pushes to a key: small whole numbers, so that sums are exact."""
    counted: Array = np.arange(np.prod(SHAPES[key])).reshape(SHAPES[key])
    pushed: Array = (counted % 7 + 10 * key + rank).astype(dtype)
    return pushed


def total(key: int, size: int, dtype: Any = np.float32) -> Array:
    sums = [value(key, rank, np.float64) for rank in range(size)]
    summed: Array = np.sum(sums, axis=0).astype(dtype)
    return summed


def init(kv: KVStore, dtype: Any = np.float32) -> None:
    kv.init(KEYS, [np.zeros(shape, dtype) for shape in SHAPES.values()])


@pytest.fixture(params=[LOCAL, "dist_sync"])
def kv(request: pytest.FixtureRequest, comm: Any) -> Iterator[KVStore]:
    with kvcoll.create(request.param) as store:
        init(store)
        yield store


def fill(kv: KVStore, arrays: list[Array], keys: list[int] = KEYS) -> None:
    for key, array in zip(keys, arrays, strict=True):
        array[...] = value(key, kv.rank, array.dtype)


def check(kv: KVStore, keys: list[int] = KEYS) -> None:
    for key in keys:
        np.testing.assert_array_equal(kv.pull(key), total(key, kv.num_workers))


def test_own_arrays_are_summed_like_any_and_not_changed(kv: KVStore) -> None:
    grads = kv.empty(KEYS)
    assert [grad.shape for grad in grads] == list(SHAPES.values())
    for _ in range(3):
        fill(kv, grads)
        kv.push(KEYS, grads)
        check(kv)
    for key, grad in zip(KEYS, grads, strict=True):
        np.testing.assert_array_equal(grad, value(key, kv.rank))


def test_a_keys_own_array_is_the_same_at_each_call(kv: KVStore) -> None:
    grads = kv.empty([3, 1])
    assert kv.empty(3) is grads[0]
    assert kv.empty((1, 5))[0] is grads[1]


def test_one_key_alone_and_some_keys_in_another_order(kv: KVStore) -> None:
    grads = dict(zip(KEYS, kv.empty(KEYS), strict=True))
    fill(kv, list(grads.values()))
    kv.push(3, grads[3])
    check(kv, [3])
    kv.push([5, 1], [grads[5], grads[1]])
    check(kv, [1, 3, 5])
    assert kv.pull(2) == 0


def test_own_arrays_mix_with_plain_ones_on_some_ranks_and_keys(kv: KVStore) -> None:
    grads = kv.empty(KEYS)
    fill(kv, grads)
    plain = [grad.copy() for grad in grads]
    kv.push(KEYS, grads if kv.rank % 2 else plain)
    check(kv)
    kv.push(KEYS, [grads[0], *plain[1:]])
    check(kv)
    kv.push(KEYS, [[grad] for grad in grads])
    check(kv)
    kv.push([1, 1], [grads[0], grads[0]])  # twice the key: its values are summed
    np.testing.assert_array_equal(kv.pull(1), 2 * total(1, kv.num_workers))


def test_keys_that_come_later_have_own_arrays_too(kv: KVStore) -> None:
    grads = kv.empty(KEYS)
    kv.init(9, np.zeros((2, 2), np.float32))
    later = kv.empty(9)
    fill(kv, grads)
    later[...] = kv.rank + 1
    kv.push([9, *KEYS], [later, *grads])
    check(kv)
    n = kv.num_workers
    np.testing.assert_array_equal(kv.pull(9), np.full((2, 2), n * (n + 1) / 2))


@pytest.mark.parametrize(
    "dtype", [np.float16, ml_dtypes.bfloat16, np.float64, np.int32, np.complex64]
)
def test_own_arrays_of_each_dtype(comm: Any, dtype: Any) -> None:
    with kvcoll.create("dist_sync") as kv:
        init(kv, dtype)
        grads = kv.empty(KEYS)
        fill(kv, grads)
        kv.push(KEYS, grads)
        for key in KEYS:
            assert kv.pull(key).tobytes() == total(key, kv.num_workers, dtype).tobytes()


def test_an_updater_gets_the_sum_of_own_arrays_and_may_write_to_it(kv: KVStore) -> None:
    seen = []

    def update(key: int, summed: Array, stored: Array) -> None:
        seen.append(key)
        stored += 2 * summed
        summed[...] = -1

    kv.set_updater(update)
    grads = kv.empty(KEYS)
    fill(kv, grads)
    for _ in range(2):
        kv.push(KEYS, grads)
    assert seen == KEYS * 2
    for key in KEYS:
        np.testing.assert_array_equal(kv.pull(key), 4 * total(key, kv.num_workers))


def test_an_optimizer_gives_the_same_bits_with_own_arrays_as_with_plain_ones(comm: Any) -> None:
    results = []
    for own in (True, False):
        with kvcoll.create("dist_sync") as kv:
            init(kv)
            kv.set_optimizer("sgd", learning_rate=0.1, momentum=0.9, wd=0.01)
            grads = kv.empty(KEYS) if own else [np.empty(s, np.float32) for s in SHAPES.values()]
            for step in range(4):
                for key, grad in zip(KEYS, grads, strict=True):
                    grad[...] = value(key, kv.rank) / 3 + step
                kv.push(KEYS, grads)
            results.append([kv.pull(key).tobytes() for key in KEYS])
    assert results[0] == results[1]


@pytest.mark.ranks(at_least=2)
def test_ranks_that_ask_for_different_keys_are_an_error_on_all(comm: Any) -> None:
    with kvcoll.create("dist_sync") as kv:
        init(kv)
        raised = raised_by_all(comm, lambda: kv.empty(1 if kv.rank else 2))
        assert type(raised) is RanksDisagreeError
        raised = raised_by_all(comm, lambda: kv.empty(77 if kv.rank == 1 else 2))
        assert type(raised) is KeyNotFoundError
        grad = kv.empty(2)
        grad[...] = value(2, kv.rank)
        kv.push(2, grad)
        check(kv, [2])


def test_a_view_follows_each_push_and_cannot_be_written(kv: KVStore) -> None:
    views = kv.view(KEYS)
    for turn in (1, 2):
        kv.push(KEYS, [turn * value(key, kv.rank) for key in KEYS])
        for key, view in zip(KEYS, views, strict=True):
            np.testing.assert_array_equal(view, turn * total(key, kv.num_workers))
            assert not view.flags.writeable
    with pytest.raises(ValueError, match="read-only"):
        views[0][...] = 1
    assert kv.view(5).shape == (5,)


def test_a_view_may_itself_be_pushed(kv: KVStore) -> None:
    view = kv.view(3)
    kv.push(3, value(3, kv.rank))
    n = kv.num_workers
    kv.push(3, view)
    np.testing.assert_array_equal(kv.pull(3), n * total(3, n))
    kv.push(3, [view, np.ones(SHAPES[3], np.float32)])
    np.testing.assert_array_equal(kv.pull(3), n * (n * total(3, n) + 1))
    kv.push(3, view[::-1])
    np.testing.assert_array_equal(kv.pull(3), n * n * (n * total(3, n) + 1)[::-1])


@pytest.mark.parametrize("n", [1000, 700_000])  # together in a bucket, and each alone
def test_views_of_other_keys_may_be_pushed(comm: Any, n: int) -> None:
    keys = [1, 2, 3]
    for kind in ("local", "dist_sync"):
        with kvcoll.create(kind) as kv:
            kv.init(keys, [np.full(n, 10.0**key, np.float32) for key in keys])
            kv.push(keys, kv.view(keys)[::-1])
            for key in keys:
                assert (kv.pull(key) == kv.num_workers * 10.0 ** (4 - key)).all()


def test_views_and_own_arrays_can_be_read_after_the_store_is_closed(comm: Any) -> None:
    for kind in ("local", "dist_sync"):
        with kvcoll.create(kind) as kv:
            init(kv)
            grads, views = kv.empty(KEYS), kv.view(KEYS)
            fill(kv, grads)
            kv.push(KEYS, grads)
            rank, size = kv.rank, kv.num_workers
        comm.Barrier()
        for key, grad, view in zip(KEYS, grads, views, strict=True):
            np.testing.assert_array_equal(grad, value(key, rank))
            np.testing.assert_array_equal(view, total(key, size))


@pytest.mark.ranks(at_least=2)
@pytest.mark.parametrize("allows", [True, False])
def test_memory_is_shared_only_where_that_is_allowed_and_given_back(
    comm: Any, allows: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        raise OSError("no more files")

    gc.collect()  # what other tests have left goes now, and not in the midst of this one
    before = shared_bytes()
    kv = kvcoll.create("dist_sync")
    of_store = shared_bytes()
    with monkeypatch.context() as patched:
        if comm.rank == 0 and not allows:
            patched.setattr("os.memfd_create", refuse)  # now: the store itself has what it needs
        init(kv)
        grads = kv.empty(KEYS)
    local_size = comm.size // kv.num_hosts  # hosts are alike where this test runs on several
    n_rows = 2 * local_size if allows else 0  # of values and of gradients, 16 MiB each at least
    assert shared_bytes() - of_store >= n_rows << 24
    assert (shared_bytes() == of_store) == (not allows)
    fill(kv, grads)
    for pushed in (grads, [grad.copy() for grad in grads]):
        kv.push(KEYS, [np.zeros(shape, np.float32) for shape in SHAPES.values()])
        kv.push(KEYS, pushed)
        check(kv)
    kv.close()
    del grads, pushed
    assert shared_bytes() <= max(before, of_store)


def shared_bytes() -> int:
    """Give how much memory of other processes this one has mapped through kvcoll."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    bounds = [line.split()[0].split("-") for line in lines if "memfd:kvcoll" in line]
    return sum(int(high, 16) - int(low, 16) for low, high in bounds)


@pytest.mark.single
def test_what_a_child_made_by_fork_writes_is_its_own(mpirun: Callable[..., Job]) -> None:
    program = """
import os
import numpy as np
import kvcoll
kv = kvcoll.create("dist_sync")
kv.init(3, np.zeros(100_000, np.float32))
grad, view = kv.empty(3), kv.view(3)
grad[...] = kv.rank + 1
kept = []
kv.set_updater(lambda key, summed, stored: (kept.append(stored), stored.__iadd__(summed)))
kv.push(3, grad)
child = os.fork()
if child == 0:
    grad[...] = kept[0][...] = 99
    os._exit(0 if (view == 99).all() and (grad == 99).all() else 1)
died = os.waitpid(child, 0)[1]
kv.barrier()
print("held:", died, set(view.tolist()), set(grad.tolist()) == {kv.rank + 1})
"""
    job = mpirun(2, "-W", "ignore", "-c", program)
    assert not job.timed_out
    assert job.stdout.count("held: 0 {3.0} True") == 2, job.stdout + job.stderr
