"""What can be set of an optimizer, and what of it must be equal on all ranks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

from ..errors import ArgumentError
from ..lr_scheduler import LRScheduler
from ..schema import Key
from .step import Factors

Scheduler = Callable[[int], float]


class Settings(ABC):
    """The half of an optimizer that touches no arrays; its parameters are at `Optimizer`."""

    #: The learning rate if none is given.
    default_learning_rate: ClassVar[float] = 0.01

    def __init__(
        self,
        *,
        learning_rate: float | None = None,
        wd: float = 0.0,
        rescale_grad: float = 1.0,
        clip_gradient: float | None = None,
        lr_scheduler: Scheduler | None = None,
        multi_precision: bool = False,
        param_idx2name: Mapping[Key, str] | None = None,
        begin_num_update: int = 0,
    ) -> None:
        if lr_scheduler is not None and not callable(lr_scheduler):
            raise TypeError(f"lr_scheduler must be callable, got {type(lr_scheduler).__name__}")
        if clip_gradient is not None and clip_gradient <= 0:
            raise ArgumentError(f"clip_gradient must be above 0 or None, got {clip_gradient}")
        if isinstance(lr_scheduler, LRScheduler):
            if learning_rate is None:
                learning_rate = lr_scheduler.base_lr
            elif learning_rate != lr_scheduler.base_lr:
                lr_scheduler = lr_scheduler.with_base_lr(learning_rate)
        self.lr = self.default_learning_rate if learning_rate is None else learning_rate
        self.wd = wd
        self.rescale_grad = rescale_grad
        self.clip_gradient = clip_gradient
        self.lr_scheduler = lr_scheduler
        self.multi_precision = multi_precision
        self.num_update = begin_num_update
        self.begin_num_update = begin_num_update
        self.version = 0  # goes up with every change of multipliers
        self._names = dict(param_idx2name or {})
        self._lr_mult: dict[Key, float] = {}
        self._wd_mult: dict[Key, float] = {}
        self.set_wd_mult({})

    @property
    def learning_rate(self) -> float:
        """The learning rate of the next update, before a key's own multiplier."""
        return self.rate_at(self.num_update)

    def rate_at(self, num_update: int) -> float:
        """Give the learning rate after so many updates."""
        return float(self.lr if self.lr_scheduler is None else self.lr_scheduler(num_update))

    def set_learning_rate(self, lr: float) -> None:
        """Set the learning rate from the next push on; all ranks must set the same.

        Raises
        ------
        ArgumentError
            A scheduler sets it.
        """
        if self.lr_scheduler is not None:
            raise ArgumentError("the learning rate is set by lr_scheduler: change that instead")
        self.lr = lr

    def set_lr_mult(self, lr_mult: Mapping[Key, float]) -> None:
        """Multiply the learning rate of single keys, given by key or by name."""
        self._lr_mult = dict(lr_mult)
        self.version += 1

    def set_wd_mult(self, wd_mult: Mapping[Key, float]) -> None:
        """Multiply the weight decay of single keys, given by key or by name."""
        self._wd_mult = {
            name: 0.0 for name in self._names.values() if not name.endswith(("_weight", "_gamma"))
        }
        self._wd_mult.update(wd_mult)
        self.version += 1

    def settings(self) -> tuple[float, ...]:
        """Give the numbers that must be equal on all ranks; compared at every push."""
        return self.settings_at(self.num_update)

    def settings_at(self, num_update: int) -> tuple[float, ...]:
        """Give `settings` after so many updates; a scheduler is asked once."""
        own = self._own_settings().values()
        clip = or_minus_1(self.clip_gradient)
        return (self.rate_at(num_update), self.wd, self.rescale_grad, clip, *own)

    def names_and_factors(self) -> tuple[str, ...]:
        """Write down what else must be equal on all ranks; compared like `settings`."""
        words = ["multi_precision"] if self.multi_precision else []
        if self.begin_num_update:
            words.append(f"begin_num_update={self.begin_num_update}")
        # Ours only: another's may hold what is written differently on each rank.
        if type(self.lr_scheduler).__module__ == LRScheduler.__module__:
            words.append(f"lr_scheduler={self.lr_scheduler!r}")
        for what, table in (
            ("names", self._names),
            ("lr_mult", self._lr_mult),
            ("wd_mult", self._wd_mult),
        ):
            words += [f"{what}[{key!r}]={table[key]!r}" for key in sorted(table, key=repr)]
        return tuple(words)

    def describe(self, settings: Sequence[float] | None = None) -> str:
        """Write name and settings, those of now or others, as messages do."""
        names = ("learning_rate", "wd", "rescale_grad", "clip_gradient", *self._own_settings())
        # All digits: settings that differ must not read alike.
        numbers = [
            repr(float(number)).removesuffix(".0") for number in (settings or self.settings())
        ]
        text = ", ".join(f"{name}={n}" for name, n in zip(names, numbers, strict=True))
        others = self.names_and_factors()
        return f"{type(self).__name__}({text})" + (f" with {', '.join(others)}" if others else "")

    def multipliers(self, key: Key) -> Factors:
        """Give the factors of a key for the learning rate and for the weight decay."""
        name = self._names.get(key, key)
        lr_mult = self._lr_mult.get(key, self._lr_mult.get(name, 1.0))
        wd_mult = self._wd_mult.get(key, self._wd_mult.get(name, 1.0))
        # Python's own floats: NumPy's would widen the arithmetic of float32 keys.
        return Factors(float(lr_mult), float(wd_mult), self._adapts(name))

    def _own_settings(self) -> dict[str, float]:
        """Give by name what else must be equal on all ranks; an option that is off is -1."""
        return {}

    @abstractmethod
    def _n_states(self) -> int:
        """How many arrays of the value's shape a key's state has."""

    def _adapts(self, name: Key) -> bool:
        """Say whether the norms of a key set its step, for an optimizer that takes them."""
        return True


def or_minus_1(limit: float | None) -> float:
    """Give a limit as a number: -1 where there is none."""
    return -1.0 if limit is None else limit
