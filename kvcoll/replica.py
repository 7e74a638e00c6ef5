"""Where the values of a store lie: few flat chunks of memory, one dtype each.

Keys that are initialised one after another are neighbours in a chunk, so that a push
of many keys is summed and updated as one array. Rules of the file: a key never moves;
the order of the keys in memory is the order of `init`, the same on every rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import numpy as np

from .arrays import Array, DType
from .schema import Key, Spec

# Memory that is not touched costs nothing, so chunks are large; they grow with the
# store, so that a store of few small keys reserves little.
_CHUNK_BYTES = 16 << 20
_LARGEST_CHUNK_BYTES = 256 << 20


@final
class Chunk:
    """Flat memory for keys of one dtype.

    Attributes
    ----------
    flat : numpy.ndarray, shape (capacity,)
    used : int
        How many elements belong to keys, from the first on.
    """

    def __init__(self, dtype: DType, capacity: int) -> None:
        self.flat: Array = np.empty(capacity, dtype)
        self.used = 0


@dataclass(frozen=True)
class Entry:
    """One key's value in memory.

    Attributes
    ----------
    spec : Spec
    chunk : Chunk
    start, stop : int
        Where in the chunk, in elements.
    value : numpy.ndarray
        The same memory in the key's shape.
    """

    spec: Spec
    chunk: Chunk
    start: int
    stop: int
    value: Array

    @property
    def flat(self) -> Array:
        """The value as a flat array."""
        return self.chunk.flat[self.start : self.stop]


@final
class Replica:
    """The values of all keys of one store on one rank."""

    def __init__(self, chunk_bytes: int = _CHUNK_BYTES) -> None:
        self.entries: dict[Key, Entry] = {}
        self._chunk_bytes = chunk_bytes
        self._open: dict[DType, Chunk] = {}
        self._n_bytes = 0

    def draft(self, specs: Sequence[Spec], values: Sequence[Array]) -> list[Entry]:
        """Copy new values into memory, but do not count them in yet.

        Parameters
        ----------
        specs : sequence of Spec
            Keys that the replica does not hold.
        values : sequence of numpy.ndarray
            For each key its value, of any dtype and layout.

        Returns
        -------
        list of Entry
            For `keep`; a draft that is not kept leaves no trace.
        """
        chunks: dict[DType, Chunk] = {}
        used: dict[DType, int] = {}
        for dtype in {spec.dtype for spec in specs}:
            needed = sum(spec.n_elements for spec in specs if spec.dtype == dtype)
            chunks[dtype] = self._chunk_for(dtype, needed)
            used[dtype] = chunks[dtype].used
        drafted = []
        for spec, value in zip(specs, values, strict=True):
            start = used[spec.dtype]
            stop = used[spec.dtype] = start + spec.n_elements
            stored = chunks[spec.dtype].flat[start:stop].reshape(spec.shape)
            np.copyto(stored, value, casting="unsafe")
            drafted.append(Entry(spec, chunks[spec.dtype], start, stop, stored))
        return drafted

    def keep(self, drafted: Sequence[Entry]) -> None:
        """Count drafted values in."""
        for entry in drafted:
            self.entries[entry.spec.key] = entry
            self._open[entry.spec.dtype] = entry.chunk
            entry.chunk.used = entry.stop
            self._n_bytes += entry.value.nbytes

    def clear(self) -> None:
        """Give the memory back."""
        self.entries.clear()
        self._open.clear()

    def _chunk_for(self, dtype: DType, n_elements: int) -> Chunk:
        chunk = self._open.get(dtype)
        if chunk is not None and chunk.flat.size - chunk.used >= n_elements:
            return chunk
        grown = min(max(self._chunk_bytes, self._n_bytes), _LARGEST_CHUNK_BYTES)
        return Chunk(dtype, max(n_elements, grown // dtype.itemsize))
