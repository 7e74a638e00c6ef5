"""Making a store by its name, and leaving all stores when the process ends."""

from __future__ import annotations

import atexit
import os
import platform
import sys
import time
import warnings
from typing import Any

from .agreement import AcrossRanks, Alone, Call
from .errors import ArgumentError
from .schema import digest
from .store import KVStore
from .topology import Topology
from .transport.alone import AloneTransport
from .transport.contract import Transport
from .transport.host import HostTransport
from .transport.memory import SharedMemory

_LOCAL = ("local", "local_update_cpu", "local_allreduce_cpu", "device", "local_allreduce_device")
_DISTRIBUTED = ("dist", "dist_sync")
_CREATE_LIMIT_S = 300.0
# Within a host a piece of the sum stays in cache; a wire wants longer ones.
_PIECE_BYTES, _WIRE_PIECE_BYTES = 1 << 20, 8 << 20
# Where a core's writes are seen by others in their order, as HostTransport needs it.
_ORDERED_MACHINES = ("x86_64", "AMD64")
_NO_SHARED_MEMORY = (
    "the ranks of this host cannot share memory (memfd_create, or /proc/<pid>/fd of another "
    "rank, is not allowed here): sums take MPI, which is slower for large arrays"
)

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
    transport = _transport(own, topology, reproducible)
    store = KVStore(kind, transport, agreement, one_thread=True)
    _open_stores[:] = [other for other in _open_stores if not other.closed]
    _open_stores.append(store)
    return store


def _transport(comm: Any, topology: Topology, tree: bool) -> Transport:
    """Take the quickest way there is for ranks that are so placed."""
    from .transport import mpi

    flat = mpi.MpiTransport(comm, topology, tree=tree)
    alone = topology.num_hosts == topology.size
    if alone or platform.machine() not in _ORDERED_MACHINES or (tree and not _is_level(topology)):
        return flat
    here = mpi.split(comm, topology.host)
    flat.keep(here)
    size = len(topology.ranks_on(topology.host))
    piece_bytes = _PIECE_BYTES if topology.num_hosts == 1 else _WIRE_PIECE_BYTES

    def share(n_bytes: int) -> SharedMemory | None:
        return mpi.share_memory(here, n_bytes, everywhere=comm)

    memory = share(HostTransport.bytes_for(size, piece_bytes))
    if memory is None:
        if topology.rank == 0:
            warnings.warn(_NO_SHARED_MEMORY, RuntimeWarning, stacklevel=4)
        return flat
    across = None
    if topology.num_hosts > 1:
        lane = mpi.split(comm, topology.local_rank)
        flat.keep(lane)
        if topology.local_rank < min(len(ranks) for ranks in topology.hosts):
            between = Topology(topology.host, tuple(range(topology.num_hosts)))
            across = mpi.MpiTransport(lane, between, tree=tree)
    return HostTransport(topology, memory, flat, across, share, tree=tree, piece_bytes=piece_bytes)


def _is_level(topology: Topology) -> bool:
    """Say whether a tree over all ranks is trees over each host's, and one over the hosts."""
    size = len(topology.hosts[0])
    in_order = topology.host_of == tuple(rank // size for rank in range(topology.size))
    return in_order and size & (size - 1) == 0


@atexit.register
def _leave_all() -> None:
    """Leave the stores that are open, all at once, so that no rank waits for this one."""
    error = vars(sys).get("last_value")  # what ended the program, if an exception did
    why = "" if error is None else f"{type(error).__name__}: {error}"
    under_way = [store.leaving(why) for store in _open_stores if not store.closed]
    while under_way:
        for steps in list(under_way):
            try:
                next(steps)
            except StopIteration:
                under_way.remove(steps)
        time.sleep(0)


# A child made by fork must not speak for its parent.
os.register_at_fork(after_in_child=_open_stores.clear)
