"""Adam with decoupled weight decay."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar, final

import numpy as np

from ..arrays import Array
from ..schema import Key
from .base import Optimizer
from .parts import check_decay, check_not_negative, decay, update_mean, update_mean_square
from .settings import Scheduler
from .step import Step, power


@final
class AdamW(Optimizer):
    """AdamW (Loshchilov and Hutter 2019): the decay is not part of the gradient.

    ``g = clip(rescale_grad * grad)``;
    ``m = beta1 * m + (1 - beta1) * g``; ``v = beta2 * v + (1 - beta2) * g * g``;
    ``m' = m / (1 - beta1**t)``; ``v' = v / (1 - beta2**t)``;
    ``weight -= lr * (m' / (sqrt(v') + epsilon) + wd * weight)``.

    Parameters
    ----------
    learning_rate : float, default 0.001
    beta1, beta2 : float, default 0.9 and 0.999
    epsilon : float, default 1e-6
    correct_bias : bool, default True
        Off: `m` and `v` are taken as they are.
    wd, rescale_grad, clip_gradient, lr_scheduler, multi_precision, param_idx2name, \
begin_num_update
        See `Optimizer`.

    References
    ----------
    I. Loshchilov and F. Hutter, "Decoupled weight decay regularization", ICLR 2019.
    """

    default_learning_rate: ClassVar[float] = 0.001

    def __init__(
        self,
        *,
        learning_rate: float | None = None,
        beta1: float = 0.9,
        beta2: float = 0.999,
        epsilon: float = 1e-6,
        correct_bias: bool = True,
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
        self.beta1 = check_decay("beta1", beta1)
        self.beta2 = check_decay("beta2", beta2)
        self.epsilon = check_not_negative("epsilon", epsilon)
        self.correct_bias = correct_bias

    def _own_settings(self) -> dict[str, float]:
        return {
            "beta1": self.beta1,
            "beta2": self.beta2,
            "epsilon": self.epsilon,
            "correct_bias": self.correct_bias,
        }

    def _n_states(self) -> int:
        return 2

    def _step(
        self, weight: Array, grad: Array, state: list[Array], scratch: list[Array], step: Step
    ) -> None:
        mean, variance = state
        beta1, beta2 = float(self.beta1), float(self.beta2)
        g, a = self._gradient(weight, grad, scratch, 0.0), scratch[1]
        update_mean(mean, g, beta1, a)
        update_mean_square(variance, g, beta2, a)
        first, second = 1.0, 1.0
        if self.correct_bias:
            first, second = 1 - power(beta1, step.count), math.sqrt(1 - power(beta2, step.count))
        np.sqrt(variance, out=a)
        np.add(a, float(self.epsilon) * second, out=a)  # scaled, which spares a pass
        np.divide(mean, a, out=a)
        np.multiply(a, step.lr * second / first, out=a)
        decay(weight, step)
        np.subtract(weight, a, out=weight)
