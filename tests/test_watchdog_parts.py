"""The parts of the watchdog by themselves: where a rank stands, stacks, processes, messages."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from fake_messenger import call, fake_messengers, finished

import kvcoll
from kvcoll.agreement import AcrossRanks, Call
from kvcoll.transport import mpi
from kvcoll.watchdog import Watchdog, patrol
from kvcoll.watchdog.held import HeldStack, ask_for_stack, last_stack, read_stack
from kvcoll.watchdog.post import MpiPost, introduce
from kvcoll.watchdog.processes import Place, look_at, own_place
from kvcoll.watchdog.stacks import stack_of
from kvcoll.watchdog.track import ENDS, INSIDE, LEFT, OUTSIDE, UPDATES, WAITS, Track, Watched

if TYPE_CHECKING:
    from mpi4py import MPI

SETTINGS = Watchdog(floor_s=1, ceiling_s=2, limit_s=30)
LIMIT_S = 10.0


def until(is_so: Callable[[], bool]) -> None:
    """Wait until something is so."""
    end_s = time.monotonic() + LIMIT_S
    while not is_so():
        assert time.monotonic() < end_s
        time.sleep(0.005)


# Where a rank stands


def test_a_track_tells_what_a_rank_does_from_its_agreement_and_its_calls() -> None:
    first, second = (AcrossRanks(messenger) for messenger in fake_messengers(2))
    calls = [0, 0]
    track = Track(first, SETTINGS)
    track.add(
        Watched(
            "store 1",
            SETTINGS,
            calls=lambda: (calls[0], calls[1]),
            version=lambda: 7,
            thread=lambda: None,
            beside=lambda: None,
            is_closed=lambda: False,
        )
    )
    assert track.position().stance == OUTSIDE
    calls[0] += 1
    assert track.position().stance == INSIDE
    one = call("push('w')")
    pushing = threading.Thread(target=first.confirm, args=(one,))
    pushing.start()
    until(lambda: track.position().stance == WAITS)
    place = track.position()
    assert (place.entered, place.passed, place.call, place.version) == (1, 0, "push('w')", 7)
    second.confirm(one)
    pushing.join(LIMIT_S)
    assert (track.position().stance, track.position().passed) == (INSIDE, 1)
    with first.held():
        assert track.position().stance == UPDATES
    calls[1] += 1
    assert track.position().stance == OUTSIDE
    track.program_ends = True
    leaving = first.leave("")
    next(leaving)
    assert track.position().stance == ENDS
    finished([leaving, second.leave("")])
    assert track.position().stance == OUTSIDE


def test_the_end_of_a_push_is_part_of_it_and_a_rank_that_left_is_known() -> None:
    first, second = (AcrossRanks(messenger) for messenger in fake_messengers(2))
    track = Track(first, SETTINGS)
    for one in (Call("push('w')", 5, keys=("w", ())), Call("its end", 0, ends_push=True)):
        other = threading.Thread(target=second.confirm, args=(one,))
        other.start()
        first.confirm(one)
        other.join(LIMIT_S)
    assert (track.position().call, track.position().of_push) == ("push('w')", True)
    leaving = second.leave("bad batch")
    next(leaving)
    error = finished([first.leave(""), leaving])
    assert error == [None, None]
    first, second = (AcrossRanks(messenger) for messenger in fake_messengers(2))
    track = Track(first, SETTINGS)
    leaving = second.leave("bad batch")
    next(leaving)
    other = threading.Thread(target=finished, args=([leaving],))
    other.start()
    with pytest.raises(kvcoll.errors.RankLeftError):
        first.confirm(call("push('w')"))
    other.join(LIMIT_S)
    assert track.position().stance == LEFT
    assert track.is_over


def test_a_wait_counts_from_look_to_look_as_long_as_nothing_moves() -> None:
    (ranks,) = (AcrossRanks(messenger) for messenger in fake_messengers(1))
    begun = [1]
    track = Track(ranks, SETTINGS)
    track.add(
        Watched("", SETTINGS, lambda: (begun[0], 0), lambda: 0, lambda: 1, lambda: 2, lambda: False)
    )
    for _ in range(5):
        track.look(0.5)
    assert track.has_waited() == 2.0
    assert track.is_due()
    track.was_spoken_of()
    assert not track.is_due()
    assert track.thread == 1
    with ranks.held():
        assert track.thread == 2
    begun[0] += 1  # another call: it has come out of the one before
    assert track.look(0.5) == 2.0
    assert track.has_waited() == 0.0


# Stacks


def test_the_stack_of_a_thread_shows_where_it_is() -> None:
    go_on = threading.Event()

    def read_the_next_batch() -> None:
        go_on.wait(LIMIT_S)

    thread = threading.Thread(target=read_the_next_batch)
    thread.start()
    try:
        until(lambda: "in wait\n" in stack_of(thread.ident))
        text = stack_of(thread.ident)
        assert "in read_the_next_batch\n    go_on.wait(LIMIT_S)\n" in text
        assert "in test_the_stack_of_a_thread_shows_where_it_is" not in text
    finally:
        go_on.set()
        thread.join(LIMIT_S)
    assert stack_of(thread.ident) == ""
    assert "in test_the_stack_of_a_thread_shows_where_it_is\n" in stack_of(None)


def test_of_calls_within_kvcoll_the_first_and_the_last_are_shown() -> None:
    seen: list[str] = []

    def update(key: object, input: object, stored: object) -> None:
        seen.append(stack_of(threading.get_ident()))

    with kvcoll.create("local") as kv:
        kv.init("w", np.ones(3))
        kv.set_updater(update)
        kv.push("w", np.ones(3))
    lines = seen[0].splitlines()
    place = lines.index("  ...")
    assert "in push" in lines[place - 2]
    assert "updater.py" in lines[place + 1]
    assert "in update" in seen[0].splitlines()[place + 3]
    assert seen[0].count("  ...\n") == 1


def test_the_last_stack_that_faulthandler_wrote_is_turned_to_the_innermost_call_last() -> None:
    text = (
        'Current thread 0x01 (most recent call first):\n  File "t.py", line 3 in wait\n\n'
        "Current thread 0x01 [python] (most recent call first):\n"
        '  File "m.py", line 9 in inner\n  File "m.py", line 2 in outer\n'
    )
    assert last_stack(text) == '  File "m.py", line 2 in outer\n  File "m.py", line 9 in inner\n'
    assert last_stack("") == ""


HOLDER = """
import ctypes, os, signal, sys, threading, time
from kvcoll.watchdog.held import HeldStack
{first}
held = HeldStack()
print(held.begin(), flush=True)
print(held.file, flush=True)
{then}
"""
HOLD_THE_LOCK = """
def hold_the_lock():
    ctypes.PyDLL(None).read(0, ctypes.create_string_buffer(1), 1)
    print("read", flush=True)
    time.sleep(60)
