"""AdaGrad: a rate of its own for each element."""

from __future__ import annotations

from collections.abc import Mapping
from typing import final

import numpy as np

from ..arrays import Array
from ..schema import Key
from .base import Optimizer
from .parts import check_not_negative, decay
from .settings import Scheduler
from .step import Step


@final
class AdaGrad(Optimizer):
    """AdaGrad (Duchi, Hazan and Singer 2011), with a diagonal matrix.

    ``g = clip(rescale_grad * grad)``; ``h += g * g``;
    ``weight -= lr * (g / (sqrt(h) + eps) + wd * weight)``: the decay is no part of the
    gradients that are summed up, as in MXNet.

    Parameters
    ----------
    eps : float, default 1e-7
        Added to the root, as in the paper; MXNet adds it under the root.
    lazy_update : bool, default True
        Of a row-sparse gradient's key, update only the rows that it names.
    learning_rate, wd, rescale_grad, clip_gradient, lr_scheduler, multi_precision, \
param_idx2name, begin_num_update
        See `Optimizer`.

    References
    ----------
    J. Duchi, E. Hazan and Y. Singer, "Adaptive subgradient methods for online learning and
    stochastic optimization", JMLR 12, 2011.
    """

    def __init__(
        self,
        *,
        learning_rate: float | None = None,
        eps: float = 1e-7,
        lazy_update: bool = True,
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
        self.eps = check_not_negative("eps", eps)
        self.lazy_update = lazy_update

    def _own_settings(self) -> dict[str, float]:
        return {"eps": self.eps, "lazy_update": self.lazy_update}

    def _n_states(self) -> int:
        return 1

    def _step(
        self, weight: Array, grad: Array, state: list[Array], scratch: list[Array], step: Step
    ) -> None:
        history = state[0]
        g, a = self._gradient(weight, grad, scratch, 0.0), scratch[1]
        np.multiply(g, g, out=a)
        np.add(history, a, out=history)
        np.sqrt(history, out=a)
        np.add(a, float(self.eps), out=a)
        np.divide(g, a, out=a)
        np.multiply(a, step.lr, out=a)
        decay(weight, step)
        np.subtract(weight, a, out=weight)
