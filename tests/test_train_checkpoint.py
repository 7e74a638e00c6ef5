"""scripts/train.py goes on after a kill, and ends with the bits of a run that was let be."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from mpi_job import Job, why_no_ft

import kvcoll

for package in ("matplotlib", "safetensors", "sklearn", "tqdm"):
    pytest.importorskip(package, reason="scripts/train.py needs the extra train")
pytestmark = [pytest.mark.single, pytest.mark.limit(120), pytest.mark.long]

SCRIPTS = Path(__file__).parents[1] / "scripts"
PATHS = (SCRIPTS, Path(kvcoll.__file__).parents[1], os.environ.get("PYTHONPATH", ""))
Start = Callable[..., Job]

# Rank 1 is killed in the middle of the given step.
KILLED = f"""
import os, sys
import train
from kvcoll.checkpoint import shares
shares.PART_BYTES, shares.CUT_BYTES = 1 << 16, 1 << 15  # so that both ranks write
from mpi4py import MPI

steps, last = [], int(sys.argv.pop(1))

def backward(*arguments, honest=train.backward):
    steps.append(1)
    if MPI.COMM_WORLD.rank == 1 and len(steps) == last:
        os.kill(os.getpid(), {int(signal.SIGKILL)})
    return honest(*arguments)

train.backward = backward
sys.exit(train.main())
"""


def options(path: Path, *more: str) -> tuple[str, ...]:
    return ("--epochs", "6", "--target-accuracy", "0", "--checkpoint", str(path), *more)


def start(mpirun: Start, ranks: int, *arguments: str | Path) -> Job:
    return mpirun(ranks, *arguments, env={"PYTHONPATH": os.pathsep.join(map(str, PATHS))})


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
    for step in (80, 40):  # of 23 an epoch
        killed = start(mpirun, 2, "-c", KILLED, str(step), *options(path, *kind, "--resume"))
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


# Ranks are killed in the middle of the steps given.
LOST = f"""
import os, sys
import train
from mpi4py import MPI

steps, plan = [], dict(pair.split(":") for pair in sys.argv.pop(1).split(","))

def backward(*arguments, honest=train.backward):
    steps.append(1)
    if plan.get(str(MPI.COMM_WORLD.rank)) == str(len(steps)):
        os.kill(os.getpid(), {int(signal.SIGKILL)})
    return honest(*arguments)

train.backward = backward
sys.exit(train.main())
"""


@pytest.mark.parametrize("more", [(), ("--kv-store", "dist_async")])
def test_an_elastic_run_goes_on_without_ranks_that_are_killed_and_reaches_its_accuracy(
    mpirun: Start, tmp_path: Path, more: tuple[str, ...]
) -> None:
    if why := why_no_ft():
        pytest.skip(why)
    program = tmp_path / "lost.py"
    program.write_text(LOST)
    job = mpirun(
        4,
        *(
            program,
            "1:30,0:75",
            "--elastic",
            "--epochs",
            "6",
            "--checkpoint",
            tmp_path / "run",
            *more,
        ),
        env={"PYTHONPATH": os.pathsep.join(map(str, PATHS))},
        with_ft=True,
        timeout_s=80.0,
    )
    assert not job.timed_out, job.stdout + job.stderr
    assert job.returncode == 0, job.stdout + job.stderr
    assert "rank 1 of 4 was lost: 3 go on from push " in job.stdout
    assert "rank 0 of 3 was lost: 2 go on from push " in job.stdout
    assert "replicas: 2 of 2 the same bits" in job.stdout
