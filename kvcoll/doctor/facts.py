"""What one rank knows of itself before MPI is started; plain data that travels as JSON.

Rules of the file: a peer may run another version of kvcoll, so fields that are not known
are left out and those that lack have their defaults.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

# Of each launcher: its name, and what tells a process its rank, the job's size, its local rank.
LAUNCHERS = (
    (
        "Open MPI's mpirun",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
    ),
    ("Hydra's mpirun", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
    (
        "MVAPICH's mpirun",
        "MV2_COMM_WORLD_RANK",
        "MV2_COMM_WORLD_SIZE",
        "MV2_COMM_WORLD_LOCAL_RANK",
    ),
    ("srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
)


@dataclass(frozen=True)
class Place:
    """Where a launcher has put this process.

    Attributes
    ----------
    launcher : str
        ``''`` if none has started it.
    rank, size : int
        By the launcher's word.
    local_rank : int
        0 where the launcher does not say.
    """

    launcher: str = ""
    rank: int = 0
    size: int = 1
    local_rank: int = 0


def place_in(environ: Mapping[str, str] = os.environ) -> Place:
    """Read from the environment which rank of which job this process is."""
    for name, rank, size, local_rank in LAUNCHERS:
        if environ.get(rank, "").isdecimal() and environ.get(size, "").isdecimal():
            # srun --mpi=pmi2 speaks as Hydra does.
            by_srun = "SLURM_STEP_NUM_TASKS" in environ and "HYDI_CONTROL_FD" not in environ
            name = "srun" if by_srun and rank == "PMI_RANK" else name
            own = environ.get(local_rank, environ.get("SLURM_LOCALID", "0") if by_srun else "0")
            local = int(own) if own.isdecimal() else 0
            return Place(name, int(environ[rank]), int(environ[size]), local)
    return Place()


@dataclass(frozen=True)
class Facts:
    """What one rank knows of itself.

    Attributes
    ----------
    rank, size, local_rank, launcher : int, int, int, str
        As in `Place`.
    host, boot, machine, system : str
        The host's name; what tells this run of its kernel from all others; kind of CPU; kernel.
    executable, folder, source : str
        Of Python; of kvcoll; a digest of kvcoll's files.
    environ : dict
        The variables that matter.
    versions : dict
        Of each library its version, ``''`` where it is not installed.
    mpi_packages : list of str
        The MPI libraries that pip has installed in this environment.
    mpirun : dict
        ``path`` and ``version`` of the mpirun that would be found; ``beside``, that of this Python.
    cores : list of int
        Those that this process may use.
    n_cores : int
        How many the host has.
    core_quota : float or None
        How many the control group allows at a time.
    memory_bytes : int
        What is available.
    limits : dict
        Soft limits by the names of `ulimit`; None where there is none.
    shm_free_bytes : int or None
        Of /dev/shm; None where there is none.
    memfd : str
        Why no memory can be shared, as far as one process can see; ``''`` if it can.
    addresses : dict
        Of each network interface that is up its IPv4 address.
    port, token : int, str
        Where this rank can be reached, and what it says there; 0 if it does not listen.
    fabrics : list of str
        Network devices that pin memory.
    gpus : dict
        See `gpus.facts`.
    library, libmpi : str
        The MPI library that mpi4py loads, and its file.
    trial : str
        Why MPI cannot be started even by one process alone; ``''`` if it can, or was not tried.
    failure : str
        What has ended this rank's part in the job.
    mpi_rank, mpi_size, threads : int, int, str
        What MPI says once it is started.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    launcher: str = ""
    host: str = ""
    boot: str = ""
    machine: str = ""
    system: str = ""
    executable: str = ""
    folder: str = ""
    source: str = ""
    environ: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    mpi_packages: list[str] = field(default_factory=list)
    mpirun: dict[str, str] = field(default_factory=dict)
    cores: list[int] = field(default_factory=list)
    n_cores: int = 1
    core_quota: float | None = None
    memory_bytes: int = 0
    limits: dict[str, int | None] = field(default_factory=dict)
    shm_free_bytes: int | None = None
    memfd: str = ""
    addresses: dict[str, str] = field(default_factory=dict)
    port: int = 0
    token: str = ""
    fabrics: list[str] = field(default_factory=list)
    gpus: dict[str, Any] = field(default_factory=dict)
    library: str = ""
    libmpi: str = ""
    trial: str = ""
    failure: str = ""
    mpi_rank: int = -1
    mpi_size: int = 0
    threads: str = ""

    def to_json(self) -> str:
        """Write it on one line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> Facts:
        """Read what another rank wrote."""
        known = {one.name for one in fields(cls)}
        told = json.loads(text)
        return cls(**{name: value for name, value in told.items() if name in known})
