"""The watchdog without MPI and without a clock: when it speaks, and what it says of whom."""

from __future__ import annotations

import pytest
from fake_watch import LOOK_S, FakeWorld

from kvcoll.errors import ArgumentError
from kvcoll.watchdog import Watchdog, settled
from kvcoll.watchdog.bound import FIRST_CALLS, Learnt

pytestmark = pytest.mark.single

SETTINGS = Watchdog(floor_s=5, ceiling_s=100)


# When it speaks


def test_the_first_pushes_may_wait_for_as_long_as_the_ceiling() -> None:
    learnt = Learnt()
    learnt.passed(FIRST_CALLS, 0.1)
    assert learnt.bound_s(SETTINGS, of_push=True) == 100
    learnt.passed(1, 0.1)
    assert learnt.bound_s(SETTINGS, of_push=True) == 5


@pytest.mark.parametrize(("longest_s", "bound_s"), [(0.5, 5), (2, 8), (20, 80), (30, 100)])
def test_a_push_may_wait_four_times_as_long_as_pushes_were_apart(
    longest_s: float, bound_s: float
) -> None:
    learnt = Learnt()
    learnt.passed(FIRST_CALLS + 1, 0.1)
    learnt.passed(1, longest_s)
    learnt.passed(1000, 0.1)
    assert learnt.bound_s(SETTINGS, of_push=True) == bound_s


def test_what_happened_once_fades_over_hundreds_of_long_steps() -> None:
    learnt = Learnt()
    learnt.passed(FIRST_CALLS + 1, 20)
    for _ in range(693):  # 0.999 ** 693 is a half
        learnt.passed(1, 1.5)
    assert learnt.bound_s(SETTINGS, of_push=True) == pytest.approx(40, rel=0.01)


def test_the_first_step_is_not_learnt_and_other_calls_may_always_wait_longer() -> None:
    learnt = Learnt()
    learnt.passed(1, 90)
    learnt.passed(FIRST_CALLS, 0.1)
    assert learnt.bound_s(SETTINGS, of_push=True) == 5
    assert learnt.bound_s(SETTINGS, of_push=False) == 100


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_a_wait_is_spoken_of_once_after_the_floor_and_then_each_time_it_has_doubled(
    ranks: int,
) -> None:
    world = FakeWorld(ranks)
    world.steps(FIRST_CALLS + 5)
    for one in world.ranks[:-1]:
        one.enter("push('fc1.w')")
    world.pass_time(4.5)
    assert world.said == []
    world.pass_time(1.5)
    assert len(world.said) == 1
    world.pass_time(3)
    assert len(world.said) == 1
    world.pass_time(4)
    assert len(world.said) == 2
    world.pass_time(33)
    assert len(world.said) == 4  # after some 5, 11, 22, 44 seconds
    for one in world.ranks:
        assert not one.ends
        assert not one.job_ends
        assert one.said == [] or one is world.ranks[0]


def test_pushes_that_go_on_slowly_are_never_spoken_of() -> None:
    world = FakeWorld(3)
    world.steps(FIRST_CALLS + 5)
    for _ in range(20):
        for one in world.ranks[1:]:
            one.enter()
        world.pass_time(4)
        world.ranks[0].enter()
        for one in world.ranks:
            one.leave()
    assert world.said == []


def test_an_evaluation_that_was_spoken_of_is_known_the_next_time() -> None:
    world = FakeWorld(2)
    world.steps(FIRST_CALLS + 5)
    for _ in range(2):
        world.ranks[1].enter()
        world.pass_time(8)
        world.ranks[0].enter()
        for one in world.ranks:
            one.leave()
        world.pass_time(1)
    assert len(world.said) == 2
    assert "rank 0 is late" in world.said[0]
    assert world.said[1] == "the wait for rank 0 is over, after 7.8 s"


def test_a_job_that_was_stopped_as_a_whole_has_waited_for_nobody() -> None:
    world = FakeWorld(2)
    world.steps(FIRST_CALLS + 5)
    world.ranks[0].enter()
    world.pass_time(2)
    for one in world.ranks:  # whoever makes the looks counts at most a second for one
        one.station.look(1.0)
    assert world.said == []


# What it says


