"""Faults on demand strike where they are set, once, and end in what their docstrings say."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvcoll
from kvcoll import KVStore, RowSparse
from kvcoll import faults as hooks
from kvcoll.errors import ArgumentError, FileError, ShapeMismatchError
from kvcoll.testing import (
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
    faults,
    parse,
)

pytestmark = pytest.mark.single


@pytest.fixture
def kv() -> Iterator[KVStore]:
    with kvcoll.create("local") as store:
        store.init(["v", "w"], [np.zeros(3), np.arange(4, dtype=np.float32)])
        yield store


def push(kv: KVStore, number: float = 1) -> None:
    kv.push(["v", "w"], [np.full(3, float(number)), np.full(4, number, np.float32)])


def test_without_faults_a_push_looks_at_one_variable_that_is_none(kv: KVStore) -> None:
    assert hooks.armed is None
    with faults(Skip(rank=0, push=2), Skip(rank=1)):
        assert hooks.armed is not None
    assert hooks.armed is None
    with faults(Skip(rank=0)) as left:
        push(kv, 7)
        assert hooks.armed is None
    assert left == []
    assert set(kv.pull("v").tolist()) == {0}
    push(kv, 7)
    assert set(kv.pull("v").tolist()) == {7}


def test_a_fault_strikes_at_its_push_and_once(kv: KVStore) -> None:
    push(kv)
    with faults(Skip(rank=0, push=3)) as left:
        for number in (2, 3, 4):
            push(kv, number)
            expected = 2 if number == 3 else number
            assert set(kv.pull("v").tolist()) == {expected}
            assert bool(left) == (number < 3)
            if number == 3:
                assert kv.version == 2  # the one that was left out does not count


def test_with_a_key_the_pushes_of_this_key_are_counted(kv: KVStore) -> None:
    with faults(Raise(rank=0, push=2, key="w")):
        push(kv)
        kv.push("v", np.ones(3))
        with pytest.raises(InjectedError, match="rank 0 raises at push 3, as it was asked to"):
            push(kv)


def test_a_fault_of_another_rank_does_not_strike(kv: KVStore) -> None:
    with faults(Raise(rank=1), Kill(rank=2)) as left:
        push(kv)
    assert len(left) == 2


def test_a_delay_takes_its_time_before_the_push(kv: KVStore) -> None:
    began = time.monotonic()
    with faults(Delay(rank=0, seconds=0.2)):
        push(kv)
    assert time.monotonic() - began >= 0.2


def test_a_stopped_process_goes_on(kv: KVStore) -> None:
    began = time.monotonic()
    with faults(Stop(rank=0, seconds=0.3)):
        push(kv, 5)
    assert time.monotonic() - began >= 0.3
    assert set(kv.pull("v").tolist()) == {5}


def test_an_error_of_the_users_is_raised_as_it_is(kv: KVStore) -> None:
    error = ZeroDivisionError("bad batch")
    with faults(Raise(rank=0, error=error)), pytest.raises(ZeroDivisionError) as raised:
        push(kv)
    assert raised.value is error


@pytest.mark.parametrize("key", [None, "v", "w"])
def test_another_shape_is_the_named_error_of_its_key(kv: KVStore, key: str | None) -> None:
    named = {"v": r"key 'v' holds float64\[3\], pushed float64\[3, 1\]"}.get(
        key or "v", r"key 'w' holds float32\[4\], pushed float32\[4, 1\]"
    )
    with faults(Reshape(rank=0, key=key)), pytest.raises(ShapeMismatchError, match=named):
        push(kv)
    with faults(Reshape(rank=0)), pytest.raises(ShapeMismatchError):
        kv.push("v", [np.ones(3), np.ones(3)])


def test_another_shape_of_rows_is_an_error_too() -> None:
    with kvcoll.create("local") as kv:
        kv.init("e", RowSparse.empty((5, 2), np.dtype(np.float32)))
        rows = RowSparse(np.ones((1, 2), np.float32), np.array([3]), (5, 2))
        with faults(Reshape(rank=0)), pytest.raises(ShapeMismatchError):
            kv.push("e", rows)
        with faults(Flip(rank=0, what="gradient", element=1, bit=31)):
            kv.push("e", rows)
        np.testing.assert_array_equal(kv.pull("e", ignore_sparse=False)[3], [1, -1])
        np.testing.assert_array_equal(rows.data, np.ones((1, 2)))


def test_a_bit_of_a_gradient_is_flipped_in_a_copy(kv: KVStore) -> None:
    given = [np.ones(3), np.ones(4, np.float32)]
    with faults(Flip(rank=0, what="gradient", key="w", element=2, bit=31)):
        kv.push(["v", "w"], given)
    np.testing.assert_array_equal(kv.pull("w"), [1, 1, -1, 1])
    np.testing.assert_array_equal(given[1], np.ones(4))
    out = np.ones(4, np.float32)
    with faults(Flip(rank=0, what="gradient", key="w", element=1)):
        kv.pushpull("w", out)
    np.testing.assert_array_equal(out, [1, 1.5, 1, 1])


def test_a_bit_of_a_value_or_a_state_is_flipped_after_the_push(kv: KVStore) -> None:
    kv.set_optimizer("sgd", learning_rate=1.0, momentum=0.5, rescale_grad=-1)
    with faults(Flip(rank=0, what="state", key="v", bit=63), Flip(rank=0, key="w", bit=31)):
        push(kv)
    np.testing.assert_array_equal(kv.pull("v"), [1, 1, 1])
    np.testing.assert_array_equal(kv.pull("w"), [-1, 2, 3, 4])
    push(kv)
    np.testing.assert_array_equal(kv.pull("v"), [1 + 0.5, 1 + 1.5, 1 + 1.5])


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", "i1", "i8", "c8", "?"])
def test_the_bit_that_is_flipped_by_default_makes_another_number_of_a_like_size(
    dtype: str,
) -> None:
    with kvcoll.create("local") as kv:
        kv.init("w", np.ones(2, dtype))
        with faults(Flip(rank=0)):
            kv.push("w", np.ones(2, dtype))
        first, second = np.abs(kv.pull("w")[:2])
        assert second == 1
        assert first != 1
        assert dtype in ("i8", "i1", "?") or first == 1.5


def test_there_is_an_error_where_there_is_no_such_bit(kv: KVStore) -> None:
    with faults(Flip(rank=0, element=3)), pytest.raises(ArgumentError, match="of element 3 among"):
        push(kv)
    with faults(Flip(rank=0, bit=64)), pytest.raises(ArgumentError, match="no bit 64 of"):
        push(kv)
    with faults(Flip(rank=0, what="state")), pytest.raises(ArgumentError, match="has no state"):
        push(kv)


@pytest.mark.parametrize("wait", [True, False])
def test_a_full_disk_fails_a_checkpoint_and_loses_none(
    kv: KVStore, tmp_path: Path, wait: bool
) -> None:
    push(kv, 3)
    kv.save(tmp_path)
    with faults(FillDisk(rank=0)):
        push(kv, 4)
        with pytest.raises(FileError, match="free some space") as raised:  # noqa: PT012
            kv.save(tmp_path, wait=wait)
            kv.wait_saved()
        assert "(No space left on device)" in str(raised.value)
    assert kvcoll.load(tmp_path)[0]["v"].tolist() == [3, 3, 3]
    kv.save(tmp_path)
    assert kvcoll.load(tmp_path)[0]["v"].tolist() == [4, 4, 4]
    with faults(FillDisk(rank=0, seconds=0)):
        push(kv, 5)
        kv.save(tmp_path)


def test_a_command_cuts_what_it_cuts(kv: KVStore, tmp_path: Path) -> None:
    with faults(Cut(rank=0, command=f"touch '{tmp_path}/a b'")):
        push(kv)
    assert (tmp_path / "a b").exists()
    with faults(Cut(rank=0, command="false")), pytest.raises(Exception, match="exit status 1"):
        push(kv)


PARSED: dict[str, list[Fault]] = {
    "": [],
    " ; ;; ": [],
    "rank=1 push=5 kill; rank=0 push=7 delay=3": [
        Kill(rank=1, push=5),
        Delay(rank=0, push=7, seconds=3),
    ],
    "kill rank=2;skip rank=0 key='a b'": [Kill(rank=2), Skip(rank=0, key="a b")],
    "rank=0 stop=0.5; rank=0 reshape": [Stop(rank=0, seconds=0.5), Reshape(rank=0)],
    "rank=0 flip=state bit=3 element=4": [Flip(rank=0, what="state", bit=3, element=4)],
    "rank=0 fill-disk; rank=0 fill-disk=2": [FillDisk(rank=0), FillDisk(rank=0, seconds=2)],
    "rank=1 cut='ip link set eth0 down; true'": [
        Cut(rank=1, command="ip link set eth0 down; true")
    ],
}


@pytest.mark.parametrize("text", PARSED)
def test_faults_are_read_as_they_are_written(text: str) -> None:
    assert parse(text) == PARSED[text]


def test_an_error_can_be_given_as_a_text() -> None:
    (fault,) = parse("rank=0 raise='bad batch'")
    assert isinstance(fault, Raise)
    assert type(fault.error) is InjectedError
    assert str(fault.error) == "bad batch"


MISTAKES = {
    "rank=0 explode": "unknown word 'explode' in 'rank=0 explode': known are 'rank=', 'push=', ",
    "rank=0 kill=3": "'kill=3' in",
    "rank=0 delay": "'delay' in",
    "rank=0 delay=long": "'delay=long' in 'rank=0 delay=long' has no number",
    "rank=one kill": "'rank=one' in",
    "push=3 kill": "needs a rank= and one of 'delay', 'stop', 'kill'",
    "rank=0": "needs a rank= and one of",
    "rank=0 kill skip": "faults are kept apart by ';'",
    "rank=0 kill bit=3": "go with flip=",
    "rank=0 flip=disk": "one of 'gradient', 'replica', 'state', got 'disk'",
    "rank=0 cut='": "cannot be read: No closing quotation",
    "rank=-1 kill": "rank of Kill is a whole number from 0 on, got -1",
    "rank=0 push=0 kill": "push of Kill is a whole number from 1 on, got 0",
    "rank=0 delay=-1": "seconds of Delay is a number from 0 on, got -1.0",
    "rank=0 delay=nan": "seconds of Delay is a number from 0 on, got nan",
}


@pytest.mark.parametrize("text", MISTAKES)
def test_what_cannot_be_read_is_an_error_that_says_what_can(text: str) -> None:
    with pytest.raises(ArgumentError) as raised:
        parse(text)
    assert MISTAKES[text] in str(raised.value)


def test_what_is_no_fault_cannot_be_set() -> None:
    wrong: Any = "rank=0 kill"
    with (
        pytest.raises(TypeError, match=r"one of kvcoll.testing's, got 'rank=0 kill'"),
        faults(wrong),
    ):
        pass
    with pytest.raises(ArgumentError, match="command of Cut is a command, got ' '"):
        Cut(rank=0, command=" ")
    with pytest.raises(ArgumentError, match="rank of Skip is a whole number from 0 on, got True"):
        Skip(rank=True)


def test_the_environment_sets_faults_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVCOLL_FAULTS", "rank=0 push=2 raise=enough")
    try:
        for k in range(2):
            with kvcoll.create("local") as kv:
                kv.init("w", np.zeros(2))
                kv.push("w", np.ones(2))
                if k == 0:
                    with pytest.raises(InjectedError, match="enough"):
                        kv.push("w", np.ones(2))
                kv.push("w", np.ones(2))
    finally:
        monkeypatch.setenv("KVCOLL_FAULTS", "")
        kvcoll.create("local").close()
    monkeypatch.setenv("KVCOLL_FAULTS", "rank=0 explode")
    with pytest.raises(ArgumentError, match="unknown word 'explode'"):
        kvcoll.create("local")
