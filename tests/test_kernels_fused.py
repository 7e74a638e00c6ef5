"""Kernels made of optimizers give NumPy's bits: the same C++ that a GPU gets, compiled by g++."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from host_kernel import HostKernel, needs_compiler
from quick_first import quick_first

from kvcoll import optimizer as optimizers
from kvcoll.arrays import wide
from kvcoll.kernels.fused import kernel_of, layout_of
from kvcoll.kernels.steps import trace_step
from kvcoll.kernels.table import Piece, n_lanes, rows_of
from kvcoll.optimizer.step import Step

pytestmark = [pytest.mark.single, needs_compiler]

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = [np.dtype(np.float32), np.dtype(np.float64), np.dtype(np.float16), BFLOAT16]
COMMON: list[dict[str, Any]] = [
    {},
    {"wd": 0.01, "rescale_grad": 0.25},
    {"clip_gradient": 0.5, "wd": 0.1},
    {"multi_precision": True},
]
OWN: dict[str, list[dict[str, Any]]] = {
    "sgd": [{}, {"momentum": 0.9}],
    "nag": [{}, {"momentum": 0.9}],
    "adam": [{}],
    "adamw": [{}, {"correct_bias": False}],
    "lamb": [{}, {"bias_correction": False}],
    "lars": [{"momentum": 0.9}, {"momentum": 0.9, "momentum_correction": False}, {"momentum": 0.0}],
    "rmsprop": [{}, {"centered": True}, {"clip_weights": 0.5}],
    "adagrad": [{}],
    "adadelta": [{}],
    "adamax": [{}],
    "nadam": [{}],
    "ftrl": [{}, {"lamda1": 0.0, "beta": 0.0}],
    "signum": [{}, {"momentum": 0.0}, {"wd_lh": 0.01}],
    "test": [{}],
}
CASES = [(name, own) for name, several in OWN.items() for own in several]


def awkward(n: int, dtype: np.dtype[Any], seed: int) -> Any:
    """Give numbers of all sizes: usual ones, zeros of both signs, tiny, huge, infinite, none."""
    random = np.random.default_rng(seed)
    numbers = random.standard_normal(n) * 10.0 ** random.integers(-3, 3, n)
    special = [0.0, -0.0, 1e-40, -1e-42, 1e-30, 1e38, -3e38, 1e-7, np.inf, -np.inf, np.nan, 1.0]
    numbers[: len(special)] = special
    with np.errstate(all="ignore"):
        return numbers.astype(dtype)


def assert_same_bits(got: Any, expected: Any) -> None:
    assert got.dtype == expected.dtype
    with np.errstate(all="ignore"):
        nan = np.isnan(expected.astype(np.float64))
        assert np.array_equal(np.isnan(got.astype(np.float64)), nan)
    bits = np.dtype(f"u{expected.itemsize}")
    differ = (got.view(bits) != expected.view(bits)) & ~nan
    assert not differ.any(), (got[differ][:4], expected[differ][:4], np.flatnonzero(differ)[:4])


@pytest.mark.parametrize("dtype", quick_first(DTYPES, 1), ids=lambda dtype: dtype.name)
@pytest.mark.parametrize(("name", "own"), CASES, ids=str)
def test_a_traced_step_gives_the_bits_of_the_host(
    name: str, own: dict[str, Any], dtype: np.dtype[Any]
) -> None:
    n = 2500  # three tiles, the last one not full
    for common in COMMON:
        settings = {**common, **own}
        host = optimizers.create(name, learning_rate=0.05, **settings)
        traced_by = optimizers.create(name, learning_rate=0.05, **settings)
        weight, grad = awkward(n, dtype, 1), awkward(n, dtype, 2)[::-1].copy()
        states = [np.zeros(n, wide(dtype)) for _ in range(host.n_states(dtype))]
        if host.keeps_master(dtype):
            states[-1] = weight.astype(np.float32)
        ours = [weight.copy(), grad.copy(), *(state.copy() for state in states)]
        expected = [weight, grad, *states]
        for count in (1, 2, 3):
            trust = 0.75 if host.needs_whole_keys else 1.0
            step = Step(0.05 / count, 0.02 * count * bool(common), count, False, trust)
            host.update_flat(weight, grad, states, step)
            traced = trace_step(traced_by, dtype, step)
            words = [*(array.ctypes.data for array in ours), *traced.numbers]
            table = rows_of(layout_of(traced.program), [Piece(n, words)])
            kernel = HostKernel(kernel_of(traced.program))
            kernel(n_lanes(table), [table.ctypes.data, np.int64(len(table))])
            for array, other in zip(ours, expected, strict=True):
                assert_same_bits(array, other)
            grad[:] = grad[::-1].copy()
            ours[1][:] = grad
