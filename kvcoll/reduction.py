"""How sums are put together from the ways there are: within a host, across hosts.

Rules of the file: every rank takes the same way, which depends on the topology and on
what all hosts allow, and on nothing that one rank alone could see.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import TYPE_CHECKING

from .sums import Adder
from .topology import Topology
from .transport.contract import Transport
from .transport.host import HostTransport
from .transport.hosts import HostsTransport
from .transport.leg import DirectLeg, LegSizes
from .transport.losses import Losses
from .transport.memory import SharedMemory
from .transport.waiting import Waiting

if TYPE_CHECKING:
    from mpi4py import MPI

_PIECE_BYTES = 1 << 20  # within a host: a piece of the sum stays in cache
# Where a core's writes are seen by others in their order, as shared memory needs it.
_ORDERED_MACHINES = ("x86_64", "AMD64")
NO_SHARED_MEMORY = (
    "the ranks of this host cannot share memory (memfd_create, or /proc/<pid>/fd of another "
    "rank, is not allowed here): sums take MPI, which is slower for large arrays"
)


def transport_for(
    comm: MPI.Intracomm,
    topology: Topology,
    losses: Losses | None = None,
    *,
    tree: bool = False,
    patient: bool = False,
) -> Transport:
    """Take the quickest way there is for ranks that are so placed; collective.

    Parameters
    ----------
    comm : mpi4py.MPI.Intracomm
        The transport's own: nobody else sends on it but with tags of their own.
    topology : Topology
        Of the ranks of `comm`.
    losses : Losses or None, default None
        Of ranks of `comm`, or of the communicator of which it is a duplicate.
    tree : bool, default False
        Add in a binary tree over the ranks, wherever they are.
    patient : bool, default False
        Leave the core to the caller's other threads while a sum waits for other ranks;
        on one host sums take longer then.

    Returns
    -------
    Transport
        It closes `comm`.
    """
    from .transport import mpi

    losses = losses or mpi.losses_of(comm)
    waiting = Waiting.patient(losses.alarm) if patient else None
    flat = mpi.MpiTransport(comm, topology, waiting=waiting, losses=losses, tree=tree)
    alone = topology.num_hosts == topology.size
    if alone or platform.machine() not in _ORDERED_MACHINES or (tree and not topology.is_level):
        return flat
    here = mpi.split(comm, topology.host, topology.rank, losses)
    flat.keep(here)

    def share(n_bytes: int) -> SharedMemory | None:
        return mpi.share_memory(here, n_bytes, comm, losses)

    if topology.num_hosts > 1:
        lane = mpi.split(comm, topology.local_rank, topology.host, losses)
        flat.keep(lane)
        return _over_hosts(lane, flat, share, losses, waiting=waiting, tree=tree) or flat
    memory = share(HostTransport.bytes_for(topology.size, _PIECE_BYTES))
    if memory is None:
        return flat
    return HostTransport(
        topology,
        memory,
        flat,
        share,
        waiting=waiting,
        alarm=losses.alarm,
        tree=tree,
        piece_bytes=_PIECE_BYTES,
    )


def _over_hosts(
    lane: MPI.Intracomm,
    flat: Transport,
    share: Callable[[int], SharedMemory | None],
    losses: Losses,
    *,
    waiting: Waiting | None,
    tree: bool,
) -> Transport | None:
    """Make the transport over several hosts; None where one of them shares no memory."""
    from .transport import mpi

    topology = flat.topology
    n_hosts, lanes = topology.num_hosts, min(len(ranks) for ranks in topology.hosts)
    sizes = LegSizes.between_hosts(n_hosts, lanes)
    small_bytes = mpi.SMALL_BYTES if waiting is None else 0
    size = len(topology.ranks_on(topology.host))
    memory = share(HostsTransport.bytes_for(size, lanes, sizes))
    if memory is None:
        return None
    leg = None
    if topology.local_rank < lanes:
        adder = Adder([[host] for host in range(n_hosts)], sizes.row_bytes(n_hosts), tree=tree)
        leg = DirectLeg(lane, mpi.import_mpi(), adder, sizes, losses)
    return HostsTransport(
        topology,
        memory,
        flat,
        leg,
        share,
        waiting=waiting or Waiting(alarm=losses.alarm),
        sizes=sizes,
        small_bytes=small_bytes,
        tree=tree,
    )


def lacks_shared_memory(transport: Transport) -> bool:
    """Say whether ranks share a host, but not its memory, as this machine should allow."""
    topology = transport.topology
    share_a_host = topology.num_hosts < topology.size
    ordered = platform.machine() in _ORDERED_MACHINES
    return share_a_host and ordered and not isinstance(transport, (HostTransport, HostsTransport))
