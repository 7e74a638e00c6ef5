"""Optimizers follow the formulae of their papers, worked out here once more in float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from optimizer_references import RULES, Reference, make, make_with_everything

from kvcoll import optimizer
from kvcoll.errors import ArgumentError, DTypeMismatchError
from kvcoll.optimizer import SGD, Adam, Optimizer, Test
from kvcoll.optimizer.base import PIECE_ELEMENTS
from kvcoll.schema import Key, Spec

pytestmark = pytest.mark.single

Array: TypeAlias = npt.NDArray[Any]
DType: TypeAlias = np.dtype[Any]
BF16 = np.dtype(ml_dtypes.bfloat16)
F16, F32, F64 = np.dtype("f2"), np.dtype("f4"), np.dtype("f8")
STEPS = 20
# Rounding of one step; the errors of all steps add up to not more than all of them.
EPSILON = {F16: 2.0**-11, BF16: 2.0**-8, F32: 2.0**-23, F64: 2.0**-52}


Make: TypeAlias = Callable[..., tuple[Optimizer, Reference]]
everything = partial(make_with_everything, key="w")
settings = pytest.mark.parametrize("name", RULES)
extent = pytest.mark.parametrize("make", [make, everything], ids=["plain", "with everything"])


def run(
    ours: Optimizer,
    weight: Array,
    step: Callable[[Array, Array], Array],
    key: Key = "w",
    steps: int = STEPS,
) -> Array:
    """Update `weight` by random gradients; give what `step` makes of the same."""
    random = np.random.default_rng(3)
    expected = weight.astype(F64)
    state = ours.create_state(Spec(key, weight.shape, weight.dtype, 0), weight)
    for _ in range(steps):
        grad = random.standard_normal(weight.shape).astype(weight.dtype)
        before = grad.copy()
        expected = step(expected, grad)
        ours.update(key, weight, grad, state)
        assert grad.tobytes() == before.tobytes()
    return expected


def some_weight(shape: tuple[int, ...], dtype: DType) -> Array:
    return np.random.default_rng(2).standard_normal(shape).astype(dtype)


def check_close(weight: Array, expected: Array, epsilon: float, steps: int = STEPS) -> None:
    bound = 4 * steps * epsilon * max(1.0, float(np.abs(expected).max()))
    assert float(np.abs(weight.astype(F64) - expected).max()) <= bound


@settings
@extent
@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
def test_steps_are_those_by_the_book(name: str, make: Make, dtype: DType) -> None:
    ours, book = make(name)
    weight = some_weight((5, 7), dtype)
    check_close(weight, run(ours, weight, book.step), 8 * EPSILON[dtype])


@settings
@extent
@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_keys_of_16_bits_are_updated_in_float32_and_rounded_once_a_step(
    name: str, make: Make, dtype: DType
) -> None:
    ours, book = make(name)
    weight = some_weight((100,), dtype)
    # The book's weight is rounded after each step too, and each is one rounding off at most.
    expected = run(ours, weight, lambda w, g: book.step(w, g).astype(dtype).astype(F64))
    check_close(weight, expected, EPSILON[dtype])
    assert np.mean(weight.astype(F64) == expected) > 0.85


@settings
@extent
@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_a_master_copy_keeps_what_16_bits_lose(name: str, make: Make, dtype: DType) -> None:
    ours, book = make(name, multi_precision=True)
    weight = some_weight((100,), dtype)
    expected = run(ours, weight, book.step)
    one_rounding = EPSILON[dtype] * np.abs(expected) + 100 * STEPS * EPSILON[F32]
    assert (np.abs(weight.astype(F64) - expected) <= one_rounding).all()


@pytest.mark.parametrize(
    "n", [0, 1, PIECE_ELEMENTS - 1, PIECE_ELEMENTS, PIECE_ELEMENTS + 1, 2 * PIECE_ELEMENTS + 77]
)
@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
@pytest.mark.parametrize("multi_precision", [False, True], ids=["", "with a master copy"])
def test_pieces_do_not_show(n: int, dtype: DType, multi_precision: bool) -> None:
    ours, ours_small = (
        Adam(learning_rate=0.05, wd=0.1, multi_precision=multi_precision) for _ in range(2)
    )
    weight = some_weight((n,), dtype)
    ends = [weight[:3].copy(), weight[-3:].copy()]
    random = np.random.default_rng(3)
    state = ours.create_state(Spec(0, (n,), dtype, 0), weight)
    states = [ours_small.create_state(Spec(k, e.shape, dtype, k), e) for k, e in enumerate(ends)]
    for _ in range(2):
        grad = random.standard_normal(n).astype(dtype)
        ours.update(0, weight, grad, state)
        for key, (end, part) in enumerate(zip(ends, [grad[:3], grad[-3:]], strict=True)):
            ours_small.update(key, end, part, states[key])
    assert weight[:3].tobytes() == ends[0].tobytes()
    assert weight[-3:].tobytes() == ends[1].tobytes()


def test_sgd_with_momentum_makes_0_9_and_0_51_of_1() -> None:
    ours = SGD(learning_rate=0.1, momentum=0.9)
    weight = np.ones((), F64)
    state = ours.create_state(Spec(3, (), F64, 0), weight)
    ours.update(3, weight, np.asarray(1.0), state)
    np.testing.assert_allclose(weight, 0.9, rtol=1e-15)
    ours.update(3, weight, np.asarray(3.0), state)  # -0.09 - 0.3
    np.testing.assert_allclose(weight, 0.51, rtol=1e-15)


def test_the_test_optimizer_adds() -> None:
    weight = np.array([1, 2, 3], F32)
    Test(rescale_grad=0.5).update("w", weight, np.array([2, 4, 8], F32), ())
    np.testing.assert_array_equal(weight, [2, 4, 7])


@pytest.mark.parametrize(
    ("ours", "n_states"), [(SGD(), 0), (SGD(momentum=0.1), 1), (Adam(), 2), (Test(), 0)]
)
@pytest.mark.parametrize("dtype", [F16, BF16, F32, F64], ids=str)
@pytest.mark.parametrize("multi_precision", [False, True], ids=["", "with a master copy"])
def test_states_are_of_the_keys_shape_in_float32_at_least(
    ours: Optimizer, n_states: int, dtype: DType, multi_precision: bool
) -> None:
    ours.multi_precision = multi_precision
    weight = some_weight((2, 3), dtype)
    state = ours.create_state(Spec("w", (2, 3), dtype, 0), weight)
    small = dtype.itemsize == 2
    assert len(state) == n_states + (multi_precision and small) == ours.n_states(dtype)
    assert all(array.shape == (2, 3) for array in state)
    assert all(array.dtype == (F32 if small else dtype) for array in state)
    if multi_precision and small:
        np.testing.assert_array_equal(state[-1], weight.astype(F32))
    assert not any(array.any() for array in state[:n_states])


@pytest.mark.parametrize("dtype", ["i4", "u1", "?", "c8"])
def test_a_key_that_holds_no_real_floats_is_refused(dtype: str) -> None:
    spec = Spec("n", (2,), np.dtype(dtype), 0)
    with pytest.raises(DTypeMismatchError) as raised:
        SGD().create_state(spec, np.zeros(2, dtype))
    assert str(raised.value) == (
        f"key 'n' holds {np.dtype(dtype).name}[2], SGD updates keys of real floats only: "
        "use an updater of your own (set_updater) for this key"
    )


NAMES: dict[Key, str] = {0: "fc_weight", 1: "fc_bias", 2: "bn_gamma", 3: "bn_beta"}
FACTORS: list[tuple[Mapping[Key, str], Mapping[Key, float], Mapping[Key, float], list[float]]] = [
    # names, lr_mult, wd_mult -> for keys 0 to 3 the weight after one gradient of 1
    ({}, {}, {}, [1 - 0.1 * 1.5] * 4),
    ({}, {1: 2.0}, {2: 3.0}, [0.85, 1 - 0.2 * 1.5, 1 - 0.1 * 2.5, 0.85]),
    (NAMES, {}, {}, [0.85, 0.9, 0.85, 0.9]),  # no decay of biases and betas
    (NAMES, {"fc_bias": 0.0}, {"fc_bias": 1.0, "bn_gamma": 0.0}, [0.85, 1, 0.9, 0.9]),
    (NAMES, {0: 3.0, "fc_weight": 9.0}, {1: 2.0}, [1 - 0.3 * 1.5, 0.8, 0.85, 0.9]),
]


@pytest.mark.parametrize(("names", "lr_mult", "wd_mult", "expected"), FACTORS)
def test_single_keys_have_factors_by_key_or_by_name(
    names: Mapping[Key, str],
    lr_mult: Mapping[Key, float],
    wd_mult: Mapping[Key, float],
    expected: list[float],
) -> None:
    ours = SGD(learning_rate=0.1, wd=0.5, param_idx2name=names)
    ours.set_lr_mult(lr_mult)
    ours.set_wd_mult(wd_mult)
    weights = [np.ones(1) for _ in range(4)]
    for key, weight in enumerate(weights):
        ours.update(key, weight, np.ones(1), ())
    np.testing.assert_allclose(np.concatenate(weights), expected, rtol=1e-14)


def test_infinities_go_through_whatever_numpy_is_told_to_raise() -> None:
    ours, weight = Adam(learning_rate=0.1), np.zeros(3, F16)
    state = ours.create_state(Spec("w", (3,), F16, 0), weight)
    with np.errstate(all="raise"):
        ours.update("w", weight, np.array([np.inf, 60000, 0], F16), state)
    assert np.isnan(weight[0])
    np.testing.assert_allclose(weight[1:].astype(F64), [-0.1, 0], rtol=1e-3)


def test_optimizers_are_made_by_name() -> None:
    made = optimizer.create("SGD", learning_rate=0.5, momentum=0.25)
    assert type(made) is SGD
    assert made.settings() == (0.5, 0.0, 1.0, -1.0, 0.25, 1.0)
    assert made.describe() == (
        "SGD(learning_rate=0.5, wd=0, rescale_grad=1, clip_gradient=-1, momentum=0.25, "
        "lazy_update=1)"
    )
    for name in optimizer.__all__:
        if name not in ("Optimizer", "create"):
            assert type(optimizer.create(name)) is vars(optimizer)[name]
            assert type(optimizer.create(name.lower())) is vars(optimizer)[name]
    with pytest.raises(ArgumentError, match=r"^unknown optimizer 'sdg': known are .*lamb, .*sgd"):
        optimizer.create("sdg")
    with pytest.raises(TypeError):
        optimizer.create("sgd", beta1=0.9)
