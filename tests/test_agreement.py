"""All ranks learn at one place that they differ, and raise the same error in plain words."""

from __future__ import annotations

import signal
import threading
import time
from functools import partial

import pytest
from fake_messenger import (
    call,
    fake_messengers,
    finished,
    leave,
    on_all,
    together,
)

from kvcoll.agreement import AcrossRanks, Alone, Call, Report, name_ranks, verdict
from kvcoll.errors import (
    RankFailedError,
    RankLeftError,
    RanksDisagreeError,
    ShapeMismatchError,
    WaitEndedError,
)
from kvcoll.schema import digest

pytestmark = pytest.mark.single
sizes = pytest.mark.parametrize("ranks", range(1, 10))
ORDER = "every rank must make the same calls in one order"
LEFT = "all ranks must make the same number of calls; the stores of these ranks are closed now"


def push(*shapes: str) -> Report:
    return Report("push()", tuple(f"key 'w' holds {shape}" for shape in shapes))


def wrong(text: str, name: str = "ShapeMismatchError") -> Report:
    return Report("push()", (), name, text)


VERDICTS: list[tuple[list[Report], type[Exception], str]] = [
    (
        [Report("push(1)"), Report("barrier()")],
        RanksDisagreeError,
        f"the ranks disagree: rank 0 called push(1), rank 1 called barrier(); {ORDER}",
    ),
    (
        [Report("a"), Report("b"), Report("a"), Report("c")],
        RanksDisagreeError,
        f"the ranks disagree: ranks 0, 2 called a, rank 1 called b, rank 3 called c; {ORDER}",
    ),
    (
        [Report(f"f{rank}") for rank in range(8)],
        RanksDisagreeError,
        "the ranks disagree: "
        + ", ".join(f"rank {rank} called f{rank}" for rank in range(6))
        + f", and 2 other ways; {ORDER}",
    ),
    (
        [push("f[1]", "f[2]"), push("f[1]", "f[3]")],
        RanksDisagreeError,
        "the ranks disagree: rank 0 called push() with key 'w' holds f[2], "
        f"rank 1 called push() with key 'w' holds f[3]; {ORDER}",
    ),
    (
        [push("f[1]"), push("f[1]", "f[2]"), push("f[1]")],
        RanksDisagreeError,
        "the ranks disagree: ranks 0, 2 called push() with 1 keys, "
        f"rank 1 called push() with 2 keys; {ORDER}",
    ),
    (
        [push("f[1]"), push("f[1]")],
        RanksDisagreeError,
        f"the ranks disagree: ranks 0, 1 called push() after another number of calls; {ORDER}",
    ),
    ([wrong("bad"), wrong("bad")], ShapeMismatchError, "bad"),
    ([push("f[1]"), wrong("bad"), wrong("bad")], ShapeMismatchError, "ranks 1, 2: bad"),
    ([wrong("x"), push("f[1]"), wrong("y")], ShapeMismatchError, "rank 0: x; rank 2: y"),
    (
        [Report("barrier()"), wrong("no luck", "UnknownError")],
        RankFailedError,
        "UnknownError: rank 1: no luck",
    ),
    ([wrong("x", "TypeError"), wrong("x", "ValueError")], TypeError, "ranks 0, 1: x"),
    (
        [Report("push(1)"), Report("close", left=True)],
        RankLeftError,
        f"rank 1 left the store, while rank 0 called push(1): {LEFT}",
    ),
    (
        [Report("close", error_text="KeyError: 'w'", left=True), wrong("bad"), Report("init(2)")],
        RankLeftError,
        "rank 0 left the store (KeyError: 'w'), while rank 1 called push(), "
        f"rank 2 called init(2): {LEFT}",
    ),
    (
        [
            Report("close", left=True),
            Report("close", error_text="X: y", left=True),
            Report("push(1)"),
            Report("close", left=True),
        ],
        RankLeftError,
        "ranks 0, 3 left the store, rank 1 left the store (X: y), "
        f"while rank 2 called push(1): {LEFT}",
    ),
]


@pytest.mark.parametrize(("reports", "kind", "text"), VERDICTS)
def test_the_reports_of_all_ranks_make_one_error(
    reports: list[Report], kind: type[Exception], text: str
) -> None:
    error = verdict([Report.decode(report.encode()) for report in reports])
    assert type(error) is kind
    assert str(error) == text


def test_many_ranks_are_named_short() -> None:
    assert name_ranks([1]) == "rank 1"
    assert name_ranks([0, 2]) == "ranks 0, 2"
    assert name_ranks(list(range(100))) == "ranks 0, 1, 2, 3, 4, 5, 6, 7, …"


def test_in_one_process_there_is_nothing_to_agree_upon() -> None:
    alone = Alone()
    assert alone.confirm(call("push(1)"), 5) == 5
    assert alone.tell("mine") == ["mine"]
    error = ValueError("as it is")
    with pytest.raises(ValueError, match="as it is") as raised:
        alone.refuse("push()", error)
    assert raised.value is error
    assert finished([alone.leave("")]) == [None]


