"""Jobs of their own in which a rank ends, dies or never comes: the others say so, and end."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from mpi_job import Job

pytestmark = [pytest.mark.jobs, pytest.mark.limit(40)]

RunJob = Callable[..., Job]
# With three ranks each finds another one that is still there; two are a case of their own.
TWO_OR_THREE = (pytest.param(2, marks=pytest.mark.long), 3)
LIMIT_S = 12.0

HEAD = """
import os, signal, sys, time
import numpy as np
import kvcoll
from kvcoll.errors import *
from mpi4py import MPI

rank, size = MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size
last = size - 1
one = np.ones(4, np.float32)

def say(*words):
    # One write a line, so that the lines of several ranks do not mix.
    sys.stdout.write(" ".join([f"[{rank}]", *map(str, words)]) + "\\n")
    sys.stdout.flush()

def work(kv, n=1_000_000):
    try:
        for step in range(n):
            kv.push(3, one)
    except KVCollError as error:
        say(type(error).__name__, error)
        raise
"""


def run(mpirun: RunJob, folder: Path, ranks: int, body: str) -> Job:
    """Run a program, and check that it has ended by itself."""
    program = folder / "program.py"
    program.write_text(HEAD + body)
    job = mpirun(ranks, program, timeout_s=LIMIT_S)
    assert not job.timed_out, f"the job hung\n{job.stdout}\n{job.stderr}"
    return job


def lines(job: Job, rank: int) -> list[str]:
    """Give what a rank has said."""
    mark = f"[{rank}] "
    return [line.removeprefix(mark) for line in job.stdout.splitlines() if line.startswith(mark)]


ENDINGS: dict[str, tuple[str, str, bool]] = {
    # What the last rank does after three pushes, what the others are told, whether it is a failure
    "ends early": ("pass", "", False),
    "raises": ("raise ZeroDivisionError('bad batch')", " (ZeroDivisionError: bad batch)", True),
    "calls sys.exit": ("sys.exit(5)", "", True),
    "ends MPI": ("MPI.Finalize()", "", False),
    "leaves a with block by an exception": (
        "\n    with kv: raise LookupError('no data')",
        " (LookupError: no data)",
        True,
    ),
}


@pytest.mark.parametrize("ranks", TWO_OR_THREE)
@pytest.mark.parametrize(("ending", "cause", "fails"), ENDINGS.values(), ids=ENDINGS.keys())
def test_a_rank_that_ends_while_others_push_is_named_on_them(
    mpirun: RunJob, tmp_path: Path, ranks: int, ending: str, cause: str, fails: bool
) -> None:
    body = f"""
kv = kvcoll.create("dist_sync")
kv.init(3, one)
work(kv, 3)
if rank == last:
    {ending}
else:
    work(kv)
"""
    job = run(mpirun, tmp_path, ranks, body)
    assert job.returncode != 0
    others = "rank 0" if ranks == 2 else "ranks 0, 1"
    for rank in range(ranks - 1):
        said = lines(job, rank)
        assert said == [
            f"RankLeftError rank {ranks - 1} left the store{cause}, while {others} called "
            "push(3 float32[4]): all ranks must make the same number of calls; "
            "the stores of these ranks are closed now"
        ]


def test_stores_left_open_by_all_ranks_do_not_keep_the_job(mpirun: RunJob, tmp_path: Path) -> None:
    body = """
stores = [kvcoll.create("dist_sync") for _ in range(3)]
for kv in stores:
    kv.init(3, one)
    work(kv, 2)
stores[1].close()
say("done")
"""
    job = run(mpirun, tmp_path, 3, body)
    assert job.returncode == 0, job.stderr
    assert all(lines(job, rank) == ["done"] for rank in range(3))
    assert "Traceback" not in job.stderr


@pytest.mark.parametrize("ranks", TWO_OR_THREE)
def test_a_rank_that_raises_with_several_stores_open_is_named_in_each(
    mpirun: RunJob, tmp_path: Path, ranks: int
) -> None:
    body = """
stores = [kvcoll.create("dist_sync") for _ in range(3)]
for kv in stores:
    kv.init(3, one)
if rank == last:
    raise ZeroDivisionError("bad batch")
for kv in stores[::-1]:
    try:
        work(kv)
    except RankLeftError:
        pass
