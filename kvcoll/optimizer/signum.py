"""Signum: steps of one size, by the sign of the momentum."""

from __future__ import annotations

from collections.abc import Mapping
from typing import final

import numpy as np

from ..arrays import Array
from ..schema import Key
from .base import Optimizer
from .parts import update_mean
from .settings import Scheduler
from .step import Step


@final
class Signum(Optimizer):
    """Signum (Bernstein et al. 2018); without momentum it is signSGD.

    ``g = clip(rescale_grad * grad) + wd * weight``;
    ``m = momentum * m + (1 - momentum) * g``;
    ``weight = (1 - lr * wd_lh) * weight - lr * sign(m)``.

    Parameters
    ----------
    momentum : float, default 0.9
    wd_lh : float, default 0
        Weight decay outside of the gradient (Loshchilov and Hutter 2019).
    learning_rate, wd, rescale_grad, clip_gradient, lr_scheduler, multi_precision, \
param_idx2name, begin_num_update
        See `Optimizer`.

    References
    ----------
    J. Bernstein et al., "signSGD: compressed optimisation for non-convex problems",
    ICML 2018.
    """

    def __init__(
        self,
        *,
        learning_rate: float | None = None,
        momentum: float = 0.9,
        wd_lh: float = 0.0,
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
        self.wd_lh = wd_lh

    def _own_settings(self) -> dict[str, float]:
        return {"momentum": self.momentum, "wd_lh": self.wd_lh}

    def _n_states(self) -> int:
        return 1 if self.momentum else 0

    def _step(
        self, weight: Array, grad: Array, state: list[Array], scratch: list[Array], step: Step
    ) -> None:
        g, a = self._gradient(weight, grad, scratch, step.wd), scratch[1]
        if state:
            update_mean(state[0], g, float(self.momentum), a)
            g = state[0]
        np.sign(g, out=a)
        np.multiply(a, step.lr, out=a)
        if self.wd_lh:
            np.multiply(weight, 1 - step.lr * float(self.wd_lh), out=weight)
        np.subtract(weight, a, out=weight)
