"""Which rank is on which host: plain data, made once per store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Topology:
    """Where the ranks of one group are.

    Attributes
    ----------
    rank : int
        This process's rank in the group.
    host_of : tuple of int
        For each rank the number of its host; hosts are numbered from 0 in the
        order in which the ranks come to them.
    """

    rank: int
    host_of: tuple[int, ...]

    @classmethod
    def alone(cls) -> Topology:
        """One rank on one host."""
        return cls(0, (0,))

    @classmethod
    def of_leaders(cls, rank: int, leader_of: Sequence[int]) -> Topology:
        """Make it from each rank's leader: the lowest rank with which it shares memory."""
        number: dict[int, int] = {}
        return cls(rank, tuple(number.setdefault(leader, len(number)) for leader in leader_of))

    @property
    def size(self) -> int:
        """How many ranks there are."""
        return len(self.host_of)

    @property
    def num_hosts(self) -> int:
        """How many hosts there are."""
        return max(self.host_of) + 1

    @property
    def host(self) -> int:
        """The number of this rank's host."""
        return self.host_of[self.rank]

    def ranks_on(self, host: int) -> tuple[int, ...]:
        """List the ranks of one host, ascending."""
        return tuple(rank for rank, its_host in enumerate(self.host_of) if its_host == host)

    @property
    def hosts(self) -> tuple[tuple[int, ...], ...]:
        """The ranks of each host."""
        return tuple(self.ranks_on(host) for host in range(self.num_hosts))

    @property
    def local_rank(self) -> int:
        """Give the place of this rank among the ranks of its host, from 0."""
        return self.ranks_on(self.host).index(self.rank)

    @property
    def is_level(self) -> bool:
        """Whether a tree over all ranks is trees over each host's, and one over the hosts."""
        if self.num_hosts == 1:
            return True
        size = len(self.hosts[0])
        in_order = self.host_of == tuple(rank // size for rank in range(self.size))
        return in_order and size & (size - 1) == 0
