"""FTRL-Proximal: sparse values by an L1 norm."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, final

import numpy as np

from ..arrays import Array
from ..schema import Key
from .base import Optimizer
from .parts import check_not_negative
from .settings import Scheduler
from .step import Step


@final
class Ftrl(Optimizer):
    """FTRL-Proximal (McMahan et al. 2013, algorithm 1).

    ``g = clip(rescale_grad * grad)``;
    ``z += g - (sqrt(n + g * g) - sqrt(n)) / lr * weight``; ``n += g * g``;
    ``weight = -sign(z) * max(abs(z) - lamda1, 0) / ((beta + sqrt(n)) / lr + wd)``.

    `wd` is the weight of the squared L2 norm. As in the paper, ``z`` and ``n`` begin at
    0, so of the first values only as much is left as the first gradient is large. A
    learning rate of 0 changes nothing.

    Parameters
    ----------
    learning_rate : float, default 0.1
    lamda1 : float, default 0.01
        Weight of the L1 norm: values whose ``z`` is not above it are 0.
    beta : float, default 1
    wd, rescale_grad, clip_gradient, lr_scheduler, multi_precision, param_idx2name, \
begin_num_update
        See `Optimizer`.

    References
    ----------
    H. B. McMahan et al., "Ad click prediction: a view from the trenches", KDD 2013.
    """

    default_learning_rate: ClassVar[float] = 0.1

    def __init__(
        self,
        *,
        learning_rate: float | None = None,
        lamda1: float = 0.01,
        beta: float = 1.0,
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
        self.lamda1 = check_not_negative("lamda1", lamda1)
        self.beta = check_not_negative("beta", beta)

    def _own_settings(self) -> dict[str, float]:
        return {"lamda1": self.lamda1, "beta": self.beta}

    def _n_states(self) -> int:
        return 2

    def _step(
        self, weight: Array, grad: Array, state: list[Array], scratch: list[Array], step: Step
    ) -> None:
        if step.lr == 0:
            return
        z, n = state
        g, a, b = self._gradient(weight, grad, scratch, 0.0), scratch[1], scratch[2]
        np.sqrt(n, out=b)
        np.multiply(g, g, out=a)
        np.add(n, a, out=n)
        np.sqrt(n, out=a)
        np.subtract(a, b, out=b)
        np.multiply(b, weight, out=b)
        np.multiply(b, 1 / step.lr, out=b)
        np.add(z, g, out=z)
        np.subtract(z, b, out=z)
        # Not 0 where beta is and no gradient came yet; z is 0 there.
        np.add(a, max(float(self.beta), float(np.finfo(a.dtype).tiny)), out=a)
        np.multiply(a, 1 / step.lr, out=a)
        np.add(a, step.wd, out=a)
        np.absolute(z, out=b)
        np.subtract(b, float(self.lamda1), out=b)
        np.maximum(b, 0, out=b)
        np.copysign(b, z, out=b)
        np.divide(b, a, out=b)
        np.subtract(0, b, out=weight)  # not negative, which would make a 0 a -0