"""
    job = run(mpirun, tmp_path, ranks, body)
    assert job.returncode != 0
    for rank in range(ranks - 1):
        said = lines(job, rank)
        assert len(said) == 3
        assert all(f"rank {ranks - 1} left the store (ZeroDivisionError: b" in s for s in said)


def test_stores_end_with_mpi_and_the_program_goes_on(mpirun: RunJob, tmp_path: Path) -> None:
    body = """
kv, closed = kvcoll.create("dist_sync"), kvcoll.create("dist_sync")
kv.init(3, one)
kv.push(3, one)
closed.close()
MPI.Finalize()
for call in (lambda: kv.pull(3, out=one), lambda: kv.push(3, one), kv.barrier):
    try:
        call()
    except StoreClosedError as error:
        say(error)
kv.close()
try:
    kvcoll.create("dist_sync")
except LaunchError as error:
    say(error)
"""
    job = run(mpirun, tmp_path, 2, body)
    assert job.returncode == 0, job.stderr
    assert job.stderr == ""
    why = "MPI.Finalize() was called: leave it out, Python ends MPI when it ends"
    no_more = f"a distributed store needs MPI, but {why}"
    for rank in range(2):
        assert lines(job, rank) == [*[f"the store was closed: {why}"] * 3, no_more]


@pytest.mark.parametrize(
    "create", ["'dist_async'", "'dist_sync', comm=MPI.COMM_WORLD.Dup()"], ids=["late", "own comm"]
)
def test_ranks_that_leave_a_store_by_an_exception_one_after_another_all_end(
    mpirun: RunJob, tmp_path: Path, create: str
) -> None:
    body = f"""
with kvcoll.create({create}) as kv:
    kv.init(3, one)
    kv.set_optimizer("sgd")
    kv.push(3, one)
    kv.barrier()
    time.sleep(0.5 * rank)
    raise LookupError("no data")
"""
    job = run(mpirun, tmp_path, 3, body)
    assert job.returncode != 0
    assert job.stderr.count("LookupError: no data") == 3


def test_nothing_of_kvcoll_calls_mpi_once_it_has_ended_whatever_has_failed(
    mpirun: RunJob, tmp_path: Path
) -> None:
    body = """
import threading
from kvcoll import on_gpus
def fail():
    raise OSError("CUDA is broken")
on_gpus.end_joined = fail
kv = kvcoll.create("dist_sync")
MPI.Finalize()
threads = [thread.name for thread in threading.enumerate()]
assert "kvcoll-watchdog" not in threads, threads
try:
    kv.barrier()
except StoreClosedError as error:
    say("closed")
"""
    job = run(mpirun, tmp_path, 2, body)
    assert [lines(job, rank) for rank in range(2)] == [["closed"]] * 2, job.stderr


def test_stores_closed_by_all_ranks_end_quietly(mpirun: RunJob, tmp_path: Path) -> None:
    body = """
with kvcoll.create("dist_sync") as a, kvcoll.create("dist_sync", reproducible=True) as b:
    a.init(3, one); b.init(3, one)
    work(a, 2); work(b, 2)
kvcoll.create("dist_sync").close()
say("done", a.closed, b.closed)
"""
    job = run(mpirun, tmp_path, 2, body)
    assert job.returncode == 0, job.stderr
    assert lines(job, 0) == lines(job, 1) == ["done True True"]
    assert job.stderr == ""


@pytest.mark.parametrize("ranks", TWO_OR_THREE)
def test_a_store_that_one_rank_does_not_create_is_an_error_after_its_limit(
    mpirun: RunJob, tmp_path: Path, ranks: int
) -> None:
    body = """
if rank != last:
    start = time.monotonic()
    try:
        kvcoll.create("dist_sync", create_limit_s=0.5)
    except RanksDisagreeError as error:
        say(error)
        say(time.monotonic() - start < 5)
        raise
"""
    job = run(mpirun, tmp_path, ranks, body)
    assert job.returncode != 0
    for rank in range(ranks - 1):
        said = lines(job, rank)
        assert (
            f"not all {ranks} ranks called create() of a distributed store within 0.5 s" in said[0]
        )
        assert said[1] == "True"


@pytest.mark.parametrize("other", ["'local'", "'foo'", "'dist_sync', comm='x'"])
def test_another_type_of_store_on_one_rank_is_an_error(
    mpirun: RunJob, tmp_path: Path, other: str
) -> None:
    body = f"""
if rank == last:
    kvcoll.create({other})
    say("created")
else:
    try:
        kvcoll.create("dist_sync", create_limit_s=0.5)
    except RanksDisagreeError as error:
        say(error)
        raise
