"""Ranks, hosts and cables are lost in jobs over several hosts: they go on, or end with a cause."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Final

import pytest
from cluster.hosts import CHECKOUT, OF_CROWDED_CORES, Hosts, environment_of, pretend_hosts
from mpi_job import Job, clean_environment, is_open_mpi, own_mpirun, why_no_ft

pytestmark = [pytest.mark.single, pytest.mark.limit(240), pytest.mark.long]

TRAIN: Final = CHECKOUT / "scripts/train.py"
FT: Final = ("--with-ft", "ulfm")
# The bar is 15 s; on cores that others use, too, a job takes longer to end.
ENDS_WITHIN_S: Final = 30.0

GOES_ON: Final = """
import os, signal
import numpy as np
import kvcoll

kv = kvcoll.create("dist_sync", elastic=True)
me, n = kv.rank, 100_000
kv.init("w", np.zeros(n, np.float32))
kv.set_optimizer("sgd", learning_rate=1.0)
while kv.version < 30:
    try:
        if (me, kv.version) in ((2, 10), (0, 20)):
            os.kill(os.getpid(), signal.SIGKILL)
        kv.push("w", np.full(n, 2 ** kv.rank, np.float32))
    except kvcoll.errors.RankLostError as error:
        told = error.ranks
        kv.recover()
        print(f"{me} without {told}: {kv.rank} of {kv.num_workers} on {kv.num_hosts}", flush=True)
# 4 ranks push 1 + 2 + 4 + 8 ten times, 3 ranks 1 + 2 + 4, 2 ranks 1 + 2.
print(f"{me} right: {(kv.pull('w') == -10 * (15 + 7 + 3)).all()}", flush=True)
"""


KILLED: Final = """
import os, signal
import numpy as np
import kvcoll

kv = kvcoll.create("dist_sync", overlap="always")
kv.init("w", np.zeros(100_000, np.float32))
for step in range(100):
    if (kv.rank, step) == (3, 20):
        os.kill(os.getpid(), signal.SIGKILL)
    kv.push("w", np.ones(100_000, np.float32))
"""


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    with pretend_hosts(2) as made:
        yield made


def run_until(
    hosts: Hosts,
    arguments: list[str],
    *,
    options: tuple[str, ...] = (),
    ready: Callable[[], bool] = lambda: False,
    lose: Callable[[], None] = lambda: None,
    env: dict[str, str] | None = None,
) -> tuple[Job, float]:
    """Run Python on 2 hosts with 2 ranks each; once `ready` lose something, and wait for the end.

    Output goes to a file: what a launcher leaves behind may hold a pipe open.
    """
    env = {"PYTHONPATH": str(CHECKOUT)} | OF_CROWDED_CORES | (env or {})
    command = [own_mpirun(), *hosts._placed((2, 2), in_turn=False), *options]
    if is_open_mpi():
        command += [word for name in env for word in ("-x", name)]
    script = str(CHECKOUT / "tests/cluster/hosts.sh")
    with (hosts.folder / "out").open("w+") as out:
        process = subprocess.Popen(
            [script, "on", "kv1", *command, sys.executable, *arguments],
            env=clean_environment() | environment_of(hosts.folder) | env,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
        )
        end_s = time.monotonic() + 60
        while process.poll() is None and not ready() and time.monotonic() < end_s:
            time.sleep(0.05)
        began_s, timed_out = time.monotonic(), False
        lose()
        try:
            process.wait(ENDS_WITHIN_S if ready() else 60)
        except subprocess.TimeoutExpired:
            timed_out = True
        took_s = time.monotonic() - began_s
        out.seek(0)
        said = out.read()
    return Job(process.wait(0) if not timed_out else 0, said, said, timed_out), took_s


@pytest.fixture
def tidy(hosts: Hosts) -> Iterator[None]:
    """Leave no process of this test's jobs on the hosts, nor a cable cut."""
    yield
    hosts.mend("kv2")
    for host in ("kv1", "kv2"):
        hosts.on(host, "bash", "-c", "kill -9 -1")  # all but sshd, its process 1


def test_ranks_lost_on_several_hosts_are_left_behind(hosts: Hosts, tidy: None) -> None:
    if why := why_no_ft():
        pytest.skip(why)
    program = hosts.folder / "goes_on.py"
    program.write_text(GOES_ON)
    job, _ = run_until(hosts, [str(program)], options=FT)
    assert not job.timed_out, job.stdout
    assert job.returncode == 0, job.stdout
    lines = sorted(line for line in job.stdout.splitlines() if line[1:2] == " ")
    assert lines == [
        "0 without (2,): 0 of 3 on 2",
        "1 right: True",
        "1 without (0,): 0 of 2 on 2",
        "1 without (2,): 1 of 3 on 2",
        "3 right: True",
        "3 without (0,): 1 of 2 on 2",
        "3 without (2,): 2 of 3 on 2",
    ]


