"""Schedules of the learning rate, against figures worked out by hand."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest

import kvcoll
from kvcoll.errors import ArgumentError
from kvcoll.lr_scheduler import (
    CosineScheduler,
    FactorScheduler,
    LRScheduler,
    MultiFactorScheduler,
    PolyScheduler,
)
from kvcoll.optimizer import SGD, Adam

pytestmark = pytest.mark.single

# The rates of updates 1, 2, ...
RATES: list[tuple[LRScheduler, list[float]]] = [
    (FactorScheduler(3), [0.01] * 8),
    (
        FactorScheduler(3, factor=0.5, base_lr=1.0),
        [1, 1, 1, 0.5, 0.5, 0.5, 0.25, 0.25, 0.25, 0.125],
    ),
    (FactorScheduler(1, factor=0.5, base_lr=1.0, stop_factor_lr=0.2), [1, 0.5, 0.25, 0.2, 0.2]),
    (FactorScheduler(2, factor=0.5, base_lr=0.1, stop_factor_lr=0.2), [0.1, 0.1, 0.2]),
    (
        FactorScheduler(3, factor=0.5, base_lr=1.0, warmup_steps=5),
        [0.2, 0.4, 0.6, 0.8, 0.5, 0.5, 0.25],  # the warm-up's updates count
    ),
    (
        MultiFactorScheduler([2, 5], factor=0.1, base_lr=1.0),
        [1, 1, 0.1, 0.1, 0.1, 0.01, 0.01],
    ),
    (
        MultiFactorScheduler((1, 3), factor=0.5, base_lr=1.0, warmup_steps=3, warmup_begin_lr=0.4),
        [0.6, 0.8, 0.5, 0.25],
    ),
    (PolyScheduler(4, base_lr=1.6), [0.9, 0.4, 0.1, 0, 0, 0]),
    (PolyScheduler(4, base_lr=2.0, pwr=1, final_lr=1.0), [1.75, 1.5, 1.25, 1, 1]),
    (
        PolyScheduler(6, base_lr=1.6, warmup_steps=2, warmup_begin_lr=0.3, warmup_mode="constant"),
        [0.3, 1.6, 0.9, 0.4, 0.1, 0, 0],
    ),
    (
        CosineScheduler(4, base_lr=2.0),
        [1 + math.sqrt(0.5), 1, 1 - math.sqrt(0.5), 0, 0],
    ),
    (
        CosineScheduler(5, base_lr=3.0, final_lr=1.0, warmup_steps=2, warmup_begin_lr=1.0),
        [2, 3, 2.5, 1.5, 1, 1],
    ),
]


@pytest.mark.parametrize(("schedule", "rates"), RATES)
def test_rates_are_those_of_the_formula(schedule: LRScheduler, rates: list[float]) -> None:
    given = [schedule(number) for number in range(1, len(rates) + 1)]
    np.testing.assert_allclose(given, rates, rtol=1e-14, atol=1e-16)
    assert all(type(rate) is float for rate in given)


@pytest.mark.parametrize(("schedule", "rates"), RATES)
def test_a_call_changes_nothing_whatever_the_order(
    schedule: LRScheduler, rates: list[float]
) -> None:
    before, numbers = repr(schedule), range(len(rates) + 3)
    forwards = {number: schedule(number) for number in numbers}
    assert {number: schedule(number) for number in reversed(numbers)} == forwards
    assert repr(schedule) == before


@pytest.mark.parametrize("schedule", [s for s, rates in RATES if rates[0] >= rates[-1]])
def test_rates_never_rise_after_the_warm_up(schedule: LRScheduler) -> None:
    later = [schedule(number) for number in range(max(schedule.warmup_steps, 1), 40)]
    assert all(after <= before for before, after in itertools.pairwise(later))


def test_a_rate_that_the_optimizer_is_given_is_the_base_of_the_schedule() -> None:
    schedule = PolyScheduler(10, base_lr=0.5, pwr=1, warmup_steps=2)
    ours = SGD(learning_rate=4.0, lr_scheduler=schedule)
    assert [ours.rate_at(n) for n in (1, 2, 6, 10)] == [2, 4, 2, 0]
    assert schedule.base_lr == 0.5  # another optimizer may have it
    assert schedule(2) == 0.5


@pytest.mark.parametrize("optimizer", [SGD, Adam])
def test_without_one_the_base_of_the_schedule_holds(optimizer: type[SGD | Adam]) -> None:
    schedule = FactorScheduler(10, base_lr=0.5)
    assert optimizer(lr_scheduler=schedule).learning_rate == 0.5
    assert optimizer().learning_rate == {SGD: 0.01, Adam: 0.001}[optimizer]


def test_a_schedule_of_ones_own_is_a_class_or_a_function() -> None:
    class Harmonic(LRScheduler):
        def __call__(self, num_update: int) -> float:
            if num_update < self.warmup_steps:
                return self.get_warmup_lr(num_update)
            return self.base_lr / num_update

    ours = SGD(learning_rate=8.0, lr_scheduler=Harmonic(warmup_steps=2, warmup_begin_lr=0.01))
    assert [ours.rate_at(n) for n in (1, 2, 4)] == [4.005, 4, 2]
    assert SGD(learning_rate=8.0, lr_scheduler=lambda n: 1.0 / n).rate_at(4) == 0.25
    assert not any("Harmonic" in word for word in ours.names_and_factors())


def test_a_schedule_is_part_of_what_ranks_compare() -> None:
    words = SGD(lr_scheduler=FactorScheduler(7, factor=0.5)).names_and_factors()
    assert words == (
        "lr_scheduler=FactorScheduler(base_lr=0.01, factor=0.5, step=7, stop_factor_lr=1e-08, "
        "warmup_begin_lr=0.0, warmup_mode='linear', warmup_steps=0)",
    )


WRONG: list[tuple[Callable[[], object], str]] = [
    (lambda: FactorScheduler(0), "step must be a whole number, at least 1, got 0"),
    (lambda: FactorScheduler(1.5), "step must be a whole number, at least 1, got 1.5"),  # type: ignore[arg-type]
    (lambda: FactorScheduler(True), "step must be a whole number, at least 1, got True"),
    (lambda: FactorScheduler(1, factor=1.1), "factor must be above 0 and at most 1, got 1.1"),
    (lambda: FactorScheduler(1, factor=0.0), "factor must be above 0 and at most 1, got 0.0"),
    (lambda: FactorScheduler(1, stop_factor_lr=-1), "stop_factor_lr must be a number that is not"),
    (lambda: MultiFactorScheduler([]), "step must be a list of rising numbers of updates, got []"),
    (lambda: MultiFactorScheduler([3, 3]), "step must be a list of rising numbers"),
    (lambda: MultiFactorScheduler([3, 2]), "step must be a list of rising numbers"),
    (lambda: MultiFactorScheduler([0, 2]), "each step must be a whole number, at least 1, got 0"),
    (lambda: PolyScheduler(0), "max_update must be a whole number, at least 1, got 0"),
    (lambda: PolyScheduler(5, warmup_steps=5), "max_update must be above warmup_steps: 5 is not"),
    (lambda: PolyScheduler(5, pwr=-1), "pwr must be a number that is not below 0, got -1"),
    (lambda: CosineScheduler(5, warmup_steps=9), "max_update must be above warmup_steps: 5 is not"),
    (lambda: CosineScheduler(5, final_lr=math.nan), "final_lr must be a number that is not below"),
    (lambda: CosineScheduler(5, base_lr=math.inf), "base_lr must be a number that is not below 0"),
    (lambda: FactorScheduler(1, warmup_steps=-1), "warmup_steps must be a whole number, at least"),
    (lambda: FactorScheduler(1, warmup_mode="slow"), "warmup_mode is 'linear' or 'constant', got"),
    (lambda: FactorScheduler(1, warmup_begin_lr=1.0), "warmup_begin_lr must not be above base_lr"),
    (
        lambda: SGD(learning_rate=0.001, lr_scheduler=FactorScheduler(1, warmup_begin_lr=0.005)),
        "warmup_begin_lr must not be above base_lr: 0.005 is above 0.001",
    ),
]


@pytest.mark.parametrize(("wrong", "said"), WRONG)
def test_what_makes_no_schedule_is_refused(wrong: Callable[[], object], said: str) -> None:
    with pytest.raises(ArgumentError) as raised:
        wrong()
    assert str(raised.value).startswith(said)


def test_whole_numbers_of_numpy_are_whole_numbers() -> None:
    schedule = kvcoll.lr_scheduler.FactorScheduler(np.int64(2), factor=0.5, base_lr=1.0)
    assert [schedule(n) for n in (2, 3)] == [1, 0.5]
