"""Ranks of jobs are killed; the others are told, recover, and go on with the right sums."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest
from mpi_job import Job, why_no_ft

import kvcoll

pytestmark = [pytest.mark.jobs, pytest.mark.limit(60), pytest.mark.long]

RunJob = Callable[..., Job]
LIMIT_S = 40.0
TESTS = Path(__file__).parent
PATH = os.pathsep.join([str(TESTS), str(Path(kvcoll.__file__).parents[1])])

HEAD = """
import os, sys, time
import numpy as np
import kvcoll
from kvcoll.errors import *
from lost_ranks import N, die, die_in, same_bits, say, until_lost
from mpi4py import MPI

rank = MPI.COMM_WORLD.rank  # as it was at the start
LIMIT_S = 10  # it takes 0.1 s where a core is free; several times what crowded cores need

def stores(name="dist_sync", optimizer=None, **options):
    kv = kvcoll.create(name, **options)
    check = kvcoll.create("dist_sync")
    check.init("check", np.zeros(2, np.int64))
    kv.init(["w", "v"], [np.zeros(N, np.float32), np.zeros(5, np.float32)])
    if optimizer:
        kv.set_optimizer(optimizer)
    return kv, check

def gradients(kv):
    # Whole numbers, so that sums are exact in any order.
    w = np.arange(N, dtype=np.float32) % 50 + 100 * rank
    return [w, np.full(5, rank + 1, np.float32)]
"""


@pytest.fixture(scope="module", autouse=True)
def ft() -> None:
    """Skip where MPI has no ULFM."""
    if why := why_no_ft():
        pytest.skip(why)


def run(mpirun: RunJob, folder: Path, ranks: int, body: str, code: int = 0) -> list[str]:
    """Run a program, and check that it has ended by itself; give its lines, sorted."""
    program = folder / "program.py"
    program.write_text(HEAD + body)
    job = mpirun(ranks, program, timeout_s=LIMIT_S, env={"PYTHONPATH": PATH}, with_ft=True)
    assert not job.timed_out, f"the job hung\n{job.stdout}\n{job.stderr}"
    assert job.returncode == code, f"{job.returncode}\n{job.stdout}\n{job.stderr}"
    return sorted(job.stdout.splitlines())


def test_a_kill_is_survived_and_the_next_sums_are_right(mpirun: RunJob, tmp_path: Path) -> None:
    said = run(
        mpirun,
        tmp_path,
        4,
        """
kv, check = stores()
for step in range(3):
    kv.push(["w", "v"], gradients(kv))
view, own = kv.view("w"), kv.empty("w")
if rank == 1:
    die()
