"""Optimizers whose step depends on norms over a whole key.

Rules of the file: a key is walked twice in the same pieces, first for the norms, then
for the step; pieces begin where the key begins, and their sums of squares are added in
order, so that a norm is the same bits on all ranks, whatever else a bucket holds.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import numpy as np

from ..arrays import Array
from .base import PIECE_ELEMENTS, Optimizer
from .step import Step


class LayerWise(Optimizer):
    """Base of the optimizers that scale the step of each key by its norms."""

    needs_whole_keys: ClassVar[bool] = True

    def update_flat(self, weight: Array, grad: Array, state: Sequence[Array], step: Step) -> None:
        """Apply one step to one key; the arguments are those of `Optimizer.update_flat`."""
        if step.adapts:
            step = replace(step, trust=self._trust_of(weight, grad, state, step))
        super().update_flat(weight, grad, state, step)

    def _trust_of(self, weight: Array, grad: Array, state: Sequence[Array], step: Step) -> float:
        self.reserve(weight.dtype)
        weight_squares, other_squares = 0.0, 0.0
        with np.errstate(all="ignore"):  # nothing may raise on one rank alone
            for start in range(0, weight.size, PIECE_ELEMENTS):
                piece = slice(start, start + PIECE_ELEMENTS)
                states = [array[piece] for array in state]
                of_weight, of_other = self.measure(weight[piece], grad[piece], states, step)
                weight_squares += float(of_weight)
                other_squares += float(of_other)
            return self.trust(weight_squares, other_squares, step)

    def measure(
        self, weight: Array, grad: Array, state: list[Array], step: Step
    ) -> tuple[float, float]:
        """Give the sums of squares of a piece, as `_measure` does, in any dtype of keys."""
        return self._measure(*self._widened(weight, grad, state), step)

    def trust(self, weight_squares: float, other_squares: float, step: Step) -> float:
        """Give the factor of a key's step, from the sums of all its pieces; 1 if a norm is 0."""
        weight_norm, other_norm = math.sqrt(weight_squares), math.sqrt(other_squares)
        low, high = self.limits()
        if low is not None:
            weight_norm = max(weight_norm, low)
        if high is not None:
            weight_norm = min(weight_norm, high)
        if weight_norm == 0 or other_norm == 0:
            return 1.0
        return float(self.ratio(weight_norm, other_norm, step))

    def ratio(self, weight_norm: float, other_norm: float, step: Step) -> float:
        """Give the factor that norms make which are not 0; see `_trust`."""
        return self._trust(weight_norm, other_norm, step)

    def limits(self) -> tuple[float | None, float | None]:
        """Give between what the norm of a value is taken to be; None for no limit."""
        return None, None

    @abstractmethod
    def _measure(
        self, weight: Array, grad: Array, state: list[Array], scratch: list[Array], step: Step
    ) -> tuple[float, float]:
        """Give the sums of squares of a piece of the value, and of what its step is made of.

        It may bring the state forward, which `_step` then finds so.
        """

    @abstractmethod
    def _trust(self, weight_norm: float, other_norm: float, step: Step) -> float:
        """Give the factor of a key's step, by arithmetic alone: on a GPU norms are symbols.

        It is not asked where one of them is 0.
        """


def sum_of_squares(array: Array, scratch: Array) -> float:
    """Add the squares of a piece.

    NumPy adds pairwise, in an order that depends on the number of elements alone; a
    BLAS would be quicker, but adds in another order on another machine.
    """
    np.multiply(array, array, out=scratch)
    total: float = np.add.reduce(scratch)
    return total
