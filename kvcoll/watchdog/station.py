"""How the watchdogs of one group of ranks come to one report; no clock, no MPI, one look at a time.

A rank that has waited for too long tells the lowest rank that answers, rank 0 as a rule. That
one asks all ranks where they stand, has the kernel asked about those that do not answer, and
speaks for all. Rules of the file: a look never waits; time is what passes between looks, so
that a job that is stopped as a whole has waited for nobody when it goes on; what is said to
people is said by the reporter alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, final

from ..agreement import name_ranks
from .post import Message, Post
from .processes import Place, Seen, look_at
from .report import Incident, Told, seconds, words_for
from .track import LEFT, OUTSIDE, WAITS, Position, Track

# Why a report is made; the highest counts.
_DUE, _ENDED, _LIMIT = 1, 2, 3
_ANSWER_S: Final = 2.0  # in which a thread that can answer does, on a loaded machine, too
_LOOK_FOR_ENDED_S: Final = 1.0
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
    told: dict[int, Told] = field(default_factory=dict)
    seen: dict[int, Seen] = field(default_factory=dict)
    looking: set[int] = field(
        default_factory=set
    )  # whose ranks the kernel is asked about elsewhere
    is_looking: bool = False


@dataclass
class _Notice:
    """A wait of this rank's of which a reporter has to be told."""

    to: int
    until_s: float


