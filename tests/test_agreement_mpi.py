"""The agreement over MPI, at the run's own number of ranks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
from fake_messenger import Outcome, call, finished, leave, outcome_of

from kvcoll.agreement import AcrossRanks, name_ranks
from kvcoll.errors import ArgumentError, RankLeftError, RanksDisagreeError, ShapeMismatchError
from kvcoll.transport import mpi

if TYPE_CHECKING:
    from mpi4py import MPI

ORDER = "every rank must make the same calls in one order"
at_least_two = pytest.mark.ranks(at_least=2)


@pytest.fixture
def agreement(comm: MPI.Intracomm) -> Iterator[AcrossRanks]:
    with_own = mpi.duplicate(comm, 30)
    yield AcrossRanks(mpi.MpiMessenger(with_own, mpi.topology_of(with_own)))
    with_own.Free()


def test_flags_of_all_ranks_are_ored(agreement: AcrossRanks, rank: int, size: int) -> None:
    assert agreement.confirm(call("push(1)"), 1 << rank) == 2**size - 1
    assert agreement.confirm(call("push(1)"), 1 << 63 if rank == size - 1 else 0) == 1 << 63


@at_least_two
def test_each_rank_that_differs_is_named_on_all(
    agreement: AcrossRanks, rank: int, size: int
) -> None:
    for odd in range(size):
        mine = call("push('w')", f"key 'w' holds float32[{2 + (rank == odd)}]")
        same = name_ranks([other for other in range(size) if other != odd])
        said = {
            min(r for r in range(size) if r != odd): f"{same} called push('w') with "
            "key 'w' holds float32[2]",
            odd: f"rank {odd} called push('w') with key 'w' holds float32[3]",
        }
        text = f"the ranks disagree: {said.pop(min(said))}, {said.pop(max(said))}; {ORDER}"
        outcome = outcome_of(lambda mine=mine: agreement.confirm(mine))  # type: ignore[misc]
        assert outcome == (RanksDisagreeError, text)
        assert agreement.confirm(call("barrier()")) == 0


@at_least_two
def test_each_rank_that_refuses_raises_its_error_on_all(
    agreement: AcrossRanks, rank: int, size: int
) -> None:
    long = "é" * 100_000  # more than a message that MPI sends at once
    for odd in range(size):

        def act(odd: int = odd) -> int:
            if rank == odd:
                agreement.refuse("push()", ShapeMismatchError(long))
            return agreement.confirm(call("push(1)"))

        assert outcome_of(act) == (ShapeMismatchError, f"rank {odd}: {long}")


def test_all_ranks_that_refuse_alike_raise_the_error_as_it_is(agreement: AcrossRanks) -> None:
    def act() -> int:
        agreement.refuse("init()", ArgumentError("bad"))

    assert outcome_of(act) == (ArgumentError, "bad")


@at_least_two
@pytest.mark.parametrize("last_leaves", [False, True], ids=["rank 0", "the last rank"])
def test_a_rank_that_leaves_is_named_on_all(
    agreement: AcrossRanks, rank: int, size: int, last_leaves: bool
) -> None:
    odd = size - 1 if last_leaves else 0
    stay = name_ranks([other for other in range(size) if other != odd])
    expected: Outcome = (
        RankLeftError,
        f"rank {odd} left the store (X: y), while {stay} called push(1): all ranks must make "
        "the same number of calls; the stores of these ranks are closed now",
    )

    def act() -> int:
        return leave(agreement, "X: y") if rank == odd else agreement.confirm(call("push(1)"))

    assert outcome_of(act) == expected


def test_two_stores_left_at_once_in_opposite_order_do_not_block(
    agreement: AcrossRanks, comm: MPI.Intracomm, rank: int
) -> None:
    own = mpi.duplicate(comm, 30)
    other = AcrossRanks(mpi.MpiMessenger(own, mpi.topology_of(own)))
    leaves = [agreement.leave(""), other.leave("")]
    assert finished(leaves if rank % 2 else leaves[::-1], pause_s=1e-4) == [None, None]
    own.Free()


def test_texts_of_all_ranks_come_by_rank(agreement: AcrossRanks, rank: int, size: int) -> None:
    told = ["", "é", "x" * 200_000, "\udc80"]
    for _ in range(3):  # messages of one round are not taken for those of the next
        got = agreement.tell(told[rank % 4])
        assert got == [told[other % 4].replace("\udc80", "?") for other in range(size)]