began_s = time.monotonic()
error, _ = until_lost(lambda: kv.push(["w", "v"], gradients(kv)))
assert error.ranks == (1,) and "rank 1 of 4 was lost" in str(error)
assert kv.recover() == kv.version == 3
kv.push(["w", "v"], gradients(kv))
took_s = time.monotonic() - began_s
assert took_s < LIMIT_S, took_s
assert (kv.rank, kv.num_workers, kv.local_rank) == (rank - (rank > 1), 3, rank - (rank > 1))
left = [0, 2, 3]
expected = sum(np.arange(N, dtype=np.float32) % 50 + 100 * k for k in left)
assert (kv.pull("w") == expected).all() and (view == expected).all()
assert (kv.pull("v") == sum(k + 1 for k in left)).all()
own[:] = 7 + rank
kv.push("w", own)  # the store's own array, given out before the loss
assert (view == sum(7 + k for k in left)).all()
kv.barrier()
more = kvcoll.create("dist_sync")
more.init("new", np.full(3, rank, np.float32))
assert (more.pull("new") == 0).all()
say("well", rank)
""",
    )
    assert said == ["well 0", "well 2", "well 3"]


PLACES = {
    # How the stores are made, and what is done over and over when rank 1 is killed.
    "agreement": ("stores(elastic=True)", "kv.push('v', np.ones(5, np.float32))"),
    "sum": ("stores(elastic=True)", "kv.push(['w', 'v'], gradients(kv))"),
    "sum with an optimizer": (
        "stores(optimizer='adam', elastic=True)",
        "kv.push(['w', 'v'], gradients(kv))",
    ),
    "reproducible sum": (
        "stores(elastic=True, reproducible=True)",
        "kv.push(['w', 'v'], gradients(kv))",
    ),
    "own arrays": ("stores(elastic=True)", "kv.push('w', kv.empty('w'))"),
    "overlap": (
        "stores(optimizer='adam', elastic=True, overlap='always')",
        "kv.push(['w', 'v'], gradients(kv))",
    ),
    "dist_async": (
        "stores('dist_async', 'adam', staleness=3)",
        "kv.push(['w', 'v'], gradients(kv))",
    ),
    "barrier": ("stores()", "kv.barrier()"),
    "init": ("stores()", "kv.init(f'more {time.monotonic_ns() * 0 + next(count)}', np.ones(N))"),
    "updater": ("with_updater()", "kv.push(['w', 'v'], gradients(kv))"),
    "rows": ("stores(elastic=True)", "kv.push('w2', rows())"),
    "codes": ("with_codes()", "kv.push(['w', 'v'], gradients(kv))"),
    "save": ("stores()", "kv.save(folder, keep=2)"),
    "join": ("stores(elastic=True)", "join()"),
}


@pytest.mark.parametrize("place", PLACES)
def test_wherever_a_rank_is_killed_the_others_are_told_in_time_and_go_on(
    mpirun: RunJob, tmp_path: Path, place: str
) -> None:
    made, call = PLACES[place]
    said = run(
        mpirun,
        tmp_path,
        3,
        f"""
import itertools
count, folder = itertools.count(), {str(tmp_path / "saved")!r}

def with_updater():
    kv, check = stores(elastic=True)
    kv.set_updater(lambda key, total, stored: stored.__iadd__(total % 7))
    return kv, check

def with_codes():
    kv, check = stores(optimizer="sgd", elastic=True)
    kv.set_gradient_compression({{"type": "2bit", "threshold": 0.5}})
    return kv, check

def rows():
    return kvcoll.RowSparse(np.full((2, 4), rank, np.float32), np.array([rank, 7]), (10, 4))

def join():
    with kv.join():
        for _ in range(1 + rank):
            kv.push("v", np.ones(5, np.float32))

kv, check = {made}
kv.init("w2", np.zeros((10, 4), np.float32))
began_s = time.monotonic()
if rank == 1:
    die_in(0.4)
error, waited_s = until_lost(lambda: {call})
assert error.ranks == (1,), error.ranks
assert waited_s < LIMIT_S, waited_s
again = time.monotonic()
version = kv.recover()
took_s = time.monotonic() - again
assert took_s < LIMIT_S, took_s
assert version == kv.version and kv.num_workers == 2
kv.wait()
same_bits(kv, ["w", "v"], check)
for _ in range(5):
    kv.push(["w", "v"], gradients(kv))
kv.barrier()
assert kv.version == version + 5
same_bits(kv, ["w", "v"], check)
say("well", rank)
""",
    )
    assert said == ["well 0", "well 2"]


INTERRUPTED = """
from kvcoll import sums
kv, check = stores(optimizer="adam", elastic=ELASTIC)
honest, calls = sums.Adder.add, []

def add(self, rows, out):
    calls.append(1)
    if rank == 1 and len(calls) == last:
        die()  # the others have shown it their part, and wait for its
    honest(self, rows, out)

from kvcoll.transport import host
for step in range(4):
    kv.push(["w", "v"], gradients(kv))
last = len(calls) + 1  # one sum a push
sums.Adder.add = add
before = kv.pull("w")
try:
    for step in range(3):
        kv.push(["w", "v"], gradients(kv))
except RankLostError as error:
    assert error.ranks == (1,)
else:
    raise AssertionError("the push came through")
