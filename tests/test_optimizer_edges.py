"""Where optimizers could fail: zeros, edges of their settings, pieces, and memory."""

from __future__ import annotations

import math
import tracemalloc
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pytest
from optimizer_references import RULES, make, norm

from kvcoll import optimizer
from kvcoll.errors import ArgumentError
from kvcoll.optimizer import (
    LAMB,
    LARS,
    AdaDelta,
    AdaGrad,
    Adamax,
    AdamW,
    Ftrl,
    Nadam,
    Optimizer,
    RMSProp,
    Signum,
)
from kvcoll.optimizer.base import PIECE_ELEMENTS
from kvcoll.optimizer.step import power
from kvcoll.schema import Spec

pytestmark = pytest.mark.single

Array: TypeAlias = npt.NDArray[Any]


def run(ours: Optimizer, weight: Array, *grads: Any) -> Array:
    """Update a value by some gradients, in place."""
    state = ours.create_state(Spec("w", weight.shape, weight.dtype, 0), weight)
    for grad in grads:
        ours.update("w", weight, np.broadcast_to(grad, weight.shape).astype(weight.dtype), state)
    return weight


@pytest.mark.parametrize("name", [name for name in RULES if name[:4] not in ("Ftrl", "sign")])
@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_gradients_of_0_leave_a_value_as_it_is(name: str, dtype: str) -> None:
    ours, _ = make(name)
    weight = run(ours, np.array([0.5, -0.25, 0], dtype), 0.0, 0.0, 0.0)
    np.testing.assert_array_equal(weight, np.array([0.5, -0.25, 0], dtype))


def test_adamax_goes_on_where_the_first_gradients_were_0() -> None:
    weight = run(Adamax(learning_rate=0.5), np.ones(2, np.float32), [0.0, 4.0], [4.0, 4.0])
    # In the second update the mean is 0.1 * 4, and 1 - 0.9**2 of it is known.
    expected = [1 - 0.5 / 0.19 * 0.1, 1 - 0.5 - 0.5 / 0.19 * 0.19 / math.sqrt(1)]
    np.testing.assert_allclose(weight, expected, rtol=1e-6)


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_ftrl_makes_0_of_what_has_no_gradient_or_a_small_one(beta: float) -> None:
    weight = run(Ftrl(lamda1=0.5, beta=beta), np.zeros(3, np.float32), [0.0, 0.25, -0.25])
    assert weight.tobytes() == np.zeros(3, np.float32).tobytes()  # and not -0


def test_ftrl_with_a_rate_of_0_changes_nothing() -> None:
    ours, weight = Ftrl(learning_rate=0.5), np.array([0.5, 2.0])
    state = ours.create_state(Spec("w", (2,), weight.dtype, 0), weight)
    ours.set_lr_mult({"w": 0.0})
    ours.update("w", weight, np.ones(2), state)
    np.testing.assert_array_equal(weight, [0.5, 2.0])
    assert not any(array.any() for array in state)


def test_a_variance_that_rounding_makes_negative_counts_as_0() -> None:
    ours = RMSProp(learning_rate=1e-4, gamma1=0.5, epsilon=1e-12, centered=True)
    gradients = np.linspace(0.1, 1.0, 1000)  # the same each time: in the end without variance
    weight = run(ours, np.zeros(1000, np.float32), *[gradients] * 60)
    assert np.isfinite(weight).all()


def test_signum_moves_by_the_rate_whatever_the_gradient() -> None:
    weight = run(Signum(learning_rate=0.25), np.zeros(3), [1e-9, -1e9, 0.0])
    np.testing.assert_array_equal(weight, [-0.25, 0.25, 0.0])


