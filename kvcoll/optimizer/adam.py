"""Adam: adaptive moment estimation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import final

import numpy as np

from ..arrays import Array
from ..errors import ArgumentError
from ..schema import Key
from .base import Optimizer, Scheduler, Step


@final
class Adam(Optimizer):
    """Adam (Kingma and Ba 2015), in the paper's form with the corrected step size.

    ``g = clip(rescale_grad * grad) + wd * weight``;
    ``m = beta1 * m + (1 - beta1) * g``; ``v = beta2 * v + (1 - beta2) * g * g``;
    ``weight -= lr * sqrt(1 - beta2**t) / (1 - beta1**t) * m / (sqrt(v) + epsilon)``.

    Parameters
    ----------
    learning_rate : float, default 0.001
    beta1, beta2 : float, default 0.9 and 0.999
    epsilon : float, default 1e-8
    wd, rescale_grad, clip_gradient, lr_scheduler, multi_precision, param_idx2name, \
begin_num_update
        See `Optimizer`.
    """

    def __init__(
        self,
        *,
        learning_rate: float = 0.001,
        beta1: float = 0.9,
        beta2: float = 0.999,
        epsilon: float = 1e-8,
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
        for name, beta in (("beta1", beta1), ("beta2", beta2)):
            if not 0 <= beta < 1:
                raise ArgumentError(f"{name} must be at least 0 and below 1, got {beta}")
        if not epsilon >= 0:
            raise ArgumentError(f"epsilon must not be below 0, got {epsilon}")
        self.beta1 = beta1
        self.beta2 = beta2
        self.epsilon = epsilon

    def _own_settings(self) -> tuple[float, ...]:
        return (self.beta1, self.beta2, self.epsilon)

    def _n_states(self) -> int:
        return 2

    def _step(
        self, weight: Array, grad: Array, state: list[Array], scratch: list[Array], step: Step
    ) -> None:
        mean, variance = state
        beta1, beta2, epsilon = float(self.beta1), float(self.beta2), float(self.epsilon)
        g, a = self._gradient(weight, grad, scratch, step.wd), scratch[1]
        np.multiply(mean, beta1, out=mean)
        np.multiply(g, 1 - beta1, out=a)
        np.add(mean, a, out=mean)
        np.multiply(variance, beta2, out=variance)
        np.multiply(g, g, out=a)  # not into g, which may be the sum itself
        np.multiply(a, 1 - beta2, out=a)
        np.add(variance, a, out=variance)
        np.sqrt(variance, out=a)
        np.add(a, epsilon, out=a)
        np.divide(mean, a, out=a)
        corrected = math.sqrt(1 - beta2**step.count) / (1 - beta1**step.count)
        np.multiply(a, step.lr * corrected, out=a)
        np.subtract(weight, a, out=weight)
