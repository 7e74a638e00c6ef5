"""Sums over hosts that are made up pass the contract, however the ranks are placed.

The hosts here are groups of ranks of one machine that share memory among themselves
only: what crosses from group to group goes by MPI, as between machines. In a run over
several hosts, a class whose groups do not each fit on one of them is skipped.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import pytest
from transport_contract import TransportContract

from kvcoll import reduction
from kvcoll.topology import Topology
from kvcoll.transport import mpi
from kvcoll.transport.contract import Transport
from kvcoll.transport.hosts import HostsTransport, Stage
from kvcoll.transport.leg import LegSizes

if TYPE_CHECKING:
    from mpi4py import MPI


@pytest.fixture(scope="class")
def transport(
    request: pytest.FixtureRequest, comm: MPI.Intracomm, host_of: tuple[int, ...]
) -> Iterator[Transport]:
    own = request.cls
    own.world = comm
    truly_on = host_of
    host_of = own.hosts[comm.size]
    own.groups = Topology(0, host_of).hosts
    if any(len({truly_on[rank] for rank in group}) > 1 for group in own.groups):
        pytest.skip("ranks that are to share memory here are on several hosts")
    with pytest.MonkeyPatch.context() as patched:
        if own.leg_sizes is not None:
            patched.setattr(LegSizes, "between_hosts", lambda *_: own.leg_sizes)
        made = reduction.transport_for(
            mpi.duplicate(comm, 30),
            Topology(comm.rank, host_of),
            tree=own.tree,
            patient=own.patient,
        )
    assert isinstance(made, HostsTransport)
    yield made
    made.close()


class OverHosts(TransportContract):
    """What the classes below share: segments of 1 KiB, so that slots come round many times.

    Messages of 300 bytes cut elements in two.
    """

    hosts: dict[int, tuple[int, ...]] = {}  # noqa: RUF012  of each rank, by number of ranks
    leg_sizes: LegSizes | None = LegSizes(1 << 10, 300, 4, 500)
    edges_bytes: tuple[int, ...] = (2 << 10, 40 << 10)
    patient = False
    world: MPI.Intracomm

    def all_of(self, mine: bytes) -> list[bytes]:
        return self.world.allgather(mine)


@pytest.mark.ranks(at_least=3)
class TestHostsOfTwo(OverHosts):
    """2 + 1 ranks, or 2 + 2."""

    hosts = {3: (0, 0, 1), 4: (0, 0, 1, 1)}  # noqa: RUF012


@pytest.mark.ranks(at_least=3)
class TestHostsOfTwoAsAStoreUsesThem(OverHosts):
    hosts = {3: (0, 0, 1), 4: (0, 0, 1, 1)}  # noqa: RUF012
    leg_sizes = None
    edges_bytes = (240 << 10,)


@pytest.mark.long
@pytest.mark.ranks(at_least=3)
class TestHostsOfTwoThatWaitPatiently(OverHosts):
    hosts = {3: (0, 0, 1), 4: (0, 0, 1, 1)}  # noqa: RUF012
    leg_sizes = LegSizes(4 << 10, 4 << 10, 2, 4 << 10)
    patient = True


@pytest.mark.ranks(exactly=4)
class TestUnequalHosts(OverHosts):
    """3 + 1 ranks, placed in turns."""

    hosts = {4: (0, 1, 0, 0)}  # noqa: RUF012


@pytest.mark.long
@pytest.mark.ranks(exactly=4)
class TestThreeHosts(OverHosts):
    """1 + 2 + 1 ranks: sums between hosts take two phases."""

    hosts = {4: (0, 1, 1, 2)}  # noqa: RUF012
    edges_bytes = (2 << 10, 16 << 10, 40 << 10)


@pytest.mark.long
@pytest.mark.ranks(exactly=4)
class TestHostsInAnotherOrderOnEachLane(OverHosts):
    """Of the second ranks of the hosts, the first is on the second host."""

    hosts = {4: (0, 1, 1, 0)}  # noqa: RUF012


@pytest.mark.ranks(exactly=4)
class TestHostsOfTwoInATree(OverHosts):
    hosts = {4: (0, 0, 1, 1)}  # noqa: RUF012
    tree = True


@pytest.mark.ranks(exactly=4)
def test_a_tree_over_ranks_that_are_placed_in_turns_is_taken_flat(comm: MPI.Intracomm) -> None:
    made = reduction.transport_for(
        mpi.duplicate(comm, 30), Topology(comm.rank, (0, 1, 0, 1)), tree=True
    )
    parts = [np.float32(10.0) ** -k for k in range(4)]
    total = np.array([parts[comm.rank]], np.float32)
    made.all_reduce(total, total)
    assert total[0] == (parts[0] + parts[1]) + (parts[2] + parts[3])
    made.close()


@pytest.mark.single
def test_a_stage_is_passed_when_all_that_count_have_passed_it() -> None:
    raw = np.zeros(3 * 64, np.uint8)
    seen_by = [Stage(raw, rank, counted=2) for rank in range(3)]
    assert all(stage.all_passed(0) for stage in seen_by)
    seen_by[0].pass_to(2)
    assert not any(stage.all_passed(1) for stage in seen_by)
    seen_by[1].pass_to(1)
    assert all(stage.all_passed(1) for stage in seen_by)
    assert not any(stage.all_passed(2) for stage in seen_by)
    assert raw.view(np.int64)[::8].tolist() == [2, 1, 0]


@pytest.mark.single
@pytest.mark.parametrize("size", [2, 3, 4, 9, 64])
@pytest.mark.parametrize("lanes", [1, 2, 3, 8, 64])
def test_a_segment_is_short_on_many_lanes_and_its_parts_fit_their_rows(
    size: int, lanes: int
) -> None:
    sizes = LegSizes.between_hosts(size, lanes)
    assert sizes.segment_bytes % 64 == 0
    assert lanes * sizes.segment_bytes <= max(lanes * 16 << 10, 4 * max(240, 16 * size) << 10)
    n = sizes.segment_bytes // 16
    longest = max(n * (k + 1) // size - n * k // size for k in range(size))
    assert sizes.row_bytes(size) >= 16 * (n if size == 2 else longest)
