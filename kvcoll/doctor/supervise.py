"""The doctor itself: gathers facts, lets a child start MPI and measure, and reports.

Rules of the file: this process never starts MPI, so that nothing of MPI can end it or
hold it up; every wait has a limit; rank 0 alone prints the page, the others say on stderr
what has ended them, if rank 0 cannot know.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from threading import Thread
from types import FrameType
from typing import IO, Any, final

from .. import apart
from . import checks, reach
from .facts import Facts, place_in
from .findings import Finding
from .gather import gather
from .notes import Notes, name_of_job
from .seen import Seen

_FOR_NOTES_S = 1.5
# Rank 0 is to print before another rank's end takes it along.
_LATER_S, _LAST_WORDS_S = 10.0, 2.0
_TO_FINISH_S = 5.0
_LOOKS_EVERY_S = 0.5


class _EndedError(Exception):
    """The launcher, or the user, has asked this process to end."""


def examine(limit_s: float, *, quick: bool, show: Callable[[Seen, list[Finding]], None]) -> int:
    """Examine the job of which this process is a rank.

    Parameters
    ----------
    limit_s : float
        How long to wait for other ranks, or for any step.
    quick : bool
        Leave out the push.
    show : callable
        Called on rank 0, once, with what was seen and found.

    Returns
    -------
    int
        The exit code: 0 if all is well.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _end)
    place, notes = place_in(), Notes(name_of_job())
    seen = Seen(size=place.size, limit_s=limit_s)
    rank = None
    try:
        try:
            seen.facts[place.rank] = Facts(rank=place.rank, size=place.size)
            port, token = reach.listen()
            own = gather(place, port=port, token=token)
            seen.facts[place.rank] = own
            notes.leave(own)
            if place.local_rank == 0 and place.size > 1:
                Thread(target=_reach, args=(own, notes), daemon=True).start()
            if place.rank == 0:
                seen.facts = notes.wait(place.size, _FOR_NOTES_S) | seen.facts
            if not _stopped(seen):
                rank = _RankProcess(own, limit_s, quick=quick)
                later_s = _LATER_S if place.rank else 0.0
                for told in rank.tells(
                    limit_s + later_s, partial(_another_failed, notes, place.rank)
                ):
                    seen.take(told)
                _judge(seen, rank)
        except _EndedError:
            if place.rank and not seen.failure:
                return 1  # rank 0 has printed, or has been asked, too
            seen.failure = seen.failure or "the launcher ended this rank"
        if place.rank:
            return _end_as_other(seen, notes, place.rank)
        return _end_as_first(seen, notes, show)
    finally:
        notes.remove(place.rank)
        if rank is not None:
            rank.finish(_TO_FINISH_S if rank.is_done else 0.0)


def _end(number: int, frame: FrameType | None) -> None:
    raise _EndedError


def _stopped(seen: Seen) -> bool:
    """Say on stderr what is wrong already, as MPI may take this process along; stop if it would."""
    found = [one for one in checks.before_start(seen) if one.level == "problem"]
    if min(seen.facts) == 0 and seen.size > 1:
        for one in found:
            print(
                f"kvcoll doctor: before MPI starts: {one.about}: {_first_line(one.what)}",
                file=sys.stderr,
            )
        sys.stderr.flush()
    return any(one.stops for one in found)


def _reach(own: Facts, notes: Notes) -> None:
    """See which hosts are reached, while MPI starts, which may hang for want of it."""
    others = notes.wait(own.size, _FOR_NOTES_S).values()
    leaders = [one for one in others if one.local_rank == 0]
    if len(leaders) > 1:
        notes.leave_reached(own.rank, reach.try_all(own, leaders))


def _another_failed(notes: Notes, rank: int) -> bool:
    """Say on rank 0 whether another rank has left a note that it cannot go on."""
    return rank == 0 and any(one.failure for one in notes.read().values())


def _judge(seen: Seen, rank: _RankProcess) -> None:
    """Say why the child has told no more."""
    if rank.is_done or rank.is_given_up or seen.failure:
        return
    if rank.is_late:
        seen.failure = f"nothing came of {seen.at} within {seen.limit_s:g} s"
    else:
        seen.failure = f"its process ended with {rank.last_words()}"


