"""Signals to stop are noted and end nothing; ranks agree on what holds on any of them."""

from __future__ import annotations

import os
import signal
import threading
from typing import Any

import numpy as np
import pytest
from raised_by_all import raised_by_all

import kvcoll
from kvcoll.errors import RanksDisagreeError, StoreClosedError, ThreadError


def test_a_signal_is_noted_and_named_and_later_ones_change_nothing() -> None:
    with kvcoll.StopSignals() as stop:
        assert (stop.came, stop.name) == (False, "")
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert (stop.came, stop.name) == (True, "SIGUSR1")
    assert stop.came


def test_after_the_block_signals_do_what_they_did_before() -> None:
    noted: list[int] = []
    before = signal.signal(signal.SIGUSR2, lambda number, frame: noted.append(number))
    try:
        with kvcoll.StopSignals([signal.SIGUSR2]) as stop:
            os.kill(os.getpid(), signal.SIGUSR2)
            assert not noted
        assert stop.name == "SIGUSR2"
        os.kill(os.getpid(), signal.SIGUSR2)
        assert noted == [signal.SIGUSR2]
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_block_that_is_entered_again_begins_anew() -> None:
    stop = kvcoll.StopSignals()
    for number in (signal.SIGTERM, signal.SIGUSR1):
        with stop:
            assert not stop.came
            os.kill(os.getpid(), number)
            assert stop.name == number.name


def test_another_thread_than_the_main_one_is_an_error() -> None:
    raised: list[Exception] = []

    def enter() -> None:
        try:
            with kvcoll.StopSignals():
                pass
        except ThreadError as error:
            raised.append(error)

    thread = threading.Thread(target=enter, name="reader")
    thread.start()
    thread.join()
    assert "in the main thread of a program, got thread 'reader'" in str(raised[0])


def test_any_rank_is_true_on_all_ranks_if_it_is_on_one(kv: kvcoll.KVStore) -> None:
    assert kv.any_rank(True) is True
    assert kv.any_rank(False) is False
    for chosen in range(kv.num_workers):
        assert kv.any_rank(kv.rank == chosen) is True
    assert kv.any_rank(kv.rank >= kv.num_workers) is False


def test_all_pushes_are_complete_after_any_rank(comm: Any) -> None:
    with kvcoll.create("dist_async") as kv:
        kv.init("w", np.zeros(5, np.float32))
        kv.set_optimizer("test")
        for _ in range(3):
            kv.push("w", np.full(5, kv.rank + 1, np.float32))
            kv.any_rank(False)
        total = sum(range(1, comm.size + 1))
        np.testing.assert_array_equal(kv.view("w"), np.full(5, 3 * total))


@pytest.mark.ranks(at_least=2)
def test_a_rank_that_asks_while_others_do_something_else_is_an_error_on_all(comm: Any) -> None:
    with kvcoll.create("dist_sync") as kv:
        call = kv.barrier if comm.rank else lambda: kv.any_rank(True)
        raised = raised_by_all(comm, call)
        assert type(raised) is RanksDisagreeError
        assert "any_rank()" in str(raised)
        # What has no truth value is told to the others.
        raised = raised_by_all(comm, lambda: kv.any_rank(np.zeros(2) if comm.rank else True))  # type: ignore[arg-type]
        assert "truth value" in str(raised)


def test_a_rank_at_the_end_of_join_says_no(comm: Any) -> None:
    with kvcoll.create("dist_sync") as kv, kv.join():
        if comm.rank == 0:
            assert kv.any_rank(False) is False
            assert kv.any_rank(True) is True


def test_a_closed_store_cannot_be_asked(kv: kvcoll.KVStore) -> None:
    kv.close()
    with pytest.raises(StoreClosedError):
        kv.any_rank(True)
