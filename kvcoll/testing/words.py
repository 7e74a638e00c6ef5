"""Faults as the environment writes them; see the head of this package."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from typing import Any, Final

from ..errors import ArgumentError
from .kinds import (
    Cut,
    Delay,
    Fault,
    FillDisk,
    Flip,
    InjectedError,
    Kill,
    Raise,
    Reshape,
    Skip,
    Stop,
    listed,
)

VARIABLE: Final = "KVCOLL_FAULTS"
# For each word its fault, and the field that its value goes to, if it takes one.
_KINDS: Final[dict[str, tuple[type[Fault], str]]] = {
    "delay": (Delay, "seconds"),
    "stop": (Stop, "seconds"),
    "kill": (Kill, ""),
    "raise": (Raise, "error"),
    "skip": (Skip, ""),
    "reshape": (Reshape, ""),
    "flip": (Flip, "what"),
    "fill-disk": (FillDisk, "seconds"),
    "cut": (Cut, "command"),
}
_MUST_SAY: Final = ("delay", "stop", "flip", "cut")
_WHERE: Final[dict[str, Callable[[str], Any]]] = {"rank": int, "push": int, "key": str}
_OF_FLIP: Final[dict[str, Callable[[str], Any]]] = {"element": int, "bit": int}
_READERS: Final[dict[str, Callable[[str], Any]]] = {"seconds": float, "error": InjectedError}


def parse(text: str) -> list[Fault]:
    """Read faults as `KVCOLL_FAULTS` writes them; see the head of this package.

    Raises
    ------
    ArgumentError
        A word is not known, or missing, or its value is none.
    """
    words = shlex.shlex(text, posix=True, punctuation_chars=";")
    words.whitespace_split, words.commenters = True, ""
    parts: list[list[str]] = [[]]
    try:
        for word in words:
            if set(word) == {";"}:
                parts.append([])
            else:
                parts[-1].append(word)
    except ValueError as error:
        raise ArgumentError(f"{VARIABLE}={text!r} cannot be read: {error}") from None
    return [_fault(part) for part in parts if part]


def _fault(words: Sequence[str]) -> Fault:
    """Make a fault of its words."""
    said = " ".join(words)
    fields: dict[str, Any] = {}
    kinds: list[type[Fault]] = []
    for word in words:
        name, _, text = word.partition("=")
        if name in _KINDS:
            kind, field = _KINDS[name]
            kinds.append(kind)
            if (text and not field) or (not text and name in _MUST_SAY):
                raise ArgumentError(f"{VARIABLE}: {word!r} in {said!r}: see help(kvcoll.testing)")
            if text:
                fields[field] = _read(_READERS.get(field, str), word, text, said)
        elif name in _WHERE or name in _OF_FLIP:
            fields[name] = _read((_WHERE | _OF_FLIP)[name], word, text, said)
        else:
            known = [f"{one}=" for one in _WHERE] + [*_KINDS] + [f"{one}=" for one in _OF_FLIP]
            raise ArgumentError(
                f"{VARIABLE}: unknown word {word!r} in {said!r}: known are {listed(known)}"
            )
    if len(kinds) != 1 or "rank" not in fields:
        raise ArgumentError(
            f"{VARIABLE}: {said!r} needs a rank= and one of {listed(list(_KINDS))}; "
            "faults are kept apart by ';'"
        )
    if kinds[0] is not Flip and not _OF_FLIP.keys().isdisjoint(fields):
        raise ArgumentError(f"{VARIABLE}: element= and bit= go with flip=, got {said!r}")
    return kinds[0](**fields)


def _read(reader: Callable[[str], Any], word: str, text: str, said: str) -> Any:
    try:
        return reader(text)
    except ValueError:
        raise ArgumentError(f"{VARIABLE}: {word!r} in {said!r} has no number: give one") from None
