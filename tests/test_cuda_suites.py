"""The tests that scripts/gpu_check.sh runs on real GPUs pass on a CuPy whose GPUs are the host.

So what they find on a machine with GPUs is its GPUs', and not their own way of asking for them.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import fake_cupy
import pytest
from host_kernel import needs_compiler
from marks import needs
from mpi_job import Job, clean_environment

pytestmark = [pytest.mark.jobs, pytest.mark.long, needs_compiler]

TESTS = Path(__file__).parent
AS_REAL = {"KVCOLL_TEST_GPUS": "real"}
PYTEST = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "fake_cupy", "-m", "not long")


def files(*names: str) -> list[str]:
    return [str(TESTS / f"test_{name}.py") for name in names]


def passed(said: str) -> int:
    """Give how many tests have passed: those that skip show nothing."""
    found = re.search(r"(\d+) passed", said)
    return int(found[1]) if found else 0


@pytest.mark.limit(200)
def test_stores_of_one_process(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, *PYTEST, *files("gpu_store", "gpu_place", "gpu_torch", "gpu_bench")],
        env=clean_environment() | AS_REAL | fake_cupy.environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert passed(done.stdout) > 70


@needs("train", "scripts/train.py")
def test_the_readmes_command_trains_on_gpus(mpirun: Callable[..., Job], tmp_path: Path) -> None:
    own = fake_cupy.environment(tmp_path)
    script, losses = TESTS.parent / "scripts" / "train.py", []
    for store in ("dist_sync", "dist_device_sync"):
        told = tmp_path / f"{store}.json"
        options = ("--epochs", "3", "--target-accuracy", "0", "--json", told)
        job = mpirun(2, script, "--kv-store", store, *options, env=own)
        assert job.returncode == 0, job.stdout + job.stderr
        assert f"store     {store}, 2 ranks on 1 host" in job.stdout
        assert "replicas: 2 of 2 the same bits (blake2b " in job.stdout
        losses.append([epoch["loss"] for epoch in json.loads(told.read_text())["epochs"]])
    assert len(losses[0]) == 4
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_ranks_that_leave_stores_open_close_their_communicators(
    mpirun: Callable[..., Job], tmp_path: Path
) -> None:
    code = """
import atexit
opened = []
atexit.register(lambda: print([one.how for one in opened], len(world.opened)))  # after kvcoll's
import fake_cupy
world = fake_cupy.install()
import kvcoll, numpy as np
kv = kvcoll.create("dist_device_sync")
kv.init("w", np.zeros(100_000, np.float32))
kv.push("w", np.full(100_000, kv.rank + 1, np.float32))
opened += world.opened
print((kv.pull("w").get() == 3).all())
"""
    job = mpirun(2, "-c", code, env=fake_cupy.environment(tmp_path))
    assert job.returncode == 0, job
    assert job.stdout.splitlines() == ["True", "['destroyed'] 0"] * 2


@pytest.mark.limit(200)
def test_stores_over_ranks(mpirun: Callable[..., Job], tmp_path: Path) -> None:
    own = AS_REAL | fake_cupy.environment(tmp_path)
    suites = files("gpu_ranks", "gpu_hosts", "nccl_transport")
    job = mpirun(2, *PYTEST, *suites, env=own, timeout_s=180)
    assert (job.returncode, job.timed_out) == (0, False), job.stdout[-4000:] + job.stderr[-2000:]
    assert passed(job.stdout) > 60
