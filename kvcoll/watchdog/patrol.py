"""The one thread of a process that keeps all its watchdogs going, and how it begins and ends.

Rules of the file: the thread sleeps between looks, and never keeps the process from ending;
it is gone before MPI is finalized, and never was there in a child made by fork; what fails in
it is said once and ends it, as a watchdog must do no harm.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, NoReturn, final
from weakref import WeakKeyDictionary

from ..agreement import AcrossRanks
from ..errors import LateRankError, text_of
from ..transport.lifeline import LOST_CODE
from ..transport.losses import Losses
from .held import NO_FILE, HeldStack
from .post import MpiPost, NoPost, Post, introduce
from .processes import own_place
from .settings import EXIT_CODE
from .stacks import stack_of
from .station import Station
from .track import Position, Track

if TYPE_CHECKING:
    from mpi4py import MPI

_MOST_S: Final = 1.0  # that a look counts: a process that was stopped has not waited
_TO_END_S: Final = 2.0
_TO_BE_READ_S: Final = 1.0  # what a launcher needs to pass on what was said
_ABORT_S: Final = 5.0  # beyond that, MPI_Abort itself is taken to be stuck


@final
class Watch:
    """The watchdog of a group of ranks in this process.

    Parameters
    ----------
    comm : mpi4py.MPI.Intracomm or None
        The watchdog's own duplicate; None where MPI was not started for several threads.
    like : mpi4py.MPI.Intracomm
        Of the same ranks: that of a link.
    mpi : module
        ``mpi4py.MPI``.
    survives : bool
        Whether a wait can be ended by an error.
    """

    def __init__(
        self, comm: MPI.Intracomm | None, like: MPI.Intracomm, mpi: Any, *, survives: bool
    ) -> None:
        self._mpi, self._has_threads = mpi, comm is not None
        self.group = like.Get_group()
        self._losses: dict[int, Losses] = {}
        post: Post
        if comm is None:
            post = NoPost(like.rank, like.size)
            places = [own_place(mpi.COMM_WORLD.rank)] * like.size
        else:
            post = MpiPost(comm, mpi)
            # Over the link's, which is revoked if a rank is lost meanwhile; the other never is.
            file = NO_FILE if _held is None else _held.file
            places = introduce(like, mpi.COMM_WORLD.rank, file)
        self._name = "kvcoll: "
        if post.rank and post.reaches_others:
            self._name += f"(rank {post.rank} says this, as no rank before it answers) "
        self.station = Station(
            post,
            places,
            say=self._say,
            end=self._end if survives and comm is not None else None,
            end_job=self._end_job,
            stack=stack_of,
            elsewhere=self._elsewhere,
        )

    def add(self, track: Track, losses: Losses) -> None:
        """Watch one more order of calls."""
        self.station.remove_closed()
        self._losses[self.station.add(track)] = losses

    def _say(self, text: str) -> None:
        print(f"{self._name}{text}", file=sys.stderr, flush=True)

    def _end(self, tracks: Sequence[int], text: str, late: Sequence[int]) -> None:
        for number in tracks:
            if number in self._losses:
                self._losses[number].alarm.sound(LateRankError(text, late))

    def _end_job(self, text: str, has_lost: bool) -> NoReturn:
        code = LOST_CODE if has_lost else EXIT_CODE
        timer = threading.Timer(_ABORT_S, os._exit, [code])
        timer.daemon = True
        timer.start()
        self._say(f"{text}\n  The job ends here, with exit code {code}")
        time.sleep(_TO_BE_READ_S)
        if self._has_threads:
            self._mpi.COMM_WORLD.Abort(code)
        os._exit(code)

    def _elsewhere(self) -> list[Position]:
        others = [watch.station for watch in _watches if watch is not self]
        return [place for station in others for place in station.positions().values()]


_watches: list[Watch] = []
_tracks: WeakKeyDictionary[AcrossRanks, Track] = WeakKeyDictionary()
_thread: threading.Thread | None = None
_stop = threading.Event()
_look_s = 1.0
_held: HeldStack | None = None
_ready: Callable[[], None] | None = None


def watch(
    comm: MPI.Intracomm,
    losses: Losses,
    track: Track,
    duplicate: Callable[[], MPI.Intracomm] | None,
    mpi: Any,
    ready: Callable[[], None],
) -> None:
    """Watch a link's calls from now on; collective.

    Parameters
    ----------
    comm : mpi4py.MPI.Intracomm
    losses : Losses
    track : Track
    duplicate : callable or None
        Duplicates `comm`; None where MPI was not started for several threads.
    mpi : module
        ``mpi4py.MPI``.
    ready : callable
        Is called in the thread before it calls MPI.

    Notes
    -----
    All communicators of the same ranks in the same order (MPI_Group_compare) have one
    watchdog, which is never given back: what is under way in it when a store is closed
    might come out in another communicator.
    """
    global _look_s, _held, _ready
    if track.settings.held_stacks and _held is None:
        with suppress(OSError):  # memfd_create is not allowed: then without such stacks
            _held = HeldStack()
            if not _held.begin():
                _held.close()
                _held = None
    group = comm.Get_group()
    known = [w for w in _watches if mpi.Group.Compare(w.group, group) == mpi.IDENT]
    group.Free()
    if known:
        own = known[0]
    else:
        own = Watch(duplicate() if duplicate else None, comm, mpi, survives=losses.survives)
        _watches.append(own)
    own.add(track, losses)
    _tracks[track.ranks] = track
    _ready = ready
    _look_s = min(_look_s, track.settings.look_s)
    start()


def track_of(ranks: AcrossRanks) -> Track | None:
    """Give the track of a link's agreements, if they are watched."""
    return _tracks.get(ranks)


def program_ends() -> None:
    """Tell those who ask that this rank's program has come to its end."""
    for one in _watches:
        one.station.end_program()


def start() -> None:
    """Begin to look, if nobody does."""
    global _thread
    if _thread is not None:
        return
    _stop.clear()
    _thread = threading.Thread(target=_run, name="kvcoll-watchdog", daemon=True)
    try:
        _thread.start()
    except RuntimeError as error:  # no more threads are allowed: the others have made the store
        _say_ended(error)


def stop() -> None:
    """End the thread, and wait until it has ended, but not for long."""
    global _thread
    thread, _thread = _thread, None
    _stop.set()
    if thread is not None and thread is not threading.current_thread():
        thread.join(_TO_END_S)


def forget() -> None:
    """Have no watchdogs: in a child made by fork they are its parent's."""
    global _thread, _stop, _held
    _thread, _stop, _held = None, threading.Event(), None
    _watches.clear()
    _tracks.clear()


def _run() -> None:
    before_s = time.monotonic()
    if _held is not None:
        _held.begin()
    try:
        while not _stop.wait(_look_s):
            now_s = time.monotonic()
            if _ready is not None:
                _ready()
            for one in list(_watches):
                one.station.look(min(now_s - before_s, _MOST_S))
            before_s = now_s
            if _held is not None:
                _held.clear()
    except Exception as error:  # whatever it is: training goes on without a watchdog
        _say_ended(error)
    if _held is not None:
        _held.end()


def _say_ended(error: Exception) -> None:
    said = f"{type(error).__name__}: {text_of(error)}"
    print(f"kvcoll: this rank has no watchdog any more: {said}", file=sys.stderr)
