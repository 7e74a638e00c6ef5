"""The ranks that are alive after a loss, as a communicator of their own.

Rules of the file: every survivor takes part in every step, also one that ends and goes on no
further; a step that another loss interrupts is taken again by all, as they agree on it
(MPI_Comm_agree, which gives all survivors one answer whoever dies meanwhile).
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from ..errors import BrokenMPIError

if TYPE_CHECKING:
    from mpi4py import MPI

LIMIT_CODE: Final = 87
_FORCED_S: Final = 3.0  # what MPI_Abort has to end the job
_OK: Final = 1
_N_CHECKED: Final = 1000  # so many that a collective goes its usual way


def regroup(mpi: Any, comm: MPI.Intracomm, *, stays: bool) -> MPI.Intracomm | None:
    """Make a communicator of the survivors that go on; called by all survivors.

    Parameters
    ----------
    mpi : module
        ``mpi4py.MPI``.
    comm : mpi4py.MPI.Intracomm
        Revoked, so that no rank is in another call of it.
    stays : bool
        Whether this rank goes on.

    Returns
    -------
    mpi4py.MPI.Intracomm or None
        Of the ranks that stay, in their order; None on one that does not.

    Notes
    -----
    MPI_Comm_shrink, MPI_Comm_split.
    """
    while True:
        alive: Any = comm.Shrink()
        alive.Set_errhandler(mpi.ERRORS_RETURN)
        part, done = mpi.COMM_NULL, True
        try:
            part = alive.Split(0 if stays else mpi.UNDEFINED, alive.rank)
        except mpi.Exception:
            alive.Revoke()
            done = False
        if agree(mpi, alive, _OK if done else 0) == _OK:
            break
    if part == mpi.COMM_NULL:
        return None
    part.Set_errhandler(mpi.ERRORS_RETURN)
    made: MPI.Intracomm = part
    return made


def agree(mpi: Any, comm: MPI.Intracomm, bits: int) -> int | None:
    """Give the bits that all ranks gave; None if one has died. The same on all that are alive."""
    try:
        return int(comm.Agree(bits))
    except mpi.Exception:
        return None


def check_collectives(mpi: Any, comm: Any) -> None:
    """Raise unless collectives over these ranks give what they should; called by all.

    Parameters
    ----------
    mpi : module
        ``mpi4py.MPI``.
    comm : mpi4py.MPI.Intracomm

    Raises
    ------
    BrokenMPIError
        They do not, on this rank; others may see nothing of it.
    """
    size, rank = comm.size, comm.rank
    n = np.arange(_N_CHECKED, dtype=np.int64)
    total = n + rank
    comm.Allreduce(mpi.IN_PLACE, total)
    ranks = np.empty(size, np.int64)
    comm.Allgather(np.array([rank + 1]), ranks)
    told = n * (rank + 1)
    comm.Bcast(told, size - 1)
    sums_right = (total == size * n + size * (size - 1) // 2).all()
    if sums_right and (ranks == np.arange(1, size + 1)).all() and (told == n * size).all():
        return
    raise BrokenMPIError(
        "after a rank was lost, collective calls of this MPI give wrong results, as coll/han of "
        "Open MPI 5.0 does across hosts: start the job with OMPI_MCA_coll=^han (scripts/train.sh "
        "does), and go on from the last checkpoint"
    )


@contextmanager
def limited(comm: MPI.Intracomm, what: str, limit_s: float) -> Iterator[None]:
    """End the job if the with-block takes longer: a survivor does not come to it."""

    def end() -> None:
        where = f"rank {comm.rank} of {comm.size}"
        print(f"kvcoll: {where}: {what}: the job ends", file=sys.stderr, flush=True)
        forced = threading.Timer(_FORCED_S, os._exit, [LIMIT_CODE])
        forced.daemon = True
        forced.start()
        comm.Abort(LIMIT_CODE)

    timer = threading.Timer(limit_s, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