def test_it_names_call_push_and_store_of_the_late_rank_and_prints_its_stack() -> None:
    world = FakeWorld(3)
    world.steps(FIRST_CALLS + 5)
    for rank in (0, 2):
        world.ranks[rank].enter("push('fc1.w' float32[4])")
    world.pass_time(6)
    assert world.said == [
        "ranks 0, 2 have waited 5.2 s in push number 26, push('fc1.w' float32[4]): rank 1 is late\n"
        "  rank 1 (process 101 on a) has made 25 pushes, and is in no call of the store; "
        "its last was push('w'). It is at\n"
        "    line of rank 1\n"
        "  If it goes on: after 10 s this is said again, after 60 s the job ends"
    ]
    world.ranks[1].enter("push('fc1.w' float32[4])")
    for one in world.ranks:
        one.leave()
    world.pass_time(1)
    assert world.said[1:] == ["the wait for rank 1 is over, after 5.8 s"]


def test_rank_0_speaks_also_when_it_is_late_itself() -> None:
    world = FakeWorld(2)
    world.steps(FIRST_CALLS + 5)
    world.ranks[1].enter()
    world.pass_time(6)
    assert "rank 1 has waited" in world.said[0]
    assert "rank 0 is late\n  rank 0 (process 100 on a) has made 25 pushes" in world.said[0]
    assert world.ranks[1].said == []


def test_a_rank_in_its_updater_is_late_for_those_that_have_come_through_theirs() -> None:
    world = FakeWorld(3)
    world.steps(FIRST_CALLS + 5)
    for one in world.ranks:
        one.enter()
        one.agree()
    world.ranks[2].tracks[0].is_held = True
    for one in world.ranks[:2]:
        one.tracks[0].entered += 1
    world.pass_time(6)
    assert (
        "rank 2 is late\n  rank 2 (process 102 on a) is in the updater of push number 26"
        in (world.said[0])
    )


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ("T", "does not answer: it is stopped by a signal (as by SIGSTOP): kill -CONT 101"),
        ("R", "does not answer: it computes, in code that lets no other thread of Python run"),
        ("S", "does not answer: it sleeps (in a_wait), in code that lets no other thread of"),
        ("D", "does not answer: it waits for a disk or a file server, in the kernel (in a_wait)"),
    ],
)
def test_a_rank_that_does_not_answer_is_looked_at_from_its_host(state: str, said: str) -> None:
    for hosts in ("aaa", "abb"):
        world = FakeWorld(3, hosts=hosts)
        world.steps(FIRST_CALLS + 5)
        for rank in (0, 2):
            world.ranks[rank].enter()
        world.ranks[1].answers = False
        world.states[1] = state
        world.pass_time(10)
        assert "rank 1 is late" in world.said[0]
        assert f"(process 101 on {hosts[1]}) {said}" in world.said[0]


@pytest.mark.parametrize("state", ["S", "R"])
@pytest.mark.parametrize("hosts", ["aaa", "abb"])
@pytest.mark.parametrize("leaves", [True, False])
def test_a_rank_that_does_not_answer_is_asked_for_its_stack_and_not_waited_for(
    hosts: str, state: str, *, leaves: bool
) -> None:
    world = FakeWorld(3, hosts=hosts)
    world.stacks = {1: "  line in C\n"} if leaves else {1: ""}
    world.steps(FIRST_CALLS + 5)
    for rank in (0, 2):
        world.ranks[rank].enter()
    world.ranks[1].answers, world.states[1] = False, state
    world.pass_time(9)
    assert world.asked == {1}
    assert len(world.said) == 1
    assert "rank 1 (process 101 on" in world.said[0]
    what = {"S": "sleeps (in a_wait)", "R": "computes"}[state]
    assert f"does not answer: it {what}, in code that lets" in world.said[0]  # before it was asked
    assert (". It is at\n    line in C\n" in world.said[0]) == leaves


@pytest.mark.parametrize("state", ["T", "t", "Z", "gone"])
def test_a_rank_that_is_stopped_or_has_ended_is_not_asked_for_its_stack(state: str) -> None:
    world = FakeWorld(3)
    world.stacks = {1: "  line in C\n"}
    world.steps(FIRST_CALLS + 5)
    for rank in (0, 2):
        world.ranks[rank].enter()
    world.ranks[1].answers, world.states[1] = False, state
    world.pass_time(9)
    assert not world.asked
    assert [said for one in world.ranks for said in (*one.said, *one.job_ends)]


