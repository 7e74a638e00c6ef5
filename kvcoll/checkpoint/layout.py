"""Which files a checkpoint has, what is in each, and the last one: the manifest.

Rules of the file: no MPI; all ranks make the same layout of the same content.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import final

from .. import tensors
from ..arrays import Array
from ..errors import FileError
from ..files import write_small
from . import folder as folders
from .content import Content
from .kept import Kept, as_stored, stored_shape
from .manifest import Manifest, Part, encode
from .shares import Piece, cut, is_whole, name_of, pieces, worker_of


@final
class Layout:
    """The files of one checkpoint.

    Parameters
    ----------
    content : Content
        The same on all ranks.
    rank_arrays : sequence of sequence of Kept
        What is each rank's own; empty if no rank has any.
    n_writers : int
        How many ranks write, from rank 0 on.

    Attributes
    ----------
    part_files, rank_files : list of str
    starts : tuple of (int, int)
        Where each part begins, see `shares.cut`.
    """

    def __init__(
        self, content: Content, rank_arrays: Sequence[Sequence[Kept]], n_writers: int
    ) -> None:
        self.starts = tuple(cut(content.arrays, n_writers))
        self._content = content
        self._rank_arrays = rank_arrays
        self._n_writers = n_writers
        self._shares = pieces(content.arrays, self.starts)
        n_parts, n_ranks = len(self._shares), len(rank_arrays)
        self.part_files = [_file("part", k, n_parts) for k in range(n_parts)]
        self.rank_files = [_file("rank", k, n_ranks) for k in range(n_ranks)]

    def files_of(
        self, rank: int, rank_arrays: Mapping[int, Mapping[str, Array]]
    ) -> dict[str, dict[str, Array]]:
        """Give the files that a rank writes, each with its arrays, as they are in memory.

        Parameters
        ----------
        rank : int
        rank_arrays : mapping of int to mapping of str to numpy.ndarray
            The own arrays of those ranks for which this one writes.
        """
        files = {}
        for k, (name, share) in enumerate(zip(self.part_files, self._shares, strict=True)):
            if worker_of(k, len(self._shares), self._n_writers) == rank:
                files[name] = dict(map(self._piece, share))
        for owner, arrays in rank_arrays.items():
            files[self.rank_files[owner]] = {
                kept.name: _in_file(kept, arrays[kept.name], is_all=True)
                for kept in self._rank_arrays[owner]
            }
        return files

    def complete(self, folder: str, draft: Manifest, keep: int | None) -> None:
        """Write the manifest, once all files are there; remove what is superfluous then.

        Raises
        ------
        FileError, FileFormatError
            A file is not there or not whole; or the manifest cannot be written; or it is
            written, and something else cannot be removed.
        """
        manifest = replace(
            draft,
            parts=tuple(_part(folder, name) for name in self.part_files),
            rank_parts=tuple(_part(folder, name) for name in self.rank_files),
        )
        write_small(os.path.join(folder, folders.MANIFEST), encode(manifest))
        try:
            folders.prune(folder, keep)
        except FileError as error:
            raise FileError(f"{folder!r} is written, but an older one stays: {error}") from error

    def _piece(self, piece: Piece) -> tuple[str, Array]:
        """Give a piece's name and array in its file."""
        arrays = self._content.arrays
        kept = arrays[piece.array]
        flat = self._content.flat[kept.name][piece.start : piece.stop]
        return name_of(arrays, piece), _in_file(kept, flat, is_all=is_whole(kept, piece))


def _in_file(kept: Kept, flat: Array, *, is_all: bool) -> Array:
    """Bring a flat array, or a piece of one, into the dtype and shape that its file has."""
    shape = kept.shape if is_all else flat.shape
    return as_stored(flat).reshape(stored_shape(kept.dtype, shape))


def _part(folder: str, name: str) -> Part:
    with tensors.opened(os.path.join(folder, name)) as file:
        return Part(name, file.n_bytes, file.checksum)


def _file(kind: str, number: int, n: int) -> str:
    return f"{kind}-{number:05d}-of-{n:05d}.safetensors"
