"""Watchdogs of several ranks in one process, their messages in boxes, looked at in turn."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Sequence
from typing import Any, Final, final

from kvcoll.agreement import AcrossRanks, Call
from kvcoll.watchdog import Watchdog
from kvcoll.watchdog.post import Message, Post
from kvcoll.watchdog.processes import Place, Seen
from kvcoll.watchdog.station import Station
from kvcoll.watchdog.track import Track, Watched

LOOK_S: Final = 0.25
SETTINGS: Final = Watchdog(floor_s=5, ceiling_s=10, limit_s=60)


@final
class FakePost(Post):
    """Messages as JSON, in a box a rank."""

    def __init__(self, rank: int, boxes: list[deque[tuple[int, str]]]) -> None:
        self.rank, self.size, self._boxes = rank, len(boxes), boxes

    def send(self, rank: int, message: Message) -> None:
        self._boxes[rank].append((self.rank, json.dumps(message)))

    def receive(self) -> list[tuple[int, Message]]:
        box, self._boxes[self.rank] = self._boxes[self.rank], deque()
        return [(source, json.loads(text)) for source, text in box]


@final
class FakeRanks:
    """What a track reads of an agreement."""

    def __init__(self) -> None:
        self.entered = self.passed = 0
        self.is_over = False
        self.is_held = self.is_leaving = False
        self.call: Call | None = None
        self.calls = (0, 0)


@final
class FakeRank:
    """One rank: what it does, and what its watchdog has said."""

    def __init__(self, rank: int, boxes: list[deque[tuple[int, str]]], world: FakeWorld) -> None:
        self.said: list[str] = []
        self.ends: list[tuple[list[int], str, list[int]]] = []
        self.job_ends: list[tuple[str, bool]] = []
        self.answers = True
        self.tracks: list[FakeRanks] = []
        self.version = 0
        self.station = Station(
            FakePost(rank, boxes),
            world.places,
            say=self.said.append,
            end=self._end if world.ends_all else None,
            end_job=lambda text, has_lost: self.job_ends.append((text, has_lost)),
            stack=lambda ident: f"  line of rank {rank}\n",
            look=world.look_at,
            ask=world.ask,
        )

    def _end(self, tracks: Sequence[int], text: str, late: Sequence[int]) -> None:
        self.ends.append((list(tracks), text, list(late)))

    def add_track(self, settings: Watchdog = SETTINGS, *, is_beside: bool = False) -> None:
        ranks: Any = FakeRanks()
        self.tracks.append(ranks)
        of_agreement: AcrossRanks = ranks
        track = Track(of_agreement, settings, is_beside=is_beside)
        track.add(
            Watched(
                "the late store" if is_beside else "store 1",
                settings,
                calls=lambda: ranks.calls,
                version=lambda: self.version,
                thread=lambda: None,
                beside=lambda: None,
                is_closed=lambda: False,
            )
        )
        self.station.add(track)

    def enter(self, call: str = "push('w')", track: int = 0) -> None:
        """Come to the agreement of a call."""
        ranks = self.tracks[track]
        ranks.call = Call(call, 1, keys=("w", ()) if "push" in call else None)
        ranks.entered += 1
        ranks.calls = (ranks.calls[0] + 1, ranks.calls[1])

    def agree(self, track: int = 0) -> None:
        """Pass it, and go on with the call."""
        self.tracks[track].passed = self.tracks[track].entered

    def leave(self, track: int = 0) -> None:
        """Come out of the call."""
        self.agree(track)
        ranks = self.tracks[track]
        ranks.calls = (ranks.calls[0], ranks.calls[1] + 1)
        self.version += 1


@final
class FakeWorld:
    """Some ranks, which are looked at in turn as if time went by."""

    def __init__(self, size: int, *, ends_all: bool = False, hosts: str = "") -> None:
        self.ends_all = ends_all
        names = hosts or "a" * size
        self.places = [Place(names[rank], 100 + rank, 1, rank) for rank in range(size)]
        self.states = dict.fromkeys(range(size), "S")
        #: The stacks of ranks that leave one when asked, a look later; '' for one that never does.
        self.stacks: dict[int, str] = {}
        self.asked: set[int] = set()
        boxes: list[deque[tuple[int, str]]] = [deque() for _ in range(size)]
        self.ranks = [FakeRank(rank, boxes, self) for rank in range(size)]
        for one in self.ranks:
            one.add_track()

    def look_at(self, place: Place) -> Seen:
        rank = place.pid - 100
        if rank in self.asked and self.states[rank] == "S":  # it runs, and writes its stack
            return Seen("R", "", self.stacks[rank])
        return Seen(self.states[rank], "a_wait", self.stacks[rank] if rank in self.asked else "")

    def ask(self, place: Place) -> bool:
        if place.pid - 100 not in self.stacks:
            return False
        self.asked.add(place.pid - 100)
        return True

    def pass_time(self, span_s: float) -> None:
        for _ in range(round(span_s / LOOK_S)):
            for one in self.ranks:
                if one.answers:
                    one.station.look(LOOK_S)

    def steps(self, count: int) -> None:
        """Let all ranks make as many quick pushes."""
        for _ in range(count):
            for one in self.ranks:
                one.enter()
                one.leave()
            self.pass_time(LOOK_S)

    @property
    def said(self) -> list[str]:
        """What has been said on rank 0."""
        return self.ranks[0].said
