"""Whether the program that started the job belongs to the MPI library it loaded.

A launcher of another MPI starts N processes, each of which believes to be alone:
N trainings on one part of the data each, with exit code 0. Launchers tell their
processes the size of the job in the environment; it is compared with what MPI says.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from ..errors import LaunchError

# Open MPI's mpirun; Hydra (MPICH, Intel MPI) and srun --mpi=pmi2; MVAPICH.
_SIZE_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")


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
    # A launcher's own word counts for more than SLURM's: an mpirun in a batch job starts
    # its daemons by srun, whose number of tasks is the number of nodes.
    told = told or [v for v in ("SLURM_STEP_NUM_TASKS",) if environ.get(v, "").isdecimal()]
    for variable in told:
        if int(environ[variable]) > 1:
            raise LaunchError(
                f"the launcher started {environ[variable]} ranks ({variable}), but {library} "
                "sees one: the launcher belongs to another MPI. Use the mpirun of the "
                "environment that holds this library, or under SLURM srun --mpi=pmix for "
                "Open MPI and srun --mpi=pmi2 for MPICH"
            )
