"""Ranks with fake GPUs are killed; the others recover, each on its GPU, with the right sums."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from any_gpus import ARE_REAL
from host_kernel import needs_compiler
from mpi_job import Job, why_no_ft

import kvcoll

pytestmark = [
    pytest.mark.single,
    pytest.mark.limit(120),
    pytest.mark.long,
    needs_compiler,
    pytest.mark.skipif(ARE_REAL, reason="these jobs are on fake GPUs"),
]

RunJob = Callable[..., Job]
LIMIT_S = 90.0
TESTS = Path(__file__).parent
PATH = os.pathsep.join([str(TESTS), str(Path(kvcoll.__file__).parents[1])])

HEAD = """
import os, sys, time
from pathlib import Path
import numpy as np
import kvcoll
from fake_gpu import FakeGpus
from fake_nccl import FakeCommunicator, FakeNccl
from kvcoll import on_gpus
from kvcoll.errors import *
from lost_ranks import N, die, say, until_lost
from mpi4py import MPI

rank, size = MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size  # as they were at the start
home = rank  # the GPU
gpus = FakeGpus(size, [f"gpu-{k}" for k in range(size)])
gpus.pump_in_background()
nccl = FakeNccl(gpus, Path(FOLDER))
vars(on_gpus).update(find=lambda: (gpus, nccl), find_gpus=lambda: gpus)

KEYS = ["w", "v"]  # large enough to go in segments, and small

def store(optimizer="sgd", **options):
    kv = kvcoll.create("dist_device_sync", **options)
    kv.init(KEYS, [np.zeros(N * 3, np.float32), np.zeros(5, np.float32)])
    kv.set_optimizer(optimizer, learning_rate=1)
    return kv

def push(kv, by=None):
    by = rank + 1 if by is None else by
    shapes = N * 3, 5
    kv.push(KEYS, [gpus.array(np.full(n, by, np.float32), home) for n in shapes])

def check(kv, total):
    # Whole numbers, so that sums are exact in any order.
    for key in KEYS:
        here = kv.pull(key)
        assert here.device_array.device == home  # where it was
        assert (here.get() == total).all(), (key, here.get()[:3], total)
    kv.verify()

def well(kv):
    assert len(nccl.open) == (kv.num_workers > 1)
    kv.close()
    assert not nccl.open
    gpus.finish()
    say("well", rank)
"""


@pytest.fixture(scope="module", autouse=True)
def ft() -> None:
    """Skip where MPI has no ULFM."""
    if why := why_no_ft():
        pytest.skip(why)


def run(mpirun: RunJob, folder: Path, ranks: int, body: str) -> list[str]:
    """Run a program, and check that it has ended by itself; give its lines, sorted."""
    program, mail = folder / "program.py", folder / "mail"
    mail.mkdir()
    program.write_text(HEAD.replace("FOLDER", repr(str(mail))) + body)
    job = mpirun(ranks, program, timeout_s=LIMIT_S, env={"PYTHONPATH": PATH}, with_ft=True)
    assert not job.timed_out, f"the job hung\n{job.stdout}\n{job.stderr}"
    assert job.returncode == 0, f"{job.returncode}\n{job.stdout}\n{job.stderr}"
    return sorted(job.stdout.splitlines())


@pytest.mark.parametrize("ranks", [2, 3])
def test_survivors_go_on_where_their_values_are(mpirun: RunJob, tmp_path: Path, ranks: int) -> None:
    said = run(
        mpirun,
        tmp_path,
        ranks,
        """
kv = store()
for _ in range(2):
    push(kv)
kv.wait()
old = -2 * sum(range(1, size + 1))
check(kv, old)
if rank == 1:
    die()
error, _ = until_lost(lambda: push(kv))
assert error.ranks == (1,)
assert kv.recover() == 2
assert kv.num_workers == size - 1
check(kv, old)
for _ in range(2):
    push(kv)
check(kv, old - 2 * (sum(range(1, size + 1)) - 2))
well(kv)
""",
    )
    assert said == [f"well {rank}" for rank in range(ranks) if rank != 1]


# Rank 1 dies once the others have put the push on their GPUs, where NCCL waits for it in vain.
DIES_IN_A_SUM = """
kv = store(elastic=ELASTIC)
push(kv)
kv.wait()
old = -sum(range(1, size + 1))
check(kv, old)
if rank == 1:
    def launch(self, calls):
        time.sleep(1.0)
        die()
    FakeNccl._launch = launch
try:
    push(kv)
    say("returned", rank)
    kv.wait()
    raise AssertionError("a sum without rank 1")
except RankLostError as error:
    assert error.ranks == (1,)
