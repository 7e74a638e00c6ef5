"""The reporter of a group of ranks: gathers what all of them tell, and speaks for all.

Rules of the file: a step never waits; who does not answer in time is asked about at the
kernel of its host; what is over by the time that all is known is not spoken of.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, final

from ..agreement import name_ranks
from .post import Message
from .processes import Place, Seen
from .report import Incident, Told, seconds

# Why a report is made; the highest counts.
DUE, ENDED, LIMIT = 1, 2, 3
ANSWER_S: Final = 2.0  # in which a thread that can answer does, on a loaded machine, too
_SLACK_S: Final = 1e-3  # of sums of floats


@dataclass
class _Gathering:
    """A report that is being made."""

    number: int
    why: int
    tracks: set[int]
    waited_s: float  # for so long somebody has waited when it began
    began_s: float
    until_s: float
    sources: set[int]  # whose notices it is made for
    told: dict[int, Told] = field(default_factory=dict)
    seen: dict[int, Seen] = field(default_factory=dict)
    looking: set[int] = field(default_factory=set)  # who look at ranks of their hosts
    is_looking: bool = False


@dataclass(frozen=True)
class Own:
    """What a reporter needs of its own rank's watchdog.

    Attributes
    ----------
    rank : int
    places : sequence of Place
        Of all ranks.
    near : sequence of int
        The other ranks whose processes it can look at.
    reaches_others : bool
    ends_all : bool
        Whether waits end by an error on each rank; else the job ends.
    tell : callable
        Sends a message to a rank, itself included.
    say : callable
        Shows a text to people.
    end_job : callable
        Ends the job, given the report, and whether processes have ended by themselves.
    told : callable
        Gives what this rank tells of itself.
    limit_s : callable
        Gives the shortest hard limit of tracks.
    """

    rank: int
    places: Sequence[Place]
    near: Sequence[int]
    reaches_others: bool
    ends_all: bool
    tell: Callable[[int, Message], None]
    say: Callable[[str], None]
    end_job: Callable[[str, bool], None]
    told: Callable[[], Told]
    limit_s: Callable[[Collection[int]], float]


@final
class Reporter:
    """Makes the reports of which this rank was told that they are needed.

    Parameters
    ----------
    own : Own
    """

    def __init__(self, own: Own) -> None:
        self._own = own
        self._ranks = range(len(own.places))
        self._at: _Gathering | None = None
        self._n_gatherings = 0
        self._open: list[int] | None = None  # the late ranks of what was spoken of

    def take_notice(self, source: int, message: dict[str, Any], now_s: float) -> None:
        """Begin to gather what all ranks tell, or go on with it for one rank more."""
        why, tracks, waited_s = message["why"], set(message["tracks"]), message["waited_s"]
        own, at = self._own, self._at
        if at is not None:
            at.why, at.waited_s = max(why, at.why), min(waited_s, at.waited_s)
            at.tracks |= tracks
            at.sources.add(source)
            own.tell(source, {"kind": "heard", "why": at.why})
            return
        self._n_gatherings += 1
        until_s = now_s + (ANSWER_S if own.reaches_others else 0.0)
        self._at = _Gathering(self._n_gatherings, why, tracks, waited_s, now_s, until_s, {source})
        for rank in self._ranks:
            own.tell(rank, {"kind": "ask", "number": self._n_gatherings, "why": why})

    def take_told(self, source: int, message: dict[str, Any]) -> None:
        """Keep what a rank tells of itself."""
        if self._at is not None and message["number"] == self._at.number:
            self._at.told[source] = Told.decode(message)

    def take_seen(self, source: int, message: dict[str, Any]) -> None:
        """Keep what a rank has seen of others of its host."""
        if self._at is not None and message["number"] == self._at.number:
            found = {int(rank): Seen(*said) for rank, said in message["seen"].items()}
            self._at.seen.update(found)
            self._at.looking.discard(source)

    def take_over(self, track: int, after_s: float) -> None:
        """Make no report of what is over; say once that what was spoken of is."""
        if self._at is not None and track in self._at.tracks:
            self._at = None  # what was told is of before
            self._let_speak(self._ranks)
        late, self._open = self._open, None
        if late is not None:
            who = f"for {name_ranks(late)} " if late else ""
            self._own.say(f"the wait {who}is over, after {seconds(after_s)}")

    def step(self, now_s: float) -> None:
        """Go on with the report that is being made, if there is one."""
        at = self._at
        if at is None:
            return
        if not at.is_looking and (len(at.told) == len(self._ranks) or now_s >= at.until_s):
            self._begin_looking(at, now_s)
        if at.is_looking and (not at.looking or now_s >= at.until_s):
            self._at = None
            self._conclude(at, now_s)

    def _begin_looking(self, at: _Gathering, now_s: float) -> None:
        """Have ranks that do not answer looked at, each by a rank of its host."""
        at.is_looking, at.until_s = True, now_s + ANSWER_S
        places, wanted = self._own.places, dict[int, list[int]]()
        for rank in self._ranks:
            if rank in at.told:
                continue
            if rank in self._own.near:
                near = [self._own.rank]
            else:
                others = [r for r in at.told if r != self._own.rank]
                near = [r for r in others if places[r].host == places[rank].host]
            if near:
                wanted.setdefault(near[0], []).append(rank)
        at.looking = set(wanted)
        for rank, ranks in wanted.items():
            self._own.tell(rank, {"kind": "look", "number": at.number, "ranks": ranks})

    def _conclude(self, at: _Gathering, now_s: float) -> None:
        own, age_s = self._own, now_s - at.began_s
        told = {rank: one.later(age_s) for rank, one in at.told.items()}
        tracks = at.tracks | _also_waited_for(told, at.waited_s / 2)
        incident = Incident(own.places, told, tracks, at.seen, can_ask=own.reaches_others)
        waited_s = incident.waited_s()
        if waited_s < at.waited_s + age_s - _SLACK_S:
            # They go on; or those that gave notice are in the midst of a call, and others, who
            # wait for them, have not done so for as long: these may speak when they have.
            self._let_speak(told.keys() - at.sources)
            return
        late, text = incident.all_late(), incident.text()
        if at.why == LIMIT or (incident.ended and not own.ends_all):
            self._end_waits(incident, text, late)
            return
        self._open = late
        for rank in at.told:
            own.tell(rank, {"kind": "said"})
        own.say(f"{text}\n  {self._what_next(incident, waited_s)}")

    def _let_speak(self, ranks: Collection[int]) -> None:
        """Have ranks give notice again that were asked for a report which is not made."""
        for rank in ranks:
            self._own.tell(rank, {"kind": "unsaid"})

    def _end_waits(self, incident: Incident, text: str, late: list[int]) -> None:
        self._open = None
        if not self._own.ends_all:
            self._own.end_job(text, bool(incident.ended))
            return
        self._own.say(text)
        tracks = sorted(incident.tracks)
        for rank in self._ranks:
            self._own.tell(rank, {"kind": "end", "tracks": tracks, "text": text, "late": late})

    def _what_next(self, incident: Incident, waited_s: float) -> str:
        limit_s = math.inf if incident.is_at_the_end else self._own.limit_s(incident.tracks)
        said = []
        if 2 * waited_s < limit_s:
            said.append(f"after {seconds(2 * waited_s)} this is said again")
        if limit_s < math.inf:
            what = "those that wait raise LateRankError" if self._own.ends_all else "the job ends"
            said.append(f"after {seconds(limit_s)} {what}")
        return f"If it goes on: {', '.join(said)}"


def _also_waited_for(told: Mapping[int, Told], from_s: float) -> set[int]:
    """Give the tracks in which somebody has waited for so long: all of it is one matter."""
    return {
        number
        for one in told.values()
        for number, place in one.positions.items()
        if place.waits and place.for_s >= from_s
    }
