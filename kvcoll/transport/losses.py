"""Which ranks have died, as MPI tells it, and what its errors mean then.

Rules of the file: an error of MPI reaches nobody as it is once the alarm has sounded; who learns
first of a loss sounds the alarm and revokes the communicators (MPI_Comm_revoke), so that the
ranks that are alive come out of calls in which they wait for one another. MPI goes on after a
loss only with ULFM, which is part of Open MPI 5 and on under ``mpirun --with-ft ulfm``.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Mapping, MutableMapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, final

from ..errors import RankLostError, WaitEndedError
from .alarm import Alarm

if TYPE_CHECKING:
    from mpi4py import MPI

_UNTIL_NAMED_S: Final = 1.0  # in which a rank whose call was revoked hears who is lost, and why
_NAP_S: Final = 1e-3
# What ``mpirun --with-ft ulfm`` of Open MPI 5 sets for its ranks.
_SWITCH: Final = "OMPI_MCA_mpi_ft_enable"
_COLLECTIVES: Final = "OMPI_MCA_coll"
_ABORT_DELAY: Final = "OMPI_MCA_opal_abort_delay"
_RANKS: Final = ("OMPI_COMM_WORLD_LOCAL_SIZE", "OMPI_COMM_WORLD_SIZE")  # Open MPI's launchers set
_ON: Final = ("1", "true", "yes", "t", "y", "enabled")


def survives_losses(mpi: Any, environ: Mapping[str, str] = os.environ) -> bool:
    """Say whether the job goes on when a rank has died: ULFM is there, and was asked for.

    Parameters
    ----------
    mpi : module
        ``mpi4py.MPI``.
    environ : mapping of str to str, optional
    """
    vendor, version = mpi.get_vendor()
    return vendor == "Open MPI" and version >= (5,) and _is_asked_for(environ)


def _is_asked_for(environ: Mapping[str, str]) -> bool:
    """Say whether the launcher was told that losses are to be survived."""
    return environ.get(_SWITCH, "").strip().lower() in _ON


def leave_out_han(environ: MutableMapping[str, str] = os.environ) -> None:
    """Have MPI start without coll/han, where a loss is to be survived; before MPI is loaded.

    In Open MPI 5.0 its collective calls across hosts succeed with wrong results when a rank dies.
    """
    if _is_asked_for(environ):
        environ.setdefault(_COLLECTIVES, "^han")


def let_launchers_name_losses(environ: MutableMapping[str, str] = os.environ) -> None:
    """Have a rank on several hosts wait for a second before MPI aborts it; before MPI is loaded.

    Where losses are not survived Open MPI aborts ranks as soon as a connection breaks. If
    its launcher hears of that before it hears of the rank that was killed, it names the wrong one,
    and now and then (version 5.0.11) it does not end.
    """
    here, all_ranks = (environ.get(name, "") for name in _RANKS)
    if here != all_ranks and not _is_asked_for(environ):
        environ.setdefault(_ABORT_DELAY, "1")


def uses_han(environ: Mapping[str, str] = os.environ) -> bool:
    """Say whether MPI was started with coll/han."""
    said = environ.get(_COLLECTIVES, "^")
    named = "han" in said.strip().removeprefix("^").split(",")
    return not named if said.strip().startswith("^") else named


@final
class Losses:
    """The ranks of one communicator that have died.

    A with-block around calls of MPI, and `meaning`, turn its errors into what the alarm says.

    Parameters
    ----------
    mpi : module
        ``mpi4py.MPI``.
    comm : mpi4py.MPI.Intracomm
        By its ranks the lost ones are named.
    alarm : Alarm
    """

    def __init__(self, mpi: Any, comm: MPI.Intracomm, alarm: Alarm) -> None:
        self.alarm = alarm
        #: Whether the other ranks go on when one has died.
        self.survives = comm.size > 1 and survives_losses(mpi)
        self._mpi, self._comm = mpi, comm
        self._error = mpi.Exception
        if self.survives:
            self.watch(comm)
            alarm.look_by(self.look)

    def watch(self, comm: MPI.Comm) -> None:
        """Have another communicator revoked when the alarm sounds."""
        if self.survives:
            self.alarm.on_sound(lambda: self._revoke(comm))

    def look(self) -> None:
        """Sound the alarm if a rank has died, or another rank has heard of it.

        Cost: a microsecond or two. MPI learns of it by the way, in whatever call it makes.
        """
        self._mpi.COMM_SELF.Iprobe()
        lost = self.ranks()
        if lost:
            self.alarm.sound(RankLostError(_who(lost, self._comm.size), lost))
        elif self._comm.Is_revoked():
            self._sound_revoked()

    def ranks(self) -> tuple[int, ...]:
        """Give the ranks that are known to have died, ascending (MPI_Comm_get_failed)."""
        failed = self._comm.Get_failed()
        try:
            if not failed.size:
                return ()
            group = self._comm.Get_group()
            translated = self._mpi.Group.Translate_ranks(failed, None, group)
            group.Free()
            return tuple(sorted(int(rank) for rank in translated))
        finally:
            failed.Free()

    def meaning(self, error: Exception) -> Exception:
        """Say what an error of MPI means: that of the alarm, if a rank has died; else itself."""
        if not self.survives:
            return error
        if self.alarm.error is None:
            self.look()
        if self.alarm.error is None and self._is_of_loss(error):
            self._sound_revoked()
        try:
            self.alarm.check()
        except WaitEndedError as ended:
            return ended
        return error

    def find_out(self) -> None:
        """Sound the alarm, as another rank has: with what this one hears within a second."""
        if self.alarm.error is None:
            self.look()
        if self.alarm.error is None:
            self._sound_revoked()

    def hold(self, *things: object) -> None:
        """Keep requests that were not completed, and their memory: MPI may still write to it.

        For ever: MPI_Finalize, which may still push them on, comes after Python's own end.
        """
        for thing in things:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))

    def __enter__(self) -> None:
        """Begin a block of calls of MPI."""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Raise what an error of MPI in the block means."""
        if isinstance(error, self._error):
            told = self.meaning(error)
            if told is not error:
                raise told from error

    def _is_of_loss(self, error: Any) -> bool:
        mpi = self._mpi
        kinds = (mpi.ERR_PROC_FAILED, mpi.ERR_PROC_FAILED_PENDING, mpi.ERR_REVOKED)
        return error.Get_error_class() in kinds

    def _sound_revoked(self) -> None:
        """Another rank knows more: wait until this one does, too, but not for long."""
        end_s = time.monotonic() + _UNTIL_NAMED_S
        lost = self.ranks()
        while not lost and self.alarm.error is None and time.monotonic() < end_s:
            time.sleep(_NAP_S)
            self._mpi.COMM_SELF.Iprobe()
            lost = self.ranks()
        if lost:
            self.alarm.sound(RankLostError(_who(lost, self._comm.size), lost))
        else:
            self.alarm.sound(
                WaitEndedError("another rank has ended all calls of these stores, and not said why")
            )

    def _revoke(self, comm: MPI.Comm) -> None:
        if comm != self._mpi.COMM_NULL:  # which it is once it has been freed
            comm.Revoke()


def _who(ranks: tuple[int, ...], size: int) -> str:
    one = len(ranks) == 1
    shown = ", ".join(map(str, ranks))
    return (
        f"{'rank' if one else 'ranks'} {shown} of {size} {'was' if one else 'were'} lost (killed, "
        "out of memory, or the host went down): go on without by kv.recover(), or from a checkpoint"
    )