@final
class Station:
    """The watchdog of one rank in one group of ranks.

    Parameters
    ----------
    post : Post
    places : sequence of Place
        Of the ranks' processes.
    say : callable
        Shows a text to people.
    end : callable
        Ends the waits of these tracks: called with their numbers, the report, and the
        ranks that are late. On all ranks alike where `ends_all`, else on the reporter.
    ends_all : bool
        Whether waits end by an error on each rank; else the reporter ends the job.
    stack : callable
        Gives the Python stack of a thread, by its number.
    elsewhere : callable
        Says where this rank stands in stores of other groups.
    look : callable, optional
        Looks at another rank's process on this host.
    """

    def __init__(
        self,
        post: Post,
        places: Sequence[Place],
        *,
        say: Callable[[str], None],
        end: Callable[[Sequence[int], str, Sequence[int]], None],
        ends_all: bool,
        stack: Callable[[int | None], str],
        elsewhere: Callable[[], list[Position]] = list,
        look: Callable[[Place], Seen] = look_at,
    ) -> None:
        self._post, self._places = post, places
        self._rank, self._size = post.rank, post.size
        self._say, self._end, self.ends_all = say, end, ends_all
        self._stack, self._elsewhere, self._look_at = stack, elsewhere, look
        own = places[self._rank].host
        beside = [r for r, place in enumerate(places) if r != self._rank and place.host == own]
        # Others of this name may be in a container of their own, where numbers mean others.
        self._near = [rank for rank in beside if not look(places[rank]).has_ended]
        self._tracks: dict[int, Track] = {}
        self._n_tracks = 0
        self._now_s = 0.0
        self._notice: _Notice | None = None
        self._quiet_why, self._quiet_until_s = 0, 0.0
        self._gathering: _Gathering | None = None
        self._n_gatherings = 0
        self._open: list[int] = []  # the late ranks of an incident that was spoken of
        self._reporter = 0  # who has asked last
        self._looked_for_ended_s = 0.0
        self.program_ends = False

    def add(self, track: Track) -> int:
        """Watch one more order of calls; by the same number on all ranks."""
        number = self._n_tracks
        self._n_tracks += 1
        self._tracks = self._tracks | {number: track}  # the thread may go through the old one
        return number

    def remove_closed(self) -> None:
        """Forget tracks whose stores are all closed, on a communicator that is no more."""
        self._tracks = {n: track for n, track in self._tracks.items() if not track.is_over}

    def positions(self) -> dict[int, Position]:
        """Say where this rank stands, by track."""
        return {n: t.position(ends=self.program_ends) for n, t in self._tracks.items()}

    def look(self, elapsed_s: float) -> None:
        """Take one look: at what the others say, and at what this rank waits for.

        Parameters
        ----------
        elapsed_s : float
            Since the last look.
        """
        self._now_s += elapsed_s
        for number, track in self._tracks.items():
            over_s = track.look(elapsed_s)
            if over_s:
                message = {"kind": "over", "track": number, "after_s": over_s}
                self._tell(self._reporter, message)
        for rank, message in self._post.receive():
            self._handle(rank, message)
        self._mind_own_waits()
        self._go_on_gathering()

    # What this rank waits for -----------------------------------------------------------

    def _mind_own_waits(self) -> None:
        why, numbers = self._reason()
        heard = why > _DUE and why <= self._quiet_why and self._now_s < self._quiet_until_s
        if not why or heard:
            self._notice = None
            return
        if self._notice is None:
            first = 0 if self._post.reaches_others else self._rank
            self._notice = _Notice(first - 1, self._now_s)
        if (
            self._now_s >= self._notice.until_s
        ):  # for the first time, or the last one told is silent
            self._notice.to += 1
            self._notice.until_s = self._now_s + _ANSWER_S
            waited_s = max(self._tracks[n].has_waited() for n in numbers)
            message = {"kind": "wait", "why": why, "tracks": numbers, "waited_s": waited_s}
            self._tell(self._notice.to, message)

    def _reason(self) -> tuple[int, list[int]]:
        """Say why this rank's waits need a report, and which of them."""
        tracks = self._tracks.items()
        beyond = [n for n, track in tracks if track.is_beyond_limit()]
        if beyond:
            return _LIMIT, beyond
        ended = self._has_seen_ended()
        if ended:
            return _ENDED, [n for n, track in tracks if track.has_waited() > _LOOK_FOR_ENDED_S]
        due = [n for n, track in tracks if track.is_due()]
        return (_DUE, due) if due else (0, [])

    def _has_seen_ended(self) -> bool:
        """Look now and then, while this rank waits, whether a rank of its host has ended."""
        if self.ends_all:  # MPI itself tells of lost ranks
            return False
        if self._now_s < self._looked_for_ended_s + _LOOK_FOR_ENDED_S:
            return False
        if not any(t.has_waited() > _LOOK_FOR_ENDED_S for t in self._tracks.values()):
            return False
        if any(self._look_at(self._places[rank]).has_ended for rank in self._near):
            return True
        self._looked_for_ended_s = self._now_s
        return False

    # What ranks tell one another --------------------------------------------------------

    def _tell(self, rank: int, message: Message) -> None:
        if rank == self._rank:
            self._handle(rank, message)
        else:
            self._post.send(rank, message)

    def _handle(self, source: int, message: dict[str, Any]) -> None:
        kind = message["kind"]
        if kind == "wait":
            self._take_notice(source, message)
        elif kind == "heard":
            self._keep_quiet(message["why"])
        elif kind == "ask":
            self._note_asked(source, message["why"])
            self._tell(source, {"kind": "told", "number": message["number"]} | self._own().encode())
        elif kind == "look":
            found = {str(r): self._look_at(self._places[r]) for r in message["ranks"]}
            seen = {rank: [one.state, one.sleeps_in] for rank, one in found.items()}
            self._tell(source, {"kind": "seen", "number": message["number"], "seen": seen})
        elif kind == "end":
            self._end(message["tracks"], message["text"], message["late"])
        elif kind == "said":
            self._take_for_said()
        elif kind == "over":
            self._note_over(message["track"], message["after_s"])
        elif self._gathering is not None and message["number"] == self._gathering.number:
            if kind == "told":
                self._gathering.told[source] = Told.decode(message)
            else:
                self._note_seen(source, message["seen"])

    def _own(self) -> Told:
        positions = self.positions()
        idents = [t.thread for t in self._tracks.values() if t.thread is not None]
        others = [place for place in self._elsewhere() if place.stance not in (OUTSIDE, LEFT)]
        return Told(
            positions,
            self._stack(idents[0] if idents else None),
            tuple(f"{words_for(place)}, over another communicator" for place in others),
            any(place.stance == WAITS for place in others),
        )

    def _keep_quiet(self, why: int) -> None:
        self._notice, self._quiet_why = None, why
        self._quiet_until_s = self._now_s + 3 * _ANSWER_S

    def _note_asked(self, reporter: int, why: int) -> None:
        """Take this rank's waits for spoken of, whichever rank they were due on."""
        self._reporter = reporter
        self._keep_quiet(why)
        self._take_for_said()

    def _take_for_said(self) -> None:
        for track in self._tracks.values():
            track.was_spoken_of()

    # What the reporter does -------------------------------------------------------------

    def _take_notice(self, source: int, message: dict[str, Any]) -> None:
        """Begin to gather what all ranks tell, or go on with it for one more."""
        why, tracks, waited_s = message["why"], set(message["tracks"]), message["waited_s"]
        at = self._gathering
        if at is not None:
            at.why, at.waited_s = max(why, at.why), min(waited_s, at.waited_s)
            at.tracks |= tracks
            self._tell(source, {"kind": "heard", "why": at.why})
            return
        self._n_gatherings += 1
        until_s = self._now_s + (_ANSWER_S if self._post.reaches_others else 0.0)
        at = self._gathering = _Gathering(
            self._n_gatherings, why, tracks, waited_s, self._now_s, until_s
        )
        at.told[self._rank] = self._own()
        self._note_asked(self._rank, why)
        for rank in range(self._size):
            if rank != self._rank:
                self._tell(rank, {"kind": "ask", "number": at.number, "why": why})

    def _go_on_gathering(self) -> None:
        at = self._gathering
        if at is None:
            return
        if not at.is_looking and (len(at.told) == self._size or self._now_s >= at.until_s):
            self._begin_looking(at)
        if at.is_looking and (not at.looking or self._now_s >= at.until_s):
            self._gathering = None
            self._conclude(at)

    def _begin_looking(self, at: _Gathering) -> None:
        """Have the kernel asked about ranks that do not answer, by a rank of their host."""
        at.is_looking, at.until_s = True, self._now_s + _ANSWER_S
        wanted: dict[int, list[int]] = {}
        for rank in range(self._size):
            if rank in at.told:
                continue
            if rank in self._near:
                at.seen[rank] = self._look_at(self._places[rank])
                continue
            host = self._places[rank].host
            near = [r for r in at.told if r != self._rank and self._places[r].host == host]
            if near:
                wanted.setdefault(near[0], []).append(rank)
        at.looking = set(wanted)
        for rank, ranks in wanted.items():
            self._tell(rank, {"kind": "look", "number": at.number, "ranks": ranks})

    def _note_seen(self, source: int, seen: dict[str, list[str]]) -> None:
        if self._gathering is not None:
            found = {int(rank): Seen(*said) for rank, said in seen.items()}
            self._gathering.seen.update(found)
            self._gathering.looking.discard(source)

    def _conclude(self, at: _Gathering) -> None:
        age_s = self._now_s - at.began_s
        told = {rank: one.later(age_s) for rank, one in at.told.items()}
        incident = Incident(
            self._places, told, at.tracks, at.seen, can_ask=self._post.reaches_others
        )
        waited_s = incident.waited_s()
        if waited_s < at.waited_s + age_s - _SLACK_S:
            return  # they go on
        late, text = incident.all_late(), incident.text()
        if at.why == _LIMIT or (incident.ended and not self.ends_all):
            self._end_waits(sorted(at.tracks), text, late)
            return
        self._open = late or [-1]
        for rank in at.told:
            self._tell(rank, {"kind": "said"})
        self._say(f"{text}\n  {self._what_next(at, waited_s)}")

    def _end_waits(self, tracks: list[int], text: str, late: list[int]) -> None:
        self._open = []
        if self.ends_all:
            self._say(text)
            message = {"kind": "end", "tracks": tracks, "text": text, "late": late}
            for rank in range(self._size):
                if rank != self._rank:
                    self._tell(rank, message)
        self._end(tracks, text, late)

    def _what_next(self, at: _Gathering, waited_s: float) -> str:
        own = [self._tracks[n] for n in at.tracks if n in self._tracks]
        limits = [track.settings.limit_s for track in own if track.settings.limit_s is not None]
        limit_s, said = min(limits, default=math.inf), []
        if 2 * waited_s < limit_s:
            said.append(f"after {seconds(2 * waited_s)} this is said again")
        if limits:
            what = "those that wait raise LateRankError" if self.ends_all else "the job ends"
            said.append(f"after {seconds(limit_s)} {what}")
        return f"If it goes on: {', '.join(said)}"

    def _note_over(self, track: int, after_s: float) -> None:
        """Make no report of what is over; say once that what was spoken of is."""
        if self._gathering is not None:
            self._gathering.tracks.discard(track)
        late, self._open = self._open, []
        if late:
            who = f"for {name_ranks(late)} " if late != [-1] else ""
            self._say(f"the wait {who}is over, after {seconds(after_s)}")
