"""LAMB: Adam with a rate for each layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar, final

import numpy as np

from ..arrays import Array
from ..schema import Key
from .layerwise import LayerWise, sum_of_squares
from .parts import check_decay, check_not_negative, update_mean, update_mean_square
from .settings import Scheduler, or_minus_1
from .step import Step, power


@final
class LAMB(LayerWise):
    """LAMB (You et al. 2020).

    ``g = clip(rescale_grad * grad)``;
    ``m = beta1 * m + (1 - beta1) * g``; ``v = beta2 * v + (1 - beta2) * g * g``;
    ``m' = m / (1 - beta1**t)``; ``v' = v / (1 - beta2**t)``;
    ``r = m' / (sqrt(v') + epsilon) + wd * weight``;
    ``weight -= lr * |weight| / |r| * r``, or ``lr * r`` if one of them is 0.

    ``|x|`` is the L2 norm over a whole key.

    Parameters
    ----------
    learning_rate : float, default 0.001
    beta1, beta2 : float, default 0.9 and 0.999
    epsilon : float, default 1e-6
    lower_bound, upper_bound : float, optional
        ``|weight|`` is limited to them.
    bias_correction : bool, default True
        Off: `m` and `v` are taken as they are.
    wd, rescale_grad, clip_gradient, lr_scheduler, multi_precision, param_idx2name, \
begin_num_update
        See `Optimizer`.

    References
    ----------
    Y. You et al., "Large batch optimization for deep learning: training BERT in 76 minutes",
    ICLR 2020.
    """

    default_learning_rate: ClassVar[float] = 0.001

    def __init__(
        self,
        *,
        learning_rate: float | None = None,
        beta1: float = 0.9,
        beta2: float = 0.999,
        epsilon: float = 1e-6,
        lower_bound: float | None = None,
        upper_bound: float | None = None,
        bias_correction: bool = True,
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
        for name, bound in (("lower_bound", lower_bound), ("upper_bound", upper_bound)):
            if bound is not None:
                check_not_negative(name, bound)
        self.beta1 = check_decay("beta1", beta1)
        self.beta2 = check_decay("beta2", beta2)
        self.epsilon = check_not_negative("epsilon", epsilon)
        self.lower_bound = lower_bound
        self.upper_bound = upper_bound
        self.bias_correction = bias_correction

    def _own_settings(self) -> dict[str, float]:
        return {
            "beta1": self.beta1,
            "beta2": self.beta2,
            "epsilon": self.epsilon,
            "lower_bound": or_minus_1(self.lower_bound),
            "upper_bound": or_minus_1(self.upper_bound),
            "bias_correction": self.bias_correction,
        }

    def _n_states(self) -> int:
        return 2

    def _measure(
        self, weight: Array, grad: Array, state: list[Array], scratch: list[Array], step: Step
    ) -> tuple[float, float]:
        mean, variance = state
        g = self._gradient(weight, grad, scratch, 0.0)
        update_mean(mean, g, float(self.beta1), scratch[1])
        update_mean_square(variance, g, float(self.beta2), scratch[1])
        direction = self._direction(weight, state, scratch, step)
        return sum_of_squares(weight, scratch[0]), sum_of_squares(direction, scratch[0])

    def limits(self) -> tuple[float | None, float | None]:
        """Give what the settings say."""
        bounds = self.lower_bound, self.upper_bound
        low, high = (None if bound is None else float(bound) for bound in bounds)
        return low, high

    def _trust(self, weight_norm: float, other_norm: float, step: Step) -> float:
        return weight_norm / other_norm

    def _step(
        self, weight: Array, grad: Array, state: list[Array], scratch: list[Array], step: Step
    ) -> None:
        direction = self._direction(weight, state, scratch, step)
        np.multiply(direction, step.lr * step.trust, out=direction)
        np.subtract(weight, direction, out=weight)

    def _direction(
        self, weight: Array, state: list[Array], scratch: list[Array], step: Step
    ) -> Array:
        """Work out `r`, which is cheaper than to keep it, into the second scratch array."""
        mean, variance = state
        a = scratch[1]
        first, second = 1.0, 1.0
        if self.bias_correction:
            first = 1 - power(float(self.beta1), step.count)
            second = math.sqrt(1 - power(float(self.beta2), step.count))
        np.sqrt(variance, out=a)
        np.add(a, float(self.epsilon) * second, out=a)  # scaled, which spares a pass
        np.divide(mean, a, out=a)
        np.multiply(a, second / first, out=a)
        if step.wd:
            np.multiply(weight, step.wd, out=scratch[0])
            np.add(a, scratch[0], out=a)
        return a
