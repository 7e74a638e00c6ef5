"""What a round of the soak does and must end in, drawn from a seed.

Rules of the file: a round depends on the seed and its number alone, so that it can be run again;
nothing is started here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import soak_job

import kvcoll

PUSHES: Final = 30
SAVE_EVERY: Final = 5
_OPTIMIZERS: Final[tuple[dict[str, Any], ...]] = (
    {"optimizer": "sgd", "learning_rate": 0.125, "momentum": 0.5, "multi_precision": True},
    {"optimizer": "adam", "learning_rate": 0.01, "multi_precision": True},
)
_ASYNC: Final = "dist_async"
_CUT: Final = "cut='ip link set eth0 down'"


@dataclass(frozen=True)
class Round:
    """One round.

    Attributes
    ----------
    number : int
    kind : str
        Of `KINDS`.
    settings : soak_job.Settings
    faults : str
        For `KVCOLL_FAULTS`.
    ends : frozenset of str
        With which errors the job may end, to be resumed from its checkpoint; if it is
        empty the job must come to its end.
    may_end : frozenset of str
        The same, but it may as well come to its end.
    told : frozenset of str
        Errors that a rank that comes to the end must have gone on after, one of them at least.
    survives : bool
        Whether the job goes on without ranks that are lost.
    is_known : bool
        Whether the values at the end are those of an undisturbed run.
    """

    number: int
    kind: str
    settings: soak_job.Settings
    faults: str
    ends: frozenset[str] = frozenset()
    may_end: frozenset[str] = frozenset()
    told: frozenset[str] = frozenset()
    survives: bool = False
    is_known: bool = True

    @property
    def store(self) -> str:
        """The store, for people."""
        options = self.settings.options
        shown = [self.settings.name, *(f"{name}={options[name]}" for name in options)]
        return " ".join(shown)


@dataclass(frozen=True)
class Place:
    """Where rounds run: `survives` says whether an MPI can go on without a rank."""

    ranks: int
    hosts: int
    survives: bool


class _Draw:
    """The dice of one round."""

    def __init__(self, seed: int, number: int, place: Place) -> None:
        self._dice = np.random.default_rng((seed, number))
        self.place = place
        self.seed = seed * 100_003 + number

    def of(self, choices: Sequence[Any]) -> Any:
        """Give one of them."""
        return choices[int(self._dice.integers(len(choices)))]

    def where(self, last: int = PUSHES) -> str:
        """Give a rank and a push."""
        push = int(self._dice.integers(1, last + 1))
        return f"rank={self.of(range(self.place.ranks))} push={push}"

    def seconds(self, most_s: float) -> str:
        """Give a time."""
        return f"{self._dice.uniform(0.05, most_s):.2f}"

    def delays(self) -> list[str]:
        """Give faults that change nothing, often none."""
        n = self.of((0, 0, 1, 2))
        return [f"{self.where()} delay={self.seconds(0.3)}" for _ in range(n)]

    def options(self) -> tuple[str, dict[str, Any]]:
        """Give a store."""
        name = self.of(("dist_sync", "dist_sync", _ASYNC))
        options: dict[str, Any] = {}
        if name == _ASYNC:
            options["staleness"] = self.of((1, 2, 3))
        elif self.of((False, True)):
            options["overlap"] = "always"
        if self.of((False, False, True)):
            options["reproducible"] = True
        if self.of((False, True)):
            options["verify_every"] = self.of((1, 4, 7))
        return name, options


# For each kind: what strikes, and what else than the defaults is so of its round.
def _undisturbed(_: _Draw) -> tuple[list[str], dict[str, Any]]:
    return [], {}


def _late(draw: _Draw) -> tuple[list[str], dict[str, Any]]:
    kinds = ("delay", "stop")
    n = draw.of((1, 2, 3))
    return [f"{draw.where()} {draw.of(kinds)}={draw.seconds(1.0)}" for _ in range(n)], {}


def _other_shape(draw: _Draw) -> tuple[list[str], dict[str, Any]]:
    key = draw.of(soak_job.KEYS)
    return [f"{draw.where()} key={key} reshape"], {
        "ends_if_async": {"ShapeMismatchError"},
        "told": {"ShapeMismatchError"},
    }


def _raises(draw: _Draw) -> tuple[list[str], dict[str, Any]]:
    return [f"{draw.where()} raise='bad batch'"], {"ends": {"InjectedError", "RankLeftError"}}


def _left_out(draw: _Draw) -> tuple[list[str], dict[str, Any]]:
    return [f"{draw.where()} skip"], {
        "counts": True,
        "ends": {"RanksDisagreeError", "RankLeftError"},
    }


def _done_again(draw: _Draw) -> tuple[list[str], dict[str, Any]]:
    return [f"{draw.where()} skip"], {}


def _flipped(draw: _Draw) -> tuple[list[str], dict[str, Any]]:
    # The value of a key of 16 bits is made anew of its master copy at each push.
    key = draw.of([key for key in soak_job.KEYS if key != "half"])
    what, element = draw.of(("replica", "replica", "state")), draw.of(range(33))
    fault = f"{draw.where()} key={key} flip={what} element={element}"
    return [fault], {
        "verify_every": draw.of((1, 2, 4)),
        "repairs": draw.place.ranks > 2 and draw.of((False, True)),
        "may_end": {"ReplicasDifferError"},
    }


def _wrong_gradient(draw: _Draw) -> tuple[list[str], dict[str, Any]]:
    return [f"{draw.where()} key=weight flip=gradient element=7"], {"is_known": False}


def _full_disk(draw: _Draw) -> tuple[list[str], dict[str, Any]]:
    # So small a checkpoint is rank 0's to write.
    push = draw.of(range(1, PUSHES - SAVE_EVERY))
    return [f"rank=0 push={push} fill-disk"], {"told": {"FileError"}}


def _killed(draw: _Draw) -> tuple[list[str], dict[str, Any]]:
    return [f"{draw.where()} kill"], {"ends": {"RankLostError", "RankLeftError", "WaitEndedError"}}


def _lost(draw: _Draw) -> tuple[list[str], dict[str, Any]]:
    n = draw.of((1, 1, 2)) if draw.place.ranks > 2 else 1
    ranks = [draw.of(range(draw.place.ranks))]
    ranks += [(ranks[0] + 1) % draw.place.ranks] * (n - 1)  # one of them is left
    return [f"rank={rank} push={draw.of(range(1, PUSHES - 1))} kill" for rank in ranks], {
        "elastic": True,
        "told": {"RankLostError"},
    }


def _cut_off(draw: _Draw) -> tuple[list[str], dict[str, Any]]:
    last = draw.place.ranks - 1  # on the last host: the launcher is on the first
    push = draw.of(range(1, PUSHES))
    return [f"rank={last} push={push} {_CUT}"], {
        "ends": {"RankLostError", "LateRankError", "WaitEndedError", "RankLeftError"}
    }


KINDS: Final[Mapping[str, Callable[[_Draw], tuple[list[str], dict[str, Any]]]]] = {
    "undisturbed": _undisturbed,
    "late ranks": _late,
    "another shape": _other_shape,
    "a rank raises": _raises,
    "a push left out": _left_out,
    "a push done again": _done_again,
    "a flipped bit": _flipped,
    "a wrong gradient": _wrong_gradient,
    "a full disk": _full_disk,
    "a rank is killed": _killed,
    "going on without": _lost,
    "a cable is cut": _cut_off,
}


def possible(place: Place) -> list[str]:
    """Give the kinds that there can be at a place."""
    left_out = set()
    if place.ranks == 1:
        left_out |= {"a rank raises", "a push left out", "going on without", "a flipped bit"}
    if not place.survives:
        left_out.add("going on without")
    if place.hosts == 1:
        left_out.add("a cable is cut")
    return [kind for kind in KINDS if kind not in left_out]


def draw(seed: int, number: int, place: Place, kinds: Sequence[str], folder: str) -> Round:
    """Draw a round; the kinds come in turn, so that each has come before one comes again."""
    dice = _Draw(seed, number, place)
    kind = kinds[number % len(kinds)]
    faults, said = KINDS[kind](dice)
    name, options = dice.options()
    for option in ("verify_every", "elastic"):
        if option in said:
            options[option] = said[option]
    settings = soak_job.Settings(
        seed=dice.seed,
        name=name,
        options=options,
        optimizer=dict(dice.of(_OPTIMIZERS)),
        pushes=PUSHES,
        save_every=SAVE_EVERY,
        repairs=bool(said.get("repairs")),
        counts=bool(said.get("counts")),
        folder=folder,
    )
    ends = set(said.get("ends", ()))
    if name == _ASYNC:
        ends |= set(said.get("ends_if_async", ()))
    return Round(
        number=number,
        kind=kind,
        settings=settings,
        faults="; ".join(faults + (dice.delays() if faults else [])),
        ends=frozenset(ends),
        told=frozenset(said.get("told", ())),
        may_end=frozenset(said.get("may_end", ())),
        survives=bool(said.get("elastic")),
        is_known=bool(said.get("is_known", True)),
    )


def undisturbed(settings: soak_job.Settings) -> str:
    """Train as the round does, in this process and without faults; give the fingerprint."""
    with kvcoll.create("local") as kv:
        kv.init(soak_job.KEYS, soak_job.first_values())
        kv.set_optimizer(**settings.optimizer)
        for step in range(settings.pushes):
            kv.push(soak_job.KEYS, soak_job.gradients(settings.seed, step, 0, 1))
        return kv.verify()


def problem(
    round_: Round, reports: Sequence[Mapping[str, Any]], expected: str, *, is_well: bool
) -> str:
    """Say what is wrong with a job that has ended, or ``''``.

    Parameters
    ----------
    round_ : Round
    reports : sequence of mapping
        Of those ranks that have left one, as `soak_job.Report`.
    expected : str
        The fingerprint of an undisturbed run.
    is_well : bool
        Whether the job has ended with exit code 0; only where none of its ranks is lost must it.
    """
    ends = {report["end"] for report in reports}
    if ends - {"done"}:
        return _unexpected_end(round_, reports)
    if not reports:
        return "" if round_.ends else "no rank has said how it ended"
    if round_.ends:
        return f"it was done, and should have ended with one of {sorted(round_.ends)}"
    if not is_well and not round_.survives:
        return "all was done, but the exit code is not 0"
    if {report["num_workers"] for report in reports} != {len(reports)}:
        return f"{len(reports)} ranks are done of {reports[0]['num_workers']}"
    if {report["version"] for report in reports} != {PUSHES}:
        return f"not all ranks have made {PUSHES} pushes"
    prints = {report["fingerprint"] for report in reports}
    if len(prints) > 1:
        return f"the replicas differ at the end: {sorted(prints)}"
    if round_.is_known and prints != {expected}:
        return f"the values are not those of an undisturbed run: {sorted(prints)}, {expected}"
    if round_.told and not all(round_.told & set(report["errors"]) for report in reports):
        return f"not all ranks were told one of {sorted(round_.told)}"
    return ""


def _unexpected_end(round_: Round, reports: Sequence[Mapping[str, Any]]) -> str:
    allowed = round_.ends | round_.may_end
    if not allowed:
        shown = [f"{r['end']}: {r['text']}" for r in reports if r["end"] != "done"]
        return f"it ended with {shown[0]}"
    for report in reports:
        if report["end"] not in allowed | {"done"}:
            return f"it ended with {report['end']}: {report['text']}"
    return ""
