"""Ranks that are threads of one process, or generators taken in turn, and their messenger."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Generator
from functools import partial
from queue import Empty, SimpleQueue
from typing import Final, TypeAlias, TypeVar, final

from kvcoll.agreement import AcrossRanks, Agreement, Call
from kvcoll.errors import KVCollError, WaitEndedError
from kvcoll.schema import digest
from kvcoll.topology import Topology
from kvcoll.transport.contract import Messenger, Pending, Settling

T = TypeVar("T")
Outcome: TypeAlias = "tuple[type[BaseException], str] | int"

LIMIT_S: Final = 10.0

# From, to, and which of the two kinds of message.
Boxes: TypeAlias = "defaultdict[tuple[int, int, str], SimpleQueue[bytes]]"


def fake_messengers(size: int, *, settles: bool = False) -> list[FakeMessenger]:
    """Make one messenger a rank, all on one set of boxes; `settles` where losses end no job."""
    boxes: Boxes = defaultdict(SimpleQueue)
    for dest in range(size):
        for source in range(size):
            for kind in ("agree", "text", "settle"):
                boxes[source, dest, kind]  # made now: threads then only look them up
    return [
        FakeMessenger(boxes, Topology(rank, (0,) * size), settles=settles) for rank in range(size)
    ]


@final
class FakeMessenger(Messenger):
    """Messages are put in a box for each pair of ranks, as MPI keeps their order."""

    def __init__(self, boxes: Boxes, topology: Topology, *, settles: bool = False) -> None:
        self.topology = topology
        self.settles = settles
        self.n_exchanges = 0
        self._boxes = boxes

    def exchange(self, sent: bytearray, received: bytearray, dest: int, source: int) -> None:
        self.n_exchanges += 1
        rank = self.topology.rank
        self._boxes[rank, dest, "agree"].put(bytes(sent))
        received[:] = self._boxes[source, rank, "agree"].get(timeout=LIMIT_S)

    def start_exchange(
        self, sent: bytearray, received: bytearray, dest: int, source: int
    ) -> Pending:
        self.n_exchanges += 1
        rank = self.topology.rank
        self._boxes[rank, dest, "agree"].put(bytes(sent))
        return _Exchange(self._boxes[source, rank, "agree"], received)

    def start_all_gather(self, text: bytes) -> Pending:
        rank, size = self.topology.rank, self.topology.size
        for dest in range(size):
            self._boxes[rank, dest, "text"].put(text)
        return _Texts([self._boxes[source, rank, "text"] for source in range(size)])

    def start_settling(self, came_through: bool) -> Settling | None:
        if not self.settles:
            return None
        rank, size = self.topology.rank, self.topology.size
        for dest in range(size):
            self._boxes[rank, dest, "settle"].put(b"1" if came_through else b"0")
        return _Settled(_Texts([self._boxes[source, rank, "settle"] for source in range(size)]))


@final
class _Exchange(Pending):
    def __init__(self, box: SimpleQueue[bytes], received: bytearray) -> None:
        self._box, self._received, self._done = box, received, False

    def done(self) -> bool:
        if not self._done:
            try:
                self._received[:] = self._box.get_nowait()
            except Empty:
                return False
            self._done = True
        return True

    def texts(self) -> list[bytes]:
        return []


@final
class _Texts(Pending):
    def __init__(self, boxes: list[SimpleQueue[bytes]]) -> None:
        self._boxes, self._got = boxes, list[bytes]()

    def done(self) -> bool:
        while len(self._got) < len(self._boxes):
            try:
                self._got.append(self._boxes[len(self._got)].get_nowait())
            except Empty:
                return False
        return True

    def texts(self) -> list[bytes]:
        return self._got


@final
class _Settled(Settling):
    def __init__(self, votes: _Texts) -> None:
        self._votes = votes

    def done(self) -> bool:
        return self._votes.done()

    def check(self) -> None:
        if b"0" in self._votes.texts():
            raise WaitEndedError("another rank did not come through")

    def give_up(self) -> None:
        pass


def call(name: str, *items: str) -> Call:
    """Make a call whose digest is that of its words."""
    return Call(name, digest(name, *items), items)


def finished(leaves: list[Generator[None, None, T]], pause_s: float = 0.0) -> list[T]:
    """Take the steps of all in turn until all have ended."""
    values: dict[int, T] = {}
    end_s = time.monotonic() + LIMIT_S
    while time.monotonic() < end_s:
        time.sleep(pause_s)
        for number, steps in enumerate(leaves):
            if number not in values:
                try:
                    next(steps)
                except StopIteration as end:
                    values[number] = end.value
        if len(values) == len(leaves):
            return [values[number] for number in range(len(leaves))]
    raise AssertionError("they wait for one another")


def outcome_of(act: Callable[[], int]) -> Outcome:
    """Give what `act` gives, or class and text of what it raises."""
    try:
        return act()
    except (KVCollError, TypeError, ValueError) as error:
        return type(error), str(error)


def on_all(acts: list[Callable[[], int]]) -> list[Outcome]:
    """Let each act in a thread of its own; give what came of each."""
    outcomes: dict[int, Outcome] = {}

    def run(rank: int) -> None:
        outcomes[rank] = outcome_of(acts[rank])

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(acts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * LIMIT_S)
    return [outcomes[rank] for rank in range(len(acts))]


def together(
    ranks: int, act: Callable[[int, AcrossRanks], int], *, settles: bool = False
) -> list[Outcome]:
    """Let each rank act with an agreement of its own; give what came of it, by rank."""
    agreements = [AcrossRanks(messenger) for messenger in fake_messengers(ranks, settles=settles)]
    return on_all([partial(act, rank, agreement) for rank, agreement in enumerate(agreements)])


def leave(agreement: Agreement, why: str = "") -> int:
    """Leave, and raise what the other ranks raise; -1 if they have left too."""
    error = finished([agreement.leave(why)], pause_s=1e-4)[0]
    if error is not None:
        raise error
    return -1
