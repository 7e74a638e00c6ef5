"""Whether the program that started the job belongs to the MPI library it loaded.

A launcher of another MPI starts N processes, each of which believes to be alone:
N trainings on one part of the data each, with exit code 0. Launchers tell their
processes the size of the job in the environment; it is compared with what MPI says.
A process that no launcher has started is one rank, which may not be what was meant.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..errors import LaunchError

# Open MPI's mpirun; Hydra (MPICH, Intel MPI) and srun --mpi=pmi2; MVAPICH.
_SIZE_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
# A launcher's own word counts for more than SLURM's: an mpirun in a batch job starts
# its daemons by srun, whose number of tasks is the number of nodes.
_STEP_VARIABLE = "SLURM_STEP_NUM_TASKS"
_PMIX_VARIABLE = "PMIX_NAMESPACE"

_alone_was_said = False


def name_of_library(version: str) -> str:
    """Shorten what MPI_Get_library_version gave: ``Open MPI v5.0.11``, ``MPICH 5.0.2``."""
    first = next(iter(version.split(",")[0].splitlines()), "MPI")
    return " ".join(first.replace("Version:", "").split())


def check_launcher(world_size: int, library: str, environ: Mapping[str, str] = os.environ) -> None:
    """Raise if the launcher started more ranks than MPI knows of.

    Parameters
    ----------
    world_size : int
        The size of MPI.COMM_WORLD.
    library : str
        The name of the MPI library, for the message.
    environ : mapping of str to str, optional

    Raises
    ------
    LaunchError
        A launcher says that there are several ranks, MPI that there is one.
    """
    if world_size != 1:
        return
    told = [v for v in _SIZE_VARIABLES if environ.get(v, "").isdecimal()]
    told = told or [v for v in (_STEP_VARIABLE,) if environ.get(v, "").isdecimal()]
    for variable in told:
        if int(environ[variable]) > 1:
            raise LaunchError(
                f"the launcher started {environ[variable]} ranks ({variable}), but {library} "
                "sees one: the launcher belongs to another MPI. Use the mpirun of the "
                f"environment that holds this library, or under SLURM {_srun(library)}"
            )


def must_check_before_start(environ: Mapping[str, str] = os.environ) -> bool:
    """Say whether the launcher speaks PMIx alone, as ``srun --mpi=pmix`` does.

    An MPI library that does not know PMIx then ends the process as it starts.
    """
    return _PMIX_VARIABLE in environ and not any(v in environ for v in _SIZE_VARIABLES)


def check_before_start(version: str) -> None:
    """Raise if the library cannot start under a launcher that speaks PMIx alone.

    Parameters
    ----------
    version : str
        What MPI_Get_library_version gave; MPICH tells in it how it was configured.

    Raises
    ------
    LaunchError
        It is an MPICH that was built without PMIx.
    """
    if version.startswith("MPICH") and "pmix" not in version.lower():
        library = name_of_library(version)
        raise LaunchError(
            f"the launcher speaks PMIx ({_PMIX_VARIABLE}, as by srun --mpi=pmix), but {library} "
            "was built without it and cannot start. Use the mpirun of the environment that "
            f"holds this library, or under SLURM {_srun(library)}"
        )


def say_if_alone(
    world_size: int,
    library: str,
    environ: Mapping[str, str] = os.environ,
    argv: Sequence[str] | None = None,
) -> None:
    """Say on stderr, once, that a distributed store has one rank since no launcher was used.

    Parameters
    ----------
    world_size : int
        The size of MPI.COMM_WORLD.
    library : str
        The name of the MPI library, for the command to type.
    environ : mapping of str to str, optional
    argv : sequence of str, optional
        The command line, by default that of this process.
    """
    global _alone_was_said
    launched = any(v in environ for v in (*_SIZE_VARIABLES, _STEP_VARIABLE, _PMIX_VARIABLE))
    if world_size != 1 or launched or _alone_was_said:
        return
    _alone_was_said = True
    argv = sys.argv if argv is None else argv
    script = argv[0] if argv and argv[0].endswith(".py") else "SCRIPT.py"
    # In a SLURM job its own number of ranks is meant.
    start = _srun(library) if "SLURM_JOB_ID" in environ else f"{_own_mpirun()} -n 4"
    print(
        "kvcoll: this distributed store has one rank, because no launcher started the program. "
        f"For several: {start} python {script}",
        file=sys.stderr,
        flush=True,
    )


def _srun(library: str) -> str:
    return f"srun --mpi={'pmix' if library.startswith('Open MPI') else 'pmi2'}"


def _own_mpirun() -> str:
    """Name the mpirun that belongs to this Python; by its path if another one would be found."""
    own = Path(sys.executable).with_name("mpirun")
    return str(own) if own.exists() and shutil.which("mpirun") != str(own) else "mpirun"
