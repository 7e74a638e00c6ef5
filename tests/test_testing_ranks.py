"""What other ranks make of a fault on one of them: the named errors that the docs promise."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mpi_job import Job
from raised_by_all import raised_by_all

import kvcoll
from kvcoll import KVStore
from kvcoll.errors import (
    FileError,
    RankLeftError,
    RanksDisagreeError,
    ReplicasDifferError,
    ShapeMismatchError,
)
from kvcoll.testing import Delay, FillDisk, Flip, InjectedError, Raise, Reshape, Skip, Stop, faults

several = pytest.mark.ranks(at_least=2)


@pytest.fixture(params=[False, "always"], ids=["in line", "overlap"])
def kv(request: pytest.FixtureRequest, comm: Any) -> Iterator[KVStore]:
    with kvcoll.create("dist_sync", overlap=request.param) as store:
        store.init(["v", "w"], [np.zeros(3), np.zeros(40_000, np.float32)])
        store.set_optimizer("sgd", learning_rate=1.0, momentum=0.5, rescale_grad=-1)
        yield store


def push(kv: KVStore, n: int = 1) -> None:
    for _ in range(n):
        kv.push(["v", "w"], [np.full(3, kv.rank + 1.0), np.full(40_000, kv.rank + 1, np.float32)])


@several
@pytest.mark.parametrize("fault", [Delay, Stop])
def test_a_rank_that_is_late_changes_no_bit(kv: KVStore, fault: Any) -> None:
    with faults(fault(rank=1, push=2, seconds=0.1)) as left:
        push(kv, 3)
    assert len(left) == (kv.rank != 1)
    n = kv.num_workers * (kv.num_workers + 1) // 2
    np.testing.assert_array_equal(kv.pull("v"), np.full(3, n * (1 + 1.5 + 1.75)))


@several
def test_another_shape_is_one_error_on_all_ranks_and_nothing_is_applied(
    kv: KVStore, comm: Any
) -> None:
    push(kv)
    before = kv.verify()
    with faults(Reshape(rank=1, key="w")):
        error = raised_by_all(comm, lambda: push(kv))
    assert type(error) is ShapeMismatchError
    assert str(error).startswith("rank 1: key 'w' holds float32[40000], pushed float32[40000, 1]")
    assert kv.verify() == before


@several
@pytest.mark.parametrize("what", ["replica", "state"])
def test_a_flipped_bit_of_a_replica_is_found(kv: KVStore, comm: Any, what: str) -> None:
    push(kv)
    with faults(Flip(rank=1, key="w", what=what, element=39_999)):
        push(kv)
    error = raised_by_all(comm, kv.verify)
    assert type(error) is ReplicasDifferError
    named = "key 'w'" if what == "replica" else "state0 of the optimizer for key 'w'"
    assert f"since a push after init and not after push 2: rank 1: {named} is not" in str(error)


@several
def test_a_flipped_bit_of_a_gradient_is_in_the_sum_of_all(kv: KVStore) -> None:
    with faults(Flip(rank=1, key="v", what="gradient", element=2, bit=63)):
        push(kv)
    kv.verify()
    n = kv.num_workers * (kv.num_workers + 1) // 2
    np.testing.assert_array_equal(kv.pull("v"), [n, n, n - 4])  # rank 1 gave -2 for 2


@several
def test_a_push_that_one_rank_leaves_out_is_an_error_at_the_next_other_call(
    kv: KVStore, comm: Any
) -> None:
    def train() -> None:
        push(kv, 3)  # of which rank 1 makes two
        kv.barrier()

    with faults(Skip(rank=1, push=2)):
        error = raised_by_all(comm, train)
    assert type(error) is RanksDisagreeError
    assert "rank 1 called barrier()" in str(error)
    assert kv.version == 2
    kv.verify()


@several
def test_a_disk_that_is_full_on_one_rank_is_one_error_on_all(
    kv: KVStore, comm: Any, shared_tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvcoll.checkpoint.shares.PART_BYTES", 64)
    push(kv)
    kv.save(shared_tmp_path)
    with faults(FillDisk(rank=1)):
        push(kv)
        error = raised_by_all(comm, lambda: kv.save(shared_tmp_path))
    assert type(error) is FileError
    assert "(No space left on device): free some space" in str(error)
    kv.load(shared_tmp_path)
    assert kv.version == 1
    kv.save(shared_tmp_path)


@several
def test_a_rank_that_raises_is_named_with_its_error_on_the_others(comm: Any) -> None:
    def train() -> None:
        with kvcoll.create("dist_sync") as kv, faults(Raise(rank=1, push=2)):
            kv.init("w", np.zeros(3))
            for _ in range(3):
                kv.push("w", np.ones(3))

    with pytest.raises((InjectedError, RankLeftError)) as raised:
        train()
    said = str(raised.value)
    if comm.rank == 1:
        assert said == "rank 1 raises at push 2, as it was asked to"
    else:
        assert said.startswith("rank 1 left the store (InjectedError: rank 1 raises at push 2, ")


PROGRAM = """
import sys
import numpy as np
import kvcoll

