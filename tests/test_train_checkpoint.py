"""scripts/train.py goes on after a kill, a stop or a loss; the bits are those of a run let be."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from marks import needs
from mpi_job import Job, why_no_ft

import kvcoll

pytestmark = [
    pytest.mark.jobs,
    pytest.mark.limit(120),
    pytest.mark.long,
    needs("train", "scripts/train.py"),
]

SCRIPTS = Path(__file__).parents[1] / "scripts"
PATHS = (SCRIPTS, Path(kvcoll.__file__).parents[1], os.environ.get("PYTHONPATH", ""))
Start = Callable[..., Job]

SHARED = """
import sys
import train
from kvcoll.checkpoint import shares
shares.PART_BYTES, shares.CUT_BYTES = 1 << 16, 1 << 15  # so that both ranks write
sys.exit(train.main())
"""


def options(path: Path, *more: str) -> tuple[str, ...]:
    return ("--epochs", "6", "--target-accuracy", "0", "--checkpoint", str(path), *more)


def start(mpirun: Start, ranks: int, *arguments: str | Path, faults: str = "") -> Job:
    env = {"PYTHONPATH": os.pathsep.join(map(str, PATHS)), "KVCOLL_FAULTS": faults}
    return mpirun(ranks, *arguments, env=env)


def bits(job: Job) -> str:
    found = re.search(r"the same bits \(blake2b (\w+)\)", job.stdout)
    assert found, job.stderr
    return found[1]


def test_a_run_that_was_killed_ends_with_the_bits_of_one_that_was_not(
    mpirun: Start, tmp_path: Path
) -> None:
    kind = ("--optimizer", "adam", "--compression", "2bit", "--threshold", "0.1")
    whole = start(mpirun, 2, SCRIPTS / "train.py", *options(tmp_path / "whole", *kind))
    assert whole.returncode == 0, whole.stderr
    assert sorted(os.listdir(tmp_path / "whole")) == ["00000005", "00000006"]

    path = tmp_path / "run"
    for push in (80, 110):  # of 23 an epoch
        faults = f"rank=1 push={push} kill"
        resuming = options(path, *kind, "--resume")
        killed = start(mpirun, 2, "-c", SHARED, *resuming, faults=faults)
        assert not killed.timed_out
        assert "signal 9" in killed.stdout + killed.stderr or killed.returncode == 9, killed.stderr
    numbers = tmp_path / "numbers.json"
    rest = options(path, *kind, "--resume", "--json", str(numbers))
    resumed = start(mpirun, 2, SCRIPTS / "train.py", *rest)
    assert resumed.returncode == 0, resumed.stderr
    said = re.search(r"resumed   \S+/run/\d{8}, after epoch (\d)", resumed.stdout)
    assert said
    assert 2 <= int(said[1]) <= 4
    assert bits(resumed) == bits(whole)
    assert [epoch["number"] for epoch in json.loads(numbers.read_text())["epochs"]] == list(
        range(7)
    )


def test_a_run_goes_on_with_another_number_of_ranks(mpirun: Start, tmp_path: Path) -> None:
    first = start(mpirun, 2, SCRIPTS / "train.py", *options(tmp_path), "--epochs", "3")
    assert first.returncode == 0, first.stderr
    rest = ("--epochs", "12", "--target-accuracy", "0.95", "--resume")
    second = start(mpirun, 3, SCRIPTS / "train.py", *options(tmp_path), *rest)
    assert second.returncode == 0, second.stderr
    assert "after epoch 3" in second.stdout
    assert "replicas: 3 of 3 the same bits" in second.stdout


def test_what_cannot_be_resumed_is_said_once_by_all_ranks(mpirun: Start, tmp_path: Path) -> None:
    anew = start(mpirun, 2, SCRIPTS / "train.py", *options(tmp_path), "--epochs", "1", "--resume")
    assert anew.returncode == 0, anew.stderr
    assert f"no checkpoint in {tmp_path} yet: beginning anew" in anew.stdout
    for more, why in (
        (("--lr", "0.5"), "it was trained with --lr 0.05, and not 0.5"),
        (("--hidden", "8"), "key 'layer1_weight' holds float32[64, 8], in "),
    ):
        job = start(mpirun, 2, SCRIPTS / "train.py", *options(tmp_path, "--resume", *more))
        assert job.returncode == 2
        assert not job.timed_out
        assert job.stderr.count(f"train.py: error: cannot resume from {tmp_path}: ") == 1
        assert why in job.stderr
    lone = start(mpirun, 1, SCRIPTS / "train.py", "--resume")
    assert lone.returncode == 2
    assert "--resume goes with --checkpoint DIR" in lone.stderr


@pytest.mark.parametrize("more", [(), ("--kv-store", "dist_async")])
def test_an_elastic_run_goes_on_without_ranks_that_are_killed_and_reaches_its_accuracy(
    mpirun: Start, tmp_path: Path, more: tuple[str, ...]
) -> None:
    if why := why_no_ft():
        pytest.skip(why)
    elastic = ("--elastic", "--epochs", "6", "--checkpoint", tmp_path / "run", *more)
    env = {
        "PYTHONPATH": os.pathsep.join(map(str, PATHS)),
        "KVCOLL_FAULTS": "rank=1 push=30 kill; rank=0 push=75 kill",
    }
    program = SCRIPTS / "train.py"
    job = mpirun(4, program, *elastic, env=env, with_ft=True, timeout_s=80.0)
    assert not job.timed_out, job.stdout + job.stderr
    assert job.returncode == 0, job.stdout + job.stderr
    assert "rank 1 of 4 was lost: 3 go on from push " in job.stdout
    assert "rank 0 of 3 was lost: 2 go on from push " in job.stdout
    assert "replicas: 2 of 2 the same bits" in job.stdout


def test_an_elastic_run_on_gpus_goes_on_where_its_values_are(mpirun: Start, tmp_path: Path) -> None:
    pytest.importorskip("ml_dtypes")
    if why := why_no_ft() or ("" if shutil.which("g++") else "fake GPUs need g++"):
        pytest.skip(why)
    mail = tmp_path / "nccl"
    mail.mkdir()
    options = ("--kv-store", "dist_device_sync", "--elastic", "--epochs", "6")
    env = {
        "PYTHONPATH": os.pathsep.join(map(str, PATHS)),
        "KVCOLL_FAULTS": "rank=1 push=30 kill",
    }
    program = Path(__file__).with_name("train_on_fakes.py")
    job = mpirun(2, program, mail, *options, env=env, with_ft=True, timeout_s=80.0)
    assert not job.timed_out, job.stdout + job.stderr
    assert job.returncode == 0, job.stdout + job.stderr
    assert "rank 1 of 2 was lost: 1 go on from push " in job.stdout
    assert "rank 0 updated on fake GPU 0" in job.stdout


# Signals itself in the middle of the given step, on one rank alone.
SIGNALLED = """
import os, sys
import train
from mpi4py import MPI

