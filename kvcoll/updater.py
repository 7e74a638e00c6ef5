"""What turns the sum of a push into the stored value: three ways, one contract."""

from __future__ import annotations

import struct
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TypeAlias, final

import numpy as np

from .arrays import Array
from .optimizer.base import Optimizer
from .schema import Key, Spec, digest

UpdateFunction: TypeAlias = Callable[[Key, Array, Array], object]


class Updater(ABC):
    """Changes a stored value in place, given the sum of a push."""

    #: Whether the sum may be written straight into the stored value.
    assigns = False
    #: Whether it is the user's code, which may raise on one rank and not on another.
    may_raise = False

    @abstractmethod
    def prepare(self, spec: Spec, stored: Array) -> None:
        """Do before the first update of a key what can fail; called before the push."""

    @abstractmethod
    def apply(self, spec: Spec, total: Array, stored: Array) -> None:
        """Change `stored`; `total` may be written to."""

    @abstractmethod
    def digest(self) -> int:
        """Digest what must be equal on all ranks, at each push."""

    @abstractmethod
    def describe(self) -> str:
        """Say what this is, for messages."""


@final
class Assign(Updater):
    """The sum replaces the value: what a store does that was given no updater."""

    assigns = True

    def prepare(self, spec: Spec, stored: Array) -> None:
        """Do nothing."""

    def apply(self, spec: Spec, total: Array, stored: Array) -> None:
        """Copy the sum."""
        np.copyto(stored, total, casting="unsafe")

    def digest(self) -> int:
        """Always the same."""
        return 0

    def describe(self) -> str:
        """Say that there is none."""
        return "no updater"


@final
class Custom(Updater):
    """A function of the user's: ``function(key, input, stored)``."""

    may_raise = True

    def __init__(self, function: UpdateFunction) -> None:
        self._function = function

    def prepare(self, spec: Spec, stored: Array) -> None:
        """Do nothing."""

    def apply(self, spec: Spec, total: Array, stored: Array) -> None:
        """Call the function."""
        self._function(spec.key, total, stored)

    def digest(self) -> int:
        """Tell it from the other kinds; functions themselves cannot be compared."""
        return 1

    def describe(self) -> str:
        """Say that it is the user's."""
        return "an updater"


@final
class Optimize(Updater):
    """An optimizer and the states of the keys that it has seen."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._states: dict[Key, tuple[Array, ...]] = {}
        self._name_digest = digest(type(optimizer).__qualname__)

    def prepare(self, spec: Spec, stored: Array) -> None:
        """Make the state of a key that is new."""
        if spec.key not in self._states:
            self._states[spec.key] = self._optimizer.create_state(spec, stored)

    def apply(self, spec: Spec, total: Array, stored: Array) -> None:
        """Let the optimizer update the value."""
        self._optimizer.update(spec.key, stored, total, self._states[spec.key])

    def digest(self) -> int:
        """Digest the settings that may be changed between pushes."""
        numbers = self._optimizer.settings()
        words = struct.unpack(f"<{len(numbers)}Q", struct.pack(f"<{len(numbers)}d", *numbers))
        mixed = self._name_digest
        for word in words:
            mixed = (mixed ^ word) * 0x9E3779B97F4A7C15 % 2**64
        return mixed

    def describe(self) -> str:
        """Name the optimizer and its settings."""
        return self._optimizer.describe()