def say(*words):
    sys.stdout.write(" ".join([f"[{kv.rank}]", *map(str, words)]) + "\\n")
    sys.stdout.flush()

kv = kvcoll.create("dist_sync", verify_every=1)
kv.init("w", np.zeros(4))
kv.set_optimizer("sgd", learning_rate=1.0)
try:
    for step in range(4):
        kv.push("w", np.ones(4))
except kvcoll.errors.KVCollError as error:
    say(type(error).__name__, error)
    raise
say("done")
"""

ENDINGS = {
    "rank=1 push=2 kill": "",
    "rank=1 push=2 flip=replica": "ReplicasDifferError the replicas differ, since push 3: rank 1",
    "rank=1 push=3 raise=bad; rank=0 push=1 stop=0.1": "RankLeftError rank 1 left the store "
    "(InjectedError: bad), while rank 0 called push('w' float64[4])",
    "rank=1 push=3 skip": "RankLeftError rank 1 left the store, while rank 0 called push(",
    "rank=0 push=1 delay=0.2": "done",
}


@pytest.mark.single
@pytest.mark.long
@pytest.mark.limit(60)
@pytest.mark.parametrize("text", ENDINGS)
def test_a_program_gets_its_faults_by_the_environment(
    mpirun: Callable[..., Job], text: str
) -> None:
    root = str(Path(kvcoll.__file__).parents[1])
    env = {"KVCOLL_FAULTS": text, "PYTHONPATH": root}
    job = mpirun(2, "-c", PROGRAM, timeout_s=20, env=env)
    assert not job.timed_out
    said = ENDINGS[text]
    assert (job.returncode == 0) == (said == "done"), job.stderr
    if "kill" not in text:  # then the launcher may end rank 0 before it can speak
        assert f"[0] {said}" in job.stdout, job.stdout


@pytest.mark.single
@pytest.mark.long
@pytest.mark.limit(60)
def test_an_environment_that_cannot_be_read_is_an_error_on_all_ranks(
    mpirun: Callable[..., Job],
) -> None:
    program = """
import os
from mpi4py import MPI
import kvcoll
if MPI.COMM_WORLD.rank == 1:
    os.environ["KVCOLL_FAULTS"] = "rank=0 explode"
try:
    kvcoll.create("dist_sync", create_limit_s=10)
except kvcoll.errors.ArgumentError as error:
    print("unknown word 'explode'" in str(error), flush=True)
"""
    env = {"PYTHONPATH": str(Path(kvcoll.__file__).parents[1])}
    job = mpirun(2, "-c", program, timeout_s=20, env=env)
    assert job.stdout.split() == ["True", "True"], job.stderr
