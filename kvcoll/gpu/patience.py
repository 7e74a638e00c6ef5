"""How the host waits for work on GPUs, and whether it may trust what it then finds there."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import final

from .device import Event


class Patience(ABC):
    """Waits for events, and knows of failures that no event tells of."""

    @abstractmethod
    def wait(self, event: Event) -> None:
        """Wait on the host until an event is done.

        Raises
        ------
        CollectiveError
            What it waits for has failed, or does not end.
        """

    @abstractmethod
    def check(self) -> None:
        """Raise what has failed, as memory then holds rubbish; never waits.

        Raises
        ------
        CollectiveError
        """


@final
class Trusting(Patience):
    """Of work that no other GPU takes part in: it ends."""

    def wait(self, event: Event) -> None:
        """Wait."""
        event.synchronize()

    def check(self) -> None:
        """Do nothing."""
