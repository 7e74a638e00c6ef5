"""Nothing that one rank alone does makes replicas differ: it is an error before it is applied."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from raised_by_all import raised_by_all

import kvcoll
from kvcoll import KVStore, optimizer
from kvcoll.errors import ArgumentError, RanksDisagreeError, ThreadError, UpdaterError

pytestmark = pytest.mark.ranks(at_least=2)


@pytest.fixture
def kv(comm: Any) -> Iterator[KVStore]:
    with kvcoll.create("dist_sync") as store:
        store.init("w", np.linspace(-1, 1, 1000, dtype=np.float32))
        yield store


def push(kv: KVStore, factor: float = 1.0) -> None:
    kv.push("w", np.linspace(0.1, 0.7, 1000, dtype=np.float32) * np.float32(factor))


def check_same_bits(kv: KVStore, comm: Any) -> None:
    assert len(set(comm.allgather(kv.pull("w").tobytes()))) == 1


def test_numpys_numbers_as_settings_on_one_rank_change_no_bit(kv: KVStore, comm: Any) -> None:
    number = np.float64 if kv.rank == 1 else float
    sgd = optimizer.SGD(
        learning_rate=number(0.1),
        momentum=number(0.9),
        wd=number(0.01),
        rescale_grad=number(1 / 3),
        clip_gradient=number(0.37),
    )
    kv.set_optimizer(sgd)
    for _ in range(3):
        push(kv)
    check_same_bits(kv, comm)


def test_a_schedule_that_differs_is_an_error_of_the_first_push_it_differs_in(
    kv: KVStore, comm: Any
) -> None:
    turn = 2 if kv.rank == 1 else 3
    kv.set_optimizer("sgd", lr_scheduler=lambda n: 0.5 if n < turn else 0.25)
    push(kv)
    before = kv.pull("w")
    assert type(raised_by_all(comm, lambda: push(kv))) is RanksDisagreeError
    np.testing.assert_array_equal(kv.pull("w"), before)
    check_same_bits(kv, comm)


def test_a_schedule_that_raises_on_one_rank_leaves_values_and_momentum_in_step(
    kv: KVStore, comm: Any
) -> None:
    calls = []

    def schedule(n: int) -> float:
        calls.append(n)
        if n == 2 and kv.rank == 1 and calls.count(2) == 1:
            raise OSError("no file of rates")
        return 0.5

    sgd = optimizer.SGD(momentum=0.9)
    kv.set_optimizer(sgd)
    sgd.lr_scheduler = schedule
    push(kv)
    with pytest.raises(Exception, match="no file of rates"):
        push(kv)
    push(kv)
    push(kv)
    check_same_bits(kv, comm)


class Halting(optimizer.Optimizer):
    """One of the user's own, which fails on one rank once its state has moved."""

    fail = False

    def _n_states(self) -> int:
        return 1

    def _step(self, weight: Any, grad: Any, state: Any, scratch: Any, step: Any) -> None:
        state[0][:] += grad
        weight += state[0]
        if self.fail:
            raise ZeroDivisionError("half-way")


def test_an_optimizer_of_the_users_that_fails_on_one_rank_is_mended_with_its_state(
    kv: KVStore, comm: Any
) -> None:
    own = Halting()
    kv.set_optimizer(own)
    push(kv)
    own.fail = kv.rank == 0
    with pytest.raises((ZeroDivisionError, UpdaterError)):
        push(kv, 2)
    own.fail = False
    push(kv, 3)
    check_same_bits(kv, comm)
    n = kv.num_workers
    one = np.linspace(0.1, 0.7, 1000, dtype=np.float64) * n
    # Sums of 1, then 1 + 2, then 1 + 2 + 3 pushes.
    expected = np.linspace(-1, 1, 1000) + one * (1 + 3 + 6)
    np.testing.assert_allclose(kv.pull("w"), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("what", ["momentum", "multi_precision"])
def test_a_setting_that_would_need_another_state_cannot_be_turned_on_later(
    comm: Any, what: str
) -> None:
    with kvcoll.create("dist_sync") as kv:
        kv.init("w", np.full(9, 100, np.float16))
        sgd = optimizer.SGD(learning_rate=1.0)
        kv.set_optimizer(sgd)
        kv.push("w", np.ones(9, np.float16))
        if what == "momentum":
            sgd.momentum = 0.9
        else:
            sgd.multi_precision = True
        raised = raised_by_all(comm, lambda: kv.push("w", np.ones(9, np.float16)))
        assert type(raised) is ArgumentError
        assert set(kv.pull("w").tolist()) == {100.0 - kv.num_workers}


def test_an_updater_may_not_push_to_another_store(kv: KVStore, comm: Any) -> None:
    with kvcoll.create("dist_sync") as log:
        log.init("n", np.zeros(1))
        kv.set_updater(lambda key, summed, stored: log.push("n", np.ones(1)))
        with pytest.raises(ThreadError, match="whichever the store"):
            push(kv)
        assert log.pull("n") == 0
        kv.set_updater(lambda key, summed, stored: np.copyto(stored, summed))
        push(kv)
        check_same_bits(kv, comm)


def test_stores_can_be_made_anew_by_a_rank_that_has_just_left(comm: Any) -> None:
    for _ in range(3):
        with pytest.raises(Exception, match="bad batch"), kvcoll.create("dist_sync") as kv:  # noqa: PT012
            kv.init("w", np.zeros(2))
            if kv.rank == 1:
                raise ValueError("bad batch")
            kv.barrier()
        with kvcoll.create("dist_sync", create_limit_s=20) as kv:
            kv.init("w", np.zeros(2))
            kv.push("w", np.ones(2))
            assert set(kv.pull("w").tolist()) == {kv.num_workers}
