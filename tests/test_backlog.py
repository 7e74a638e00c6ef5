"""Sums that wait: who runs first, who waits for whom, and what a failure does."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from queue import Queue

import pytest

from kvcoll.backlog import Backlog, Job
from kvcoll.errors import RankFailedError

pytestmark = pytest.mark.single

LIMIT_S = 20


class Recorder:
    """Jobs that note when they run; the first waits until it is let go."""

    def __init__(self) -> None:
        self.ran: list[int] = []
        self.began, self.let_go = threading.Event(), threading.Event()
        self.failures: list[BaseException] = []

    def job(self, number: int, priority: int = 0) -> Job:
        return Job(number, priority, lambda: self.ran.append(number))

    def held_job(self, number: int) -> Job:
        def run() -> None:
            self.began.set()
            assert self.let_go.wait(LIMIT_S)
            self.ran.append(number)

        return Job(number, 0, run)


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def leader(recorder: Recorder) -> Iterator[Backlog]:
    backlog = Backlog(leads=True, agree=lambda number: number, failed=recorder.failures.append)
    yield backlog
    recorder.let_go.set()
    if not recorder.failures:
        backlog.stop()


def follower(say: Queue[int], failed: Callable[[BaseException], None]) -> Backlog:
    return Backlog(leads=False, agree=lambda _: say.get(timeout=LIMIT_S), failed=failed)


def test_of_those_that_wait_the_most_urgent_is_first_and_equals_go_by_number(
    leader: Backlog, recorder: Recorder
) -> None:
    leader.add(recorder.held_job(0))
    assert recorder.began.wait(LIMIT_S)
    for number, priority in ((1, -1), (2, 5), (3, 0), (4, 5), (5, 7)):
        leader.add(recorder.job(number, priority))
    recorder.let_go.set()
    leader.drain()
    assert recorder.ran == [0, 5, 2, 4, 3, 1]


def test_a_wait_for_one_job_does_not_wait_for_the_others(
    leader: Backlog, recorder: Recorder
) -> None:
    done = recorder.job(0)
    leader.add(done)
    leader.wait([done])
    held = recorder.held_job(1)
    leader.add(held)
    leader.wait([done])
    assert recorder.ran == [0]
    assert not held.done


def test_a_rank_that_follows_runs_what_rank_0_says_also_if_it_gets_it_later(
    recorder: Recorder,
) -> None:
    say: Queue[int] = Queue()
    backlog = follower(say, recorder.failures.append)
    backlog.add(recorder.job(0, priority=9))
    say.put(1)
    last = recorder.job(1)
    backlog.add(last)
    backlog.wait([last])
    assert recorder.ran == [1]
    say.put(0)
    backlog.stop()
    assert recorder.ran == [1, 0]


def test_nobody_is_asked_for_a_turn_while_there_is_no_job(recorder: Recorder) -> None:
    asked = []

    def agree(number: int) -> int:
        asked.append(number)
        return number

    backlog = Backlog(leads=True, agree=agree, failed=recorder.failures.append)
    backlog.add(recorder.job(0))
    backlog.drain()
    backlog.stop()
    assert asked == [0]


@pytest.mark.parametrize("call", ["wait", "drain", "add"])
def test_what_a_job_raises_is_raised_by_who_waits_and_by_every_call_after_it(
    leader: Backlog, recorder: Recorder, call: str
) -> None:
    def run() -> None:
        raise MemoryError("no memory for the sum")

    job = Job(0, 0, run)
    leader.add(job)
    with pytest.raises(RankFailedError, match="MemoryError: no memory for the sum"):
        leader.wait([job])
    calls: dict[str, Callable[[], None]] = {
        "wait": lambda: leader.wait([job]),
        "drain": leader.drain,
        "add": lambda: leader.add(recorder.job(1)),
    }
    with pytest.raises(RankFailedError, match="no memory for the sum"):
        calls[call]()
    for _ in range(1000):
        if recorder.failures:
            break
        threading.Event().wait(0.01)
    assert [str(error) for error in recorder.failures] == ["no memory for the sum"]
    assert recorder.ran == []
