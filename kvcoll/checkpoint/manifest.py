"""A checkpoint's manifest: what is in which file, with what checksum, and what the user said.

It is JSON: ``{"crc32": "0123abcd", "checkpoint": {...}}``; the CRC-32 is that of all the
bytes behind it. Rules of the file: what is read is used as numbers, names and the
user's own data only, after every part of it has been checked.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, final

from .. import compression, fingerprint
from .._version import __version__
from ..arrays import Array
from ..errors import ArgumentError, FileFormatError
from ..schema import Key
from .folder import PART
from .kept import Kept, dtype_named
from .shares import Start

FORMAT = "kvcoll.checkpoint"
MOST_BYTES = 1 << 30
_VERSION = 1
_OPENING = re.compile(rb'\{"crc32": "([0-9a-f]{8})", ')
_LARGEST = 2**62
_MOST_RANKS = 10**9
_MOST_DIMENSIONS = 64
_DIGITS = re.compile(r"[0-9a-f]{8}")
_FINGERPRINT = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True)
class Part:
    """One file of a checkpoint.

    Attributes
    ----------
    file : str
        Its name.
    n_bytes : int
    checksum : str
        `tensors.TensorFile.checksum`.
    """

    file: str
    n_bytes: int
    checksum: str


@dataclass(frozen=True)
class Manifest:
    """What a manifest says.

    Attributes
    ----------
    version : int
        How many pushes the store had made.
    num_workers : int
        Of how many ranks it was.
    about : dict of str to str
        The rest of its settings, for people to read.
    compression : dict or None
        See `Contents`.
    keys : tuple of int or of str
        In the order of `init`.
    row_sparse : tuple of bool
        Which of them are row-sparse keys.
    arrays : tuple of Kept
        All that is the same on all ranks; the keys' values first, in their order.
    fingerprints : tuple of str
        Theirs, see `fingerprint_of`.
    optimizer : dict of str to str, or None
        What `states.Saving` says of itself.
    metadata : object
    rank_metadata : tuple of object
        By rank.
    rank_arrays : tuple of tuple of Kept
        What was the rank's own, by rank; empty if no rank had any.
    parts, rank_parts : tuple of Part
        Files of `arrays`, and of each rank's own.
    starts : tuple of (int, int)
        Where each of `parts` begins.
    """

    version: int
    num_workers: int
    about: dict[str, str]
    compression: dict[str, Any] | None
    keys: tuple[Key, ...]
    row_sparse: tuple[bool, ...]
    arrays: tuple[Kept, ...]
    fingerprints: tuple[str, ...]
    optimizer: dict[str, str] | None
    metadata: Any
    rank_metadata: tuple[Any, ...]
    rank_arrays: tuple[tuple[Kept, ...], ...]
    parts: tuple[Part, ...]
    starts: tuple[Start, ...]
    rank_parts: tuple[Part, ...]

    @property
    def fingerprint(self) -> str:
        """The one of all `arrays`, as `KVStore.verify` gives it."""
        names = (array.name for array in self.arrays)
        return fingerprint.of_all(dict(zip(names, self.fingerprints, strict=True)))


def fingerprint_of(kept: Kept, flat: Array) -> str:
    """Give the fingerprint of an array of a checkpoint, the same as that of a store's."""
    return fingerprint.of(flat, kept.name, kept.shape)


def encode(manifest: Manifest) -> bytes:
    """Write a manifest."""
    content = {
        "format": FORMAT,
        "format_version": _VERSION,
        "kvcoll": __version__,
        "version": manifest.version,
        "num_workers": manifest.num_workers,
        "about": manifest.about,
        "compression": manifest.compression,
        "metadata": manifest.metadata,
        "rank_metadata": manifest.rank_metadata,
        "keys": manifest.keys,
        "row_sparse": manifest.row_sparse,
        "arrays": _plain(manifest.arrays),
        "fingerprints": manifest.fingerprints,
        "optimizer": manifest.optimizer,
        "rank_arrays": [_plain(arrays) for arrays in manifest.rank_arrays],
        "parts": [[part.file, part.n_bytes, part.checksum] for part in manifest.parts],
        "starts": manifest.starts,
        "rank_parts": [[part.file, part.n_bytes, part.checksum] for part in manifest.rank_parts],
    }
    body = f'"checkpoint": {json.dumps(content)}}}\n'.encode()
    return f'{{"crc32": "{zlib.crc32(body):08x}", '.encode() + body


