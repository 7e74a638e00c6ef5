"""How sums are put together from the ways there are: within a host, across hosts.

Rules of the file: every rank takes the same way, which depends on the topology and on
what all hosts allow, and on nothing that one rank alone could see.
"""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING

from .topology import Topology
from .transport.contract import Transport
from .transport.host import HostTransport
from .transport.memory import SharedMemory

if TYPE_CHECKING:
    from mpi4py import MPI

# Within a host a piece of the sum stays in cache; a wire wants longer ones.
_PIECE_BYTES, _WIRE_PIECE_BYTES = 1 << 20, 8 << 20
_WIRE_MEMORY_BYTES = 64 << 20  # of a host, a quarter of what the pieces of its ranks take
# Where a core's writes are seen by others in their order, as HostTransport needs it.
_ORDERED_MACHINES = ("x86_64", "AMD64")
NO_SHARED_MEMORY = (
    "the ranks of this host cannot share memory (memfd_create, or /proc/<pid>/fd of another "
    "rank, is not allowed here): sums take MPI, which is slower for large arrays"
)


def transport_for(comm: MPI.Intracomm, topology: Topology, *, tree: bool = False) -> Transport:
    """Take the quickest way there is for ranks that are so placed; collective.

    Parameters
    ----------
    comm : mpi4py.MPI.Intracomm
        The transport's own: nobody else sends on it but with tags of their own.
    topology : Topology
        Of the ranks of `comm`.
    tree : bool, default False
        Add in a binary tree over the ranks, wherever they are.

    Returns
    -------
    Transport
        It closes `comm`.
    """
    from .transport import mpi

    flat = mpi.MpiTransport(comm, topology, tree=tree)
    alone = topology.num_hosts == topology.size
    if alone or platform.machine() not in _ORDERED_MACHINES or (tree and not _is_level(topology)):
        return flat
    here = mpi.split(comm, topology.host, topology.rank)
    flat.keep(here)
    size = len(topology.ranks_on(topology.host))
    piece_bytes = _PIECE_BYTES
    if topology.num_hosts > 1:
        largest = max(len(ranks) for ranks in topology.hosts)
        piece_bytes = max(_PIECE_BYTES, min(_WIRE_PIECE_BYTES, _WIRE_MEMORY_BYTES // largest))

    def share(n_bytes: int) -> SharedMemory | None:
        return mpi.share_memory(here, n_bytes, everywhere=comm)

    memory = share(HostTransport.bytes_for(size, piece_bytes))
    if memory is None:
        return flat
    across = None
    if topology.num_hosts > 1:
        lane = mpi.split(comm, topology.local_rank, topology.host)
        flat.keep(lane)
        if topology.local_rank < min(len(ranks) for ranks in topology.hosts):
            between = Topology(topology.host, tuple(range(topology.num_hosts)))
            across = mpi.MpiTransport(lane, between, tree=tree)
    return HostTransport(topology, memory, flat, across, share, tree=tree, piece_bytes=piece_bytes)


def lacks_shared_memory(transport: Transport) -> bool:
    """Say whether ranks share a host, but not its memory, as this machine should allow."""
    topology = transport.topology
    share_a_host = topology.num_hosts < topology.size
    ordered = platform.machine() in _ORDERED_MACHINES
    return share_a_host and ordered and not isinstance(transport, HostTransport)


def _is_level(topology: Topology) -> bool:
    """Say whether a tree over all ranks is trees over each host's, and one over the hosts."""
    if topology.num_hosts == 1:
        return True
    size = len(topology.hosts[0])
    in_order = topology.host_of == tuple(rank // size for rank in range(topology.size))
    return in_order and size & (size - 1) == 0
