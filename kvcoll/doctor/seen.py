"""All that the doctor has seen of a job: what the checks are given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .facts import Facts


@dataclass(frozen=True)
class Link:
    """A measured link between two ranks; None for what was not to be had.

    Attributes
    ----------
    a, b : int
        The ranks.
    latency_s : float or None
        Half a round trip of 8 bytes; None if no answer came.
    clock_s : float or None
        How far the clock of `b` is ahead of that of `a`.
    there_bytes_per_s, back_bytes_per_s : float or None
        From `a` to `b`, and back.
    """

    a: int
    b: int
    latency_s: float | None = None
    clock_s: float | None = None
    there_bytes_per_s: float | None = None
    back_bytes_per_s: float | None = None


@dataclass
class Seen:
    """What there is to check.

    Attributes
    ----------
    facts : dict
        Of each rank that has been heard of, by rank.
    size : int
        How many ranks there should be.
    limit_s : float
        How long was waited.
    missing : list of int
        Ranks that did not come.
    failure : str
        What ended the doctor's own part in the job; `at`, in the midst of what.
    failure_kind : str
        The error's class, if it was one of kvcoll's.
    reached : list of dict
        See `reach.try_all`.
    links : list of Link
    shared : dict
        Of each rank whether its host's ranks share memory.
    pushes : dict
        Of each rank what `push.measure` gave.
    """

    facts: dict[int, Facts] = field(default_factory=dict)
    size: int = 1
    limit_s: float = 0.0
    missing: list[int] = field(default_factory=list)
    failure: str = ""
    failure_kind: str = ""
    at: str = ""
    reached: list[dict[str, Any]] = field(default_factory=list)
    links: list[Link] = field(default_factory=list)
    shared: dict[int, bool] = field(default_factory=dict)
    pushes: dict[int, dict[str, Any]] = field(default_factory=dict)

    @property
    def own(self) -> Facts:
        """Those of the lowest rank that has been heard of."""
        return self.facts[min(self.facts)]

    @property
    def library(self) -> str:
        """What MPI_Get_library_version gave, on whichever rank."""
        return next((one.library for one in self.facts.values() if one.library), "")

    def hosts(self) -> dict[str, list[int]]:
        """List the ranks of each host, by its name; hosts of one name are told apart."""
        ranks: dict[tuple[str, str], list[int]] = {}
        for rank, one in sorted(self.facts.items()):
            ranks.setdefault((one.host, one.boot), []).append(rank)
        named: dict[str, list[int]] = {}
        for (host, _), own in ranks.items():
            named[f"{host} (rank {own[0]})" if host in named else host] = own
        return named

    def host_of(self, rank: int) -> str:
        """Name the host of a rank."""
        return next((host for host, ranks in self.hosts().items() if rank in ranks), "?")

    def is_between_hosts(self, link: Link) -> bool:
        """Say whether the link's ranks are on two hosts."""
        return self.host_of(link.a) != self.host_of(link.b)

    def take(self, told: Mapping[str, Any]) -> None:
        """Add what the rank's process has told of."""
        self.at = told.get("at", self.at)
        if "own" in told:
            own = Facts(**told["own"])
            self.facts[own.rank] = own
        if "facts" in told:
            self.facts |= {int(rank): Facts(**one) for rank, one in told["facts"].items()}
            self.missing = told["missing"]
        self.failure = told.get("error", self.failure)
        self.failure_kind = told.get("kind", self.failure_kind)
        self.reached += told.get("reached", [])
        self.links += [Link(**one) for one in told.get("links", [])]
        for known, name in ((self.shared, "shared"), (self.pushes, "pushes")):
            known.update({int(rank): one for rank, one in told.get(name, {}).items()})