"""


def test_a_sum_that_is_interrupted_leaves_elastic_stores_at_the_version_before(
    mpirun: RunJob, tmp_path: Path
) -> None:
    body = INTERRUPTED.replace("ELASTIC", "True") + (
        """
assert kv.recover() == 4
assert (kv.pull("w") == before).all()
# The optimizer goes on from its fourth update: Adam's first step is as long as the rate.
kv.push(["w", "v"], gradients(kv))
moved = np.abs(kv.pull("w") - before)[1:].max()
assert 0 < moved < 0.0011, moved
same_bits(kv, ["w", "v"], check)
say("well", rank)
"""
    )
    assert run(mpirun, tmp_path, 3, body) == ["well 0", "well 2"]


def test_where_no_replica_is_whole_the_error_names_the_cure_on_all_ranks(
    mpirun: RunJob, tmp_path: Path
) -> None:
    body = INTERRUPTED.replace("ELASTIC", "False") + (
        """
try:
    kv.recover()
except NoWholeReplicaError as error:
    assert "checkpoint" in str(error) and "elastic=True" in str(error)
    say("well", rank)
sys.exit(3)
"""
    )
    assert run(mpirun, tmp_path, 3, body, code=3) == ["well 0", "well 2"]


def test_ranks_that_had_begun_a_push_go_back_to_those_that_had_not(
    mpirun: RunJob, tmp_path: Path
) -> None:
    # Of three ranks rank 1 tells rank 2, as the agreement's first round, and dies before it tells
    # rank 0: so rank 2 begins the sum, and rank 0 does not.
    said = run(
        mpirun,
        tmp_path,
        3,
        """
from kvcoll.transport import mpi
kv, check = stores(optimizer="sgd")
kv.push(["w", "v"], gradients(kv))
before = kv.pull("w")
honest, rounds = mpi.MpiMessenger.exchange, []

def exchange(self, sent, received, dest, source):
    rounds.append(1)
    if rank == 1 and len(rounds) == 2:
        time.sleep(0.3)  # until the message has been sent
        die()
    honest(self, sent, received, dest, source)

mpi.MpiMessenger.exchange = exchange
try:
    kv.push(["w", "v"], gradients(kv))
except RankLostError:
    say("whole" if kv._engine.is_whole else "begun", rank)
mpi.MpiMessenger.exchange = honest
assert kv.recover() == 1
assert (kv.pull("w") == before).all()
kv.push(["w", "v"], gradients(kv))
same_bits(kv, ["w", "v"], check)
say("well", rank)
""",
    )
    assert said == ["begun 2", "well 0", "well 2", "whole 0"]


def test_ranks_may_be_lost_one_after_another_rank_0_too_until_one_is_left(
    mpirun: RunJob, tmp_path: Path
) -> None:
    said = run(
        mpirun,
        tmp_path,
        4,
        """
kv, check = stores(optimizer="sgd")
for step, victim in ((2, 3), (4, 0), (6, 2)):
    while kv.version < step:
        kv.push(["w", "v"], gradients(kv))
    if rank == victim:
        die()
    error, _ = until_lost(lambda: kv.push(["w", "v"], gradients(kv)))
    assert kv.recover() == step
    same_bits(kv, ["w", "v"], check)
    say(rank, "of", kv.num_workers, "without", *error.ranks)
total = 2 * (1 + 2 + 3 + 4) + 2 * (1 + 2 + 3) + 2 * (2 + 3)
assert np.allclose(kv.pull("v"), -0.01 * total)
kv.push("v", np.full(5, 100, np.float32))
assert np.allclose(kv.pull("v"), -0.01 * (total + 100))
""",
    )
    # Ranks are named as the store counted them until then.
    expected = [f"{rank} of 3 without 3" for rank in (0, 1, 2)]
    expected += [f"{rank} of 2 without 0" for rank in (1, 2)]
    assert said == sorted([*expected, "1 of 1 without 1"])


@pytest.mark.parametrize("where", ["duplicate", "broadcast", "check_collectives", "agree"])
def test_a_rank_that_dies_while_the_others_recover_is_left_behind_too(
    mpirun: RunJob, tmp_path: Path, where: str
) -> None:
    said = run(
        mpirun,
        tmp_path,
        4,
        f"""
