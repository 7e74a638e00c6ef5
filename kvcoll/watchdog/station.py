"""How the watchdogs of one group of ranks come to one report; no clock, no MPI, one look at a time.

A rank that has waited for too long tells the lowest rank that answers, rank 0 as a rule. That
one asks all ranks where they stand, has the kernel asked about those that do not answer, and
speaks for all. Rules of the file: a look never waits; time is what passes between looks, so
that a job that is stopped as a whole has waited for nobody when it goes on; what is said to
people is said by the reporter alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, final

from .post import Message, Post
from .processes import Place, Seen, ask, look_at
from .report import Told, words_for
from .reporter import ANSWER_S, DUE, ENDED, LIMIT, Own, Reporter
from .track import LEFT, OUTSIDE, WAITS, Position, Track

_LOOK_FOR_ENDED_S: Final = 1.0
_STACK_S: Final = 0.5  # in which a process that can leave its stack does


@dataclass
class _Notice:
    """A wait of this rank's of which a reporter has to be told."""

    to: int
    until_s: float


@dataclass
class _Look:
    """What a reporter is told of processes of this host, once they have left their stacks."""

    to: int
    number: int
    found: dict[int, Seen]  # before they were asked: one that writes its stack computes
    asked: list[int]
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
    end : callable or None
        Ends the waits of tracks by an error, given their numbers, the report, and the ranks
        that are late; called on all ranks alike. None where that is not possible.
    end_job : callable
        Ends the job instead, given the report, and whether processes have ended by themselves.
    stack : callable
        Gives the Python stack of a thread, by its number.
    elsewhere : callable
        Says where this rank stands in stores of other groups.
    look : callable, optional
        Looks at another rank's process on this host.
    ask : callable, optional
        Has it leave its stack, and says whether it may.
    """

    def __init__(
        self,
        post: Post,
        places: Sequence[Place],
        *,
        say: Callable[[str], None],
        end: Callable[[Sequence[int], str, Sequence[int]], None] | None,
        end_job: Callable[[str, bool], None],
        stack: Callable[[int | None], str],
        elsewhere: Callable[[], list[Position]] = list,
        look: Callable[[Place], Seen] = look_at,
        ask: Callable[[Place], bool] = ask,
    ) -> None:
        self._post, self._places = post, places
        self._rank, self._size = post.rank, post.size
        self._end = end
        self._stack, self._elsewhere, self._look_at = stack, elsewhere, look
        self._ask, self._looks = ask, list[_Look]()
        own = places[self._rank].host
        beside = [r for r, place in enumerate(places) if r != self._rank and place.host == own]
        # Others of this name may be in a container of their own, where numbers mean others.
        self._near = [rank for rank in beside if not look(places[rank]).has_ended]
        self._tracks: dict[int, Track] = {}
        self._n_tracks = 0
        self._now_s = 0.0
        self._notice: _Notice | None = None
        self._quiet_why, self._quiet_until_s = 0, 0.0
        self._asked_by = 0  # last of all
        self._reporter = Reporter(
            Own(
                self._rank,
                places,
                self._near,
                post.reaches_others,
                ends_all=end is not None,
                tell=self._tell,
                say=say,
                end_job=end_job,
                told=self._own,
                limit_s=self._limit_s,
            )
        )
        self._looked_for_ended_s = 0.0

    def add(self, track: Track) -> int:
        """Watch one more order of calls; by the same number on all ranks."""
        number = self._n_tracks
        self._n_tracks += 1
        self._tracks = self._tracks | {number: track}  # the thread may go through the old one
        return number

    def remove_closed(self) -> None:
        """Forget tracks whose stores are all closed, on a communicator that is no more."""
        self._tracks = {n: track for n, track in self._tracks.items() if not track.is_over}

    def end_program(self) -> None:
        """Take note that this rank's program has come to its end."""
        for track in self._tracks.values():
            track.program_ends = True

    def positions(self) -> dict[int, Position]:
        """Say where this rank stands, by track."""
        return {n: t.position() for n, t in self._tracks.items()}

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
                self._tell(self._asked_by, message)
        for rank, message in self._post.receive():
            self._handle(rank, message)
        self._end_looks()
        self._mind_own_waits()
        self._reporter.step(self._now_s)

    # What this rank waits for -----------------------------------------------------------

    def _mind_own_waits(self) -> None:
        why, waits = self._reason()
        heard = why > DUE and why <= self._quiet_why and self._now_s < self._quiet_until_s
        if not waits or heard:
            self._notice = None
            return
        if self._notice is None:
            first = 0 if self._post.reaches_others else self._rank
            self._notice = _Notice(first - 1, self._now_s)
        if self._now_s < self._notice.until_s:
            return
        self._notice.to += 1  # the first rank, or the next one, as this one does not answer
        self._notice.until_s = self._now_s + ANSWER_S
        message = {"kind": "wait", "why": why, "tracks": list(waits)}
        self._tell(self._notice.to, message | {"waited_s": max(waits.values())})

    def _reason(self) -> tuple[int, dict[int, float]]:
        """Say why this rank's waits need a report, and how long they have been, by track."""
        tracks = self._tracks
        waits = {number: track.has_waited() for number, track in tracks.items()}
        beyond = {n: wait_s for n, wait_s in waits.items() if tracks[n].is_beyond_limit()}
        if beyond:
            return LIMIT, beyond
        if self._end is None:  # else MPI itself tells of lost ranks
            long = {n: wait_s for n, wait_s in waits.items() if wait_s > _LOOK_FOR_ENDED_S}
            if long and self._has_seen_ended():
                return ENDED, long
        return DUE, {n: wait_s for n, wait_s in waits.items() if tracks[n].is_due()}

    def _has_seen_ended(self) -> bool:
        """Look now and then whether a rank of this host has ended."""
        if self._now_s < self._looked_for_ended_s + _LOOK_FOR_ENDED_S:
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
            self._reporter.take_notice(source, message, self._now_s)
        elif kind == "heard":
            self._keep_quiet(message["why"])
        elif kind == "ask":
            self._note_asked(source, message["why"])
            self._tell(source, {"kind": "told", "number": message["number"]} | self._own().encode())
        elif kind == "look":
            self._begin_look(source, message["number"], message["ranks"])
        elif kind == "end" and self._end is not None:
            self._end(message["tracks"], message["text"], message["late"])
        elif kind == "said":
            self._take_for_said()
        elif kind == "unsaid":
            self._quiet_why, self._quiet_until_s = 0, 0.0
            for track in self._tracks.values():
                track.was_not_spoken_of()
        elif kind == "over":
            self._reporter.take_over(message["track"], message["after_s"])
        elif kind == "told":
            self._reporter.take_told(source, message)
        else:
            self._reporter.take_seen(source, message)

    def _begin_look(self, to: int, number: int, ranks: list[int]) -> None:
        """Look at processes of this host; again, a look later at least, if one leaves its stack."""
        found = self._look_at_all(ranks)
        able = [rank for rank, one in found.items() if not (one.has_ended or one.is_stopped)]
        asked = [rank for rank in able if self._ask(self._places[rank])]
        if asked:
            self._looks.append(_Look(to, number, found, asked, self._now_s + _STACK_S))
        else:
            self._tell_seen(to, number, found)

    def _end_looks(self) -> None:
        looks, self._looks = self._looks, []
        for one in looks:
            again = self._look_at_all(one.found)
            if self._now_s < one.until_s and not all(again[rank].stack for rank in one.asked):
                self._looks.append(one)
                continue
            found = {
                rank: now if now.has_ended else replace(one.found[rank], stack=now.stack)
                for rank, now in again.items()
            }
            self._tell_seen(one.to, one.number, found)

    def _look_at_all(self, ranks: Collection[int]) -> dict[int, Seen]:
        return {rank: self._look_at(self._places[rank]) for rank in ranks}

    def _tell_seen(self, to: int, number: int, found: dict[int, Seen]) -> None:
        seen = {str(rank): [one.state, one.sleeps_in, one.stack] for rank, one in found.items()}
        self._tell(to, {"kind": "seen", "number": number, "seen": seen})

    def _own(self) -> Told:
        positions = self.positions()
        tracks = sorted(self._tracks.values(), key=lambda track: not track.ranks.is_held)
        idents = [track.thread for track in tracks if track.thread is not None]
        others = [place for place in self._elsewhere() if place.stance not in (OUTSIDE, LEFT)]
        return Told(
            positions,
            self._stack(idents[0] if idents else None),
            tuple(f"{words_for(place)}, over another communicator" for place in others),
            any(place.stance == WAITS for place in others),
        )

    def _keep_quiet(self, why: int) -> None:
        self._notice, self._quiet_why = None, why
        self._quiet_until_s = self._now_s + 3 * ANSWER_S

    def _note_asked(self, reporter: int, why: int) -> None:
        """Take this rank's waits for spoken of, whichever rank they were due on."""
        self._asked_by = reporter
        self._keep_quiet(why)
        self._take_for_said()

    def _take_for_said(self) -> None:
        for track in self._tracks.values():
            track.was_spoken_of()

    def _limit_s(self, tracks: Collection[int]) -> float:
        """Give the shortest hard limit of some tracks."""
        own = [self._tracks[n].settings.limit_s for n in tracks if n in self._tracks]
        return min((limit_s for limit_s in own if limit_s is not None), default=math.inf)
