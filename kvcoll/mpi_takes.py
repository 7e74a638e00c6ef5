"""Whether MPI takes memory of a GPU: asked first, then tried, in a process that may die of it.

An MPI that says no is not tried, one that has no answer is; what is tried is a message of a rank
to itself. Rules of the file: nothing here raises for what MPI cannot do, nor ends or holds up this
process: whatever goes wrong is a reason to stage. CuPy and a GPU are touched in the child only.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from . import apart
from .errors import ArgumentError
from .gpu.door import import_cupy
from .transport.mpi import import_mpi

#: How what crosses between hosts comes to MPI.
VARIABLE = "KVCOLL_GPU_MPI"
AUTO, STAGED, DIRECT = "auto", "staged", "direct"

_LIMIT_S = 60.0  # CuPy's first import on a network file system is slow
_QUERY = "MPIX_Query_cuda_support"  # of Open MPI, MPICH, and what is made of them
_SIZES = (1 << 10, 4 << 20)  # bytes of a message: sent at once, and announced first

_Complete: TypeAlias = Callable[[list[Any]], object]  # waits for requests


class Way(NamedTuple):
    """How what crosses between hosts comes to MPI, on all ranks alike.

    Attributes
    ----------
    direct : bool
        MPI gets addresses of GPUs' memory.
    contradicted : str
        Where MPI says that it takes them, and was seen not to: the host, and how.
    """

    direct: bool
    contradicted: str = ""


def wanted(environ: Mapping[str, str]) -> str:
    """Say what the environment asks for: `AUTO`, `STAGED` or `DIRECT`.

    Raises
    ------
    ArgumentError
        ``KVCOLL_GPU_MPI`` is none of them.
    """
    said = environ.get(VARIABLE, "").strip().lower() or AUTO
    if said not in (AUTO, STAGED, DIRECT):
        raise ArgumentError(f"{VARIABLE} is {AUTO}, {STAGED} or {DIRECT}, got {said!r}")
    return said


@cache
def why_not(device: int) -> str:
    """Say why MPI must not get addresses of a GPU's memory; ``''`` where it was seen to take them.

    It is found out once a process.

    Parameters
    ----------
    device : int
        The number of the GPU in this process, with whose memory it is tried.
    """
    if says() is False:
        mpi = import_mpi()
        vendor, version = mpi.get_vendor()
        return f"{vendor} {'.'.join(map(str, version))} says that it does not"
    return tried(device)


def says() -> bool | None:
    """Say what MPI says of itself; None where it has no answer."""
    return _says(import_mpi().__file__)


def tried(device: int = 0) -> str:
    """Hand MPI memory of a GPU in a process of one rank; say what went wrong, or ``''``."""
    try:
        answer, why = apart.ask(
            "kvcoll.mpi_takes", str(device), limit_s=_LIMIT_S, env=apart.without_launcher()
        )
    except OSError as error:  # no memory for a process, say
        return f"it could not be tried: {error}"
    return str(answer.get("why_not", why)) if answer else why or "it gave no answer"


def main(device: str) -> None:
    """Send from this rank to itself, from and to memory of a GPU; print what is wrong with it.

    No other host takes part: the way over a network is not seen. As in a rank, a second thread
    calls MPI, which the watchdog does, and may move on what the first one has begun.
    """
    apart.die_with_parent()
    cupy = import_cupy()
    use = cupy.cuda.Device(int(device)).use
    use()
    mpi = import_mpi()
    ways: list[_Complete] = [partial(_complete, mpi)]
    with ThreadPoolExecutor(1, initializer=use) as beside:
        if mpi.Query_thread() == mpi.THREAD_MULTIPLE:
            ways.append(lambda requests: beside.submit(ways[0], requests).result())
        failed = [n for n in _SIZES for way in ways if not _comes_through(mpi, cupy, n, way)]
    why = f"of {failed[0]} bytes others came than were sent" if failed else ""
    print(f"\n{json.dumps({'why_not': why})}", flush=True)


def _says(extension: str) -> bool | None:
    """Ask the MPI library that mpi4py has loaded; None where it has no answer."""
    try:
        return bool(ctypes.CDLL(extension)[_QUERY]())
    except (OSError, AttributeError):
        return None


def _comes_through(mpi: Any, cupy: Any, n_bytes: int, complete: _Complete) -> bool:
    numbers = np.arange(n_bytes // 4, dtype=np.float32)
    sent, received = cupy.asarray(numbers), cupy.zeros(numbers.size, dtype=np.float32)
    cupy.cuda.get_current_stream().synchronize()
    source, out = (mpi.buffer.fromaddress(a.data.ptr, n_bytes) for a in (sent, received))
    complete(
        [
            mpi.COMM_SELF.Irecv([out, mpi.BYTE], 0, 0),
            mpi.COMM_SELF.Isend([source, mpi.BYTE], 0, 0),
        ]
    )
    return bool((received.get() == numbers).all())


def _complete(mpi: Any, requests: list[Any]) -> None:
    """Move messages on by the calls that a sum makes, and a look for other messages."""
    while not mpi.Request.Testall(requests):
        mpi.COMM_SELF.Iprobe()
