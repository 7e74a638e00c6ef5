"""Stores on communicators of all kinds, several stores in one job, and their end."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import kvcoll
from kvcoll import KVStore
from kvcoll.errors import StoreClosedError

Array = npt.NDArray[Any]


def f32(*numbers: float) -> Array:
    return np.array(numbers, np.float32)


def equal(array: Array, *numbers: float) -> None:
    np.testing.assert_array_equal(array, f32(*numbers))


def test_a_store_on_half_of_the_ranks_sums_over_these_alone(comm: Any, rank: int) -> None:
    half = comm.Split(rank % 2, key=rank)
    members = range(rank % 2, comm.size, 2)
    with kvcoll.create("dist_sync", comm=half) as kv:
        assert (kv.rank, kv.num_workers) == (rank // 2, len(members))
        kv.init("w", f32(100 + rank, 7))
        equal(kv.pull("w"), 100 + rank % 2, 7)
        # Ranks of the two halves make another number of calls.
        for step in range(1 + rank % 2):
            kv.push("w", f32(rank + 1, step))
        equal(kv.pull("w"), sum(r + 1 for r in members), (rank % 2) * len(members))
    half.Free()


def test_a_store_on_one_rank_alone_works(comm: Any, rank: int) -> None:
    from mpi4py import MPI

    with kvcoll.create("dist_sync", comm=MPI.COMM_SELF) as kv:
        assert (kv.rank, kv.num_workers) == (0, 1)
        kv.init(3, f32(rank))
        kv.push(3, [f32(10 * rank), f32(5)])
        equal(kv.pull(3), 10 * rank + 5)


def test_ranks_are_those_of_the_communicator_and_the_first_of_them_gives_the_values(
    comm: Any, rank: int, size: int
) -> None:
    reverse = comm.Split(0, key=-rank)
    with kvcoll.create("dist_sync", comm=reverse) as kv:
        assert kv.rank == size - 1 - rank
        kv.init(3, f32(rank))
        equal(kv.pull(3), size - 1)
    reverse.Free()


@pytest.mark.ranks(at_least=2)
def test_messages_on_the_callers_communicator_are_not_confused_with_the_stores(
    comm: Any, rank: int, size: int
) -> None:
    from mpi4py import MPI

    own = comm.Dup()
    with kvcoll.create("dist_sync", comm=own) as kv:
        kv.init(3, f32(0))
        got = np.zeros(2, np.int64)
        # A receive that takes whatever comes, open while the store works, and a message
        # of each tag that lies there unread.
        receive = own.Irecv(got, MPI.ANY_SOURCE, MPI.ANY_TAG)
        kv.push(3, f32(rank))
        kv.barrier()
        equal(kv.pull(3), sum(range(size)))
        assert not receive.Test()
        kv.barrier()
        sends = [
            own.Isend(np.array([rank, tag], np.int64), (rank + 1) % size, tag) for tag in range(6)
        ]
        for step in range(5):
            kv.push(3, f32(step + rank))
        equal(kv.pull(3), sum(range(size)) + 4 * size)
        receive.Wait()
        previous = (rank - 1) % size
        assert got.tolist() == [previous, 0]
        for tag in range(1, 6):
            own.Recv(got, previous, tag)
            assert got.tolist() == [previous, tag]
        MPI.Request.Waitall(sends)
    own.Free()


def test_the_store_lives_on_when_the_callers_communicator_is_freed(comm: Any, rank: int) -> None:
    own = comm.Dup()
    kv = kvcoll.create("dist_sync", comm=own)
    own.Free()
    kv.init(3, f32(0))
    kv.push(3, f32(rank + 1))
    equal(kv.pull(3), sum(range(1, comm.size + 1)))
    kv.close()


def test_several_stores_of_one_job_do_not_mix(comm: Any, rank: int, size: int) -> None:
    stores = [kvcoll.create("dist_sync", reproducible=k == 1) for k in range(3)]
    local = kvcoll.create("local")
    for k, kv in enumerate([*stores, local]):
        kv.init(3, f32(k))
    stores[2].set_updater(lambda key, input, stored: np.add(stored, input, out=stored))
    for step in range(3):
        for k, kv in enumerate(stores):
            kv.push(3, f32(100 * k + 10 * step + rank))
        local.push(3, f32(-rank))
    ranks = sum(range(size))
    equal(stores[0].pull(3), 20 * size + ranks)
    equal(stores[1].pull(3), 120 * size + ranks)
    equal(stores[2].pull(3), 2 + (600 + 30) * size + 3 * ranks)
    equal(local.pull(3), -rank)
    for kv in (stores[1], stores[0], stores[2], local):
        kv.close()


def test_many_stores_can_be_made_and_closed(comm: Any) -> None:
    for k in range(40):
        with kvcoll.create("dist_sync") as kv:
            kv.init(k, f32(k))
            equal(kv.pull(k), k)


CALLS: dict[str, Any] = {
    "init": lambda kv: kv.init(4, f32(1)),
    "push": lambda kv: kv.push(3, f32(1)),
    "pull": lambda kv: kv.pull(3),
    "pushpull": lambda kv: kv.pushpull(3, f32(1)),
    "broadcast": lambda kv: kv.broadcast(4, f32(1), f32(1)),
    "set_updater": lambda kv: kv.set_updater(lambda key, input, stored: None),
    "set_optimizer": lambda kv: kv.set_optimizer("sgd"),
    "barrier": lambda kv: kv.barrier(),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_no_call_works_on_a_closed_store(kv: KVStore, call: Any) -> None:
    kv.init(3, f32(1))
    assert not kv.closed
    kv.close()
    assert kv.closed
    with pytest.raises(StoreClosedError, match="the store was closed: close"):
        call(kv)
    kv.close()  # twice does nothing


def test_a_closed_store_still_says_what_it_was(kv: KVStore) -> None:
    before = (kv.type, kv.rank, kv.num_workers, kv.local_rank, kv.num_hosts)
    assert "closed" not in repr(kv)
    kv.close()
    assert (kv.type, kv.rank, kv.num_workers, kv.local_rank, kv.num_hosts) == before
    assert "closed" in repr(kv)


def test_a_with_block_closes_the_store_at_its_end(comm: Any) -> None:
    with kvcoll.create("dist_sync") as kv:
        kv.init(3, f32(1))
    assert kv.closed


def test_an_exception_that_all_ranks_raise_leaves_the_with_block_as_it_is(comm: Any) -> None:
    with pytest.raises(ZeroDivisionError), kvcoll.create("dist_sync") as kv:  # noqa: PT012
        kv.init(3, f32(1))
        raise ZeroDivisionError
    assert kv.closed


def test_what_was_pulled_outlives_the_store(kv: KVStore) -> None:
    kv.init(3, f32(1, 2))
    pulled = kv.pull(3)
    kv.close()
    equal(pulled, 1, 2)
