"""The transport over MPI passes the contract, on every way that an array can take."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from transport_contract import TransportContract

from kvcoll import reduction
from kvcoll.errors import ArgumentError, LateRankError
from kvcoll.topology import Topology
from kvcoll.transport import mpi
from kvcoll.transport.contract import Transport
from kvcoll.transport.hosts import HostsTransport
from kvcoll.transport.leg import LegSizes
from kvcoll.transport.waiting import Waiting

if TYPE_CHECKING:
    from mpi4py import MPI


class OverMpi(TransportContract):
    """What the classes below share."""

    settings: dict[str, Any] = {}  # noqa: RUF012
    waiting: Waiting | None = None
    alone = False
    world: MPI.Intracomm

    @pytest.fixture
    def transport(self, comm: MPI.Intracomm, host_of: tuple[int, ...]) -> Iterator[Transport]:
        type(self).world = comm
        own = mpi.duplicate(comm, 30)
        topology = Topology(comm.rank, tuple(range(comm.size)) if self.alone else host_of)
        type(self).groups = topology.hosts
        made = mpi.MpiTransport(
            own, topology, tree=self.tree, waiting=self.waiting, **self.settings
        )
        yield made
        made.close()

    def all_of(self, mine: bytes) -> list[bytes]:
        return self.world.allgather(mine)


class TestMpi(OverMpi):
    """As a store uses it: small arrays in one message or two, others by segments."""

    edges_bytes = ((16 << 10) // 2, (16 << 10) // 3, 128 << 10)


class TestMpiInManyPieces(OverMpi):
    """Small limits stand for large arrays: segments of 1 KiB, messages of 300 bytes.

    So messages are cut in the midst of elements, and more segments than may be under way.
    """

    settings = {  # noqa: RUF012
        "sizes": LegSizes(1024, 300, 3, 200),
        "broadcast_bytes": 1001,
        "small_bytes": 64,
        "middle_bytes": 600,
    }
    edges_bytes = (64, 600, 1001, 2 * 1024, 4 * 1024, 9 * 1024, 20 * 1024)


class TestMpiBetweenHosts(OverMpi):
    """Each rank on a host of its own, as far as the transport knows."""

    edges_bytes = (60 << 10, 240 << 10)
    alone = True


@pytest.mark.long
class TestMpiThatWaitsPatiently(OverMpi):
    """Nothing goes by a call that waits as the MPI likes to."""

    waiting = Waiting.patient()
    edges_bytes = (16 << 10,)


class TestMpiInATree(OverMpi):
    settings = {  # noqa: RUF012
        "sizes": LegSizes(1024, 1024, 4, 1024),
        "small_bytes": 512,
        "middle_bytes": 512,
    }
    edges_bytes = (256, 9000)
    tree = True


def test_the_topology_is_that_of_the_communicator(
    comm: MPI.Intracomm, host_of: tuple[int, ...]
) -> None:
    assert mpi.topology_of(comm) == Topology(comm.rank, host_of)


def test_a_duplicate_speaks_past_its_original(comm: MPI.Intracomm, rank: int, size: int) -> None:
    own = mpi.duplicate(comm, 30)
    told, got = np.array([rank]), np.array([-1])
    on_original = comm.Irecv(got, (rank - 1) % size, 1)  # as a user of the original may
    transport = mpi.MpiTransport(own, mpi.topology_of(own), small_bytes=0, middle_bytes=0)
    summed = np.array([rank], np.float32)
    transport.all_reduce(summed, summed)
    got_early = got[0]
    own.Barrier()
    comm.Send(told, (rank + 1) % size, 1)
    on_original.Wait()
    assert summed[0] == size * (size - 1) / 2
    assert got_early == -1
    assert got[0] == (rank - 1) % size
    transport.close()


@pytest.mark.parametrize("what", ["a str", "None", "the null communicator", "a group"])
def test_what_is_no_communicator_is_refused(comm: MPI.Intracomm, what: str) -> None:
    from mpi4py import MPI

    given = {
        "a str": "world",
        "None": None,
        "the null communicator": MPI.COMM_NULL,
        "a group": comm.group,
    }[what]
    with pytest.raises(ArgumentError, match=r"^comm must be an mpi4py intra-communicator"):
        mpi.duplicate(given, 30)


@pytest.mark.ranks(at_least=2)
@pytest.mark.parametrize("size_of_first_host", [1, 2])
def test_memory_that_mpi_may_still_write_to_outlives_a_sum_that_was_cut_short(
    comm: MPI.Intracomm, size_of_first_host: int
) -> None:
    # The last rank, on a host of its own, does not come.
    n_first = min(size_of_first_host, comm.size - 1)
    hosts = (0,) * n_first + tuple(range(1, comm.size - n_first + 1))
    losses = mpi.losses_of(comm)
    topology = Topology(comm.rank, hosts)
    made = reduction.transport_for(mpi.duplicate(comm, 30), topology, losses)
    assert isinstance(made, HostsTransport) == (n_first == 2)
    leg = weakref.ref(made._leg if comm.rank == 0 else made)  # type: ignore[attr-defined]
    if comm.rank < comm.size - 1:
        timer = threading.Timer(0.2, losses.alarm.sound, [LateRankError("too late", [1])])
        timer.start()
        with pytest.raises(LateRankError, match="too late"):
            made.all_reduce(np.ones(200_000), np.empty(200_000))
        timer.join()
    comm.Barrier()
    del made, losses
    gc.collect()
    if comm.rank == 0:
        assert leg() is not None
