"""An optimizer's step, traced: the same arithmetic as on the host, in one kernel."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from ..arrays import DType, wide
from ..optimizer.base import Optimizer
from ..optimizer.layerwise import LayerWise
from ..optimizer.step import Step
from .trace import Sum, Traced, UntraceableError, trace

_DOUBLE: DType = np.dtype(np.float64)


def trace_step(optimizer: Optimizer, dtype: DType, step: Step) -> Traced:
    """Write down what a step does to a value, its gradient and its states.

    Parameters
    ----------
    optimizer : Optimizer
    dtype : numpy.dtype
        Of the value and the gradient.
    step : Step
        Where its key's norms set it, as they do for a `LayerWise` alone, the factor that they
        make of it is the program's scalar.

    Returns
    -------
    Traced
        Of a program on value, gradient, and states.

    Raises
    ------
    UntraceableError
        A class of the user's does what cannot be written down.
    """
    follows = isinstance(optimizer, LayerWise) and step.adapts

    def update(arrays: list[Any]) -> None:
        own_step = step
        if follows:
            *arrays, trust = arrays
            own_step = replace(step, adapts=False, trust=trust)  # the norms have been taken
        own = optimizer.with_scratch(dtype, arrays[0].scratch)
        own.update_flat(arrays[0], arrays[1], arrays[2:], own_step)

    return trace(update, step_dtypes(optimizer, dtype), int(follows))


def trace_measure(optimizer: LayerWise, dtype: DType, step: Step) -> Traced:
    """Write down what gives the norms of a key; its result is the two sums of squares.

    Raises
    ------
    UntraceableError
        As for `trace_step`, or the result is not made of two sums over all elements.
    """

    def measure(arrays: list[Any]) -> Any:
        own = optimizer.with_scratch(dtype, arrays[0].scratch)
        return own.measure(arrays[0], arrays[1], arrays[2:], step)

    traced = trace(measure, step_dtypes(optimizer, dtype))
    if [type(part) for part in traced.result] != [Sum, Sum]:
        raise UntraceableError("norms that are not sums of squares over all elements")
    return traced


def trace_trust(optimizer: LayerWise, step: Step) -> Traced:
    """Write down what makes the factor of a step of the two sums of squares, as `trust` does.

    Raises
    ------
    UntraceableError
        As for `trace_step`; or the factor is decided by norms.
    """

    def trust(sums: list[Any]) -> None:
        weight_squares, other_squares, out = sums
        weight_norm, other_norm = np.sqrt(weight_squares), np.sqrt(other_squares)
        low, high = optimizer.limits()
        if low is not None or high is not None:
            weight_norm = np.clip(weight_norm, low, high)
        ratio = np.where(other_norm == 0, 1.0, optimizer.ratio(weight_norm, other_norm, step))
        out[...] = np.where(weight_norm == 0, 1.0, ratio)

    return trace(trust, [_DOUBLE] * 3)


def step_dtypes(optimizer: Optimizer, dtype: DType) -> list[DType]:
    """Give the dtypes of a value, its gradient and its states."""
    return [dtype, dtype, *[wide(dtype)] * optimizer.n_states(dtype)]
