"""An optimizer's step, traced: the same arithmetic as on the host, in one kernel."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..arrays import DType, wide
from ..optimizer.base import Optimizer
from ..optimizer.layerwise import LayerWise
from ..optimizer.step import Step
from .trace import Sum, Traced, UntraceableError, trace


def trace_step(optimizer: Optimizer, dtype: DType, step: Step) -> Traced:
    """Write down what a step does to a value, its gradient and its states.

    Parameters
    ----------
    optimizer : Optimizer
    dtype : numpy.dtype
        Of the value and the gradient.
    step : Step
        With the factor that norms make of it, where it has one.

    Returns
    -------
    Traced
        Of a program on value, gradient, and states.

    Raises
    ------
    UntraceableError
        A class of the user's does what cannot be written down.
    """
    if optimizer.needs_whole_keys:
        step = replace(step, adapts=False)  # the norms have been taken

    def update(arrays: list[Any]) -> None:
        own = optimizer.with_scratch(dtype, arrays[0].scratch)
        own.update_flat(arrays[0], arrays[1], arrays[2:], step)

    return trace(update, step_dtypes(optimizer, dtype))


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


def step_dtypes(optimizer: Optimizer, dtype: DType) -> list[DType]:
    """Give the dtypes of a value, its gradient and its states."""
    return [dtype, dtype, *[wide(dtype)] * optimizer.n_states(dtype)]
