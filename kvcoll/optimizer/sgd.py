"""Stochastic gradient descent with momentum."""

from __future__ import annotations

from collections.abc import Mapping
from typing import final

import numpy as np

from ..arrays import Array
from ..schema import Key
from .base import Optimizer
from .settings import Scheduler
from .step import Step


@final
class SGD(Optimizer):
    """SGD with momentum and weight decay (Polyak 1964; Sutskever et al. 2013).

    ``g = clip(rescale_grad * grad) + wd * weight``;
    ``m = momentum * m - lr * g``; ``weight += m``.

    Parameters
    ----------
    momentum : float, default 0
    lazy_update : bool, default True
        Of a row-sparse gradient's key, update only the rows that it names.
    learning_rate, wd, rescale_grad, clip_gradient, lr_scheduler, multi_precision, \
param_idx2name, begin_num_update
        See `Optimizer`.

    References
    ----------
    B. T. Polyak, "Some methods of speeding up the convergence of iteration methods", 1964.
    I. Sutskever et al., "On the importance of initialization and momentum in deep learning",
    ICML 2013.
    """

    def __init__(
        self,
        *,
        learning_rate: float | None = None,
        momentum: float = 0.0,
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
        self.momentum = momentum
        self.lazy_update = lazy_update

    def _own_settings(self) -> dict[str, float]:
        return {"momentum": self.momentum, "lazy_update": self.lazy_update}

    def _n_states(self) -> int:
        return 1 if self.momentum else 0

    def _step(
        self, weight: Array, grad: Array, state: list[Array], scratch: list[Array], step: Step
    ) -> None:
        g = self._gradient(weight, grad, scratch, step.wd, step.lr)
        if not state:
            np.subtract(weight, g, out=weight)
            return
        momentum = state[0]
        np.multiply(momentum, float(self.momentum), out=momentum)
        np.subtract(momentum, g, out=momentum)
        np.add(weight, momentum, out=weight)
