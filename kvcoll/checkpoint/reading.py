"""Reading checkpoints: the newest one that is complete, every byte of it checked."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from .. import tensors
from ..arrays import Array
from ..errors import FileError, FileFormatError
from ..files import as_path, read_small
from ..schema import Key
from . import folder as folders
from .kept import Kept, as_stored, stored_shape
from .manifest import MOST_BYTES, Manifest, Part, fingerprint_of, parse
from .shares import Piece, is_whole, name_of, pieces


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that has been loaded.

    Attributes
    ----------
    path : str
        Its own folder.
    version : int
        How many pushes the store had made, `KVStore.version`.
    num_workers : int
        By how many ranks it was saved.
    fingerprint : str
        Of all values and states, as `KVStore.verify` gave it then and gives it once loaded.
    metadata : object
        What `KVStore.save` was given.
    rank_metadata : tuple of object
        What each rank gave, by rank of the store that saved.
    """

    path: str
    version: int
    num_workers: int
    fingerprint: str
    metadata: Any
    rank_metadata: tuple[Any, ...]


class Wanted(NamedTuple):
    """A piece of an array, and the memory that it goes to."""

    name: str
    kept: Kept
    piece: Piece
    out: Array  # flat

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape that it has in its file."""
        own = self.kept.shape if is_whole(self.kept, self.piece) else self.out.shape
        return stored_shape(self.kept.dtype, own)


def load(path: Any) -> tuple[dict[Key, Array], Checkpoint]:
    """Read the values of a checkpoint into plain arrays, without a store and without MPI.

    To go on training, make a store and call `KVStore.load`, which brings back the
    optimizer, too.

    Parameters
    ----------
    path : str or os.PathLike
        As for `KVStore.load`.

    Returns
    -------
    values : dict of key to numpy.ndarray
        In the order of `KVStore.init`. Dense arrays for all keys, row-sparse ones, too.
    checkpoint : Checkpoint

    Raises
    ------
    NoCheckpointError
        There is no complete checkpoint.
    FileError
        A file cannot be read.
    FileFormatError
        A file is truncated or altered; the message names the checkpoint before, if there
        is one.
    TypeError
        `path` is no path.
    """
    folder = os.path.abspath(folders.find(os.path.abspath(as_path(path))))
    with pointing_to_older(folder):
        manifest = parse(folder, read_manifest(folder))
        values = {
            key: np.empty(kept.shape, kept.dtype)
            for key, kept in zip(manifest.keys, manifest.arrays, strict=False)
        }
        flat = {f"value:{key}": array.reshape(-1) for key, array in values.items()}
        for part, wanted in zip(manifest.parts, wanted_of(manifest, flat), strict=True):
            if wanted:
                read_part(folder, part, wanted)
        check_fingerprints(folder, manifest, flat)
    return values, about(folder, manifest)


def about(folder: str, manifest: Manifest) -> Checkpoint:
    """Give what a user wants to know."""
    return Checkpoint(
        path=folder,
        version=manifest.version,
        num_workers=manifest.num_workers,
        fingerprint=manifest.fingerprint,
        metadata=manifest.metadata,
        rank_metadata=manifest.rank_metadata,
    )


def read_manifest(folder: str) -> bytes:
    """Read the manifest of a checkpoint.

    Raises
    ------
    FileError
        It cannot be read.
    """
    return read_small(os.path.join(folder, folders.MANIFEST), MOST_BYTES)


def wanted_of(manifest: Manifest, flat: Mapping[str, Array]) -> list[list[Wanted]]:
    """Give for each part the pieces in it of those arrays for which there is memory."""
    arrays = manifest.arrays
    return [
        [
            Wanted(name_of(arrays, piece), kept, piece, flat[kept.name][piece.start : piece.stop])
            for piece in of_part
            if (kept := arrays[piece.array]).name in flat
        ]
        for of_part in pieces(arrays, manifest.starts)
    ]


def whole(arrays: Iterable[Kept], flat: Mapping[str, Array]) -> list[Wanted]:
    """Give the arrays of a file in which none is cut."""
    return [
        Wanted(kept.name, kept, Piece(number, 0, kept.n_elements), flat[kept.name])
        for number, kept in enumerate(arrays)
    ]


def read_part(folder: str, part: Part, wanted: Sequence[Wanted]) -> None:
    """Read pieces from a file, and check that it is the one that the manifest means.

    Raises
    ------
    FileError
        It cannot be read.
    FileFormatError
        It is truncated, altered, or another one.
    """
    with tensors.opened(os.path.join(folder, part.file)) as file:
        if (file.n_bytes, file.checksum) != (part.n_bytes, part.checksum):
            file.refuse("its checksums are not those that the manifest names")
        for one in wanted:
            out = as_stored(one.out)
            stored = file.arrays.get(one.name)
            if stored is None or (stored.shape, stored.dtype) != (one.shape, out.dtype):
                file.refuse(f"array {one.name!r} is not in it, or not as the manifest says")
            file.read_into(one.name, out)


def check_fingerprints(folder: str, manifest: Manifest, flat: Mapping[str, Array]) -> None:
    """Compare arrays that have been read with those that the store held.

    Parameters
    ----------
    folder : str
    manifest : Manifest
    flat : mapping of str to numpy.ndarray
        By name; those that are not in it are left out.

    Raises
    ------
    FileFormatError
        One is another, though each file fits its checksums.
    """
    for kept, expected in zip(manifest.arrays, manifest.fingerprints, strict=True):
        if kept.name in flat and fingerprint_of(kept, flat[kept.name]) != expected:
            raise FileFormatError(
                f"{folder!r} is not a sound checkpoint: array {kept.name!r} does not fit its "
                "fingerprint, though the files fit their checksums: it was saved by ranks whose "
                "replicas differed (see KVStore.verify), or this machine's memory is at fault"
            )


@contextmanager
def pointing_to_older(folder: str) -> Iterator[None]:
    """Add to what is wrong with a checkpoint which one can be loaded in its place."""
    try:
        yield
    except (FileError, FileFormatError) as error:
        older = folders.older_than(folder)
        if not older:
            raise
        raise type(error)(f"{error}; the complete checkpoint before it is {older!r}") from error