@sizes
def test_equal_calls_pass_in_log2_messages_and_flags_are_ored(ranks: int) -> None:
    def act(rank: int, agreement: AcrossRanks) -> int:
        agreement.confirm(call("barrier()"))
        return agreement.confirm(call("push(1)"), 1 << rank)

    assert together(ranks, act) == [2**ranks - 1] * ranks
    messengers = fake_messengers(ranks)
    on_all([partial(AcrossRanks(messenger).confirm, call("x")) for messenger in messengers])
    log2 = {1: 0, 2: 1, 3: 2, 4: 2, 5: 3, 6: 3, 7: 3, 8: 3, 9: 4}
    assert {one.n_exchanges for one in messengers} == {log2[ranks]}


@sizes
def test_one_rank_that_differs_is_named_on_all_wherever_it_is(ranks: int) -> None:
    for odd in range(ranks):

        def act(rank: int, agreement: AcrossRanks, odd: int = odd) -> int:
            return agreement.confirm(call("push(2)" if rank == odd else "push(1)"))

        if ranks == 1:
            assert together(ranks, act) == [0]
            continue
        same = [rank for rank in range(ranks) if rank != odd]
        said = {rank: f"{name_ranks(same)} called push(1)" for rank in same}
        said[odd] = f"rank {odd} called push(2)"
        first, second = (said[0], said[odd] if odd else said[1])
        text = f"the ranks disagree: {first}, {second}; {ORDER}"
        assert together(ranks, act) == [(RanksDisagreeError, text)] * ranks


@sizes
def test_one_rank_that_refuses_raises_its_error_on_all(ranks: int) -> None:
    for odd in range(ranks):

        def act(rank: int, agreement: AcrossRanks, odd: int = odd) -> int:
            if rank == odd:
                agreement.refuse("push()", ShapeMismatchError("bad"))
            return agreement.confirm(call("push(1)"))

        text = "bad" if ranks == 1 else f"rank {odd}: bad"
        assert together(ranks, act) == [(ShapeMismatchError, text)] * ranks


@sizes
def test_ranks_that_all_refuse_alike_raise_the_error_as_it_is(ranks: int) -> None:
    def act(rank: int, agreement: AcrossRanks) -> int:
        agreement.refuse("push()", ShapeMismatchError("bad"))

    assert together(ranks, act) == [(ShapeMismatchError, "bad")] * ranks


@sizes
def test_one_rank_that_leaves_is_named_on_all(ranks: int) -> None:
    for odd in range(ranks):

        def act(rank: int, agreement: AcrossRanks, odd: int = odd) -> int:
            return leave(agreement, "X: y") if rank == odd else agreement.confirm(call("push(1)"))

        if ranks == 1:
            assert together(ranks, act) == [-1]
            continue
        same = name_ranks([rank for rank in range(ranks) if rank != odd])
        text = f"rank {odd} left the store (X: y), while {same} called push(1): {LEFT}"
        assert together(ranks, act) == [(RankLeftError, text)] * ranks


@sizes
def test_ranks_that_all_leave_end_without_an_error(ranks: int) -> None:
    agreements = [AcrossRanks(messenger) for messenger in fake_messengers(ranks)]
    assert finished([agreement.leave("") for agreement in agreements]) == [None] * ranks


@sizes
def test_stores_left_at_once_in_opposite_order_do_not_block(ranks: int) -> None:
    first, second = (
        [AcrossRanks(messenger) for messenger in fake_messengers(ranks)] for _ in range(2)
    )
    leaves = []
    for rank in range(ranks):
        pair = [first[rank].leave(""), second[rank].leave("")]
        leaves += pair if rank % 2 else pair[::-1]
    assert finished(leaves) == [None] * (2 * ranks)


def test_one_who_leaves_gives_way_in_every_step() -> None:
    early, late = (AcrossRanks(messenger) for messenger in fake_messengers(2))
    steps = early.leave("")
    for _ in range(5):
        next(steps)  # the other rank is not there yet
    assert finished([steps, late.leave("")]) == [None, None]


def test_a_call_more_on_one_rank_is_found_at_the_next_agreement() -> None:
    def act(rank: int, agreement: AcrossRanks) -> int:
        if rank == 0:
            agreement.confirm(call("push(1)"))
        return agreement.confirm(call("push(2)"))

    disagree = "the ranks disagree: rank 0 called push(1), rank 1 called push(2); " + ORDER
    assert together(2, act) == [(RanksDisagreeError, disagree)] * 2


