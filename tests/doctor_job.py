"""Runs the doctor in a job in which something was broken before, and reads what it found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Final, NamedTuple

from mpi_job import Job, clean_environment, own_mpirun, run_job

CHECKOUT: Final = Path(__file__).parents[1]
BREAK_THEN_RUN: Final = """
import os, sys
rank = int(os.environ.get("OMPI_COMM_WORLD_RANK", os.environ.get("PMI_RANK", "0")))
doctor = [sys.executable, "-m", "kvcoll", "doctor", {options}]
os.chdir({folder!r})  # else `python -m` finds the kvcoll of the checkout before all others
{broken}
os.execv(doctor[0], doctor)
"""


class Examined(NamedTuple):
    """What became of an examination; `told` is the JSON that rank 0 printed."""

    job: Job
    told: dict[str, Any]

    def found(self, about: str) -> dict[str, Any]:
        """Return the one finding about something."""
        those = [one for one in self.told["findings"] if one["about"] == about]
        assert len(those) == 1, (about, self.told["findings"])
        one: dict[str, Any] = those[0]
        return one

    def levels(self) -> dict[str, str]:
        """Return the worst level that each thing has."""
        order = ["ok", "note", "problem"]
        worst: dict[str, str] = {}
        for one in self.told["findings"]:
            level = max(one["level"], worst.get(one["about"], "ok"), key=order.index)
            worst[one["about"]] = level
        return worst


def examine(
    ranks: int, *options: str, folder: Path, broken: str = "", env: dict[str, str] | None = None
) -> Examined:
    """Run `kvcoll doctor --json` by mpirun; `broken` is Python that knows `rank` and `doctor`."""
    told = ", ".join(map(repr, ("--json", *options)))
    env = {"PYTHONPATH": str(CHECKOUT), "XDG_CACHE_HOME": str(folder / "cache")} | (env or {})
    code = BREAK_THEN_RUN.format(options=told, folder=str(folder), broken=broken)
    job = run_job(ranks, "-c", code, timeout_s=50, env=env)
    return read(job)


def examine_alone(*options: str, folder: Path, env: dict[str, str] | None = None) -> Examined:
    """Run `kvcoll doctor --json` without a launcher."""
    job = kvcoll("doctor", "--json", *options, folder=folder, env=env)
    return read(job)


def kvcoll(*words: str, folder: Path, env: dict[str, str] | None = None) -> Job:
    """Run a command of kvcoll without a launcher, in an environment of no SLURM."""
    clean = {n: v for n, v in clean_environment().items() if not n.startswith("SLURM_")}
    clean |= {"PYTHONPATH": str(CHECKOUT), "XDG_CACHE_HOME": str(folder / "cache")}
    # The mpirun that belongs to the library, before another one that may be installed.
    clean["PATH"] = f"{Path(own_mpirun()).parent}{os.pathsep}{clean['PATH']}"
    ended = subprocess.run(
        [sys.executable, "-m", "kvcoll", *words],
        cwd=folder,
        env=clean | (env or {}),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    return Job(ended.returncode, ended.stdout, ended.stderr, timed_out=False)


def read(job: Job) -> Examined:
    """Read what rank 0 printed."""
    assert not job.timed_out, job
    start = job.stdout.find("{\n")
    assert start >= 0, job
    return Examined(job, json.JSONDecoder().raw_decode(job.stdout[start:])[0])


def may_unshare() -> bool:
    """Say whether namespaces can be made here."""
    command = ["unshare", "--mount", "--uts", "--pid", "--fork", "true"]
    return os.geteuid() == 0 and subprocess.run(command, capture_output=True).returncode == 0
