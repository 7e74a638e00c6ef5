"""What a process can find out about its GPUs; all of it works without one.

Rules of the file: the driver, CuPy and an MPI that is handed GPU memory are touched in
other processes only, since each of them may crash or hang.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .. import apart, mpi_takes

_LIMIT_S = 60.0  # CuPy's first import on a network file system is slow
_NO_GPU = "there is no GPU"


def facts(*, has_cupy: bool, try_mpi: bool) -> dict[str, Any]:
    """Ask the driver, CuPy and, if all is there, the MPI library.

    Parameters
    ----------
    has_cupy : bool
        Whether it is installed.
    try_mpi : bool
        Whether to try if MPI takes GPU memory.

    Returns
    -------
    dict
        ``nodes``: the device files there are. ``driver``: a version, as ``12.4``; ``error``: why
        the driver does not answer. ``devices``: of each GPU that is visible ``uuid``, ``name``, and
        ``peers``, the others whose memory it reads. ``cupy``, ``nccl``: what CuPy says of itself;
        ``cupy_error``: why it does not work. ``mpi_takes``: ``'yes'``, or why not.
    """
    found: dict[str, Any] = {"nodes": sorted(map(str, Path("/dev").glob("nvidia[0-9]*")))}
    answer, why = apart.ask("kvcoll.doctor.gpu_probe", "driver", limit_s=_LIMIT_S)
    found |= answer or {"error": why}
    if has_cupy:
        answer, why = apart.ask("kvcoll.doctor.gpu_probe", "cupy", limit_s=_LIMIT_S)
        found |= answer or {"cupy_error": why}
    found["mpi_takes"] = _mpi_takes(found, has_cupy=has_cupy) if try_mpi else "not tried"
    return found


def _mpi_takes(found: dict[str, Any], *, has_cupy: bool) -> str:
    """Hand MPI an array in GPU memory, in a process of one rank."""
    if not found.get("devices"):
        return f"not tried: {_NO_GPU}"
    if not has_cupy or found.get("cupy_error"):
        return "not tried: CuPy is needed for it"
    return mpi_takes.tried() or "yes"
