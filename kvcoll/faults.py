"""Where faults that a user has asked for come in; `testing` makes them.

Rules of the file: while there are none, a push and a write each cost one look at `armed`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Push:
    """A push that a rank is about to make.

    Attributes
    ----------
    rank : int
        Of the store, as it was created.
    number : int
        The how-many-th push of the store it will be, from 1: its `version` afterwards.
    key : object
        As the user gave it: a key, or a list of them.
    at_host : callable
        Gives an array of the user's, wherever it lies, as one of the host.
    """

    rank: int
    number: int
    key: Any
    at_host: Callable[[Any], Any]


class Armed(ABC):
    """Faults that wait for their moment."""

    @abstractmethod
    def before_push(self, push: Push, value: Any) -> tuple[Any, bool]:
        """Give what is pushed in place of `value`, and whether it is pushed at all."""

    @abstractmethod
    def after_push(
        self, push: Push, stored: Callable[[Any], AbstractContextManager[Sequence[Any]]]
    ) -> None:
        """Change what is stored.

        Parameters
        ----------
        push : Push
        stored : callable
            Gives for a key its value and its states as flat arrays of the host, once no push of
            it waits; they are the store's own, or take their place at the end of a with-block.
        """

    @abstractmethod
    def before_write(self) -> None:
        """Raise what a write to a file shall raise."""


armed: Armed | None = None
