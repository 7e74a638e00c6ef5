"""Learning rates that fall with the number of updates, after a warm-up if one is wanted.

Rules of the file: a schedule is a function of its argument alone. A call changes
nothing, so every rank, and a run that is taken up again, gets the same rate for the
same number of updates, in whatever order they are asked for.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from numbers import Integral
from typing import final

from .errors import ArgumentError

_WARMUP_MODES = ("linear", "constant")


class LRScheduler(ABC):
    """Base of the schedules; names and defaults are MXNet's.

    One of your own gives the rate in ``__call__``; a plain function of the number of
    updates does as well.

    Parameters
    ----------
    base_lr : float, default 0.01
        The rate where the decay begins. An optimizer that is given a
        ``learning_rate`` too takes that instead.
    warmup_steps : int, default 0
        For so many updates the rate is below `base_lr` (Goyal et al. 2017).
    warmup_begin_lr : float, default 0
        The rate with which the warm-up begins.
    warmup_mode : str, default 'linear'
        ``'linear'``: from `warmup_begin_lr` to `base_lr` in equal steps;
        ``'constant'``: `warmup_begin_lr` throughout.

    Raises
    ------
    ArgumentError
        A rate below 0, a `warmup_begin_lr` above `base_lr`, a number of updates that is
        no whole number or below 0, another mode.

    References
    ----------
    P. Goyal et al., "Accurate, large minibatch SGD: training ImageNet in 1 hour",
    arXiv:1706.02677, 2017.
    """

    def __init__(
        self,
        *,
        base_lr: float = 0.01,
        warmup_steps: int = 0,
        warmup_begin_lr: float = 0.0,
        warmup_mode: str = "linear",
    ) -> None:
        if warmup_mode not in _WARMUP_MODES:
            raise ArgumentError(f"warmup_mode is 'linear' or 'constant', got {warmup_mode!r}")
        self.base_lr = _rate("base_lr", base_lr)
        self.warmup_steps = _whole("warmup_steps", warmup_steps, 0)
        self.warmup_begin_lr = _rate("warmup_begin_lr", warmup_begin_lr)
        self.warmup_mode = warmup_mode
        self._check_warmup()

    @abstractmethod
    def __call__(self, num_update: int) -> float:
        """Give the learning rate of an update, the first of which is number 1."""

    def get_warmup_lr(self, num_update: int) -> float:
        """Give the rate of an update below `warmup_steps`."""
        if self.warmup_mode == "constant":
            return self.warmup_begin_lr
        rise = self.base_lr - self.warmup_begin_lr
        return self.warmup_begin_lr + rise * num_update / self.warmup_steps

    def with_base_lr(self, base_lr: float) -> LRScheduler:
        """Give a copy that begins at another rate."""
        other = copy.copy(self)
        other.base_lr = _rate("base_lr", base_lr)
        other._check_warmup()
        return other

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in sorted(vars(self).items()))
        return f"{type(self).__name__}({settings})"

    def _check_warmup(self) -> None:
        if self.warmup_begin_lr > self.base_lr:
            raise ArgumentError(
                f"warmup_begin_lr must not be above base_lr: {self.warmup_begin_lr} is above "
                f"{self.base_lr}"
            )


@final
class FactorScheduler(LRScheduler):
    """Multiply the rate by a factor every so many updates.

    After ``n`` updates it is ``base_lr * factor ** ((n - 1) // step)``, but from the
    first decay on not below `stop_factor_lr`. The updates of the warm-up count too.

    Parameters
    ----------
    step : int
        Updates between two decays.
    factor : float, default 1
        Above 0, at most 1.
    stop_factor_lr : float, default 1e-8
    base_lr, warmup_steps, warmup_begin_lr, warmup_mode
        See `LRScheduler`.
    """

    def __init__(
        self,
        step: int,
        *,
        factor: float = 1.0,
        stop_factor_lr: float = 1e-8,
        base_lr: float = 0.01,
        warmup_steps: int = 0,
        warmup_begin_lr: float = 0.0,
        warmup_mode: str = "linear",
    ) -> None:
        super().__init__(
            base_lr=base_lr,
            warmup_steps=warmup_steps,
            warmup_begin_lr=warmup_begin_lr,
            warmup_mode=warmup_mode,
        )
        self.step = _whole("step", step, 1)
        self.factor = _factor(factor)
        self.stop_factor_lr = _rate("stop_factor_lr", stop_factor_lr)

    def __call__(self, num_update: int) -> float:
        """Give the learning rate of an update, the first of which is number 1."""
        if num_update < self.warmup_steps:
            return self.get_warmup_lr(num_update)
        n_decays = max(num_update - 1, 0) // self.step
        if n_decays == 0:
            return self.base_lr
        return max(self.base_lr * self.factor**n_decays, self.stop_factor_lr)


@final
class MultiFactorScheduler(LRScheduler):
    """Multiply the rate by a factor after each of a list of updates.

    After ``n`` updates it is ``base_lr * factor ** k``, where ``k`` of the numbers in
    `step` are below ``n``.

    Parameters
    ----------
    step : sequence of int
        Rising, from 1 on.
    factor : float, default 1
        Above 0, at most 1.
    base_lr, warmup_steps, warmup_begin_lr, warmup_mode
        See `LRScheduler`.
    """

    def __init__(
        self,
        step: Sequence[int],
        *,
        factor: float = 1.0,
        base_lr: float = 0.01,
        warmup_steps: int = 0,
        warmup_begin_lr: float = 0.0,
        warmup_mode: str = "linear",
    ) -> None:
        super().__init__(
            base_lr=base_lr,
            warmup_steps=warmup_steps,
            warmup_begin_lr=warmup_begin_lr,
            warmup_mode=warmup_mode,
        )
        self.step = tuple(_whole("each step", number, 1) for number in step)
        if not self.step or list(self.step) != sorted(set(self.step)):
            raise ArgumentError(f"step must be a list of rising numbers of updates, got {step!r}")
        self.factor = _factor(factor)

    def __call__(self, num_update: int) -> float:
        """Give the learning rate of an update, the first of which is number 1."""
        if num_update < self.warmup_steps:
            return self.get_warmup_lr(num_update)
        return self.base_lr * self.factor ** sum(number < num_update for number in self.step)


@final
class PolyScheduler(LRScheduler):
    """Let the rate fall to its last value as a power of the way that is left.

    Between the warm-up and `max_update` it is ``final_lr + (base_lr - final_lr) *
    (1 - (n - warmup_steps) / (max_update - warmup_steps)) ** pwr``, then `final_lr`.

    Parameters
    ----------
    max_update : int
        The update with which `final_lr` is reached; above `warmup_steps`.
    base_lr : float, default 0.01
    pwr : float, default 2
        Not below 0.
    final_lr : float, default 0
    warmup_steps, warmup_begin_lr, warmup_mode
        See `LRScheduler`.
    """

    def __init__(
        self,
        max_update: int,
        *,
        base_lr: float = 0.01,
        pwr: float = 2,
        final_lr: float = 0.0,
        warmup_steps: int = 0,
        warmup_begin_lr: float = 0.0,
        warmup_mode: str = "linear",
    ) -> None:
        super().__init__(
            base_lr=base_lr,
            warmup_steps=warmup_steps,
            warmup_begin_lr=warmup_begin_lr,
            warmup_mode=warmup_mode,
        )
        if not 0 <= pwr < math.inf:
            raise ArgumentError(f"pwr must be a number that is not below 0, got {pwr}")
        self.max_update = _last_update(max_update, self.warmup_steps)
        self.pwr = pwr
        self.final_lr = _rate("final_lr", final_lr)

    def __call__(self, num_update: int) -> float:
        """Give the learning rate of an update, the first of which is number 1."""
        if num_update < self.warmup_steps:
            return self.get_warmup_lr(num_update)
        if num_update >= self.max_update:
            return self.final_lr
        left = (self.max_update - num_update) / (self.max_update - self.warmup_steps)
        return self.final_lr + (self.base_lr - self.final_lr) * float(left**self.pwr)


@final
class CosineScheduler(LRScheduler):
    """Let the rate fall to its last value along half a cosine (Loshchilov and Hutter 2017).

    Between the warm-up and `max_update` it is ``final_lr + (base_lr - final_lr) *
    (1 + cos(pi * (n - warmup_steps) / (max_update - warmup_steps))) / 2``, then
    `final_lr`.

    Parameters
    ----------
    max_update : int
        The update with which `final_lr` is reached; above `warmup_steps`.
    base_lr : float, default 0.01
    final_lr : float, default 0
    warmup_steps, warmup_begin_lr, warmup_mode
        See `LRScheduler`.

    References
    ----------
    I. Loshchilov and F. Hutter, "SGDR: stochastic gradient descent with warm restarts",
    ICLR 2017.
    """

    def __init__(
        self,
        max_update: int,
        *,
        base_lr: float = 0.01,
        final_lr: float = 0.0,
        warmup_steps: int = 0,
        warmup_begin_lr: float = 0.0,
        warmup_mode: str = "linear",
    ) -> None:
        super().__init__(
            base_lr=base_lr,
            warmup_steps=warmup_steps,
            warmup_begin_lr=warmup_begin_lr,
            warmup_mode=warmup_mode,
        )
        self.max_update = _last_update(max_update, self.warmup_steps)
        self.final_lr = _rate("final_lr", final_lr)

    def __call__(self, num_update: int) -> float:
        """Give the learning rate of an update, the first of which is number 1."""
        if num_update < self.warmup_steps:
            return self.get_warmup_lr(num_update)
        if num_update >= self.max_update:
            return self.final_lr
        gone = (num_update - self.warmup_steps) / (self.max_update - self.warmup_steps)
        return self.final_lr + (self.base_lr - self.final_lr) * (1 + math.cos(math.pi * gone)) / 2


def _whole(name: str, number: int, least: int) -> int:
    # NumPy's integers are whole numbers too; True is none.
    if isinstance(number, bool) or not isinstance(number, Integral) or number < least:
        raise ArgumentError(f"{name} must be a whole number, at least {least}, got {number!r}")
    return int(number)


def _last_update(max_update: int, warmup_steps: int) -> int:
    last = _whole("max_update", max_update, 1)
    if last <= warmup_steps:
        raise ArgumentError(
            f"max_update must be above warmup_steps: {last} is not above {warmup_steps}"
        )
    return last


def _rate(name: str, rate: float) -> float:
    if not 0 <= rate < math.inf:
        raise ArgumentError(f"{name} must be a number that is not below 0, got {rate!r}")
    return float(rate)


def _factor(factor: float) -> float:
    if not 0 < factor <= 1:
        raise ArgumentError(f"factor must be above 0 and at most 1, got {factor!r}")
    return float(factor)
