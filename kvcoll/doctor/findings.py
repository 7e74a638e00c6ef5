"""What a check finds: fine, worth knowing, or wrong, with its reason and its cure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, TypeAlias

Level: TypeAlias = Literal["ok", "note", "problem"]


@dataclass(frozen=True)
class Finding:
    """One line of the page.

    Attributes
    ----------
    level : {'ok', 'note', 'problem'}
        Only a problem makes the exit code 1.
    about : str
        One or two words.
    what : str
        What is so.
    why : str
        What comes of it.
    cure : str
        What to do, if possible the command to type.
    stops : bool
        Whether MPI cannot be started so, or would take the whole job with it.
    """

    level: Level
    about: str
    what: str
    why: str = ""
    cure: str = ""
    stops: bool = False


def ok(about: str, what: str) -> Finding:
    """Say that something is as it should be."""
    return Finding("ok", about, what)


def note(about: str, what: str, why: str = "", cure: str = "") -> Finding:
    """Say something that is worth knowing, and no mistake."""
    return Finding("note", about, what, why, cure)


def problem(about: str, what: str, why: str, cure: str, *, stops: bool = False) -> Finding:
    """Say what is wrong."""
    return Finding("problem", about, what, why, cure, stops)


def listed(ranks: Iterable[int]) -> str:
    """Name ranks: ``rank 1``, ``ranks 0-2, 5``."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    parts = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    many = len(runs) > 1 or any(len(run) > 1 for run in runs)
    return f"rank{'s' * many} {', '.join(parts)}"


def counted(number: int, word: str) -> str:
    """Count things: ``1 rank``, ``2 ranks``."""
    return f"{number} {word}{'s' * (number != 1)}"