steps, last, signal = [], int(sys.argv.pop(1)), int(sys.argv.pop(1))

def backward(*arguments, honest=train.backward):
    steps.append(1)
    if MPI.COMM_WORLD.rank == MPI.COMM_WORLD.size - 1 and len(steps) == last:
        os.kill(os.getpid(), signal)
    return honest(*arguments)

train.backward = backward
sys.exit(train.main())
"""


@pytest.mark.parametrize(
    ("signal_number", "kind"),
    [(signal.SIGTERM, "dist_sync"), (signal.SIGUSR1, "dist_sync"), (signal.SIGUSR1, "dist_async")],
)
def test_a_signal_to_one_rank_stops_all_at_one_step_and_the_rest_gives_the_same_bits(
    mpirun: Start, tmp_path: Path, signal_number: signal.Signals, kind: str
) -> None:
    more = ("--kv-store", kind, "--optimizer", "adam")
    path = tmp_path / "run"
    stopped = start(
        mpirun, 2, "-c", SIGNALLED, "30", str(int(signal_number)), *options(path, *more)
    )
    assert stopped.returncode == 75, stopped
    assert f"go on with --checkpoint {path} --resume" in stopped.stdout
    assert "epoch  train" in stopped.stdout
    numbers = tmp_path / "numbers.json"
    rest = options(path, *more, "--resume", "--json", str(numbers))
    resumed = start(mpirun, 2, SCRIPTS / "train.py", *rest)
    assert resumed.returncode == 0, resumed.stderr
    # Of 23 steps an epoch it was the 7th of the second; with late pushes each tenth one asks.
    steps = 10 if kind == "dist_async" else 7
    assert f"after epoch 1 and {steps} steps\n" in resumed.stdout
    assert [epoch["number"] for epoch in json.loads(numbers.read_text())["epochs"]] == list(
        range(7)
    )
    if kind == "dist_sync":  # with late pushes no two runs have the same bits
        whole = start(mpirun, 2, SCRIPTS / "train.py", *options(tmp_path / "whole", *more))
        assert bits(resumed) == bits(whole)


def test_without_a_checkpoint_a_signal_ends_the_program_as_any_other(
    mpirun: Start, tmp_path: Path
) -> None:
    number = str(int(signal.SIGTERM))  # MPICH catches SIGUSR1 for its own use
    job = start(mpirun, 1, "-c", SIGNALLED, "5", number, "--target-accuracy", "0")
    assert not job.timed_out
    assert job.returncode not in (0, 75)
    assert "replicas:" not in job.stdout
