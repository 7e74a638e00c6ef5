"""scripts/soak.py: what it draws, what it takes for a failure, and one short run of it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvcoll
from kvcoll.testing import parse

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

import soak_job
import soak_rounds
from soak_rounds import KINDS, PUSHES, Place, Round

SCRIPT = Path(__file__).parents[1] / "scripts" / "soak.py"
pytestmark = pytest.mark.single

PLACE = Place(ranks=4, hosts=2, survives=True)
EXPECTED = "ab" * 16


def rounds(n: int = 60, seed: int = 1) -> list[Round]:
    kinds = soak_rounds.possible(PLACE)
    return [soak_rounds.draw(seed, number, PLACE, kinds, "/folder") for number in range(n)]


def test_rounds_follow_from_seed_and_number_and_every_kind_comes() -> None:
    assert rounds() == rounds()
    assert rounds() != rounds(seed=2)
    assert {one.kind for one in rounds(len(KINDS))} == set(KINDS)
    later = soak_rounds.draw(1, 17, PLACE, soak_rounds.possible(PLACE), "/folder")
    assert later == rounds()[17]


def test_all_faults_can_be_read_and_strike_on_a_rank_that_there_is() -> None:
    for one in rounds(240):
        for fault in parse(one.faults):
            assert fault.rank < PLACE.ranks
            assert fault.push is not None
            assert fault.push <= PUSHES
        assert bool(one.faults) == (one.kind != "undisturbed")


def test_kinds_that_cannot_be_at_a_place_are_left_out() -> None:
    assert "a cable is cut" not in soak_rounds.possible(Place(4, 1, survives=True))
    assert "going on without" not in soak_rounds.possible(Place(4, 2, survives=False))
    assert "a rank is killed" in soak_rounds.possible(Place(1, 1, survives=False))


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_the_shares_of_all_ranks_are_the_gradients_of_one(size: int) -> None:
    (*whole, rows) = soak_job.gradients(7, 3, 0, 1)
    shares = [soak_job.gradients(7, 3, rank, size) for rank in range(size)]
    for k, array in enumerate(whole):
        total = np.sum([np.asarray(share[k], np.float64) for share in shares], 0)
        np.testing.assert_array_equal(total, np.asarray(array, np.float64))
    assert isinstance(rows, kvcoll.RowSparse)
    assert any(np.any(np.asarray(array)) for array in whole)


def test_an_undisturbed_run_depends_on_the_seed_and_the_optimizer() -> None:
    same, other = rounds(1)[0].settings, rounds(1, seed=5)[0].settings
    prints = {soak_rounds.undisturbed(one) for one in (same, same, other)}
    assert len(prints) == 2


def reports(n: int = 4, **changed: Any) -> list[dict[str, Any]]:
    well = {"end": "done", "version": PUSHES, "num_workers": n, "fingerprint": EXPECTED}
    return [{"errors": [], "text": "", **well, **changed} for _ in range(n)]


def one_of(kind: str, is_async: bool | None = None) -> Round:
    return next(
        one
        for one in rounds(400)
        if one.kind == kind and is_async in (None, one.settings.name == "dist_async")
    )


def judged(kind: str, told: list[dict[str, Any]], *, is_well: bool = True, **which: Any) -> str:
    return soak_rounds.problem(one_of(kind, **which), told, EXPECTED, is_well=is_well)


def changed_last(told: list[dict[str, Any]], **changed: Any) -> list[dict[str, Any]]:
    return [*told[:-1], told[-1] | changed]


def test_a_run_that_ends_as_it_should_is_well() -> None:
    assert judged("undisturbed", reports()) == ""
    assert judged("late ranks", reports()) == ""
    assert judged("another shape", reports(errors=["ShapeMismatchError"]), is_async=False) == ""
    assert judged("a flipped bit", reports(errors=["ReplicasDifferError"])) == ""
    assert judged("going on without", reports(3, errors=["RankLostError"]), is_well=False) == ""
    assert judged("a rank is killed", [], is_well=False) == ""
    assert judged("a rank raises", reports(end="RankLeftError"), is_well=False) == ""
    assert judged("another shape", reports(end="ShapeMismatchError"), is_async=True) == ""
    assert judged("a wrong gradient", reports(fingerprint="cd" * 16)) == ""


WRONG: dict[str, tuple[str, Callable[[], list[dict[str, Any]]], str]] = {
    "drift": (
        "late ranks",
        lambda: changed_last(reports(), fingerprint="cd" * 16),
        "the replicas differ at the end",
    ),
    "other values": (
        "late ranks",
        lambda: reports(fingerprint="cd" * 16),
        "not those of an undisturbed run",
    ),
    "drift where the values are not known": (
        "a wrong gradient",
        lambda: changed_last(reports(), fingerprint="cd" * 16),
        "the replicas differ at the end",
    ),
    "a loss": ("late ranks", lambda: reports()[:3], "3 ranks are done of 4"),
    "a push that is missing": ("late ranks", lambda: reports(version=PUSHES - 1), "have made"),
    "no word": ("undisturbed", list, "no rank has said how it ended"),
    "another error": (
        "a rank raises",
        lambda: changed_last(reports(end="RankLeftError"), end="KeyError", text="'w'"),
        "it ended with KeyError: 'w'",
    ),
    "an error out of nothing": (
        "late ranks",
        lambda: reports(end="RanksDisagreeError", text="no"),
        "it ended with RanksDisagreeError: no",
    ),
    "no error where one is due": ("a push left out", reports, "and should have ended with one of"),
    "a rank that was told nothing": (
        "a full disk",
        lambda: changed_last(reports(errors=["FileError"]), errors=[]),
        "not all ranks were told one of ['FileError']",
    ),
}


@pytest.mark.parametrize(("kind", "told", "said"), WRONG.values(), ids=WRONG.keys())
def test_a_run_that_ends_otherwise_is_not(
    kind: str, told: Callable[[], list[dict[str, Any]]], said: str
) -> None:
    assert said in judged(kind, told())


def test_an_exit_code_that_is_not_0_is_a_failure_where_all_ranks_are_done() -> None:
    assert "exit code is not 0" in judged("late ranks", reports(), is_well=False)


def test_settings_come_back_from_the_file_that_a_job_reads() -> None:
    settings = rounds(1)[0].settings
    assert soak_job.Settings(**json.loads(json.dumps(asdict(settings)))) == settings


@pytest.mark.long
@pytest.mark.limit(150)
def test_a_short_run_writes_its_table_and_its_file(comm: object, tmp_path: Path) -> None:
    file = tmp_path / "soak.json"
    arguments = ["--hosts", "1", "--ranks", "2", "--rounds", "3", "--json", str(file)]
    kinds = ["late ranks", "a flipped bit", "a rank is killed"]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments, "--kinds", *kinds],
        capture_output=True,
        text=True,
        timeout=140,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    written = json.loads(file.read_text())
    assert written["failed"] == 0
    assert [one["kind"] for one in written["rounds"]] == kinds
    assert "3 rounds, 0 of them not well" in done.stdout
