"""Adamax: Adam with the infinity norm."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, final

import numpy as np

from ..arrays import Array
from ..schema import Key
from .base import Optimizer
from .parts import check_decay, update_mean
from .settings import Scheduler
from .step import Step, power


@final
class Adamax(Optimizer):
    """Adamax (Kingma and Ba 2015, section 7.1).

    ``g = clip(rescale_grad * grad) + wd * weight``;
    ``m = beta1 * m + (1 - beta1) * g``; ``u = max(beta2 * u, abs(g))``;
    ``weight -= lr / (1 - beta1**t) * m / u``, and nothing where all gradients so far
    were 0 and so ``u`` is.

    Parameters
    ----------
    learning_rate : float, default 0.002
    beta1, beta2 : float, default 0.9 and 0.999
    wd, rescale_grad, clip_gradient, lr_scheduler, multi_precision, param_idx2name, \
begin_num_update
        See `Optimizer`.

    References
    ----------
    D. P. Kingma and J. Ba, "Adam: a method for stochastic optimization", ICLR 2015.
    """

    default_learning_rate: ClassVar[float] = 0.002

    def __init__(
        self,
        *,
        learning_rate: float | None = None,
        beta1: float = 0.9,
        beta2: float = 0.999,
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

    def _own_settings(self) -> dict[str, float]:
        return {"beta1": self.beta1, "beta2": self.beta2}

    def _n_states(self) -> int:
        return 2

    def _step(
        self, weight: Array, grad: Array, state: list[Array], scratch: list[Array], step: Step
    ) -> None:
        mean, norm = state
        beta1, beta2 = float(self.beta1), float(self.beta2)
        g, a = self._gradient(weight, grad, scratch, step.wd), scratch[1]
        update_mean(mean, g, beta1, a)
        np.multiply(norm, beta2, out=norm)
        np.absolute(g, out=a)
        np.maximum(norm, a, out=norm)
        np.maximum(norm, np.finfo(norm.dtype).tiny, out=a)  # where it is 0, the mean is 0 too
        np.divide(mean, a, out=a)
        np.multiply(a, step.lr / (1 - power(beta1, step.count)), out=a)
        np.subtract(weight, a, out=weight)