def parse(path: str, raw: bytes) -> Manifest:
    """Read a manifest and check it.

    Parameters
    ----------
    path : str
        Of the checkpoint, for messages.
    raw : bytes

    Raises
    ------
    FileFormatError
        It is no manifest, or was truncated or altered, or is of a later kvcoll.
    """
    return _Parser(path, raw).manifest()


@final
class _Parser:
    """Reads one manifest."""

    def __init__(self, path: str, raw: bytes) -> None:
        self._path = path
        opening = _OPENING.match(raw)
        if opening is None:
            self._refuse("its manifest does not begin as one does")
        body = raw[opening.end() :]
        if zlib.crc32(body) != int(opening[1], 16):
            self._refuse("its manifest does not fit its checksum")
        try:
            self._content = json.loads(b"{" + body)["checkpoint"]
        except (ValueError, LookupError, TypeError, RecursionError):
            self._refuse("its manifest cannot be read")
        if type(self._content) is not dict or self._content.get("format") != FORMAT:
            self._refuse("its manifest is not one of a checkpoint")
        if self._content.get("format_version") != _VERSION:
            self._refuse(
                f"it is of version {self._content.get('format_version')!r} of the format, known "
                f"is {_VERSION}: read it with the kvcoll that wrote it"
            )

    def manifest(self) -> Manifest:
        content = self._content
        try:
            keys = self._keys(content["keys"])
            arrays = self._arrays(content["arrays"])
            own = tuple(self._arrays(one) for one in self._list(content["rank_arrays"]))
            made = Manifest(
                self._whole(content["version"]),
                self._whole(content["num_workers"]),
                self._texts(content["about"]),
                self._compression(content["compression"]),
                keys,
                self._bools(content["row_sparse"]),
                arrays,
                self._fingerprints(content["fingerprints"], len(arrays)),
                None if content["optimizer"] is None else self._texts(content["optimizer"]),
                content["metadata"],
                tuple(self._list(content["rank_metadata"])),
                own,
                self._parts(content["parts"]),
                tuple(self._start(start, arrays) for start in self._list(content["starts"])),
                self._parts(content["rank_parts"]),
            )
        except LookupError as error:
            self._refuse(f"its manifest does not say {error}")
        self._check(made)
        return made

    def _check(self, made: Manifest) -> None:
        names = [f"value:{key}" for key in made.keys]
        if [array.name for array in made.arrays[: len(names)]] != names:
            self._refuse("its arrays are not those of its keys")
        if len(made.row_sparse) != len(made.keys):
            self._refuse("it does not say of each key whether it is row-sparse")
        for array, row_sparse in zip(made.arrays, made.row_sparse, strict=False):
            if row_sparse and not array.shape:
                self._refuse(f"{array.name!r} is row-sparse, but has no rows")
        if not 1 <= made.num_workers <= _MOST_RANKS:
            self._refuse("its number of ranks is none")
        if len(made.rank_metadata) != made.num_workers:
            self._refuse("it has not one metadata a rank")
        if len(made.rank_arrays) not in (0, made.num_workers):
            self._refuse("it has not one list of arrays a rank")
        if len(made.rank_parts) != len(made.rank_arrays):
            self._refuse("it has not one file a rank")
        ascending = list(made.starts) == sorted(set(made.starts))
        if len(made.starts) != len(made.parts) or not ascending or made.starts[:1] != ((0, 0),):
            self._refuse("its parts do not follow one another")

    def _keys(self, listed: Any) -> tuple[Key, ...]:
        keys = self._list(listed)
        kinds = {type(key) for key in keys}
        if len(kinds) > 1 or not kinds <= {int, str} or len(set(keys)) != len(keys):
            self._refuse("its keys are none")
        return tuple(keys)

    def _arrays(self, listed: Any) -> tuple[Kept, ...]:
        arrays = []
        for item in self._list(listed):
            name, dtype_name, shape = self._three(item)
            dtype = dtype_named(self._text(dtype_name))
            self._list(shape)
            if dtype is None or len(shape) > _MOST_DIMENSIONS:
                self._refuse(f"array {name!r} is of a dtype or shape that is not known")
            n_bytes = dtype.itemsize
            for extent in shape:
                n_bytes *= max(self._whole(extent), 1)
            self._whole(n_bytes)
            arrays.append(Kept(self._text(name), dtype, tuple(shape)))
        if len({array.name for array in arrays}) != len(arrays):
            self._refuse("an array stands twice in its list")
        return tuple(arrays)

    def _fingerprints(self, listed: Any, n: int) -> tuple[str, ...]:
        found = tuple(self._text(text) for text in self._list(listed))
        if len(found) != n or not all(_FINGERPRINT.fullmatch(text) for text in found):
            self._refuse("it has not one fingerprint an array")
        return found

    def _parts(self, listed: Any) -> tuple[Part, ...]:
        parts = []
        for item in self._list(listed):
            file, n_bytes, checksum = self._three(item)
            # A stranger's manifest must not lead out of its folder.
            if not PART.fullmatch(self._text(file)) or not _DIGITS.fullmatch(self._text(checksum)):
                self._refuse(f"{file!r} is no file of a checkpoint")
            parts.append(Part(file, self._whole(n_bytes), checksum))
        return tuple(parts)

    def _start(self, start: Any, arrays: Sequence[Kept]) -> Start:
        if type(start) is not list or len(start) != 2:
            self._refuse("a part begins nowhere")
        number, element = (self._whole(n) for n in start)
        inside = number < len(arrays) and element < max(arrays[number].n_elements, 1)
        if not inside and (number, element) != (0, 0):
            self._refuse("a part begins nowhere")
        return number, element

    def _texts(self, table: Any) -> dict[str, str]:
        if type(table) is not dict or not all(type(text) is str for text in table.values()):
            self._refuse("a table of texts is none")
        return table

    def _compression(self, said: Any) -> dict[str, Any] | None:
        if said is None:
            return None
        if type(said) is not dict or type(said.get("is_on")) is not bool:
            self._refuse("its compression is none")
        try:
            if compression.parse(said.get("params")) is None:
                self._refuse("its compression is none")
        except ArgumentError as error:
            self._refuse(str(error))
        return said

    def _three(self, item: Any) -> list[Any]:
        if len(self._list(item)) != 3:
            self._refuse("an entry has not three parts")
        return list(item)

    def _text(self, text: Any) -> str:
        if type(text) is not str:
            self._refuse("a text is none")
        return text

    def _list(self, listed: Any) -> list[Any]:
        if type(listed) is not list:
            self._refuse("a list is none")
        return listed

    def _bools(self, listed: Any) -> tuple[bool, ...]:
        if not all(type(item) is bool for item in self._list(listed)):
            self._refuse("a list of bools is none")
        return tuple(listed)

    def _whole(self, number: Any) -> int:
        if type(number) is not int or not 0 <= number <= _LARGEST:
            self._refuse("a number is none")
        return number

    def _refuse(self, what: str) -> NoReturn:
        raise FileFormatError(f"{self._path!r} is not a sound checkpoint: {what}")


def _plain(arrays: Sequence[Kept]) -> list[list[Any]]:
    return [[array.name, array.dtype.name, array.shape] for array in arrays]
