"""The optimizer of MXNet's own tests: plain addition."""

from __future__ import annotations

from typing import final

import numpy as np

from ..arrays import Array
from .base import Optimizer
from .step import Step


@final
class Test(Optimizer):
    """``weight += rescale_grad * grad``: what a push has added is easily seen."""

    __test__ = False  # pytest: a class of this name is no test case

    def _n_states(self) -> int:
        return 0

    def _step(
        self, weight: Array, grad: Array, state: list[Array], scratch: list[Array], step: Step
    ) -> None:
        np.multiply(grad, self.rescale_grad, out=scratch[0])
        np.add(weight, scratch[0], out=weight)
