"""The tutorial of the semantics, step by step, with the values that each step must give."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from one_process import DEVICE, LOCAL

import kvcoll

Array = npt.NDArray[Any]
SHAPE = (2, 3)


def update(key: int | str, input: Array, stored: Array) -> None:
    """Do what the tutorial's updater does, with its print."""
    print(f"update on key: {key}")
    stored += input * 2


@pytest.mark.parametrize("name", [LOCAL, DEVICE, "dist", "dist_sync"])
def test_each_step_of_the_tutorial_gives_what_it_says(
    name: str, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    if name.startswith("dist"):
        request.getfixturevalue("comm")
    ones = np.ones(SHAPE, np.float32)
    a = np.zeros(SHAPE, np.float32)

    with kvcoll.create(name) as kv:
        n = kv.num_workers  # every rank pushes the same, so each sum is n times one rank's

        def pulled(key: int = 3) -> float:
            a[...] = -1
            kv.pull(key, out=a)
            np.testing.assert_array_equal(a, np.full(SHAPE, a[0, 0]))
            return float(a[0, 0])

        kv.init(3, ones * 2)
        assert pulled() == 2  # rank 0's value, not a sum
        kv.push(3, ones * 8)
        assert pulled() == 8 * n
        kv.push(3, [ones] * 4)
        assert pulled() == 4 * n

        kv._set_updater(update)
        assert pulled() == 4 * n
        assert capsys.readouterr().out == ""
        kv.push(3, ones)
        assert pulled() == 4 * n + 2 * n
        assert capsys.readouterr().out == "update on key: 3\n"

        four = [np.zeros(SHAPE, np.float32) for _ in range(4)]
        kv.pull(3, out=four)
        for one in four:
            np.testing.assert_array_equal(one, np.full(SHAPE, 6 * n))

        kv.init([5, 7, 9], [ones] * 3)
        kv.push([5, 7, 9], [ones] * 3)
        b = [np.zeros(SHAPE, np.float32) for _ in range(3)]
        kv.pull([5, 7, 9], out=b)
        for one in b:
            np.testing.assert_array_equal(one, np.full(SHAPE, 1 + 2 * n))
        expected = "update on key: 5\nupdate on key: 7\nupdate on key: 9\n"
        assert capsys.readouterr().out == expected

        kv.push([5, 7, 9], [[ones] * 4] * 3)
        out = [[np.zeros(SHAPE, np.float32) for _ in range(4)] for _ in range(3)]
        kv.pull([5, 7, 9], out=out)
        for row in out:
            for one in row:
                np.testing.assert_array_equal(one, np.full(SHAPE, 1 + 2 * n + 8 * n))
        assert capsys.readouterr().out == expected  # once a key, however long its list

    assert (np.ones(SHAPE, np.float32) == ones).all()  # no call has changed what it was given


@pytest.mark.ranks(exactly=1)
def test_the_figures_of_the_table_are_those_of_one_rank() -> None:
    with kvcoll.create() as kv:
        ones = np.ones(SHAPE, np.float32)
        seen = []
        kv.init(3, ones * 2)
        seen.append(kv.pull(3))
        for value in (ones * 8, [ones] * 4):
            kv.push(3, value)
            seen.append(kv.pull(3))
        kv._set_updater(update)
        kv.push(3, ones)
        seen.append(kv.pull(3))
        kv.init(5, ones)
        for value in (ones, [ones] * 4):
            kv.push(5, value)
            seen.append(kv.pull(5))
        assert [float(one[1, 2]) for one in seen] == [2, 8, 4, 6, 3, 11]


@pytest.mark.ranks(exactly=2)
def test_a_list_of_four_ones_on_two_ranks_gives_8(comm: object) -> None:
    with kvcoll.create("dist_sync") as kv:
        kv.init(3, np.zeros(SHAPE, np.float32))
        kv.push(3, [np.ones(SHAPE, np.float32)] * 4)
        np.testing.assert_array_equal(kv.pull(3), np.full(SHAPE, 8))
