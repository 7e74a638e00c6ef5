"""What the kernel says of another rank's process on this host, which does not answer itself."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from .held import NO_FILE, ask_for_stack, read_stack

GONE: Final = "gone"
_PROC: Final = Path("/proc")
_STARTED: Final = 19  # place of starttime among the fields that follow the command's name


@dataclass(frozen=True)
class Place:
    """Where a rank's process is.

    Attributes
    ----------
    host : str
    pid : int
    started : int
        When, in the kernel's ticks: another process of the same number began later.
    world_rank : int
        Its rank in the whole job.
    file : int, default -1
        Where it leaves its stack if it cannot answer, see `held`; -1 for nowhere.
    """

    host: str
    pid: int
    started: int
    world_rank: int
    file: int = NO_FILE


@dataclass(frozen=True)
class Seen:
    """What the kernel says of a process.

    Attributes
    ----------
    state : str
        The letter in ``/proc/<pid>/stat``, or `GONE`.
    sleeps_in : str
        The kernel's function in which it sleeps, where that may be read; or ``''``.
    stack : str
        Its Python stack, if it has left one; or ``''``.
    """

    state: str
    sleeps_in: str = ""
    stack: str = ""

    @property
    def has_ended(self) -> bool:
        """Whether it will never do anything again."""
        return self.state in (GONE, "Z", "X")

    @property
    def is_stopped(self) -> bool:
        """Whether it does nothing until a signal or a debugger lets it go on."""
        return self.state in ("T", "t")


def own_place(world_rank: int, file: int = NO_FILE) -> Place:
    """Say where this process is."""
    pid = os.getpid()
    return Place(os.uname().nodename, pid, int(_stat(pid)[_STARTED]), world_rank, file)


def look_at(place: Place) -> Seen:
    """Look at a process of this host."""
    try:
        fields = _stat(place.pid)
    except (FileNotFoundError, ProcessLookupError):
        return Seen(GONE)
    except OSError:
        return Seen("?")
    if int(fields[_STARTED]) != place.started:
        return Seen(GONE)
    return Seen(fields[0], _sleeps_in(place.pid), read_stack(place.pid, place.file))


def ask(place: Place) -> bool:
    """Have a process of this host leave its stack; say whether it may be waited for.

    Of a process that `look_at` has just seen: by its number alone it might be another one.
    """
    if place.file == NO_FILE:
        return False
    ask_for_stack(place.pid)
    return True


def _stat(pid: int) -> list[str]:
    """Read the fields that follow the command's name, which may hold anything."""
    return (_PROC / str(pid) / "stat").read_text(errors="replace").rpartition(")")[2].split()


def _sleeps_in(pid: int) -> str:
    try:
        name = (_PROC / str(pid) / "wchan").read_text().strip("\0\n ")
    except OSError:
        return ""
    return "" if name == "0" else name