from kvcoll.transport import mpi
kv, check = stores(optimizer="adam", elastic=True)
for step in range(3):
    kv.push(["w", "v"], gradients(kv))
if rank == 2:
    kv._engine.is_whole = False  # so that there is something to copy
    kv.view("w").base[:5] = 9 if kv.view("w").base is not None else 0
if rank == 1:
    die()
if rank == 3:
    if {where!r} == "broadcast":
        mpi.MpiTransport.broadcast = lambda *ignored: die()
    else:
        mpi.{where} = lambda *ignored: die()
until_lost(lambda: kv.push(["w", "v"], gradients(kv)))
assert kv.recover() == 3
assert kv.num_workers == 2
same_bits(kv, ["w", "v"], check)
kv.push(["w", "v"], gradients(kv))
same_bits(kv, ["w", "v"], check)
say("well", rank)
""".replace('    kv.view("w").base[:5] = 9 if kv.view("w").base is not None else 0\n', ""),
    )
    assert said == ["well 0", "well 2"]


def test_that_mpi_is_broken_is_the_same_error_on_every_rank_of_recover(
    mpirun: RunJob, tmp_path: Path
) -> None:
    said = run(
        mpirun,
        tmp_path,
        4,
        """
from kvcoll.transport import mpi
kv, check = stores()
if rank == 1:
    die()
if rank == 3:
    def sees_it(*ignored):
        raise BrokenMPIError("collective calls of this MPI give wrong results")
    mpi.check_collectives = sees_it
if rank == 2:  # which takes wrong results for what they seem to be
    def misled(*ignored):
        raise ValueError("a text of another rank is none")
    mpi.check_collectives = misled
until_lost(lambda: kv.push(["w", "v"], gradients(kv)))
try:
    kv.recover()
except BrokenMPIError as error:
    say(rank, error)
""",
    )
    elsewhere = (
        "MPI gave another rank, which says more, wrong results after the loss: go on from a "
        "checkpoint in a new job"
    )
    here = "collective calls of this MPI give wrong results"
    assert said == [f"0 {elsewhere}", f"2 {elsewhere}", f"3 {here}"]


ENDINGS = {
    # What the ranks that are left do, the job's exit code, and what must stand on stderr.
    "an error that nobody catches": ("kv.push('v', np.ones(5))", 1, "RankLostError: rank 1"),
    "an exit with a code of its own": ("sys.exit(5)", 5, ""),
    "an exit after recover": ("kv.recover(); kv.push('v', np.ones(5)); sys.exit(6)", 6, ""),
    "one that recovers and one that does not": (
        "kv.recover() if rank == 0 else sys.exit(4)\nassert kv.num_workers == 1",
        4,
        "",
    ),
    "MPI_Finalize that hangs": (
        "kv.recover()\n"
        "from kvcoll.transport import mpi\n"
        "honest = mpi.finalize\n"
        "mpi.finalize = lambda: (honest(), time.sleep(60))\n"
        "sys.exit(7)",
        7,
        "",
    ),
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_job_that_has_lost_a_rank_ends_in_time_with_its_own_exit_code(
    mpirun: RunJob, tmp_path: Path, ending: str
) -> None:
    body, code, expected = ENDINGS[ending]
    program = tmp_path / "program.py"
    program.write_text(
        HEAD
        + f"""
kv, check = stores()
if rank == 1:
    die()
