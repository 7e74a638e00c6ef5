"""An optimizer's step, traced: the same arithmetic as on the host, in one kernel."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..arrays import DType, wide
from ..optimizer.base import Optimizer
from ..optimizer.step import Step
from .trace import Traced, trace


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


def step_dtypes(optimizer: Optimizer, dtype: DType) -> list[DType]:
    """Give the dtypes of a value, its gradient and its states."""
    return [dtype, dtype, *[wide(dtype)] * optimizer.n_states(dtype)]
