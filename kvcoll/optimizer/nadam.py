"""Nadam: Adam with Nesterov's momentum."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import ClassVar, final

import numpy as np

from ..arrays import Array
from ..schema import Key
from .base import Optimizer
from .parts import check_decay, check_not_negative, update_mean, update_mean_square
from .settings import Scheduler
from .step import Step, power


@final
class Nadam(Optimizer):
    """Nadam (Dozat 2016), with the warm-up of the momentum that the paper gives.

    ``g = clip(rescale_grad * grad) + wd * weight``;
    ``m = beta1 * m + (1 - beta1) * g``; ``v = beta2 * v + (1 - beta2) * g * g``;
    ``mu_t = beta1 * (1 - 0.5 * 0.96 ** (t * schedule_decay))``;
    ``p_t = mu_1 * ... * mu_t``; ``v' = v / (1 - beta2**t)``;
    ``weight -= lr * (mu_t+1 * m / (1 - p_t+1) + (1 - mu_t) * g / (1 - p_t)) /
    (sqrt(v') + epsilon)``. The product is that of the key's own updates.

    Parameters
    ----------
    learning_rate : float, default 0.001
    beta1, beta2 : float, default 0.9 and 0.999
    epsilon : float, default 1e-8
    schedule_decay : float, default 0.004
        How quickly the momentum rises from half of `beta1` to `beta1`.
    wd, rescale_grad, clip_gradient, lr_scheduler, multi_precision, param_idx2name, \
begin_num_update
        See `Optimizer`.

    References
    ----------
    T. Dozat, "Incorporating Nesterov momentum into Adam", ICLR workshop 2016.
    """

    default_learning_rate: ClassVar[float] = 0.001

    def __init__(
        self,
        *,
        learning_rate: float | None = None,
        beta1: float = 0.9,
        beta2: float = 0.999,
        epsilon: float = 1e-8,
        schedule_decay: float = 0.004,
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
        self.schedule_decay = check_not_negative("schedule_decay", schedule_decay)

    def _own_settings(self) -> dict[str, float]:
        return {
            "beta1": self.beta1,
            "beta2": self.beta2,
            "epsilon": self.epsilon,
            "schedule_decay": self.schedule_decay,
        }

    def _n_states(self) -> int:
        return 2

    def _step(
        self, weight: Array, grad: Array, state: list[Array], scratch: list[Array], step: Step
    ) -> None:
        mean, variance = state
        beta1, beta2 = float(self.beta1), float(self.beta2)
        g, a, b = self._gradient(weight, grad, scratch, step.wd), scratch[1], scratch[2]
        update_mean(mean, g, beta1, a)
        update_mean_square(variance, g, beta2, a)
        of_g, of_mean = _shares(beta1, float(self.schedule_decay), step.count)
        second = math.sqrt(1 - power(beta2, step.count))
        np.multiply(mean, step.lr * second * of_mean, out=b)
        np.multiply(g, step.lr * second * of_g, out=scratch[0])
        np.add(b, scratch[0], out=b)
        np.sqrt(variance, out=a)
        np.add(a, float(self.epsilon) * second, out=a)  # scaled, which spares a pass
        np.divide(b, a, out=a)
        np.subtract(weight, a, out=weight)


@lru_cache(maxsize=1024)
def _shares(beta1: float, schedule_decay: float, count: int) -> tuple[float, float]:
    """Give the factors of the gradient and of the mean in update number `count`."""
    momentum = _momentum(beta1, schedule_decay, count)
    following = _momentum(beta1, schedule_decay, count + 1)
    product = _product(beta1, schedule_decay, count)
    return (1 - momentum) / (1 - product), following / (1 - product * following)


def _momentum(beta1: float, schedule_decay: float, count: int) -> float:
    return beta1 * (1 - 0.5 * math.pow(0.96, count * schedule_decay))


def _product(beta1: float, schedule_decay: float, count: int) -> float:
    """Multiply the momenta so far; what is too small to change 1 is 0."""
    product = 1.0
    for number in range(1, count + 1):
        product *= _momentum(beta1, schedule_decay, number)
        if product < 2.0**-60:
            return 0.0
    return product