until_lost(lambda: kv.push("v", np.ones(5, np.float32)))
print("words without a newline are not lost", end="")
{body}
"""
    )
    job = mpirun(3, program, timeout_s=20.0, env={"PYTHONPATH": PATH}, with_ft=True)
    assert not job.timed_out, f"the job hung\n{job.stdout}\n{job.stderr}"
    assert job.returncode == code, f"{job.returncode}\n{job.stdout}\n{job.stderr}"
    assert job.stdout.count("words without a newline are not lost") == 2
    assert expected in job.stderr


def test_a_store_that_has_recovered_closes_the_way_that_it_goes_now(
    mpirun: RunJob, tmp_path: Path
) -> None:
    said = run(
        mpirun,
        tmp_path,
        3,
        """
from kvcoll.transport import mpi
kv, check = stores()
if rank == 1:
    die()
until_lost(lambda: kv.push(["w", "v"], gradients(kv)))
kv.recover()
honest, closed = mpi.MpiTransport.close, []
mpi.MpiTransport.close = lambda self: (closed.append(self.topology.size), honest(self))
kv.close()
check.close()
assert closed == [2, 2], closed
say("well", rank)
""",
    )
    assert said == ["well 0", "well 2"]


def test_without_ulfm_recover_says_what_it_takes(mpirun: RunJob, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        HEAD
        + """
kv, check = stores()
try:
    kv.recover()
except NotSurvivableError as error:
    assert "--with-ft ulfm" in str(error)
    say("well", rank)
"""
    )
    job = mpirun(2, program, timeout_s=LIMIT_S, env={"PYTHONPATH": PATH})
    assert sorted(job.stdout.splitlines()) == ["well 0", "well 1"], job.stderr
    assert re.search("Traceback", job.stderr) is None


NEW: Final = "kv.init('new', np.ones(N, np.{}))"
USE_NEW: Final = """
kv.push(["new", "w"], [np.full(N, 10 * (rank + 1), np.float32), gradients(kv)[0]])
same_bits(kv, ["new"], check)
kv.save_optimizer_states(states)
kv.load_optimizer_states(states)
"""
USE_OWN: Final = """
own[:] = rank + 1
kv.push("w", own)
"""
# Calls that change a store: where they are cut, after how many calls of that (None: at the last but
# one), and what is done once they have come through.
CHANGES: Final = {
    "init": (NEW.format("float32"), "AcrossRanks.confirm", 0, USE_NEW),
    "init of another dtype": (NEW.format("float64"), "Sums.window", 0, USE_NEW),
    "set_updater": (
        "kv.set_updater(lambda key, given, stored: stored.__iadd__(given))",
        "AcrossRanks.confirm",
        0,
        "",
    ),
    "set_optimizer": (
        "kv.set_optimizer('sgd', learning_rate=0.5)",
        "AcrossRanks.confirm",
        0,
        "",
    ),
    "set_gradient_compression": (
        "kv.set_gradient_compression({'type': 'fp16'})",
        "AcrossRanks.confirm",
        0,
        "",
    ),
    "load_optimizer_states": ("kv.load_optimizer_states(states)", "AcrossRanks.confirm", 2, ""),
    "load": ("kv.load(run)", "AcrossRanks.confirm", None, ""),
    "empty": ("own = kv.empty('w')", "Sums.window", 0, USE_OWN),
    "adopt": ("own = kv.adopt('w', np.ones(N, np.float32))", "Sums.window", 0, USE_OWN),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_call_that_changes_a_store_is_done_by_all_survivors_or_by_none(
    mpirun: RunJob, tmp_path: Path, change: str
) -> None:
    call, where, n_before, after = CHANGES[change]
    said = run(
        mpirun,
        tmp_path,
        3,
        f"""
from kvcoll.agreement import AcrossRanks

states, run = {str(tmp_path / "states")!r}, {str(tmp_path / "run")!r}
kv, check = stores(optimizer="adam", elastic=True)
Sums = type(kv._sums)
kv.push(["w", "v"], gradients(kv))
kv.save_optimizer_states(states)
kv.save(run)
kv.push(["w", "v"], gradients(kv))

whole, n_left, has_begun = {where}, 10**9, False

