"""When the watchdog speaks, and when it ends a wait: options, and what the environment says."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final, final

from ..errors import ArgumentError

FLOOR_S: Final = 60.0
CEILING_S: Final = 300.0
LIMIT_S: Final = 1800.0
EXIT_CODE: Final = 89
"""With which a job ends whose ranks have waited for longer than `Watchdog.limit_s`."""

_SWITCH: Final = "KVCOLL_WATCHDOG"
_OF_FLOOR, _OF_CEILING, _OF_LIMIT = (
    f"{_SWITCH}_{name}_S" for name in ("FLOOR", "CEILING", "LIMIT")
)
_OF_HELD: Final = f"{_SWITCH}_HELD_STACKS"
_ON, _OFF = ("on", "1", "yes", "true"), ("off", "0", "no", "false")


@final
@dataclass(frozen=True, kw_only=True)
class Watchdog:
    """How long a distributed store's calls may wait for other ranks.

    Parameters
    ----------
    floor_s : float, default 60
        A wait shorter than this is never spoken of.
    ceiling_s : float, default 300
        A wait longer than this is always spoken of. Between the two a push may wait four
        times as long as pushes have been apart so far. For other calls, and for the first
        pushes, it is the ceiling: others wait there for a checkpoint or a compiler.
    limit_s : float or None, default 1800
        After so long every rank that waits raises `LateRankError`, or the job ends; None
        for never.
    held_stacks : bool, default False
        Have the stack also of a rank on which C code holds Python's lock, so that no thread
        of it can answer. It takes the signal SIGURG, unless the program has a handler for
        it; only a late rank that does not answer is sent it, which may cut short a system
        call in which that C code waits.

    Raises
    ------
    ArgumentError
        A number of seconds is not above 0, or the floor is above the ceiling.

    Notes
    -----
    The environment counts for more: ``KVCOLL_WATCHDOG`` (``on`` or ``off``),
    ``KVCOLL_WATCHDOG_FLOOR_S``, ``KVCOLL_WATCHDOG_CEILING_S``,
    ``KVCOLL_WATCHDOG_LIMIT_S`` (a number, or ``off``), and ``KVCOLL_WATCHDOG_HELD_STACKS``
    (``on`` or ``off``).
    """

    floor_s: float = FLOOR_S
    ceiling_s: float = CEILING_S
    limit_s: float | None = LIMIT_S
    held_stacks: bool = False

    def __post_init__(self) -> None:
        for name, value in (("floor_s", self.floor_s), ("ceiling_s", self.ceiling_s)):
            _check_seconds(name, value)
        if self.limit_s is not None:
            _check_seconds("limit_s", self.limit_s)
        if self.floor_s > self.ceiling_s:
            raise ArgumentError(
                f"floor_s must not be above ceiling_s, got {self.floor_s:g} and "
                f"{self.ceiling_s:g}: give both"
            )

    def __str__(self) -> str:
        limit = "None" if self.limit_s is None else f"{self.limit_s:g}"
        held = ", held_stacks=True" if self.held_stacks else ""
        return (
            f"Watchdog(floor_s={self.floor_s:g}, ceiling_s={self.ceiling_s:g}, "
            f"limit_s={limit}{held})"
        )

    @property
    def look_s(self) -> float:
        """How long the watchdog sleeps between two looks."""
        return min(0.25, max(0.02, min(self.floor_s, self.limit_s or math.inf) / 8))


def settled(given: Watchdog | bool, environment: Mapping[str, str]) -> Watchdog | None:
    """Give the settings that count; None for no watchdog.

    Parameters
    ----------
    given : Watchdog or bool
        What `create` was given.
    environment : mapping of str to str

    Raises
    ------
    ArgumentError
        A variable holds something else than it may.
    """
    is_on = _switched(environment, _SWITCH)
    if given is False if is_on is None else not is_on:
        return None
    settings = given if isinstance(given, Watchdog) else Watchdog()
    floor_s, ceiling_s = _seconds(environment, _OF_FLOOR), _seconds(environment, _OF_CEILING)
    # Where one of the two is given it draws the other one along.
    if ceiling_s is None:
        ceiling_s = max(settings.ceiling_s, floor_s or 0.0)
    if floor_s is None:
        floor_s = min(settings.floor_s, ceiling_s)
    held = _switched(environment, _OF_HELD)
    held_stacks = settings.held_stacks if held is None else held
    settings = replace(settings, floor_s=floor_s, ceiling_s=ceiling_s, held_stacks=held_stacks)
    if environment.get(_OF_LIMIT, "").strip().lower() in _OFF:
        return replace(settings, limit_s=None)
    limit_s = _seconds(environment, _OF_LIMIT)
    return settings if limit_s is None else replace(settings, limit_s=limit_s)


def _switched(environment: Mapping[str, str], name: str) -> bool | None:
    """Say whether a variable is on or off; None where it is not set."""
    switch = environment.get(name, "").strip().lower()
    if switch and switch not in _ON + _OFF:
        raise ArgumentError(f"{name} is 'on' or 'off', got {environment[name]!r}")
    return switch in _ON if switch else None


def _seconds(environment: Mapping[str, str], name: str) -> float | None:
    text = environment.get(name, "").strip()
    if not text:
        return None
    try:
        value = float(text)
        _check_seconds(name, value)
    except (ValueError, ArgumentError) as error:
        raise ArgumentError(f"{name} is a number of seconds above 0, got {text!r}") from error
    return value


def _check_seconds(name: str, value: object) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not 0 < value < math.inf:  # type: ignore[operator]
        raise ArgumentError(f"{name} is a number of seconds above 0, got {value!r}")
