"""Making a store by its name, and leaving all stores when the process ends."""

from __future__ import annotations

import atexit
import os
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from . import farewell
from .agreement import AcrossRanks, Alone, Call
from .errors import ArgumentError, text_of
from .reduction import transport_for
from .schema import digest
from .store import KVStore
from .topology import Topology
from .transport.alone import AloneTransport

if TYPE_CHECKING:
    from mpi4py import MPI

_LOCAL = ("local", "local_update_cpu", "local_allreduce_cpu", "device", "local_allreduce_device")
_DISTRIBUTED = ("dist", "dist_sync")
_CREATE_LIMIT_S = 300.0


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
    A distributed store costs an agreement and two or three communicators.
    """
    if not isinstance(name, str):
        raise TypeError(f"the type of a store is a str, got {type(name).__name__}")
    kind = name.lower()
    if kind not in _LOCAL + _DISTRIBUTED:
        known = ", ".join(_LOCAL + _DISTRIBUTED)
        raise ArgumentError(f"unknown type of store {name!r}: known are {known}")
    if not isinstance(reproducible, (bool, np.bool_)):
        raise TypeError(f"reproducible is a bool, got {reproducible!r}")
    if not isinstance(create_limit_s, (int, float)) or not create_limit_s > 0:
        raise ArgumentError(
            f"create_limit_s is a number of seconds above 0, got {create_limit_s!r}"
        )
    if kind in _DISTRIBUTED:
        return _distributed(kind, comm, reproducible, create_limit_s)
    if comm is not None:
        raise ArgumentError(f"a {kind!r} store is one process: comm goes with 'dist_sync'")
    return KVStore(kind, AloneTransport(), Alone(), one_thread=False)


@dataclass(frozen=True)
class _Link:
    """What the stores of one communicator share."""

    comm: MPI.Intracomm
    topology: Topology
    ranks: AcrossRanks


_world: list[_Link] = []  # that of COMM_WORLD, once it is there
_open_stores: list[tuple[AcrossRanks, KVStore]] = []


def _distributed(kind: str, comm: Any, reproducible: bool, limit_s: float) -> KVStore:
    from .transport import mpi

    world = mpi.default_communicator() if comm is None or mpi.is_world(comm) else None
    link = _new_link(comm, limit_s) if world is None else _world_link(world, limit_s)
    options = f"create('dist_sync', reproducible={bool(reproducible)})"
    link.ranks.confirm(Call(options, digest(options)))
    own = link.comm if world is None else mpi.duplicate(link.comm, limit_s)
    transport = transport_for(own, link.topology, tree=bool(reproducible))
    store = KVStore(kind, transport, link.ranks.of_store(), one_thread=True)
    _open_stores[:] = [(ranks, other) for ranks, other in _open_stores if not other.closed]
    _open_stores.append((link.ranks, store))
    return store


def _new_link(comm: Any, limit_s: float) -> _Link:
    from .transport import mpi

    own = mpi.duplicate(comm, limit_s)
    topology = mpi.topology_of(own)
    return _Link(own, topology, AcrossRanks(mpi.MpiMessenger(own, topology)))


def _world_link(world: MPI.Intracomm, limit_s: float) -> _Link:
    if _world and _world[0].ranks.ended and not _world[0].ranks.is_final:
        _world.clear()  # a rank has left its stores, but may make new ones with the others
    if not _world:
        _world.append(_new_link(world, limit_s))
    return _world[0]


@atexit.register
def _leave_all() -> None:
    """Leave the stores that are open, all at once, so that no rank waits for this one."""
    error = vars(sys).get("last_value")  # what ended the program, if an exception did
    why = "" if error is None else f"{type(error).__name__}: {text_of(error)}"
    # By identity, once each: a dict keeps their order.
    still_open = {id(ranks): ranks for ranks, store in _open_stores if not store.closed}
    farewell.finish([ranks.leave(why) for ranks in still_open.values()])


def _forget_all() -> None:
    _world.clear()
    _open_stores.clear()
    farewell.forget()


# A child made by fork must not speak for its parent.
os.register_at_fork(after_in_child=_forget_all)