def cut(self, *given, **more):
    # Rank 1 is killed once all have come so far; rank 2 hears of that before it hears of the rest.
    global n_left, has_begun
    result = whole(self, *given, **more)
    n_left -= has_begun
    if n_left < 0 and rank == 1:
        die()
    if n_left < 0 and rank == 2:
        while True:
            kv._agreement._ranks._alarm.check()
            time.sleep(1e-3)
    return result

{where} = cut
has_begun = True
n_before = {n_before}
if n_before is None:
    {call}
    n_before = 10**9 - n_left - 2  # the last one settles the call
    kv.push(["w", "v"], gradients(kv))
n_left = n_before
try:
    {call}
    raise AssertionError("nobody was lost")
except RankLostError as error:
    assert error.ranks == (1,), error.ranks
n_left, has_begun = 10**9, False
kv.recover()
version = kv.version
{call}
assert kv.version <= version
{after}
for _ in range(2):
    kv.push(["w", "v"], gradients(kv))
same_bits(kv, ["w", "v"], check)
kv.verify()
say("well", rank)
""",
    )
    assert said == ["well 0", "well 2"]


def test_what_one_rank_has_changed_alone_as_it_was_too_late_is_found(
    mpirun: RunJob, tmp_path: Path
) -> None:
    said = run(
        mpirun,
        tmp_path,
        2,
        """
from kvcoll.agreement import AcrossRanks

watchdog = kvcoll.Watchdog(floor_s=0.2, ceiling_s=0.5, limit_s=1.0)
kv, check = stores(optimizer="sgd", elastic=True, watchdog=watchdog)
whole, told = AcrossRanks._settle, None

def late(self, **given):
    time.sleep(7.0 * rank)  # longer than the limit, and than a rank waits afterwards
    return whole(self, **given)

AcrossRanks._settle = late
try:
    kv.set_optimizer("sgd", learning_rate=0.5)
except LateRankError:
    told = "late"
AcrossRanks._settle = whole
try:
    kv.recover()
except NoWholeReplicaError as error:
    assert "some ranks have loaded or set what others have not" in str(error)
    say("found", rank, told)
""",
    )
    assert said == ["found 0 late", "found 1 None"]


def test_a_rank_that_leaves_in_the_midst_of_such_a_call_is_named(
    mpirun: RunJob, tmp_path: Path
) -> None:
    said = run(
        mpirun,
        tmp_path,
        3,
        f"""
from kvcoll import states

path = {str(tmp_path / "states")!r}
kv, check = stores(optimizer="sgd")
kv.save_optimizer_states(path)

def ends(*given):
    sys.exit(0)  # as a signal's handler may

states.read = ends
try:
    with kv:
        kv.load_optimizer_states(path)
except RankLeftError as error:
    assert "rank 0 left the store" in str(error)
    say("told", rank)
""",
    )
    assert said == ["told 1", "told 2"]


@pytest.mark.parametrize("name", ["dist_sync", "dist_async"])
def test_a_survivor_that_comes_to_such_a_call_alone_does_not_wait_in_it(
    mpirun: RunJob, tmp_path: Path, name: str
) -> None:
    said = run(
        mpirun,
        tmp_path,
        3,
        f"""
kv, check = stores({name!r}, optimizer="adam", elastic=True)
kv.push(["w", "v"], gradients(kv))
kv.barrier()
if rank == 1:
    die()
began_s = time.monotonic()
try:
    if rank == 0:
        while True:
            kv.push("v", np.ones(5, np.float32))
    kv.set_optimizer("sgd", learning_rate=0.5)
    raise AssertionError("nobody was lost")
except RankLostError as error:
    assert error.ranks == (1,)
kv.recover()
took_s = time.monotonic() - began_s
assert took_s < LIMIT_S, took_s
kv.set_optimizer("sgd", learning_rate=0.5)
for _ in range(2):
    kv.push(["w", "v"], gradients(kv))
kv.barrier()
same_bits(kv, ["w", "v"], check)
say("well", rank)
""",
    )
    assert said == ["well 0", "well 2"]
