"""Sums through the memory that the ranks of one host share pass the contract.

In a run over several hosts they are skipped.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import pytest
from transport_contract import TransportContract

import kvcoll
from kvcoll import reduction
from kvcoll.topology import Topology
from kvcoll.transport import mpi
from kvcoll.transport.contract import Transport
from kvcoll.transport.host import Counters, HostTransport
from kvcoll.transport.memory import share
from kvcoll.transport.waiting import Waiting

if TYPE_CHECKING:
    from mpi4py import MPI


@pytest.fixture(scope="class")
def transport(
    request: pytest.FixtureRequest, comm: MPI.Intracomm, host_of: tuple[int, ...]
) -> Iterator[Transport]:
    own = request.cls
    own.world = comm
    own.groups = (tuple(range(comm.size)),)
    if len(set(host_of)) > 1:
        pytest.skip("ranks that are to share memory here are on several hosts")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(reduction, "_PIECE_BYTES", own.piece_bytes)
        made = reduction.transport_for(
            mpi.duplicate(comm, 30),
            Topology(comm.rank, (0,) * comm.size),
            tree=own.tree,
            patient=own.patient,
        )
    assert isinstance(made, HostTransport) == (comm.size > 1)
    yield made
    made.close()


class ThroughMemory(TransportContract):
    """What the classes below share."""

    piece_bytes = 1 << 20
    patient = False
    world: MPI.Intracomm

    def all_of(self, mine: bytes) -> list[bytes]:
        return self.world.allgather(mine)


class TestOneHost(ThroughMemory):
    """As a store uses it: small arrays at once, then pieces of 1 MiB."""

    edges_bytes = (32 << 10, 64 << 10)  # as there are 4 ranks, or 2

    def test_large_arrays_go_in_pieces(self, transport: Transport) -> None:
        rank, size = transport.topology.rank, transport.topology.size
        n = 3 * (1 << 18) + 5
        arrays = [np.arange(n, dtype=np.float32) / (k + 1) for k in range(size)]
        out = np.zeros(n, np.float32)
        transport.all_reduce(arrays[rank], out)
        self.check_equal(out, self.expected(arrays, np.dtype(np.float32)))


class TestOneHostInSmallPieces(ThroughMemory):
    piece_bytes = 16 << 10
    edges_bytes = (16 << 10, 64 << 10, 128 << 10)


class TestOneHostInATree(ThroughMemory):
    piece_bytes = 64 << 10
    edges_bytes = (70 << 10,)
    tree = True


@pytest.mark.long
class TestOneHostThatWaitsPatiently(ThroughMemory):
    piece_bytes = 64 << 10
    edges_bytes = (70 << 10,)
    patient = True


@pytest.mark.ranks(at_least=2)
def test_without_shared_memory_sums_take_mpi(
    comm: MPI.Intracomm, rank: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        raise OSError("not allowed here")

    # The first rank cannot make the memory, or the last one cannot open it.
    for attribute, where in [("memfd_create", 0), ("open", size - 1)]:
        with monkeypatch.context() as patched:
            if rank == where:
                patched.setattr(f"os.{attribute}", refuse)
            own = mpi.duplicate(comm, 30)
            made = reduction.transport_for(own, mpi.topology_of(own))
        assert reduction.lacks_shared_memory(made)
        assert isinstance(made, mpi.MpiTransport)
        total = np.full(100_000, rank + 1, np.float32)
        made.all_reduce(total, total)
        assert (total == size * (size + 1) / 2).all()
        made.close()


@pytest.mark.single
def test_memory_whose_token_is_another_is_not_taken() -> None:
    def broadcast(told: bytes) -> bytes:
        return told[:-1] + bytes([told[-1] ^ 1])

    assert share(0, 4096, broadcast, lambda mine: mine) is None


@pytest.mark.single
def test_counters_wait_for_every_rank_also_where_cores_are_few() -> None:
    raw = np.zeros(3 * 64, np.uint8)
    ranks = [Counters(raw, rank, Waiting.restless(), spins=200 * (rank != 1)) for rank in range(3)]
    for rank in (1, 2, 0):
        ranks[rank].raise_one()
    ranks[0].await_all()
    assert raw.view(np.int64)[::8].tolist() == [1, 1, 1]


@pytest.mark.ranks(at_least=2)
def test_a_store_says_once_that_its_ranks_cannot_share_memory(
    comm: MPI.Intracomm, rank: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        raise OSError("not allowed here")

    with monkeypatch.context() as patched:
        patched.setattr("os.memfd_create", refuse)
        if rank == 0:
            with pytest.warns(RuntimeWarning, match="cannot share memory"):
                kv = kvcoll.create("dist_sync")
        else:
            kv = kvcoll.create("dist_sync")
    kv.init(3, np.zeros(20_000))
    kv.push(3, np.full(20_000, rank + 1.0))
    assert (kv.pull(3) == size * (size + 1) / 2).all()
    kv.close()
