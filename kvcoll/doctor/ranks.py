"""The doctor's ranks: they start MPI, tell rank 0 their facts, and measure what it asks for.

Rules of the file: it runs in a child of the doctor, which may be ended at any time; what
rank 0 has learnt so far is with its parent already. No rank waits for another without a
limit; collective calls are made only if every rank has come.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Iterable
from typing import Any, final

from .. import apart
from ..errors import KVCollError
from ..transport import mpi
from . import links, push, reach
from .facts import Facts
from .talk import Talk

_THREADS = ("single", "funneled", "serialized", "multiple")


def main(descriptor: str) -> None:
    """Be a rank.

    Parameters
    ----------
    descriptor : str
        The number of an open file, to which the parent is told what is known, as JSON, a
        line each. On standard input it gives this rank's facts and settings.
    """
    apart.die_with_parent()
    tell = _Parent(int(descriptor))
    given = json.loads(sys.stdin.readline())
    facts, limit_s = Facts.from_json(given["facts"]), given["limit_s"]
    tell(at="the import of mpi4py and the start of MPI (MPI_Init)")
    try:
        library = mpi.import_mpi()
        facts = dataclasses.replace(
            facts,
            library=library.Get_library_version().strip("\0"),
            mpi_rank=library.COMM_WORLD.rank,
            mpi_size=library.COMM_WORLD.size,
            threads=_THREADS[sorted(_levels(library)).index(library.Query_thread())],
        )
        tell(own=dataclasses.asdict(facts))
        mpi.default_communicator()
    except KVCollError as error:
        tell(error=str(error), kind=type(error).__name__)
        return
    rank = _Rank(Talk(), facts, tell, limit_s)
    sound = rank.lead(given["quick"]) if facts.mpi_rank == 0 else rank.follow()
    tell(done=True)
    sys.stdin.read()  # until the parent has printed what there is
    if not sound:
        os._exit(1)  # MPI_Finalize would wait for the ranks that do not answer


@final
class _Parent:
    """Tells the parent."""

    def __init__(self, descriptor: int) -> None:
        self._file = open(descriptor, "w")  # noqa: SIM115 (as long as the process)

    def __call__(self, **told: object) -> None:
        self._file.write(json.dumps(told) + "\n")
        self._file.flush()


def _levels(library: Any) -> list[int]:
    return [
        library.THREAD_SINGLE,
        library.THREAD_FUNNELED,
        library.THREAD_SERIALIZED,
        library.THREAD_MULTIPLE,
    ]


@final
class _Rank:
    """One rank; rank 0 leads, the others do what it says."""

    def __init__(self, talk: Talk, facts: Facts, tell: _Parent, limit_s: float) -> None:
        self._talk, self._facts, self._tell, self._limit_s = talk, facts, tell, limit_s
        self._number = 0

    def follow(self) -> bool:
        """Do what rank 0 says; say whether it came to the end, and all ranks answer."""
        self._tell(at="the answer of rank 0")
        self._talk.send(dataclasses.asdict(self._facts), 0)
        while True:
            # Rank 0 may wait for others twice before it comes to this one.
            order = self._talk.receive([0], 3 * self._limit_s).get(0)
            if order is None:
                self._tell(error="rank 0 does not answer", kind="")
                return False
            if order["do"] == "end":
                return bool(order["sound"])
            self._tell(at=order["do"])
            self._talk.send(self._perform(order), 0)

    def lead(self, quick: bool) -> bool:
        """Learn all there is to learn, and tell the parent; say whether all ranks answer."""
        talk, tell = self._talk, self._tell
        tell(at="the first messages of the other ranks")
        others = range(1, talk.size)
        got = talk.receive(others, self._limit_s)
        facts = {0: self._facts} | {k: _facts_of(told) for k, told in sorted(got.items())}
        missing = [rank for rank in others if rank not in got]
        tell(facts={k: dataclasses.asdict(one) for k, one in facts.items()}, missing=missing)
        hosts: dict[tuple[str, str], list[int]] = {}
        for rank, one in facts.items():
            hosts.setdefault((one.host, one.boot), []).append(rank)
        sound = self._measure_links(facts, list(hosts.values())) and not missing
        if sound:
            self._measure_calls(facts, list(hosts.values()), quick=quick)
        for rank in facts:
            if rank:
                talk.send({"do": "end", "sound": sound}, rank)
        return sound

    def _measure_links(self, facts: dict[int, Facts], hosts: list[list[int]]) -> bool:
        """Try and measure what lies between ranks, two at a time; say whether all answer."""
        tell, leaders = self._tell, [ranks[0] for ranks in hosts]
        if len(leaders) > 1:
            tell(at="connections between the hosts")
            table = [json.loads(facts[k].to_json()) for k in leaders]
            answers = self._ask({"do": "reach", "table": table}, leaders)
            tell(reached=[one for k in sorted(answers) for one in answers[k]["reached"]])
        tell(at="the links within hosts")
        sound = self._pairs([(ranks[0], ranks[1]) for ranks in hosts if len(ranks) > 1])
        for pairs in links.rounds_of(leaders):
            tell(at="the links between hosts")
            sound = self._pairs(pairs) and sound
        return sound

    def _measure_calls(
        self, facts: dict[int, Facts], hosts: list[list[int]], *, quick: bool
    ) -> None:
        """Measure calls of all ranks, which would hang if one could not answer."""
        tell = self._tell
        tell(at="a call of all ranks")
        answers = self._ask({"do": "memory"}, facts)
        tell(shared={k: told["shared"] for k, told in answers.items()})
        if not quick:
            n_bytes = min(
                push.bytes_for(min(facts[k].memory_bytes for k in ranks), len(ranks))
                for ranks in hosts
            )
            tell(at="a push")
            answers = self._ask({"do": "push", "n_bytes": n_bytes}, facts)
            tell(pushes={k: told["push"] for k, told in answers.items()})

    def _pairs(self, pairs: list[tuple[int, int]]) -> bool:
        """Measure links, all at once, and tell what came of each; say whether all answer."""
        self._number += 1
        if not pairs:
            return True
        order = {"do": "pairs", "pairs": pairs, "number": self._number}
        answers = self._ask(order, [rank for pair in pairs for rank in pair])
        told = []
        for a, b in pairs:
            of_a, of_b = (answers.get(rank, {}).get("link", {}) for rank in (a, b))
            times = of_a if "latency_s" in of_a else of_b
            sign = 1.0 if times is of_a else -1.0
            told.append(
                {
                    "a": a,
                    "b": b,
                    "latency_s": times.get("latency_s"),
                    "clock_s": sign * times["clock_s"] if times else None,
                    "there_bytes_per_s": of_a.get("bytes_per_s"),
                    "back_bytes_per_s": of_b.get("bytes_per_s"),
                }
            )
        self._tell(links=told)
        return all(one["latency_s"] is not None for one in told)

    def _ask(self, order: dict[str, Any], ranks: Iterable[int]) -> dict[int, Any]:
        """Let ranks do something; give the answers of those that answer."""
        ranks = set(ranks)
        for rank in sorted(ranks - {0}):
            self._talk.send(order, rank)
        answers = {0: self._perform(order)} if 0 in ranks else {}
        return answers | self._talk.receive(ranks - {0}, self._limit_s)

    def _perform(self, order: dict[str, Any]) -> dict[str, Any]:
        talk = self._talk
        if order["do"] == "reach":
            others = map(_facts_of, order["table"])
            own = dataclasses.replace(self._facts, rank=talk.rank)
            return {"reached": reach.try_all(own, others)}
        if order["do"] == "pairs":
            pair = next(pair for pair in order["pairs"] if talk.rank in pair)
            other = pair[1] if talk.rank == pair[0] else pair[0]
            return {"link": links.measure(talk, other, order["number"])}
        if order["do"] == "memory":
            return {"shared": push.shares_memory()}
        return {"push": push.measure(talk, order["n_bytes"], self._limit_s)}


def _facts_of(told: dict[str, Any]) -> Facts:
    return Facts.from_json(json.dumps(told))
