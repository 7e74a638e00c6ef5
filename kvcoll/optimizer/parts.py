"""What several optimizers share: running means, decay, and what their settings may be."""

from __future__ import annotations

import numpy as np

from ..arrays import Array
from ..errors import ArgumentError
from .step import Step


def check_decay(name: str, decay: float) -> float:
    """Give the decay of a running mean back.

    Raises
    ------
    ArgumentError
        It is not in ``[0, 1)``.
    """
    if not 0 <= decay < 1:
        raise ArgumentError(f"{name} must be at least 0 and below 1, got {decay}")
    return decay


def check_not_negative(name: str, number: float) -> float:
    """Give a number back.

    Raises
    ------
    ArgumentError
        It is below 0.
    """
    if not number >= 0:
        raise ArgumentError(f"{name} must not be below 0, got {number}")
    return number


def update_mean(mean: Array, g: Array, decay: float, a: Array) -> None:
    """``mean = decay * mean + (1 - decay) * g``; `a` is scratch."""
    np.multiply(mean, decay, out=mean)
    np.multiply(g, 1 - decay, out=a)
    np.add(mean, a, out=mean)


def update_mean_square(mean: Array, g: Array, decay: float, a: Array) -> None:
    """``mean = decay * mean + (1 - decay) * g * g``; `a` is scratch."""
    np.multiply(mean, decay, out=mean)
    np.multiply(g, g, out=a)  # not into g, which may be the sum itself
    np.multiply(a, 1 - decay, out=a)
    np.add(mean, a, out=mean)


def decay(weight: Array, step: Step) -> None:
    """``weight = (1 - lr * wd) * weight``: weight decay that is no part of the gradient."""
    if step.wd:
        np.multiply(weight, 1 - step.lr * step.wd, out=weight)