def test_of_a_host_from_which_nobody_answers_that_is_said() -> None:
    world = FakeWorld(3, hosts="aab")
    world.steps(FIRST_CALLS + 5)
    for one in world.ranks[:2]:
        one.enter()
    world.ranks[2].answers = False
    world.pass_time(10)
    assert "rank 2 (process 102 on b) does not answer, nor does any rank on b" in world.said[0]


def test_the_next_rank_speaks_where_rank_0_does_not_answer() -> None:
    world = FakeWorld(3)
    world.steps(FIRST_CALLS + 5)
    for one in world.ranks[1:]:
        one.enter()
    world.ranks[0].answers, world.states[0] = False, "T"
    world.pass_time(12)
    assert "ranks 1, 2 have waited" in world.ranks[1].said[0]
    assert "rank 0 (process 100 on a) does not answer: it is stopped" in world.ranks[1].said[0]
    assert world.said == world.ranks[2].said == []


def test_ranks_at_calls_of_two_stores_that_wait_for_one_another_are_told_so() -> None:
    world = FakeWorld(2)
    for one in world.ranks:
        one.add_track()
    world.steps(FIRST_CALLS + 5)
    world.ranks[0].enter("push('a')", track=0)
    world.ranks[1].enter("push('b')", track=1)
    world.pass_time(12)
    said = world.said[0]
    assert "rank 0 has waited 5.2 s in push number 26, push('a'): rank 1 is late" in said
    assert "\n  and rank 1 has waited 5.2 s in push number 26, push('b'): rank 0 is late" in said
    assert "So they wait for one another: every rank must make the calls" in said


def test_what_is_over_when_all_is_known_is_not_spoken_of() -> None:
    world = FakeWorld(3)
    world.steps(FIRST_CALLS + 5)
    for one in world.ranks[:2]:
        one.enter()
    world.ranks[2].answers = False
    world.pass_time(5.5)  # all are asked, and rank 2 has some time to answer
    world.ranks[2].enter()
    for one in world.ranks:
        one.leave()
    world.pass_time(10)
    assert world.said == []


def test_a_rank_at_the_end_of_its_program_says_whom_it_waits_for_and_ends_nothing() -> None:
    world = FakeWorld(2)
    world.steps(FIRST_CALLS + 5)
    first = world.ranks[0]
    first.station.end_program()
    first.tracks[0].entered += 1
    first.tracks[0].passed += 1
    first.tracks[0].is_leaving = True
    world.pass_time(200)
    assert "rank 0 has waited 10 s at the end of the program: rank 1 is late" in world.said[0]
    assert len(world.said) > 2
    assert first.job_ends == []


# How it ends


def test_after_the_limit_each_rank_raises_the_same_where_it_can() -> None:
    world = FakeWorld(3, ends_all=True)
    world.steps(FIRST_CALLS + 5)
    for rank in (0, 2):
        world.ranks[rank].enter()
    world.pass_time(59)
    assert [one.ends for one in world.ranks] == [[], [], []]
    world.pass_time(2)
    assert all(len(one.ends) == 1 for one in world.ranks)
    tracks, text, late = world.ranks[0].ends[0]
    assert (tracks, late) == ([0], [1])
    assert text.startswith("ranks 0, 2 have waited 60 s in push number 26, push('w'): rank 1 is")
    assert world.ranks[1].ends == world.ranks[2].ends == world.ranks[0].ends


def test_after_the_limit_the_reporter_alone_ends_the_job_where_nothing_can_be_raised() -> None:
    world = FakeWorld(3)
    world.steps(FIRST_CALLS + 5)
    world.ranks[1].enter()
    world.pass_time(62)
    assert len(world.ranks[0].job_ends) >= 1
    assert world.ranks[1].job_ends == world.ranks[2].job_ends == []
    text, has_lost = world.ranks[0].job_ends[0]
    assert "rank 1 has waited 60 s in push number 26, push('w'): ranks 0, 2 are late" in text
    assert not has_lost


def test_a_rank_whose_process_has_ended_ends_the_job_within_seconds() -> None:
    world = FakeWorld(3)
    world.steps(FIRST_CALLS + 5)
    for one in world.ranks[:2]:
        one.enter()
    world.ranks[2].answers, world.states[2] = False, "gone"
    world.pass_time(5)
    assert len(world.ranks[0].job_ends) >= 1
    text, has_lost = world.ranks[0].job_ends[0]
    assert "rank 2 (process 102 on a) has ended without a word" in text
    assert has_lost