def test_collectives_that_give_wrong_sums_after_a_loss_are_refused(
    hosts: Hosts, tidy: None
) -> None:
    if why := why_no_ft():
        pytest.skip(why)
    program = hosts.folder / "han.py"
    program.write_text("from mpi4py import MPI\nimport kvcoll\nkvcoll.create('dist_sync')\n")
    job, _ = run_until(hosts, [str(program)], options=FT)
    assert not job.timed_out, job.stdout
    assert job.returncode != 0
    assert job.stdout.count("LaunchError: under --with-ft ulfm coll/han") >= 4


@pytest.mark.parametrize("ft", [False, True])
@pytest.mark.parametrize("what", ["cable", "host"])
def test_when_a_host_is_lost_the_job_ends_and_resume_goes_on(
    hosts: Hosts, tidy: None, what: str, *, ft: bool
) -> None:
    if ft and (why := why_no_ft()):
        pytest.skip(why)
    run = hosts.folder / f"run-{what}-{ft}"
    arguments = [str(TRAIN), "--checkpoint", str(run), "--epochs"]
    ended = hosts.folder / f"ended-{what}-{ft}"
    env = {"KVCOLL_ENDED_FILE": str(ended)}

    def ready() -> bool:
        return (run / "00000001" / "manifest.json").exists()

    def lose() -> None:
        if what == "cable":
            hosts.cut("kv2")
        else:
            hosts.on("kv2", "bash", "-c", "kill -9 -1")

    options = FT if ft else ()
    job, took_s = run_until(
        hosts, [*arguments, "100000"], options=options, ready=ready, lose=lose, env=env
    )
    assert not job.timed_out, job.stdout
    assert "100000  " not in job.stdout
    if what == "cable":
        assert "host kv2, with ranks 2, 3, has not been heard of for 8 s" in job.stdout
        assert job.returncode != 0
    else:
        assert "kv2" in job.stdout  # the launcher names it
        # Open MPI's own may be 0, under ULFM always: scripts/slurm.sh goes by the file then.
        assert job.returncode != 0 or is_open_mpi()
    assert not ended.exists()
    assert took_s < ENDS_WITHIN_S
    end_s = time.monotonic() + 10
    while time.monotonic() < end_s and "train.py" in processes(hosts, "kv1"):
        time.sleep(0.2)
    assert "train.py" not in processes(hosts, "kv1")
    hosts.mend("kv2")
    job, _ = run_until(hosts, [*arguments, "12", "--resume"], env=env)
    assert not job.timed_out, job.stdout
    assert "resumed   " in job.stdout
    assert job.returncode == 0, job.stdout
    assert ended.read_text() == "ended\n"


def test_the_launcher_names_a_killed_rank_and_ends(hosts: Hosts, tidy: None) -> None:
    if not is_open_mpi():
        pytest.skip("names no rank by its number")
    program = hosts.folder / "killed.py"
    program.write_text(KILLED)
    for _ in range(3):  # ranks abort and are named instead, or were once, more often than not
        job, took_s = run_until(hosts, [str(program)])
        assert not job.timed_out, job.stdout
        assert took_s < ENDS_WITHIN_S
        assert job.returncode == 128 + signal.SIGKILL, job.stdout
        assert re.search(r"process rank 3 with PID \d+ on node kv2 exited on", job.stdout)


def test_the_job_ends_though_its_launcher_waits_for_a_host_in_vain(
    hosts: Hosts, tidy: None
) -> None:
    run = hosts.folder / "run-stopped"
    arguments = [str(TRAIN), "--checkpoint", str(run), "--epochs", "100000"]

    def ready() -> bool:
        return (run / "00000001" / "manifest.json").exists()

    def lose() -> None:
        ends = "pkill -STOP 'prted|orted|hydra_pmi_proxy'; pkill -KILL -f train.py"
        hosts.on("kv2", "bash", "-c", ends)

    job, took_s = run_until(hosts, arguments, ready=ready, lose=lose)
    assert not job.timed_out, job.stdout
    assert job.returncode != 0
    assert took_s < ENDS_WITHIN_S


def processes(hosts: Hosts, host: str) -> str:
    """List what runs on a host."""
    return hosts.on(host, "ps", "-eo", "args").stdout
