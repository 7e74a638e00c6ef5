"""The table of a launch: for each piece of memory its place, its size, and its numbers.

Rules of the file: a row is words of 64 bits: the first tile of its piece, how many elements
that has, addresses, numbers; tiles of a piece follow one another, and pieces follow as rows do.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, final

import numpy as np

from ..arrays import Array
from ..gpu.array import DeviceArray
from ..gpu.kernel import Access, Parameter
from .prelude import LANES, TILE

TABLE_PARAMETERS = (
    Parameter("long long", "table", Access.READ),
    Parameter("long long", "n_rows", Access.VALUE),
)
_NO_NUMBERS: Array = np.empty(0, np.int64)


class Layout(NamedTuple):
    """What a row holds beside its first tile and its size.

    Attributes
    ----------
    n_addresses, n_numbers : int
    """

    n_addresses: int
    n_numbers: int = 0

    @property
    def n_words(self) -> int:
        """How many words a row has."""
        return 2 + self.n_addresses + self.n_numbers

    def address(self, which: int) -> int:
        """Give the place of an address in a row."""
        return 2 + which

    def number(self, which: int) -> int:
        """Give the place of a number in a row."""
        return 2 + self.n_addresses + which


class Piece(NamedTuple):
    """A row to be written."""

    n_elements: int
    words: Sequence[int]  # addresses, then numbers; as many as the layout has


def rows_of(layout: Layout, pieces: Iterable[Piece]) -> Array:
    """Write a table.

    Returns
    -------
    numpy.ndarray of int64, shape (n, layout.n_words)
        Pieces without elements have no row.
    """
    kept = [piece for piece in pieces if piece.n_elements]
    table = np.empty((len(kept), layout.n_words), np.int64)
    if kept:
        sizes = table[:, 1]
        sizes[:] = [piece.n_elements for piece in kept]
        tiles = -(-sizes // TILE)
        table[:, 0] = np.cumsum(tiles) - tiles
        table[:, 2:] = [piece.words for piece in kept]
    return table


def columns_of(sizes: Array, addresses: Sequence[Array], numbers: Array = _NO_NUMBERS) -> Array:
    """Write a table column by column, for many pieces.

    Parameters
    ----------
    sizes : numpy.ndarray of int64, shape (n,)
    addresses : sequence of numpy.ndarray of int64, shape (n,)
    numbers : numpy.ndarray of int64, shape (m,) or (n, m), optional
        Of all pieces, or of each.

    Returns
    -------
    numpy.ndarray of int64, shape (n, n_words)
        Its first tiles count from 0.
    """
    table = np.empty((sizes.size, 2 + len(addresses) + numbers.shape[-1]), np.int64)
    tiles = -(-sizes // TILE)
    np.cumsum(tiles, out=table[:, 0])
    table[:, 0] -= tiles
    table[:, 1] = sizes
    for number, column in enumerate(addresses, 2):
        table[:, number] = column
    table[:, 2 + len(addresses) :] = numbers
    return table


def joined(tables: Sequence[Array]) -> Array:
    """Make one table of several, whose tiles follow one another."""
    if len(tables) == 1:
        return tables[0]
    n_tiles = 0
    for table in tables:
        table[:, 0] += n_tiles
        n_tiles = n_lanes(table) // LANES
    return np.concatenate(tables)


@final
class Chained(Sequence[DeviceArray]):
    """Several sequences one after another, whose arrays are made only where somebody looks."""

    def __init__(self, parts: Sequence[Sequence[DeviceArray]]) -> None:
        self._parts = parts

    def __iter__(self) -> Iterator[DeviceArray]:
        for part in self._parts:
            yield from part

    def __len__(self) -> int:
        return sum(map(len, self._parts))

    def __getitem__(self, place: Any) -> Any:
        return list(self)[place]


def n_lanes(table: Array) -> int:
    """Say how many elements of a kernel's index a table needs."""
    last = table[-1]
    return int(last[0] + -(-last[1] // TILE)) * LANES