def test_a_wait_that_is_over_does_not_put_off_the_report_of_another() -> None:
    world = FakeWorld(3)
    for one in world.ranks:
        one.add_track()
    for _ in range(FIRST_CALLS + 5):
        world.steps(1)
        for one in world.ranks:
            one.enter(track=1)
            one.leave(track=1)
    world.ranks[2].answers = False
    world.ranks[0].enter("push('a')")
    world.ranks[1].enter("push('b')", track=1)
    world.pass_time(5.75)
    assert world.said == []  # all ranks have been asked
    for one in world.ranks[1:]:
        one.enter("push('a')")
    for one in world.ranks:
        one.leave()
    world.pass_time(5)
    assert len(world.said) == 1
    assert world.said[0].startswith("rank 1 has waited")
    assert "push('b')" in world.said[0]


@pytest.mark.parametrize("behind", [0, 1, 2])
@pytest.mark.parametrize(("sooner_s", "due_s"), [(0.25, 5), (1.0, 5), (4.0, 10)])
def test_a_rank_that_is_held_up_in_the_call_before_hides_no_wait_by_noting_its_own(
    behind: int, sooner_s: float, due_s: float
) -> None:
    world = FakeWorld(3, ends_all=True)
    world.steps(FIRST_CALLS + 5)
    for one in world.ranks:
        one.enter("push('a')")
        one.agree()
    world.pass_time(sooner_s)  # for so much longer it is in its call than the others wait
    others = [one for rank, one in enumerate(world.ranks) if rank != behind]
    for one in others:
        one.leave()
        one.enter("push('b')")
    world.pass_time(due_s + 2)
    assert len(world.said) == 1
    assert f"push('b'): rank {behind} is late" in world.said[0]
    world.pass_time(60 - due_s)
    for one in others:
        ((_, text, late),) = one.ends
        assert late == [behind]
        assert f"push('b'): rank {behind} is late" in text


def test_without_a_limit_nothing_is_ended() -> None:
    world = FakeWorld(2)
    never = Watchdog(floor_s=5, ceiling_s=10, limit_s=None)
    for one in world.ranks:
        one.add_track(never)
    world.steps(FIRST_CALLS + 5)
    world.ranks[0].enter(track=1)
    world.pass_time(10_000 * LOOK_S)
    assert world.ranks[0].job_ends == []
    assert len(world.said) > 5


# Settings


def test_the_environment_counts_for_more_than_the_code() -> None:
    given = Watchdog(floor_s=1, ceiling_s=2, limit_s=3)
    assert settled(given, {}) == given
    assert settled(True, {}) == Watchdog()
    assert settled(False, {}) is None
    assert settled(given, {"KVCOLL_WATCHDOG": "off"}) is None
    assert settled(False, {"KVCOLL_WATCHDOG": "on"}) == Watchdog()
    assert settled(given, {"KVCOLL_WATCHDOG_LIMIT_S": "7.5"}) == Watchdog(
        floor_s=1, ceiling_s=2, limit_s=7.5
    )
    assert settled(given, {"KVCOLL_WATCHDOG_LIMIT_S": "off"}) == Watchdog(
        floor_s=1, ceiling_s=2, limit_s=None
    )
    assert settled(True, {"KVCOLL_WATCHDOG_CEILING_S": "10"}) == Watchdog(floor_s=10, ceiling_s=10)
    assert settled(True, {"KVCOLL_WATCHDOG_FLOOR_S": "900"}) == Watchdog(floor_s=900, ceiling_s=900)


@pytest.mark.parametrize(
    ("name", "value"),
    [("", "perhaps"), ("_FLOOR_S", "soon"), ("_CEILING_S", "-1"), ("_LIMIT_S", "nan")],
)
def test_a_variable_that_holds_something_else_is_an_error_that_names_it(
    name: str, value: str
) -> None:
    with pytest.raises(ArgumentError, match=f"KVCOLL_WATCHDOG{name} is .*{value}"):
        settled(True, {f"KVCOLL_WATCHDOG{name}": value})


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ArgumentError, match="floor_s must not be above ceiling_s"):
        Watchdog(floor_s=10, ceiling_s=5)
    for wrong in (0, -1.0, float("inf"), "3", True):
        with pytest.raises(ArgumentError, match="limit_s is a number of seconds above 0"):
            Watchdog(limit_s=wrong)  # type: ignore[arg-type]
