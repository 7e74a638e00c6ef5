"""AdaDelta: steps in the units of the values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, final

import numpy as np

from ..arrays import Array
from ..schema import Key
from .base import Optimizer
from .parts import check_decay, check_not_negative, decay, update_mean_square
from .settings import Scheduler
from .step import Step


@final
class AdaDelta(Optimizer):
    """AdaDelta (Zeiler 2012).

    ``g = clip(rescale_grad * grad)``; ``n = rho * n + (1 - rho) * g * g``;
    ``delta = sqrt(d + epsilon) / sqrt(n + epsilon) * g``;
    ``d = rho * d + (1 - rho) * delta * delta``;
    ``weight -= lr * (delta + wd * weight)``: the decay is no part of the gradient, as
    in MXNet.

    Parameters
    ----------
    learning_rate : float, default 1
        The paper has none; MXNet takes one and does not use it.
    rho : float, default 0.9
    epsilon : float, default 1e-5
    wd, rescale_grad, clip_gradient, lr_scheduler, multi_precision, param_idx2name, \
begin_num_update
        See `Optimizer`.

    References
    ----------
    M. D. Zeiler, "ADADELTA: an adaptive learning rate method", arXiv:1212.5701, 2012.
    """

    default_learning_rate: ClassVar[float] = 1.0

    def __init__(
        self,
        *,
        learning_rate: float | None = None,
        rho: float = 0.9,
        epsilon: float = 1e-5,
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
        self.rho = check_decay("rho", rho)
        self.epsilon = check_not_negative("epsilon", epsilon)

    def _own_settings(self) -> dict[str, float]:
        return {"rho": self.rho, "epsilon": self.epsilon}

    def _n_states(self) -> int:
        return 2

    def _step(
        self, weight: Array, grad: Array, state: list[Array], scratch: list[Array], step: Step
    ) -> None:
        squares, deltas = state
        rho, epsilon = float(self.rho), float(self.epsilon)
        g, a, b = self._gradient(weight, grad, scratch, 0.0), scratch[1], scratch[2]
        update_mean_square(squares, g, rho, a)
        np.add(squares, epsilon, out=b)
        np.add(deltas, epsilon, out=a)
        np.divide(a, b, out=a)
        np.sqrt(a, out=a)
        np.multiply(a, g, out=a)
        update_mean_square(deltas, a, rho, b)
        np.multiply(a, step.lr, out=a)
        decay(weight, step)
        np.subtract(weight, a, out=weight)
