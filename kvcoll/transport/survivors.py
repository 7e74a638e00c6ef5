"""The ranks that are alive after a loss, as a communicator of their own.

Rules of the file: every survivor takes part in every step, also one that ends and goes on no
further; a step that another loss interrupts is taken again by all, as they agree on it
(MPI_Comm_agree, which gives all survivors one answer whoever dies meanwhile).
"""

from __future__ import annotations

import os
import sys
import threading
import time
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, final

import numpy as np

from ..errors import BrokenMPIError
from .contract import Settling
from .losses import Losses

if TYPE_CHECKING:
    from mpi4py import MPI

LIMIT_CODE: Final = 87
_FORCED_S: Final = 3.0  # what MPI_Abort has to end the job
_OK: Final = 1
_THROUGH_S: Final = 3.0
_ENDED_S: Final = 1.0
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


@final
class Agreed(Settling):
    """Whether all ranks came through a call: the same for all that are left (MPI_Comm_iagree).

    Once the alarm has sounded it is waited for a while only: longer where this rank came
    through, as all others are near then; else some may never have come to the call. A rank
    that came through, and gives up, may be the only one that does: `recover` finds that.

    Parameters
    ----------
    mpi : module
        ``mpi4py.MPI``.
    comm : mpi4py.MPI.Intracomm
        For nothing else: a rank that has been told of a loss may be in other calls.
    losses : Losses
    came_through : bool
        Whether this rank did.
    """

    def __init__(self, mpi: Any, comm: Any, losses: Losses, came_through: bool) -> None:
        self._error, self._losses = mpi.Exception, losses
        self._limit_s = _THROUGH_S if came_through else _ENDED_S
        self._until_s: float | None = None
        self._all = array("i", [_OK if came_through else 0])
        self._is_known = True
        try:
            self._request = comm.Iagree(self._all)
        except self._error:
            self._request, self._is_known = None, False

    def done(self) -> bool:
        """Ask MPI."""
        try:
            if self._request is None or self._request.Test():
                return True
        except self._error:  # a rank has died, as all that are left learn
            self._is_known = False
            return True
        if self._losses.alarm.error is not None:
            now_s = time.monotonic()
            self._until_s = self._until_s or now_s + self._limit_s
            if now_s > self._until_s:
                self.give_up()
                self._is_known = False
                return True
        return False

    def check(self) -> None:
        """Raise what the alarm says, or is about to."""
        if not self._is_known or self._all[0] != _OK:
            self._losses.find_out()
            self._losses.alarm.check()

    def give_up(self) -> None:
        """Keep what MPI may still write to."""
        self._losses.hold(self._request, self._all)


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
