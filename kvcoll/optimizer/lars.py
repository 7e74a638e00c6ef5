"""LARS: SGD with a rate for each layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import final

import numpy as np

from ..arrays import Array
from ..schema import Key
from .layerwise import LayerWise, sum_of_squares
from .parts import check_not_negative
from .settings import Scheduler
from .step import Step


@final
class LARS(LayerWise):
    """LARS (You, Gitman and Ginsburg 2017).

    ``g = clip(rescale_grad * grad)``;
    ``trust = eta * |weight| / (|g| + wd * |weight| + eps)``, or 1 if ``|weight|`` or
    ``|g|`` is 0, and for keys whose name ends in ``gamma``, ``beta`` or ``bias``;
    ``m = momentum * m + lr * trust * (g + wd * weight)``; ``weight -= m``.

    With `momentum_correction` it is ``m = momentum * m + trust * (g + wd * weight)``;
    ``weight -= lr * m``. ``|x|`` is the L2 norm over a whole key. A name is that of
    `param_idx2name`, or a key that is a str.

    Parameters
    ----------
    momentum : float, default 0
    eta : float, default 0.001
        How large a step is, next to the value.
    eps : float, default 0
    momentum_correction : bool, default True
        Leave `lr` out of ``m``, so that steps of the past follow a change of the rate
        (Goyal et al. 2017). Not to be changed once keys have been updated.
    learning_rate, wd, rescale_grad, clip_gradient, lr_scheduler, multi_precision, \
param_idx2name, begin_num_update
        See `Optimizer`.

    References
    ----------
    Y. You, I. Gitman and B. Ginsburg, "Large batch training of convolutional networks",
    arXiv:1708.03888, 2017.
    P. Goyal et al., "Accurate, large minibatch SGD: training ImageNet in 1 hour",
    arXiv:1706.02677, 2017.
    """

    def __init__(
        self,
        *,
        learning_rate: float | None = None,
        momentum: float = 0.0,
        eta: float = 0.001,
        eps: float = 0.0,
        momentum_correction: bool = True,
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
        self.momentum = momentum
        self.eta = check_not_negative("eta", eta)
        self.eps = check_not_negative("eps", eps)
        self.momentum_correction = momentum_correction

    def _own_settings(self) -> dict[str, float]:
        return {
            "momentum": self.momentum,
            "eta": self.eta,
            "eps": self.eps,
            "momentum_correction": self.momentum_correction,
        }

    def _adapts(self, name: Key) -> bool:
        return not str(name).endswith(("gamma", "beta", "bias"))

    def _n_states(self) -> int:
        return 1 if self.momentum else 0

    def _measure(
        self, weight: Array, grad: Array, state: list[Array], scratch: list[Array], step: Step
    ) -> tuple[float, float]:
        g = self._gradient(weight, grad, scratch, 0.0)
        return sum_of_squares(weight, scratch[1]), sum_of_squares(g, scratch[1])

    def _trust(self, weight_norm: float, other_norm: float, step: Step) -> float:
        limit = other_norm + step.wd * weight_norm + float(self.eps)
        ratio: float = np.divide(float(self.eta) * weight_norm, limit)  # not an error if it is 0
        return ratio

    def _step(
        self, weight: Array, grad: Array, state: list[Array], scratch: list[Array], step: Step
    ) -> None:
        corrects = self.momentum_correction and len(state) > 0
        factor = step.trust if corrects else step.trust * step.lr
        g = self._gradient(weight, grad, scratch, step.wd, factor)
        if state:
            momentum = state[0]
            np.multiply(momentum, float(self.momentum), out=momentum)
            np.add(momentum, g, out=momentum)
            g = np.multiply(momentum, step.lr, out=scratch[1]) if corrects else momentum
        np.subtract(weight, g, out=weight)
