"""Which rank is on which host: plain data, checked against hosts written by hand."""

from __future__ import annotations

from dataclasses import FrozenInstanceError

import pytest

from kvcoll.topology import Topology

pytestmark = pytest.mark.single

# leader of each rank: its host's lowest rank -> host of each rank, local rank of each
PLACEMENTS = [
    ([0], (0,), (0,)),
    ([0, 0, 0, 0], (0, 0, 0, 0), (0, 1, 2, 3)),
    ([0, 0, 2, 2], (0, 0, 1, 1), (0, 1, 0, 1)),
    ([0, 1, 0, 1], (0, 1, 0, 1), (0, 0, 1, 1)),  # round robin
    ([0, 1, 1, 1, 4], (0, 1, 1, 1, 2), (0, 0, 1, 2, 0)),  # unequal
    ([0, 1, 2, 1, 0, 5], (0, 1, 2, 1, 0, 3), (0, 0, 0, 1, 1, 0)),
]
placements = pytest.mark.parametrize(("leader_of", "host_of", "local_ranks"), PLACEMENTS)


@placements
def test_hosts_are_numbered_as_the_ranks_come_to_them(
    leader_of: list[int], host_of: tuple[int, ...], local_ranks: tuple[int, ...]
) -> None:
    for rank in range(len(leader_of)):
        topology = Topology.of_leaders(rank, leader_of)
        assert topology.host_of == host_of
        assert topology.size == len(leader_of)
        assert topology.num_hosts == len(set(leader_of))
        assert topology.host == host_of[rank]
        assert topology.local_rank == local_ranks[rank]


@placements
def test_every_rank_is_on_one_host_and_at_its_local_rank(
    leader_of: list[int], host_of: tuple[int, ...], local_ranks: tuple[int, ...]
) -> None:
    topology = Topology.of_leaders(0, leader_of)
    listed = [topology.ranks_on(host) for host in range(topology.num_hosts)]
    assert sorted(rank for ranks in listed for rank in ranks) == list(range(len(leader_of)))
    for rank, (host, local_rank) in enumerate(zip(host_of, local_ranks, strict=True)):
        assert listed[host][local_rank] == rank


def test_a_host_that_is_not_there_has_no_ranks() -> None:
    assert Topology(1, (0, 1, 0)).ranks_on(2) == ()


def test_one_process_is_one_rank_on_one_host() -> None:
    alone = Topology.alone()
    assert (alone.rank, alone.size, alone.num_hosts, alone.host, alone.local_rank) == (
        0,
        1,
        1,
        0,
        0,
    )


def test_a_topology_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        Topology.alone().rank = 1  # type: ignore[misc]
