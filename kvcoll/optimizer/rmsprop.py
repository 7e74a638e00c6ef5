"""RMSProp, plain and centered."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, final

import numpy as np

from ..arrays import Array
from ..errors import ArgumentError
from ..schema import Key
from .base import Optimizer
from .parts import check_decay, check_not_negative, update_mean, update_mean_square
from .settings import Scheduler, or_minus_1
from .step import Step


@final
class RMSProp(Optimizer):
    """RMSProp (Tieleman and Hinton 2012), or centered (Graves 2013, equations 38 to 45).

    ``g = clip(rescale_grad * grad) + wd * weight``;
    ``n = gamma1 * n + (1 - gamma1) * g * g``;
    ``weight -= lr * g / sqrt(n + epsilon)``.

    Centered also ``mean = gamma1 * mean + (1 - gamma1) * g``;
    ``delta = gamma2 * delta - lr * g / sqrt(n - mean * mean + epsilon)``;
    ``weight += delta``. A variance that rounding makes less than 0 counts as 0.

    Parameters
    ----------
    learning_rate : float, default 0.001
    gamma1 : float, default 0.9
        Decay of the running means.
    gamma2 : float, default 0.9
        Momentum; only if `centered`.
    epsilon : float, default 1e-8
        Under the root, as in Graves' paper.
    centered : bool, default False
        Not to be changed once keys have been updated.
    clip_weights : float, optional
        The values are limited to ``[-clip_weights, clip_weights]`` after each step.
    wd, rescale_grad, clip_gradient, lr_scheduler, multi_precision, param_idx2name, \
begin_num_update
        See `Optimizer`.

    References
    ----------
    T. Tieleman and G. Hinton, "Lecture 6.5: RMSProp", Coursera, 2012.
    A. Graves, "Generating sequences with recurrent neural networks", arXiv:1308.0850, 2013.
    """

    default_learning_rate: ClassVar[float] = 0.001

    def __init__(
        self,
        *,
        learning_rate: float | None = None,
        gamma1: float = 0.9,
        gamma2: float = 0.9,
        epsilon: float = 1e-8,
        centered: bool = False,
        clip_weights: float | None = None,
        wd: float = 0.0,
        rescale_grad: float = 1.0,
        clip_gradient: float | None = None,
        lr_scheduler: Scheduler | None = None,
        multi_precision: bool = False,
        param_idx2name: Mapping[Key, str] | None = None,
        begin_num_update: int = 0,
    ) -> None:
        super().__init__(
            learning_rate=learning_rate,
            wd=wd,
            rescale_grad=rescale_grad,
            clip_gradient=clip_gradient,
            lr_scheduler=lr_scheduler,
            multi_precision=multi_precision,
            param_idx2name=param_idx2name,
            begin_num_update=begin_num_update,
        )
        if clip_weights is not None and not clip_weights > 0:
            raise ArgumentError(f"clip_weights must be above 0 or None, got {clip_weights}")
        self.gamma1 = check_decay("gamma1", gamma1)
        self.gamma2 = gamma2
        self.epsilon = check_not_negative("epsilon", epsilon)
        self.centered = centered
        self.clip_weights = clip_weights

    def _own_settings(self) -> dict[str, float]:
        return {
            "gamma1": self.gamma1,
            "gamma2": self.gamma2,
            "epsilon": self.epsilon,
            "centered": self.centered,
            "clip_weights": or_minus_1(self.clip_weights),
        }

    def _n_states(self) -> int:
        return 3 if self.centered else 1

    def _step(
        self, weight: Array, grad: Array, state: list[Array], scratch: list[Array], step: Step
    ) -> None:
        gamma1 = float(self.gamma1)
        g, a = self._gradient(weight, grad, scratch, step.wd), scratch[1]
        update_mean_square(state[0], g, gamma1, a)
        if self.centered:
            update_mean(state[1], g, gamma1, a)
            np.multiply(state[1], state[1], out=a)
            np.subtract(state[0], a, out=a)
            np.maximum(a, 0, out=a)
            np.add(a, float(self.epsilon), out=a)
        else:
            np.add(state[0], float(self.epsilon), out=a)
        np.sqrt(a, out=a)
        np.divide(g, a, out=a)
        np.multiply(a, step.lr, out=a)
        if self.centered:
            np.multiply(state[2], float(self.gamma2), out=state[2])
            np.subtract(state[2], a, out=state[2])
            np.add(weight, state[2], out=weight)
        else:
            np.subtract(weight, a, out=weight)
        if self.clip_weights is not None:
            np.clip(weight, -float(self.clip_weights), float(self.clip_weights), out=weight)