"""
    job = run(mpirun, tmp_path, 2, body)
    assert job.returncode != 0
    assert "not all 2 ranks called create()" in lines(job, 0)[0]
    assert lines(job, 1) == (["created"] if other == "'local'" else [])


@pytest.mark.parametrize(("ranks", "n_elements"), [(2, 400_000), (3, 4)])
def test_a_killed_rank_ends_the_job(
    mpirun: RunJob, tmp_path: Path, ranks: int, n_elements: int
) -> None:
    body = f"""
one = np.ones({n_elements}, np.float32)
kv = kvcoll.create("dist_sync")
kv.init(3, one)
work(kv, 3)
say("pushed")
if rank == last:
    os.kill(os.getpid(), signal.SIGKILL)
work(kv)
"""
    start = time.monotonic()
    job = run(mpirun, tmp_path, ranks, body)
    assert job.returncode != 0
    assert lines(job, 0)[0] == "pushed"
    assert time.monotonic() - start < 15


@pytest.mark.parametrize("ranks", TWO_OR_THREE)
def test_an_updater_that_ends_the_program_on_one_rank_ends_the_others_with_an_error(
    mpirun: RunJob, tmp_path: Path, ranks: int
) -> None:
    body = """
def update(key, input, stored):
    if rank == last and key == 1:
        sys.exit("enough")
    stored += input

kv = kvcoll.create("dist_sync")
# Two buckets: when one rank ends in the first, the others have a sum to take still.
values = [np.ones(4, np.float32), np.ones(400_000, np.float64)]
kv.init([1, 2], values)
kv.set_updater(update)
try:
    kv.push([1, 2], values)
except KVCollError as error:
    say(type(error).__name__, error)
    raise
"""
    job = run(mpirun, tmp_path, ranks, body)
    assert job.returncode != 0
    for rank in range(ranks - 1):
        assert len(lines(job, rank)) == 1
        assert f"rank {ranks - 1}" in lines(job, rank)[0]


def test_stores_used_in_another_order_on_one_rank_do_not_hang(
    mpirun: RunJob, tmp_path: Path
) -> None:
    body = """
a, b = kvcoll.create("dist_sync"), kvcoll.create("dist_sync")
a.init(3, one); b.init(3, one)
try:
    (a if rank else b).push(3, one)
    say("pushed")
except KVCollError as error:
    say(type(error).__name__, error)
"""
    job = run(mpirun, tmp_path, 2, body)
    for rank in range(2):
        assert lines(job, rank)[0].startswith("RanksDisagreeError")


def test_a_child_made_by_fork_does_not_speak_for_its_parent(mpirun: RunJob, tmp_path: Path) -> None:
    body = """
kv = kvcoll.create("dist_sync")
kv.init(3, one)
child = os.fork()
if child == 0:
    import atexit
    atexit._run_exitfuncs()
    os._exit(0)
os.waitpid(child, 0)
work(kv, 3)
say("done", kv.pull(3)[0])
"""
    job = run(mpirun, tmp_path, 2, body)
    assert job.returncode == 0, job.stderr
    assert lines(job, 0) == lines(job, 1) == ["done 2.0"]


def test_a_rank_that_ends_between_two_stores_is_named_by_create(mpirun: RunJob) -> None:
    program = """
import sys
import kvcoll
with kvcoll.create("dist_sync"):
    pass
if kvcoll.create("local").rank == 0:
    from mpi4py import MPI
    if MPI.COMM_WORLD.rank == 1:
        sys.exit()
try:
    kvcoll.create("dist_sync")
except kvcoll.errors.RankLeftError as error:
    print("told:", error)
"""
    job = mpirun(2, "-c", program)
    assert not job.timed_out
    assert "told: rank 1 left the store, while rank 0 called create(" in job.stdout


def test_an_interrupt_in_the_midst_of_a_push_ends_the_job_and_is_named(mpirun: RunJob) -> None:
    program = """
import signal, time
import numpy as np
import kvcoll
def stop(*_):
    raise KeyboardInterrupt
kv = kvcoll.create("dist_sync")
kv.init(3, np.zeros(1_000_000))
if kv.rank == 1:
    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
else:
    time.sleep(0.8)
for _ in range(100):
    kv.push(3, np.ones(1_000_000))
"""
    job = mpirun(2, "-c", program)
    assert not job.timed_out
    assert job.returncode != 0
    assert "kvcoll: rank 1 of 2: KeyboardInterrupt in the midst of push(3" in job.stderr
