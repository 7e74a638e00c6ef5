"""From what the ranks tell of themselves to who is late, and to the words for it; pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final, final

from ..agreement import name_ranks
from .processes import GONE, Place, Seen
from .track import ENDS, INSIDE, LEFT, OUTSIDE, UPDATES, WAITS, Position

_SHOWN_STACKS: Final = 4
_SHOWN_RANKS: Final = 16
_STATES: Final = {
    "T": "is stopped by a signal (as by SIGSTOP): kill -CONT {pid} lets it go on",
    "t": "is held by a debugger",
    "D": "waits for a disk or a file server, in the kernel{where}",
    "Z": "has ended without a word",
    "X": "has ended without a word",
    GONE: "has ended without a word: there is no such process any more",
    "R": "computes, in code that lets no other thread of Python run (C code that holds the "
    "interpreter's lock): py-spy dump --native --pid {pid} shows where",
    "S": "sleeps{where}, in code that lets no other thread of Python run (C code that holds the "
    "interpreter's lock): py-spy dump --native --pid {pid} shows where",
}


@dataclass(frozen=True)
class Told:
    """What one rank tells of itself.

    Attributes
    ----------
    positions : mapping of int to Position
        By track.
    stack : str
        Of the thread that calls its stores.
    elsewhere : tuple of str
        What it does in stores that the asking ranks have no part in.
    waits_elsewhere : bool
        Whether it waits in one of those.
    """

    positions: Mapping[int, Position]
    stack: str = ""
    elsewhere: tuple[str, ...] = ()
    waits_elsewhere: bool = False

    @property
    def waits(self) -> bool:
        """Whether it waits for ranks that have not come to a call of a store."""
        own = [place.stance for place in self.positions.values()]
        return WAITS in own or self.waits_elsewhere

    def later(self, by_s: float) -> Told:
        """Give the same as it is after so many seconds in which nothing has moved."""
        moved = {n: replace(p, for_s=p.for_s + by_s) for n, p in self.positions.items()}
        return replace(self, positions=moved)

    def encode(self) -> dict[str, Any]:
        """Give what JSON holds."""
        positions = [[number, place.encode()] for number, place in self.positions.items()]
        return asdict(self) | {"positions": positions}

    @classmethod
    def decode(cls, told: dict[str, Any]) -> Told:
        """Read what `encode` gave."""
        positions = {number: Position.decode(place) for number, place in told["positions"]}
        elsewhere = tuple(told["elsewhere"])
        return cls(positions, told["stack"], elsewhere, told["waits_elsewhere"])


@final
@dataclass(frozen=True)
class Incident:
    """A wait, as all ranks tell of it.

    Attributes
    ----------
    places : sequence of Place
        By rank.
    told : mapping of int to Told
        By rank, of those that have answered.
    tracks : collection of int
        In which somebody waits for too long.
    seen : mapping of int to Seen
        What the kernel says of ranks that have not answered, where one could look.
    can_ask : bool
        Whether the other ranks were asked at all.
    """

    places: Sequence[Place]
    told: Mapping[int, Told]
    tracks: Collection[int]
    seen: Mapping[int, Seen] = field(default_factory=dict)
    can_ask: bool = True

    @property
    def silent(self) -> list[int]:
        """The ranks that were asked, and have not answered."""
        if not self.can_ask:
            return []
        return [rank for rank in range(len(self.places)) if rank not in self.told]

    @property
    def ended(self) -> list[int]:
        """The ranks whose processes have ended."""
        return [rank for rank in self.silent if rank in self.seen and self.seen[rank].has_ended]

    def waiting(self, track: int) -> dict[int, Position]:
        """Give the ranks that have come as far as any, and wait there, with where they stand."""
        places = {rank: told.positions.get(track) for rank, told in sorted(self.told.items())}
        waiting = {rank: place for rank, place in places.items() if place and place.waits}
        furthest = max((place.entered for place in waiting.values()), default=0)
        return {rank: place for rank, place in waiting.items() if place.entered == furthest}

    def late(self, track: int) -> list[int]:
        """Give the ranks that those that wait in a track wait for; none if nobody is behind."""
        waiting = self.waiting(track)
        if not waiting:
            return []
        furthest = next(iter(waiting.values())).entered
        late = set(self.silent)
        for rank, told in self.told.items():
            place = told.positions.get(track)
            if place is None or place.entered < furthest or place.stance == UPDATES:
                late.add(rank)
        if not late:  # all have come, and one has not gone on: in the rest of a call, or away
            late = {r for r, place in waiting.items() if place.stance == INSIDE}
            late = late if len(late) < len(waiting) else set()
        return sorted(late)

    def waited_s(self) -> float:
        """Say how long the longest wait is; 0 if nobody waits any more."""
        waits = [place.for_s for track in self.tracks for place in self.waiting(track).values()]
        return max(waits, default=0.0)

    @property
    def is_at_the_end(self) -> bool:
        """Whether all that wait do so at the end of their programs: then for no limit."""
        places = [place for track in self.tracks for place in self.waiting(track).values()]
        return all(place.stance == ENDS for place in places)

    def all_late(self) -> list[int]:
        """Give the ranks that are late in any of the tracks."""
        return sorted({rank for track in self.tracks for rank in self.late(track)})

    def text(self) -> str:
        """Say who waits for whom, and where those are."""
        heads = [self._headline(track) for track in sorted(self.tracks) if self.waiting(track)]
        lines = heads[:1] + [f"  and {head}" for head in heads[1:]]
        shown = self.all_late() or self._suspects()
        for number, rank in enumerate(shown[:_SHOWN_RANKS]):
            lines += self._lines_of(rank, with_stack=number < _SHOWN_STACKS)
        if len(shown) > _SHOWN_RANKS:
            lines.append(f"  and {len(shown) - _SHOWN_RANKS} other ranks")
        if self._is_circle():
            lines.append(
                "  So they wait for one another: every rank must make the calls of all its stores "
                "in one order"
            )
        return "\n".join(lines)

    def _headline(self, track: int) -> str:
        waiting, late = self.waiting(track), self.late(track)
        ranks = [rank for rank in waiting if rank not in late] or list(waiting)
        place = waiting[ranks[0]]
        longest = max(waiting[rank].for_s for rank in ranks)
        has = "has" if len(ranks) == 1 else "have"
        what = f"in {call_of(place)}"
        if place.stance == ENDS:
            what = f"at the end of {'the program' if len(ranks) == 1 else 'their programs'}"
        head = f"{name_ranks(ranks)} {has} waited {seconds(longest)} {what}"
        if not self.can_ask:
            return (
                f"{head}: which rank is late cannot be asked, as MPI was not started for several "
                "threads (MPI_THREAD_MULTIPLE)"
            )
        if late:
            is_late = "is late" if len(late) == 1 else "are late"
            return f"{head}: {name_ranks(late)} {is_late}"
        return f"{head}: all ranks have come to it, so a rank or the network between hosts is stuck"

    def _is_circle(self) -> bool:
        """Say whether those that are late wait themselves, in a call of another store."""
        late = self.all_late()
        return bool(late) and all(rank in self.told and self.told[rank].waits for rank in late)

    def _suspects(self) -> list[int]:
        """Give ranks whose stacks may tell more where none is behind."""
        return sorted({rank for track in self.tracks for rank in self.waiting(track)})

    def _lines_of(self, rank: int, *, with_stack: bool) -> list[str]:
        place = self.places[rank]
        of_job = f", rank {place.world_rank} of the job" if place.world_rank != rank else ""
        name = f"  rank {rank} (process {place.pid} on {place.host}{of_job})"
        told = self.told.get(rank)
        if told is None:
            line = f"{name} {self._silence(rank)}"
            stack = self.seen[rank].stack if rank in self.seen else ""
        else:
            line, stack = f"{name} {'; '.join(self._doings(told))}", told.stack
        if not with_stack or not stack:
            return [line]
        return [f"{line}. It is at", *("  " + of_stack for of_stack in stack.splitlines())]

    def _doings(self, told: Told) -> list[str]:
        """Say in words what a rank does; what it is late for last, unless it is in that."""
        idle = (OUTSIDE, LEFT)
        busy = [p for p in told.positions.values() if p.stance not in idle]
        away = [p for n, p in told.positions.items() if n in self.tracks and p.stance in idle]
        return [*map(words_for, busy), *told.elsewhere, *map(words_for, away)]

    def _silence(self, rank: int) -> str:
        place, seen = self.places[rank], self.seen.get(rank)
        if seen is None:
            others = [r for r, p in enumerate(self.places) if p.host == place.host and r != rank]
            if any(r in self.told for r in others):
                return "does not answer"
            return (
                f"does not answer, nor does any rank on {place.host}: the host or its network may "
                "be down"
            )
        if seen.state not in _STATES:
            return f"does not answer (its state is {seen.state})"
        where = f" (in {seen.sleeps_in})" if seen.sleeps_in else ""
        said = _STATES[seen.state].format(pid=place.pid, where=where)
        return said if seen.has_ended else f"does not answer: it {said}"


def call_of(place: Position) -> str:
    """Name the call in which a rank is."""
    of = f" of {place.store}" if place.store else ""
    if place.of_push:
        return f"push number {place.version + 1}{of}, {place.call}"
    return f"{place.call or 'a call'}{of}, after {_pushes(place.version)}"


def words_for(place: Position) -> str:
    """Say what a rank does."""
    of = f" of {place.store}" if place.store else ""
    if place.stance == WAITS:
        return f"has waited {seconds(place.for_s)} in {call_of(place)}"
    if place.stance == INSIDE:
        return f"is in the midst of {call_of(place)}, since {seconds(place.for_s)}"
    if place.stance == UPDATES:
        return f"is in the updater of {call_of(place)}, since {seconds(place.for_s)}"
    if place.stance == LEFT:
        return f"has left its stores{of}"
    last = f"; its last was {place.call}" if place.call else ""
    if place.stance == ENDS:
        return f"has come to the end of its program {seconds(place.for_s)} ago{last}"
    store = place.store or "the store"
    return f"has made {_pushes(place.version)}, and is in no call of {store}{last}"


def seconds(span_s: float) -> str:
    """Write a span of time for people."""
    return f"{span_s:.0f} s" if span_s >= 10 else f"{span_s:.1f} s"


def _pushes(n: int) -> str:
    return "1 push" if n == 1 else f"{n} pushes"