@pytest.mark.parametrize("dtype", ["f8", "f4", "f2"])
def test_a_norm_is_taken_over_all_pieces_of_a_key(dtype: str) -> None:
    n = 2 * PIECE_ELEMENTS + 77
    random = np.random.default_rng(7)
    start = random.standard_normal(n).astype(dtype)
    grad = random.standard_normal(n).astype(dtype)
    weight = run(LARS(learning_rate=1.0, eta=0.5, multi_precision=True), start.copy(), grad)
    wide = start.astype("f8"), grad.astype("f8")
    expected = wide[0] - 0.5 * norm(wide[0]) / norm(wide[1]) * wide[1]
    rtol = {"f8": 1e-12, "f4": 1e-5, "f2": 2e-3}[dtype]
    np.testing.assert_allclose(weight.astype("f8"), expected, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("ours", [LAMB, LARS])
def test_a_value_of_0_or_no_elements_has_a_ratio_of_1(ours: type[LAMB | LARS]) -> None:
    weight = run(ours(learning_rate=0.5), np.zeros(4), 2.0)
    step = 0.5 * (2.0 if ours is LARS else 1 / (1 + 1e-6 / 2))
    np.testing.assert_allclose(weight, -step, rtol=1e-9)
    assert run(ours(), np.zeros((0, 3)), 1.0).shape == (0, 3)


def test_momentum_of_lars_follows_a_rate_that_falls() -> None:
    # Without a gradient only momentum moves the value: by the new rate, or by the old.
    for corrects, moved in ((True, 0.125), (False, 0.5)):
        ours = LARS(learning_rate=1.0, momentum=0.5, eta=1.0, momentum_correction=corrects)
        weight = np.ones(1)
        state = ours.create_state(Spec("w", (1,), weight.dtype, 0), weight)
        ours.update("w", weight, np.full(1, 4.0), state)  # a step of 1 * |1| / |4| * 4
        assert weight[0] == 0
        ours.set_learning_rate(0.25)
        ours.update("w", weight, np.zeros(1), state)
        assert weight[0] == -moved


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("dtype", ["f4", "f2"])
def test_an_update_takes_no_memory_after_the_first(name: str, dtype: str) -> None:
    ours, _ = make(name, wd=0.1, clip_gradient=0.5, rescale_grad=0.5, multi_precision=True)
    weight, grad = np.ones(3 * PIECE_ELEMENTS, dtype), np.ones(3 * PIECE_ELEMENTS, dtype)
    state = ours.create_state(Spec("w", weight.shape, weight.dtype, 0), weight)
    ours.update("w", weight, grad, state)
    tracemalloc.start()
    try:
        ours.update("w", weight, grad, state)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # Views and numbers, but no piece: that would be 128 kB at least.
    assert peak_bytes < 50_000


def test_powers_are_those_of_exact_arithmetic() -> None:
    for base, count in [(0.5, 0), (0.5, 1), (0.5, 10), (-2.0, 7), (3.0, 20), (0.0, 0), (0.0, 3)]:
        assert power(base, count) == base**count
    for count in (3, 1000, 123457):
        assert power(0.999, count) == pytest.approx(0.999**count, rel=1e-10)


def test_nadam_has_no_gap_where_its_product_of_momenta_has_vanished() -> None:
    sizes = []
    for begin in (10_000, 1_000_000):
        ours = Nadam(learning_rate=1.0, beta2=0.0, begin_num_update=begin)
        sizes.append(-run(ours, np.zeros(1), 3.0)[0])
    # In the limit mu is beta1: 0.9 * 0.1 + 0.1.
    assert 0.19 < sizes[0] < 0.4
    assert sizes[1] == pytest.approx(0.19, rel=1e-6)


WRONG: list[tuple[Callable[[], object], str]] = [
    (lambda: optimizer.create("adam", beta1=1.0), "beta1 must be at least 0 and below 1, got 1.0"),
    (lambda: AdamW(beta2=-0.1), "beta2 must be at least 0 and below 1, got -0.1"),
    (lambda: LAMB(beta2=math.nan), "beta2 must be at least 0 and below 1, got nan"),
    (lambda: LAMB(epsilon=-1.0), "epsilon must not be below 0, got -1.0"),
    (lambda: LAMB(lower_bound=-1.0), "lower_bound must not be below 0, got -1.0"),
    (lambda: LAMB(upper_bound=-1.0), "upper_bound must not be below 0, got -1.0"),
    (lambda: LARS(eta=-1.0), "eta must not be below 0, got -1.0"),
    (lambda: LARS(eps=-1.0), "eps must not be below 0, got -1.0"),
    (lambda: RMSProp(gamma1=1.0), "gamma1 must be at least 0 and below 1, got 1.0"),
    (lambda: RMSProp(clip_weights=0.0), "clip_weights must be above 0 or None, got 0.0"),
    (lambda: AdaGrad(eps=-1.0), "eps must not be below 0, got -1.0"),
    (lambda: AdaDelta(rho=2.0), "rho must be at least 0 and below 1, got 2.0"),
    (lambda: Adamax(beta1=3.0), "beta1 must be at least 0 and below 1, got 3.0"),
    (lambda: Nadam(schedule_decay=-1.0), "schedule_decay must not be below 0, got -1.0"),
    (lambda: Ftrl(lamda1=-1.0), "lamda1 must not be below 0, got -1.0"),
    (lambda: Ftrl(beta=-1.0), "beta must not be below 0, got -1.0"),
]


@pytest.mark.parametrize(("wrong", "said"), WRONG)
def test_settings_that_make_no_sense_are_refused(wrong: Callable[[], object], said: str) -> None:
    with pytest.raises(ArgumentError) as raised:
        wrong()
    assert str(raised.value) == said
