"""Making a store by its name, and leaving all stores when the process ends."""

from __future__ import annotations

import atexit
import os
import sys
from typing import Any

from . import farewell
from .agreement import AcrossRanks, Alone, Call
from .errors import ArgumentError
from .reduction import transport_for
from .schema import digest
from .store import KVStore
from .transport.alone import AloneTransport

_LOCAL = ("local", "local_update_cpu", "local_allreduce_cpu", "device", "local_allreduce_device")
_DISTRIBUTED = ("dist", "dist_sync")
_CREATE_LIMIT_S = 300.0

_open_stores: list[KVStore] = []


def create(
    name: str = "local",
    *,
    comm: Any = None,
    reproducible: bool = False,
    create_limit_s: float = _CREATE_LIMIT_S,
) -> KVStore:
    """Make a key-value store.

    Parameters
    ----------
    name : str, default 'local'
        Of any case. ``'local'``, ``'local_update_cpu'``, ``'local_allreduce_cpu'``,
        ``'device'``, ``'local_allreduce_device'``: one process, no MPI needed.
        ``'dist'``, ``'dist_sync'``: all ranks of `comm`, which all must call this.
    comm : mpi4py.MPI.Intracomm, optional
        Whose ranks share the store; it is duplicated. By default ``MPI.COMM_WORLD``.
    reproducible : bool, default False
        Take sums over ranks by a fixed binary tree on the ranks, so that they are the
        same bits whatever the placement of ranks on hosts.
    create_limit_s : float, default 300
        How many seconds to wait for the other ranks to create theirs.

    Returns
    -------
    KVStore

    Raises
    ------
    ArgumentError
        The name is not known, or `comm` is no communicator for this.
    MissingDependencyError
        A distributed store, and mpi4py or an MPI library is not installed.
    LaunchError
        The job was started by the launcher of another MPI.
    RanksDisagreeError
        The ranks create different stores, or not all of them come in time.

    Notes
    -----
    A distributed store costs two communicators and an MPI_Comm_split_type.
    """
    if not isinstance(name, str):
        raise TypeError(f"the type of a store is a str, got {type(name).__name__}")
    kind = name.lower()
    if kind not in _LOCAL + _DISTRIBUTED:
        known = ", ".join(_LOCAL + _DISTRIBUTED)
        raise ArgumentError(f"unknown type of store {name!r}: known are {known}")
    if kind in _DISTRIBUTED:
        return _distributed(kind, comm, reproducible, create_limit_s)
    if comm is not None:
        raise ArgumentError(f"a {kind!r} store is one process: comm goes with 'dist_sync'")
    return KVStore(kind, AloneTransport(), Alone(), one_thread=False)


def _distributed(kind: str, comm: Any, reproducible: bool, limit_s: float) -> KVStore:
    from .transport import mpi

    own = mpi.duplicate(mpi.default_communicator() if comm is None else comm, limit_s)
    topology = mpi.topology_of(own)
    agreement = AcrossRanks(mpi.MpiMessenger(own, topology))
    options = f"create('dist_sync', reproducible={reproducible})"
    agreement.confirm(Call(options, digest(options)))
    transport = transport_for(own, topology, tree=reproducible)
    store = KVStore(kind, transport, agreement, one_thread=True)
    _open_stores[:] = [other for other in _open_stores if not other.closed]
    _open_stores.append(store)
    return store


@atexit.register
def _leave_all() -> None:
    """Leave the stores that are open, all at once, so that no rank waits for this one."""
    error = vars(sys).get("last_value")  # what ended the program, if an exception did
    why = "" if error is None else f"{type(error).__name__}: {error}"
    farewell.finish([store.leaving(why) for store in _open_stores if not store.closed])


def _forget_all() -> None:
    _open_stores.clear()
    farewell.forget()


# A child made by fork must not speak for its parent.
os.register_at_fork(after_in_child=_forget_all)
