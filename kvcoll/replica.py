"""Where the values of a store lie: few flat chunks of memory, one dtype each.

Keys that are initialised one after another are neighbours in a chunk, so that a push
of many keys is summed and updated as one array. Rules of the file: a key never moves;
memory is taken before the ranks agree, and may be given up for a better one, on all
ranks, before the first key is in it; the order of the keys in memory is the order of
`init`, the same on every rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import final

from .arrays import Array, DType
from .place import HOST, Place
from .schema import Key, Spec
from .sparse import Rows

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
        Until a key is kept in it, another array of this size and dtype may take its place.
    used : int
        How many elements belong to keys, from the first on.
    """

    def __init__(self, dtype: DType, capacity: int, place: Place = HOST) -> None:
        self.flat: Array = place.empty(capacity, dtype)
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
    """

    spec: Spec
    chunk: Chunk
    start: int
    stop: int

    @cached_property
    def value(self) -> Array:
        """The value in the key's shape; only once the entry is kept."""
        return self.flat.reshape(self.spec.shape)

    @property
    def flat(self) -> Array:
        """The value as a flat array."""
        return self.chunk.flat[self.start : self.stop]


@final
class Replica:
    """The values of all keys of one store on one rank.

    Attributes
    ----------
    place : Place
        Where they lie; to be set while there are none.
    """

    def __init__(self, chunk_bytes: int = _CHUNK_BYTES, place: Place = HOST) -> None:
        self.place = place
        self.entries: dict[Key, Entry] = {}
        self._chunk_bytes = chunk_bytes
        self._open: dict[DType, Chunk] = {}
        self._n_bytes = 0

    def draft(self, specs: Sequence[Spec]) -> list[Entry]:
        """Find and take memory for new keys, but do not count them in yet.

        Parameters
        ----------
        specs : sequence of Spec
            Keys that the replica does not hold.

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
        for spec in specs:
            start = used[spec.dtype]
            stop = used[spec.dtype] = start + spec.n_elements
            drafted.append(Entry(spec, chunks[spec.dtype], start, stop))
        return drafted

    def keep(self, drafted: Sequence[Entry], values: Sequence[Array | Rows]) -> None:
        """Copy values in, and count them.

        Parameters
        ----------
        drafted : sequence of Entry
        values : sequence of numpy.ndarray or Rows
            For each key its value, of any dtype and layout.
        """
        for entry, value in zip(drafted, values, strict=True):
            if isinstance(value, Rows):
                value.write_to(entry.value)
            else:
                self.place.copy(value, entry.value)
            self.entries[entry.spec.key] = entry
            self._open[entry.spec.dtype] = entry.chunk
            entry.chunk.used = entry.stop
            self._n_bytes += entry.value.nbytes

    def drop(self, keys: Iterable[Key]) -> None:
        """Leave keys out, as if those that came last had never been there."""
        for key in keys:
            entry = self.entries.pop(key)
            self._n_bytes -= entry.value.nbytes
            left = (e.stop for e in self.entries.values() if e.chunk is entry.chunk)
            entry.chunk.used = max(left, default=0)

    def close_chunks(self) -> None:
        """Let keys to come lie in memory of their own: ranks may have taken more than others."""
        self._open.clear()

    def clear(self) -> None:
        """Give the memory back."""
        self.entries.clear()
        self._open.clear()

    def _chunk_for(self, dtype: DType, n_elements: int) -> Chunk:
        chunk = self._open.get(dtype)
        if chunk is not None and chunk.flat.size - chunk.used >= n_elements:
            return chunk
        grown = min(max(self._chunk_bytes, self._n_bytes), _LARGEST_CHUNK_BYTES)
        return Chunk(dtype, max(n_elements, grown // dtype.itemsize), self.place)
