"""Stores that are not created: names, options and communicators that will not do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from raised_by_all import raised_by_all

import kvcoll
from kvcoll.errors import ArgumentError, KVCollError, RanksDisagreeError

# fmt: off
CREATE: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "no such name": (lambda: kvcoll.create("foo"), ArgumentError, "local, local_update_cpu"),
    "an empty name": (lambda: kvcoll.create(""), ArgumentError, "unknown type of store ''"),
    "spaces": (lambda: kvcoll.create(" local"), ArgumentError, "unknown type"),
    "an int": (lambda: kvcoll.create(3), TypeError, "is a str, got int"),  # type: ignore[call-overload]
    "None": (lambda: kvcoll.create(None), TypeError, "got NoneType"),  # type: ignore[call-overload]
    "comm as text": (
        lambda: kvcoll.create("dist_sync", comm="x"), ArgumentError, "'x' of type str"),
    "comm of a local store": (
        lambda: kvcoll.create("local", comm=object()), ArgumentError, "one process"),
    "an unknown option": (lambda: kvcoll.create("local", foo=1), TypeError, "foo"),  # type: ignore[call-overload]
}
# fmt: on


@pytest.mark.parametrize(("call", "error", "piece"), CREATE.values(), ids=CREATE.keys())
def test_a_store_is_not_created_by_mistake(
    comm: object, call: Callable[[], object], error: type[Exception], piece: str
) -> None:
    with pytest.raises(error) as raised:
        call()
    assert piece in str(raised.value)
    assert isinstance(raised.value, (KVCollError, TypeError))


def test_the_null_communicator_is_refused(comm: Any) -> None:
    from mpi4py import MPI

    for null in (MPI.COMM_NULL, MPI.Intracomm(), MPI.Intercomm()):
        with pytest.raises(ArgumentError, match="intra-communicator that holds this rank"):
            kvcoll.create("dist_sync", comm=null)


@pytest.mark.ranks(at_least=2)
def test_an_inter_communicator_is_refused(comm: Any, rank: int) -> None:
    half = comm.Split(rank % 2)
    between = half.Create_intercomm(0, comm, 1 - rank % 2)
    with pytest.raises(ArgumentError, match="must be an mpi4py intra-communicator"):
        kvcoll.create("dist_sync", comm=between)
    between.Free()
    half.Free()


@pytest.mark.ranks(at_least=2)
def test_reproducible_on_one_rank_only_is_an_error_of_create(comm: Any, rank: int) -> None:
    raised = raised_by_all(comm, lambda: kvcoll.create("dist_sync", reproducible=rank == 1))
    assert type(raised) is RanksDisagreeError
    assert "rank 1 called create('dist_sync', reproducible=True)" in str(raised)


def test_dist_and_dist_sync_are_one_type_of_store(comm: Any, rank: int) -> None:
    with kvcoll.create("dist" if rank else "dist_sync") as kv:
        kv.init(3, np.zeros(2))
        kv.push(3, np.array([1.0, rank]))
        np.testing.assert_array_equal(kv.pull(3), [comm.size, sum(range(comm.size))])