assert not nccl.open  # aborted
"""


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_transfer_that_hangs_for_a_lost_rank_is_aborted_and_no_value_is_lost(
    mpirun: RunJob, tmp_path: Path, ranks: int
) -> None:
    said = run(
        mpirun,
        tmp_path,
        ranks,
        DIES_IN_A_SUM.replace("ELASTIC", "True")
        + """
assert kv.recover() == 1
check(kv, old)
push(kv)
check(kv, old - sum(range(1, size + 1)) + 2)
well(kv)
""",
    )
    assert said == [f"well {rank}" for rank in range(ranks) if rank != 1]


def test_values_that_a_cut_sum_has_changed_are_not_gone_on_with(
    mpirun: RunJob, tmp_path: Path
) -> None:
    said = run(
        mpirun,
        tmp_path,
        3,
        DIES_IN_A_SUM.replace("ELASTIC", "False")
        + """
try:
    kv.recover()
except NoWholeReplicaError as error:
    assert "elastic=True" in str(error)
    say("well", rank)
""",
    )
    assert said == ["returned 0", "returned 2", "well 0", "well 2"]


def test_a_rank_that_the_others_call_off_raises_their_error_that_no_replica_is_whole(
    mpirun: RunJob, tmp_path: Path
) -> None:
    said = run(
        mpirun,
        tmp_path,
        3,
        DIES_IN_A_SUM.replace("ELASTIC", "False")
        + """
if rank == 0:
    from kvcoll import recovery
    def level(store, standings, ranks, transport):
        ranks.tell("to nobody")  # who have found by then that there is no going on
    recovery._level = level
try:
    kv.recover()
except NoWholeReplicaError as error:
    assert "elastic=True" in str(error)
    say("well", rank)
""",
    )
    assert said == ["returned 0", "returned 2", "well 0", "well 2"]


def test_a_replica_that_is_not_whole_is_copied_from_one_that_is(
    mpirun: RunJob, tmp_path: Path
) -> None:
    said = run(
        mpirun,
        tmp_path,
        4,
        """
kv = store("adam")
for _ in range(3):
    push(kv)
kv.wait()
before = kv.verify()
if rank == 2:
    kv._engine.is_whole = False  # as a cut sum leaves it
    for array in kv.view(KEYS):
        array[...] = 9
if rank == 1:
    die()
until_lost(lambda: push(kv))
assert kv.recover() == 3
assert kv.verify() == before
push(kv)
assert kv.verify() != before
well(kv)
""",
    )
    assert said == ["well 0", "well 2", "well 3"]


@pytest.mark.parametrize("where", ["FakeNccl.init_rank", "FakeCommunicator.broadcast"])
def test_a_rank_that_dies_while_the_gpus_are_joined_is_left_behind_too(
    mpirun: RunJob, tmp_path: Path, where: str
) -> None:
    said = run(
        mpirun,
        tmp_path,
        4,
        f"""
kv = store("adam", elastic=True)
for _ in range(3):
    push(kv)
kv.wait()
before = kv.verify()
if rank == 2:
    kv._engine.is_whole = False  # so that there is something to copy
if rank == 1:
    die()
if rank == 3:
    {where} = lambda *ignored: die()
until_lost(lambda: push(kv))
assert kv.recover() == 3
assert kv.num_workers == 2
assert kv.verify() == before
push(kv)
assert kv.verify() != before
well(kv)
""",
    )
    assert said == ["well 0", "well 2"]


@pytest.mark.parametrize("victim", [1, 2])
def test_hosts_that_lose_a_rank_go_on_together(mpirun: RunJob, tmp_path: Path, victim: int) -> None:
    said = run(
        mpirun,
        tmp_path,
        4,
        f"""
from kvcoll.topology import Topology
from kvcoll.transport import mpi
home = rank % 2

def topology_of(comm, losses):  # two ranks a host
    with losses:
        before = comm.allgather(rank)
    return Topology.of_leaders(comm.rank, [one // 2 for one in before])

mpi.topology_of = topology_of
kv = store("adam")
assert kv.num_hosts == 2
for _ in range(2):
    push(kv)
kv.wait()
before = kv.verify()
if rank == 3:
    kv._engine.is_whole = False  # as a cut sum leaves it
    for array in kv.view(KEYS):
        array[...] = 9
if rank == {victim}:
    die()
until_lost(lambda: push(kv))
assert kv.recover() == 2
assert kv.num_hosts == 2 and kv.num_workers == 3
assert kv.verify() == before
push(kv)
kv.set_updater(lambda key, given, stored: stored.__iadd__(given))
values = [array.get()[0] for array in kv.pull(KEYS)]
push(kv)
for key, value in zip(KEYS, values):
    assert (kv.pull(key).get() == value + np.float32(10 - {victim} - 1)).all()
kv.verify()
kv.close()
gpus.finish()
say("well", rank)
""",
    )
    assert said == [f"well {rank}" for rank in range(4) if rank != victim]
