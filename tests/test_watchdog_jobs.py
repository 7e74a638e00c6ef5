"""The watchdog in jobs of their own, in each of which one rank keeps the others waiting."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from mpi_job import Job, is_open_mpi, why_no_ft

from kvcoll.transport.lifeline import LOST_CODE
from kvcoll.watchdog import EXIT_CODE

pytestmark = [pytest.mark.jobs, pytest.mark.long, pytest.mark.limit(90)]

RunJob = Callable[..., Job]

HEAD = """
import ctypes, json, os, signal, subprocess, sys, time
import numpy as np
import kvcoll
from kvcoll import Watchdog
from mpi4py import MPI

world = MPI.COMM_WORLD
rank, size = world.rank, world.size
last = size - 1
one = np.ones(4, np.float32)

def create(limit_s, name="dist_sync", **options):
    settings = Watchdog(floor_s=0.4, ceiling_s=0.8, limit_s=limit_s)
    return kvcoll.create(name, watchdog=settings, **options)

def say(*words):
    sys.stdout.write(" ".join([f"[{rank}]", *map(str, words)]) + "\\n")
    sys.stdout.flush()
"""
SLEEPS = "does not answer: it sleeps (in "
NO_LOCK = (
    "), in code that lets no other thread of Python run (C code that holds the interpreter's lock)"
)


def run(mpirun: RunJob, folder: Path, body: str, ranks: int = 3, **options: object) -> Job:
    """Run a program, and check that it has ended by itself."""
    program = folder / "program.py"
    program.write_text(HEAD + body)
    job = mpirun(ranks, program, timeout_s=60, **options)
    assert not job.timed_out, f"the job hung\n{job.stdout}\n{job.stderr}"
    return job


def reports(job: Job) -> list[str]:
    """Give what watchdogs have said, each as one text."""
    texts = re.findall(r"^kvcoll: (.*?)(?=^\S|\Z)", job.stderr, re.DOTALL | re.MULTILINE)
    return [text for text in texts if "waited" in text]


def in_one(texts: list[str], *parts: str) -> bool:
    """Say whether one of the texts has all parts."""
    return any(all(part in text for part in parts) for text in texts)


def test_wherever_a_rank_is_the_others_are_told_and_go_on_when_it_comes(
    mpirun: RunJob, tmp_path: Path
) -> None:
    body = """
def read_the_next_batch():
    time.sleep(1.8)

def search_in_python():
    end_s, n = time.monotonic() + 1.8, 0
    while time.monotonic() < end_s:
        n += 1

def look_at_what_was_raised():
    try:
        raise ZeroDivisionError("bad batch")
    except ZeroDivisionError:
        time.sleep(1.8)

def stop():
    subprocess.Popen(["sh", "-c", f"sleep 4; kill -CONT {os.getpid()}"])
    os.kill(os.getpid(), signal.SIGSTOP)

def hold_the_lock():
    with subprocess.Popen(["sleep", "5"], stdout=subprocess.PIPE) as sleep:
        ctypes.PyDLL(None).read(sleep.stdout.fileno(), ctypes.create_string_buffer(1), 1)

def update_slowly(key, input, stored):
    if key == "updater" and rank == last:
        time.sleep(1.8)
    stored += input

acts = {"sleep": read_the_next_batch, "loop": search_in_python, "caught": look_at_what_was_raised,
        "updater": None, "stopped": stop, "held": hold_the_lock}
os.environ["KVCOLL_WATCHDOG_HELD_STACKS"] = "on"
kv = create(limit_s=50)
kv.init(list(acts), [one] * len(acts))
kv.set_updater(update_slowly)
for key, act in acts.items():
    if rank == last and act:
        act()
    kv.push(key, one)
    assert (kv.pull(key) == 4).all()
say("done")
"""
    job = run(mpirun, tmp_path, body)
    assert job.returncode == 0, job.stderr
    assert sorted(job.stdout.split("\n")) == ["", "[0] done", "[1] done", "[2] done"]
    said = reports(job)
    late, in_no_call = "rank 2 is late", "is in no call of the store"
    at = "push number {}, push('{}' float32[4])".format
    assert in_one(
        said, "ranks 0, 1 have waited", at(1, "sleep"), late, in_no_call, "time.sleep(1.8)"
    )
    assert in_one(said, at(2, "loop"), late, in_no_call, ", in search_in_python\n")
    assert in_one(said, at(3, "caught"), late, ", in look_at_what_was_raised\n")
    assert in_one(said, at(4, "updater"), late, "is in the updater of push", ", in update_slowly\n")
    assert in_one(said, at(5, "stopped"), late, "does not answer: it is stopped by a signal")
    assert in_one(said, at(6, "held"), late, SLEEPS, "pipe_read" + NO_LOCK, " in hold_the_lock")
    assert (
        job.stderr.count("kvcoll: the wait for rank 2 is over, after") >= 5
    )  # the last may come too late


ENDINGS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    # What rank 0 does, what the others do, and what is said
    "rank 0 lets no thread run": (
        "ctypes.PyDLL(None).sleep(50)",
        "",
        (
            "(rank 1 says this, as no rank before it answers) ranks 1, 2 have",
            SLEEPS + "hrtimer_nanosleep" + NO_LOCK,
        ),
    ),
    "a late store in another order": (
        "late.push('b', one)",
        "kv.push('a', one); late.push('b', one)",
        (
            "ranks 1, 2 have waited",
            "in push number 1, push('a' float32[4]): rank 0 is late",
            "in push number 1 of the 'dist_async' store, push('b' float32[4])",
            "So they wait for one another",
        ),
    ),
    "a store of other ranks in another order": (
        "other.push('c', one)",
        "kv.push('a', one)",
        (
            "in push number 1, push('a' float32[4]): rank 0 is late",
            "in push number 1, push('c' float32[4]), over another communicator",
            "So they wait for one another",
        ),
    ),
}


@pytest.mark.parametrize(("first", "others", "said"), ENDINGS.values(), ids=ENDINGS.keys())
def test_after_the_limit_the_job_ends_with_a_report_and_an_exit_code_of_its_own(
    mpirun: RunJob, tmp_path: Path, first: str, others: str, said: tuple[str, ...]
) -> None:
    body = f"""