def test_equal_calls_after_another_number_of_calls_are_no_agreement() -> None:
    # It cannot come about by calls alone, but would be a step that one rank never made.
    messengers = fake_messengers(2)
    agreements = [AcrossRanks(messenger) for messenger in messengers]
    on_all([partial(agreement.confirm, call("push(1)")) for agreement in agreements])
    agreements[1] = AcrossRanks(messengers[1])  # it has forgotten that call

    text = f"the ranks disagree: ranks 0, 1 called push(1) after another number of calls; {ORDER}"
    outcomes = on_all([partial(agreement.confirm, call("push(1)")) for agreement in agreements])
    assert outcomes == [(RanksDisagreeError, text)] * 2


@sizes
def test_after_an_error_all_ranks_agree_again(ranks: int) -> None:
    def act(rank: int, agreement: AcrossRanks) -> int:
        refuse = partial(agreement.refuse, "push()", ShapeMismatchError(f"bad {rank}"))
        for odd in range(ranks):
            with pytest.raises(ShapeMismatchError, match=f"^(rank {odd}: )?bad {odd}$"):
                refuse() if rank == odd else agreement.confirm(call("push(1)"))
        return agreement.confirm(call("push(1)"), 4)

    assert together(ranks, act) == [4] * ranks


@sizes
def test_texts_of_all_ranks_come_by_rank_whatever_is_in_them(ranks: int) -> None:
    told = ["", "é\n\x00", "\udc80", "x" * 100_000, *"abcde"][:ranks]

    def act(rank: int, agreement: AcrossRanks) -> int:
        got = agreement.tell(told[rank])
        assert got == [text.replace("\udc80", "?") for text in told]
        return len(got)

    assert together(ranks, act) == [ranks] * ranks


def test_an_error_without_a_text_does_not_keep_the_others_waiting() -> None:
    class MuteError(ValueError):
        def __str__(self) -> str:
            raise ZeroDivisionError

    def act(rank: int, agreement: AcrossRanks) -> int:
        if rank == 1:
            agreement.refuse("push()", MuteError())
        return agreement.confirm(call("push(1)"))

    text = "rank 1: (its text cannot be written: ZeroDivisionError)"
    assert together(2, act) == [(ValueError, text)] * 2


def test_a_digest_that_looks_like_a_word_of_the_agreement_is_none() -> None:
    for low in range(4):

        def act(rank: int, agreement: AcrossRanks, low: int = low) -> int:
            return agreement.confirm(Call("push(1)", low))

        assert together(3, act) == [0, 0, 0]


@sizes
@pytest.mark.parametrize("settles", [False, True])
def test_a_call_that_all_come_through_is_settled_and_its_errors_are_those_of_the_agreement(
    ranks: int, settles: bool
) -> None:
    def act(rank: int, agreement: AcrossRanks) -> int:
        for shape in ("all alike", f"that of {rank}", "refused"):
            try:
                with agreement.atomic():
                    if shape == "refused" and rank == ranks - 1:
                        agreement.refuse("set()", ValueError("wrong"))
                    agreement.confirm(call(f"set({shape})"))
            except (RanksDisagreeError, ValueError) as error:
                told = error
            else:
                assert ranks == 1 or shape == "all alike"
        assert str(told).endswith("wrong")
        return agreement.confirm(call("push(1)"))

    assert together(ranks, act, settles=settles) == [0] * ranks


@pytest.mark.parametrize("ends", [WaitEndedError, KeyboardInterrupt])
def test_where_one_rank_does_not_come_through_none_does(ends: type[BaseException]) -> None:
    def act(rank: int, agreement: AcrossRanks) -> int:
        try:
            with agreement.atomic():
                agreement.confirm(call("set(1)"))
                if rank == 1:
                    raise ends("cut short")
        except KeyboardInterrupt as error:
            raise ValueError from error  # which the thread's end would show
        return 1

    told = [outcome[0] for outcome in together(3, act, settles=True) if isinstance(outcome, tuple)]
    own = ValueError if ends is KeyboardInterrupt else WaitEndedError
    assert told == [WaitEndedError, own, WaitEndedError]


def test_a_signal_in_a_wait_for_files_is_raised_once_the_others_have_come() -> None:
    class Interrupted(Exception):  # noqa: N818 - as a program's own, which is no error
        pass

    def interrupt(*_: object) -> None:
        signals.append(time.monotonic())
        raise Interrupted

    signals: list[float] = []
    came: list[float] = []
    agreements = [AcrossRanks(messenger) for messenger in fake_messengers(2)]
    of_files = Call("a step", digest("a step"), is_of_files=True)

    def late() -> None:
        while not signals:
            time.sleep(0.01)
        time.sleep(0.05)
        came.append(time.monotonic())
        agreements[1].confirm(of_files)
        agreements[1].confirm(call("push(1)"))

    other = threading.Thread(target=late)
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        other.start()
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        with pytest.raises(Interrupted):
            agreements[0].confirm(of_files)
        assert came  # not before
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert agreements[0].confirm(call("push(1)")) == 0  # the ranks are in step
    other.join(10)
    assert not other.is_alive()