hold_the_lock()
"""


def place_of(process: subprocess.Popen[str] | subprocess.Popen[bytes]) -> Place:
    """Say where a process is that was begun here."""
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return Place("here", process.pid, int(fields[19]), 0)


@contextmanager
def holder(
    then: str, first: str = "", *, begins: bool = True
) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Start a process that has a `HeldStack`; give it, and the number of its file."""
    program = HOLDER.format(first=first, then=then)
    command = [sys.executable, "-c", program]
    process = subprocess.Popen(command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == f"{begins}\n"
        yield process, int(process.stdout.readline())
    finally:
        process.kill()
        process.communicate()


@pytest.mark.single
def test_a_process_that_lets_no_thread_run_leaves_its_stack_when_asked_and_goes_on() -> None:
    with holder(HOLD_THE_LOCK) as (process, file):
        until(lambda: look_at(place_of(process)).sleeps_in != "")
        assert read_stack(process.pid, file) == ""
        ask_for_stack(process.pid)
        until(lambda: "in hold_the_lock" in read_stack(process.pid, file))
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("x")
        process.stdin.flush()
        assert process.stdout.readline() == "read\n"  # what was interrupted was begun again
    assert read_stack(process.pid, file) == ""


@pytest.mark.waits
def test_a_stack_that_nobody_asks_for_is_not_written_even_if_no_thread_ran_for_long() -> None:
    # Of a process that is stopped, a thread with a timeout would write when all run again.
    with holder("while True: pass") as (process, file):
        process.send_signal(signal.SIGSTOP)
        time.sleep(1.5)
        process.send_signal(signal.SIGCONT)
        time.sleep(0.5)
        assert read_stack(process.pid, file) == ""
        assert process.poll() is None


@pytest.mark.single
def test_a_process_whose_threads_do_run_may_be_asked_at_any_moment() -> None:
    then = """
def call(depth):
    names = {}
    exec(f"def one(call, depth):\\n    return depth and call(depth - 1)", names)
    return names["one"](call, depth)

def work():
    while True:
        call(20)

threading.Thread(target=work, daemon=True).start()
work()
"""
    with holder(then) as (process, file):
        for _ in range(300):
            ask_for_stack(process.pid)
            time.sleep(0.003)
        until(lambda: read_stack(process.pid, file).count("in call\n") > 0)
        assert process.poll() is None


@pytest.mark.single
def test_a_program_keeps_its_own_handler_for_the_signal() -> None:
    own = "signal.signal(signal.SIGURG, lambda *_: print('own', flush=True))"
    with holder("while True: time.sleep(0.01)", first=own, begins=False) as (process, file):
        ask_for_stack(process.pid)
        assert process.stdout is not None
        assert process.stdout.readline() == "own\n"
        assert read_stack(process.pid, file) == ""


@pytest.mark.single
def test_without_a_handler_the_signal_does_nothing() -> None:
    then = "held.end()\nprint('ended', flush=True)\nsys.stdin.readline()\nprint('well')"
    with holder(then) as (process, _):
        assert process.stdout is not None
        assert process.stdout.readline() == "ended\n"
        ask_for_stack(process.pid)
        process.send_signal(signal.SIGURG)
        assert process.communicate("go on\n", LIMIT_S)[0] == "well\n"


def test_a_stack_is_forgotten_when_threads_run_again() -> None:
    held = HeldStack()
    os.write(held.file, b'Current thread 0x01:\n  File "m.py", line 9 in inner\n')
    assert "inner" in read_stack(os.getpid(), held.file)
    held.clear()
    assert read_stack(os.getpid(), held.file) == ""
    os.write(held.file, b'Current thread 0x01:\n  File "m.py", line 2 in outer\n')
    assert read_stack(os.getpid(), held.file) == '  File "m.py", line 2 in outer\n'
    held.close()


# Processes


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(["sleep", "60"])
    yield process
    process.kill()
    process.wait()


@pytest.mark.single
def test_the_kernel_tells_whether_a_process_sleeps_is_stopped_or_has_ended(
    sleeper: subprocess.Popen[bytes],
) -> None:
    place = place_of(sleeper)
    until(lambda: look_at(place).state == "S")
    sleeper.send_signal(signal.SIGSTOP)
    until(lambda: look_at(place).state == "T")
    assert not look_at(place).has_ended
    assert look_at(replace(place, started=place.started - 1)).has_ended  # another, of that number
    sleeper.kill()
    until(lambda: look_at(place).has_ended)
    sleeper.wait()
    assert look_at(place).state == "gone"


def test_this_process_runs() -> None:
    assert look_at(own_place(0)).state == "R"


# Messages


def test_messages_reach_every_rank_and_nobody_waits(
    comm: MPI.Intracomm, rank: int, size: int
) -> None:
    post = MpiPost(mpi.duplicate(comm, 30), mpi.import_mpi())
    assert post.receive() == []
    comm.Barrier()
    text = "ü" * 5000 * (rank + 1)
    for other in range(size):
        post.send(other, {"kind": "told", "of": rank, "text": text})
    got: list[tuple[int, dict[str, object]]] = []

    def has_all() -> bool:
        got.extend(post.receive())
        return len(got) == size

    until(has_all)
    assert sorted(source for source, _ in got) == list(range(size))
    for source, message in got:
        assert message == {"kind": "told", "of": source, "text": "ü" * 5000 * (source + 1)}
    comm.Barrier()
    post.comm.Free()


def test_each_rank_learns_where_all_are(comm: MPI.Intracomm, rank: int, size: int) -> None:
    places = introduce(comm, rank, 40 + rank)
    assert [place.world_rank for place in places] == list(range(size))
    assert [place.file for place in places] == list(range(40, 40 + size))
    assert places[rank] == own_place(rank, 40 + rank)
    assert [place.pid for place in places] == comm.allgather(os.getpid())


@pytest.mark.ranks(at_least=2)
def test_stores_of_the_same_ranks_have_one_watchdog_and_those_of_others_another(
    comm: MPI.Intracomm, rank: int, size: int
) -> None:
    def watchdogs_of(ranks: MPI.Comm) -> int:
        group, identical = ranks.Get_group(), mpi.import_mpi().IDENT
        return sum(one.group.Compare(group) == identical for one in patrol._watches)

    again, turned = comm.Dup(), comm.Split(0, -rank)
    with kvcoll.create("dist_sync"):
        assert watchdogs_of(comm) == 1
        before = len(patrol._watches)
        with kvcoll.create("dist_sync", comm=again):
            assert watchdogs_of(again) == 1
        with kvcoll.create("dist_sync", comm=turned, watchdog=False):
            assert len(patrol._watches) == before
        for _ in range(2):
            with kvcoll.create("dist_sync", comm=turned):
                assert watchdogs_of(turned) == 1
        threads = [thread.name for thread in threading.enumerate()]
        assert threads.count("kvcoll-watchdog") == 1
        comm.Barrier()
    again.Free()
    turned.Free()