kv, late = create(limit_s=2), create(limit_s=2, name="dist_async", staleness=0)
part = world.Split(rank < 2, rank)
other = create(limit_s=2, comm=part)
kv.init("a", one); late.init("b", one); other.init("c", one)
late.set_updater(lambda key, input, stored: None)
if rank == 0:
    {first}
else:
    {others or "pass"}
kv.push("a", one)
"""
    job = run(mpirun, tmp_path, body)
    assert job.returncode == EXIT_CODE == 89, job.stderr
    texts = reports(job)
    assert in_one(texts, "The job ends here, with exit code 89")
    assert in_one(texts, *said), job.stderr


def test_with_ulfm_all_ranks_that_wait_raise_the_same_and_the_late_one_when_it_comes(
    mpirun: RunJob, tmp_path: Path
) -> None:
    if why_no_ft():
        pytest.skip(why_no_ft())
    body = """
kv = create(limit_s=2)
kv.init("w", one)
kv.push("w", one)
if rank == 1:
    time.sleep(5)
try:
    kv.push("w", one)
except kvcoll.errors.LateRankError as error:
    say(json.dumps([error.ranks, str(error)]))
"""
    job = run(mpirun, tmp_path, body, with_ft=True)
    said = dict(re.findall(r"^\[(\d)\] (.*)$", job.stdout, re.MULTILINE))
    assert set(said) == {"0", "1", "2"}, job.stderr
    assert len(set(said.values())) == 1
    late, text = json.loads(said["0"])
    assert late == [1]
    assert text.startswith("ranks 0, 2 have waited")
    assert "in push number 2, push('w' float32[4]): rank 1 is late" in text
    assert "time.sleep(5)" in text
    assert "the job ends" not in job.stderr.lower()


def test_a_rank_that_has_ended_without_a_word_is_named_within_seconds(
    mpirun: RunJob, tmp_path: Path
) -> None:
    body = """
kv = create(limit_s=50)
kv.init("w", one)
if rank == 1:
    os._exit(0)
kv.push("w", one)
"""
    # By default both launchers end the others before anybody can say anything.
    goes_on = "--continuous" if is_open_mpi() else "-disable-auto-cleanup"
    job = run(mpirun, tmp_path, body, options=[goes_on])
    texts = reports(job)
    assert in_one(texts, "ranks 0, 2 have waited", "rank 1 is late", "has ended without a word")
    assert in_one(texts, f"The job ends here, with exit code {LOST_CODE}")


def test_settings_that_differ_between_ranks_are_an_error_on_all(
    mpirun: RunJob, tmp_path: Path
) -> None:
    body = """
for value in ("7", "soon"):
    if rank == 1:
        os.environ["KVCOLL_WATCHDOG_LIMIT_S"] = value
    try:
        kvcoll.create("dist_sync")
    except kvcoll.errors.KVCollError as error:
        say(type(error).__name__, error)
os.environ["KVCOLL_WATCHDOG_LIMIT_S"] = "9"
kvcoll.create("dist_sync").close()
"""
    job = run(mpirun, tmp_path, body, ranks=2)
    assert job.returncode == 0, job.stderr
    for rank in range(2):
        lines = [line for line in job.stdout.splitlines() if line.startswith(f"[{rank}]")]
        assert "RanksDisagreeError the ranks disagree: rank 0 called create('dist_sync'" in lines[0]
        assert "watchdog=Watchdog(floor_s=60, ceiling_s=300, limit_s=7)" in lines[0]
        assert "ArgumentError" in lines[1]
        assert "KVCOLL_WATCHDOG_LIMIT_S is a number of seconds above 0, got 'soon'" in lines[1]


def test_without_threads_each_rank_says_for_itself_how_long_it_has_waited(
    mpirun: RunJob, tmp_path: Path
) -> None:
    body = """
kv = create(limit_s=2)
kv.init("w", one)
if rank == 1:
    time.sleep(50)
kv.push("w", one)
"""
    program = tmp_path / "program.py"
    program.write_text("import mpi4py\nmpi4py.rc.thread_level = 'single'\n" + HEAD + body)
    job = mpirun(2, program, timeout_s=60)
    assert not job.timed_out
    assert job.returncode == EXIT_CODE
    assert in_one(
        reports(job), "rank 0 has waited", "which rank is late cannot be asked", "code 89"
    )


def test_it_stays_out_of_the_way_of_fork_finalize_and_the_end(
    mpirun: RunJob, tmp_path: Path
) -> None:
    body = """
import threading
kv = create(limit_s=2)
kv.init("w", one)
kv.push("w", one)
assert [t.name for t in threading.enumerate()].count("kvcoll-watchdog") == 1
child = os.fork()
if child == 0:
    os._exit(threading.active_count())
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
if size == 3:
    kv.close()
    MPI.Finalize()
    assert "kvcoll-watchdog" not in [t.name for t in threading.enumerate()]
say("done")
"""
    for ranks in (2, 3):
        job = run(mpirun, tmp_path, body, ranks=ranks)
        assert job.returncode == 0, job.stderr
        assert job.stdout.count("done") == ranks
        assert job.stderr == ""
