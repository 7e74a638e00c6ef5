"""A real SLURM on pretend hosts for a test; slurm.sh does the work."""

from __future__ import annotations

import re
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final, NamedTuple, final

from mpi_job import Job, clean_environment

from .hosts import (
    CHECKOUT,
    OF_CROWDED_CORES,
    PATH,
    Hosts,
    environment_of,
    missing,
    run,
    skip_or_fail,
)

SCRIPT: Final = CHECKOUT / "tests/cluster/slurm.sh"
TOOLS: Final = ("munged", "slurmctld", "slurmd", "srun", "sbatch", "squeue", "scontrol")
PACKAGES: Final = "apt-get install slurm-wlm munge libpmix-dev"
LOOKS_EVERY_S: Final = 0.2


class Ended(NamedTuple):
    """What became of a batch job.

    Attributes
    ----------
    states : list of str
        As SLURM has it, with the exit code, of each job of an array: ``COMPLETED 0:0``.
    outputs : list of str
        What each of them printed, on both streams.
    """

    states: list[str]
    outputs: list[str]


class Submitted(NamedTuple):
    """A batch job: its number, and the folder of what it prints."""

    number: str
    outputs: Path

    def texts(self) -> list[str]:
        """Return what each job of it has printed so far."""
        return [path.read_text() for path in sorted(self.outputs.iterdir())]

    def wait_for(self, words: str, timeout_s: float) -> bool:
        """Wait until its output has these words; say whether it has."""
        end_s = time.monotonic() + timeout_s
        while not any(words in text for text in self.texts()):
            if time.monotonic() > end_s:
                return False
            time.sleep(LOOKS_EVERY_S)
        return True


@final
class Slurm:
    """Nodes kv1, kv2 and so on; jobs are submitted on kv1, by default in the checkout's folder."""

    def __init__(self, hosts: Hosts) -> None:
        self.hosts = hosts

    def on_kv1(
        self,
        *command: str | Path,
        timeout_s: float = 40.0,
        env: dict[str, str] | None = None,
        folder: Path = CHECKOUT,
    ) -> Job:
        """Run a command such as srun; the Python of this process comes first on PATH."""
        told = clean_environment() | environment_of(self.hosts.folder) | OF_CROWDED_CORES
        told |= {"PATH": f"{Path(sys.executable).parent}:{PATH}", "PYTHONPATH": str(CHECKOUT)}
        told["KVCOLL_CHECKPOINTS"] = str(self.hosts.folder / "checkpoints")
        words = [str(SCRIPT), "on", "kv1", "env", f"--chdir={folder}", *map(str, command)]
        return run(words, env=told | (env or {}), timeout_s=timeout_s)

    def submit(
        self, *arguments: str | Path, env: dict[str, str] | None = None, folder: Path = CHECKOUT
    ) -> Submitted:
        """Submit a job to sbatch, and return at once."""
        outputs = Path(tempfile.mkdtemp(dir=self.hosts.folder))
        command = ("sbatch", "--parsable", f"--output={outputs}/%j.out", *arguments)
        submitted = self.on_kv1(*command, env=env, folder=folder)
        assert submitted.returncode == 0, submitted
        return Submitted(submitted.stdout.strip(), outputs)

    def ended(self, job: Submitted, timeout_s: float = 60.0) -> Ended:
        """Wait for the end of a job; one that is late is cancelled."""
        end_s = time.monotonic() + timeout_s
        while self.on_kv1("squeue", "--noheader", "--jobs", job.number).stdout.strip():
            if time.monotonic() > end_s:
                self.on_kv1("scancel", job.number)
                end_s += 10
            time.sleep(LOOKS_EVERY_S)
        shown = self.on_kv1("scontrol", "--oneliner", "show", "job", job.number).stdout
        states = re.findall(r"JobState=(\S+).* ExitCode=(\S+)", shown)
        return Ended([" ".join(state) for state in states], job.texts())

    def sbatch(
        self,
        *arguments: str | Path,
        timeout_s: float = 60.0,
        env: dict[str, str] | None = None,
        folder: Path = CHECKOUT,
    ) -> Ended:
        """Submit a job, and wait for its end; one that is late is cancelled."""
        return self.ended(self.submit(*arguments, env=env, folder=folder), timeout_s)


@contextmanager
def slurm_on(hosts: Hosts, *, gpus: int) -> Iterator[Slurm]:
    """Start SLURM on all hosts; it ends with them. Its nodes claim to have GPUs."""
    if missing(TOOLS):
        skip_or_fail(f"SLURM needs {', '.join(missing(TOOLS))}: {PACKAGES}")
    env = clean_environment() | environment_of(hosts.folder) | {"KVCOLL_CLUSTER_GPUS": str(gpus)}
    started = run([str(SCRIPT), "up"], env=env, timeout_s=40.0)
    assert started.returncode == 0, started.stderr + _logs(hosts.folder)
    yield Slurm(hosts)


def _logs(folder: Path) -> str:
    logs: Sequence[Path] = sorted((folder / "slurm/log").glob("*"))
    return "".join(f"\n{log.name}:\n{log.read_text()[-1000:]}" for log in logs)