def _end_as_first(seen: Seen, notes: Notes, show: Callable[[Seen, list[Finding]], None]) -> int:
    """Print the page, if need be with what the others have left in their notes."""
    noted = notes.read()
    if seen.failure or any(one.failure for one in noted.values()):
        seen.facts = noted | seen.facts
        seen.reached = seen.reached or notes.read_reached()
        for rank, one in noted.items():
            if one.failure or one.trial:
                seen.facts[rank] = dataclasses.replace(
                    seen.facts[rank], failure=one.failure, trial=one.trial
                )
        if len(seen.facts) < seen.size and not seen.missing:
            seen.missing = [rank for rank in range(seen.size) if rank not in seen.facts]
    found = checks.all_of(seen)
    show(seen, found)
    return int(any(one.level == "problem" for one in found))


def _end_as_other(seen: Seen, notes: Notes, rank: int) -> int:
    """Leave a note of what went wrong, and time for rank 0 to print."""
    own = seen.facts[rank]
    stops = [one for one in checks.before_start(seen) if one.stops]
    if not seen.failure and not stops:
        return 0
    why = seen.failure or stops[0].what
    notes.leave(dataclasses.replace(own, failure=why))
    with contextlib.suppress(_EndedError):
        time.sleep(_LAST_WORDS_S)
    if seen.failure_kind == "LaunchError":
        return 1  # of which rank 0 says the same
    print(
        f"kvcoll doctor: rank {rank} on {own.host}: {why if notes.are_lost else _first_line(why)}",
        file=sys.stderr,
    )
    return 1


def _first_line(text: str) -> str:
    return text.partition("\n")[0]


@final
class _RankProcess:
    """The child that starts MPI; see `ranks`."""

    def __init__(self, facts: Facts, limit_s: float, *, quick: bool) -> None:
        self.is_done = self.is_late = self.is_given_up = False
        self._said: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (closed in finish)
        self._told, descriptor = os.pipe()
        os.set_inheritable(descriptor, True)
        self._process = subprocess.Popen(
            apart.command("kvcoll.doctor.ranks", str(descriptor)),
            stdin=subprocess.PIPE,
            stdout=self._said,
            stderr=subprocess.STDOUT,
            close_fds=False,  # a launcher may have left open files for MPI
        )
        os.close(descriptor)
        given = {"facts": facts.to_json(), "limit_s": limit_s, "quick": quick}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(given).encode() + b"\n")
        self._process.stdin.flush()

    def tells(self, limit_s: float, give_up: Callable[[], bool]) -> Iterator[dict[str, Any]]:
        """Give what it tells until it is done, ends, is given up, or tells nothing for so long."""
        rest, last_s = b"", time.monotonic()
        with selectors.DefaultSelector() as selector:
            selector.register(self._told, selectors.EVENT_READ)
            while time.monotonic() < last_s + limit_s:
                if not selector.select(min(_LOOKS_EVERY_S, limit_s)):
                    self.is_given_up = give_up()
                    if self.is_given_up:
                        return
                    continue
                data, last_s = os.read(self._told, 1 << 16), time.monotonic()
                if not data:
                    return
                *lines, rest = (rest + data).split(b"\n")
                for line in lines:
                    told = json.loads(line)
                    self.is_done = self.is_done or "done" in told
                    yield told
                if self.is_done:
                    return
        self.is_late = True

    def last_words(self) -> str:
        """Tell how it ended, and what it wrote."""
        self._process.wait()
        self._said.seek(0)
        return apart.how_it_ended(
            self._process.returncode, self._said.read().decode("utf-8", "replace")
        )

    def finish(self, limit_s: float) -> None:
        """Let it end MPI; kill it when late."""
        assert self._process.stdin is not None
        with contextlib.suppress(_EndedError, OSError, subprocess.TimeoutExpired):
            self._process.stdin.close()
            self._process.wait(limit_s)
        self._process.kill()
        with contextlib.suppress(_EndedError):
            self._process.wait()
        os.close(self._told)
        self._said.close()
