"""The transport of a store in one process: there is nobody to talk to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import final

from ..arrays import Array, DType
from ..place import HOST, Place
from ..topology import Topology
from .contract import Exchange, Sink, Transport, Window


@final
class AloneTransport(Transport):
    """One rank: every sum is the rank's own array.

    Attributes
    ----------
    place : Place
        Where the arrays lie.
    """

    def __init__(self, place: Place = HOST) -> None:
        self.topology = Topology.alone()
        self.place = place

    def all_reduce(self, source: Array, out: Array) -> None:
        """Copy `source`; rounds where `out` has fewer bits."""
        if source is not out:
            self.place.copy(source, out)

    def all_reduce_pieces(self, source: Array, dtype: DType, sink: Sink) -> None:
        """Hand over `source` itself, or its rounded copy."""
        if source.dtype != dtype:
            rounded = self.place.empty(source.size, dtype)
            self.place.copy(source, rounded)
            source = rounded
        sink(0, source.size, source)

    def window(self, private: Array) -> Window:
        """Give private memory: there is no other rank."""
        return Window((private,))

    def all_reduce_window(self, window: Window, start: int, stop: int, sink: Sink) -> None:
        """Sum it as any array."""
        self.all_reduce_pieces(window.own[start:stop], window.own.dtype, sink)

    def broadcast(self, buffer: Array, root: int = 0) -> None:
        """Do nothing: the root is this rank."""

    def start_all_to_all(
        self, sent: Mapping[int, Array], received: Mapping[int, Array]
    ) -> Exchange:
        """Do nothing: a rank sends itself nothing."""
        return _Nothing()

    def abort(self, why: str) -> None:
        """Do nothing: nobody waits."""

    def close(self) -> None:
        """Do nothing: nothing is held."""


@final
class _Nothing(Exchange):
    def wait(self) -> None:
        """Do nothing."""
