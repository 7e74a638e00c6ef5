"""The header of a safetensors file: names, dtypes, shapes and places of its arrays.

A file is 8 bytes with the header's length (little-endian), the header as JSON,
``{"name": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, ...}`` and
optionally ``"__metadata__"`` with texts by name, then the arrays' bytes, little-endian
and row by row, without gaps (https://github.com/huggingface/safetensors, "Format").
Ours have in their metadata, under `_CHECKSUM`, the CRC-32 of the header and of each array.

Rules of the file: pure; nothing that a header says is believed before it is checked.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np

from ..arrays import Array, DType, describe
from ..dlpack import extension_dtype
from ..errors import ArgumentError, DTypeMismatchError

LENGTH = struct.Struct("<Q")
LONGEST_HEADER_BYTES = 100_000_000  # the format's own limit
_LARGEST_BYTES = 2**63 - 1
_MOST_DIMENSIONS = 32  # NumPy's, before 2.0
_LONGEST_NUMBER = 19  # digits
_LONGEST_SHOWN = 80
_ALIGNMENT = 8
_METADATA = "__metadata__"
_CHECKSUM = "kvcoll.crc32"
# In every file of ours the checksums stand first, so that they are found without a doubt.
_OPENING = f'{{"{_METADATA}":{{"{_CHECKSUM}":"'.encode()
_DIGITS = 8  # of one checksum
CHECKSUM_AT = LENGTH.size + len(_OPENING)

_DTYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "U16": "uint16",
    "I16": "int16",
    "U32": "uint32",
    "I32": "int32",
    "U64": "uint64",
    "I64": "int64",
    "F16": "float16",
    "F32": "float32",
    "F64": "float64",
    "C64": "complex64",
}
_EXTENSIONS = {  # of ml_dtypes, with their sizes
    "BF16": ("bfloat16", 2),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "F8_E8M0": ("float8_e8m0fnu", 1),
    "F8_E4M3FNUZ": ("float8_e4m3fnuz", 1),
    "F8_E5M2FNUZ": ("float8_e5m2fnuz", 1),
}
_SIZES = {code: np.dtype(name).itemsize for code, name in _DTYPES.items()} | {
    code: size for code, (_, size) in _EXTENSIONS.items()
}
_CODES = {name: code for code, name in _DTYPES.items()} | {
    name: code for code, (name, _) in _EXTENSIONS.items()
}


class UnsoundError(ValueError):
    """What is wrong with a header."""


@dataclass(frozen=True)
class Stored:
    """One array in a file.

    Attributes
    ----------
    code : str
        Its dtype, as safetensors writes it.
    shape : tuple of int
    start, stop : int
        Where its bytes are in the file.
    checksum : str
        What `as_digits` makes of its CRC-32, or ``''`` if there is none.
    """

    code: str
    shape: tuple[int, ...]
    start: int
    stop: int
    checksum: str

    @property
    def dtype(self) -> DType:
        """The dtype as NumPy's object.

        Raises
        ------
        MissingDependencyError
            It is one of ml_dtypes, which is not installed, or too old.
        """
        if self.code in _DTYPES:
            return np.dtype(_DTYPES[self.code])
        return extension_dtype(_EXTENSIONS[self.code][0])


@dataclass(frozen=True)
class Header:
    """What a header says.

    Attributes
    ----------
    metadata : dict of str to str
        Without the checksums.
    arrays : dict of str to Stored
        In the order of their bytes.
    checksum : str
        Of all checksums, in digits; ``''`` if there are none.
    """

    metadata: dict[str, str]
    arrays: dict[str, Stored]
    checksum: str


def as_digits(checksum: int) -> str:
    """Write a CRC-32 in eight hexadecimal digits."""
    return f"{checksum:0{_DIGITS}x}"


def is_storable(dtype: DType) -> bool:
    """Say whether the format has a dtype."""
    return dtype.name in _CODES


def dtype_named(name: str) -> DType | None:
    """Give the dtype of NumPy, or of ml_dtypes, that the format has under this name of ours.

    Raises
    ------
    MissingDependencyError
        As `Stored.dtype`.
    """
    code = _CODES.get(name)
    return None if code is None else Stored(code, (), 0, 0, "").dtype


def encode(arrays: Sequence[tuple[str, Array]], metadata: Mapping[str, str]) -> bytes:
    """Write the header of arrays, with zeros in the place of their checksums."""
    if _CHECKSUM in metadata:
        raise ArgumentError(f"the metadata {_CHECKSUM!r} is the file's own: give another name")
    zeros = "0" * (_DIGITS * (len(arrays) + 1))
    entries: dict[str, Any] = {_METADATA: {_CHECKSUM: zeros, **metadata}}
    start = 0
    for name, array in arrays:
        if name == _METADATA:
            raise ArgumentError(f"{_METADATA!r} cannot be the name of an array: give another")
        if array.dtype.name not in _CODES:
            raise DTypeMismatchError(
                f"array {name!r} is {describe(array)}, and the safetensors format has no such "
                f"dtype: convert it to one of {', '.join(_CODES)}"
            )
        offsets = [start, start + array.nbytes]
        code = _CODES[array.dtype.name]
        entries[name] = {"dtype": code, "shape": array.shape, "data_offsets": offsets}
        start += array.nbytes
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":"))
    try:
        raw = text.encode()
    except UnicodeEncodeError as error:
        raise ArgumentError(f"a name or a text is not valid unicode: {error.reason}") from None
    raw += b" " * (-len(raw) % _ALIGNMENT)
    if len(raw) > LONGEST_HEADER_BYTES:
        raise ArgumentError(
            f"the names of {len(arrays)} arrays and the metadata take {len(raw)} bytes, the "
            f"format allows {LONGEST_HEADER_BYTES}: use several files"
        )
    return raw


def parse(raw: bytes, n_bytes: int) -> Header:
    """Read and check a header.

    Parameters
    ----------
    raw : bytes
    n_bytes : int
        The size of the whole file.

    Raises
    ------
    UnsoundError
        It is no header, or not that of this file, or was altered.
    """
    entries = _parsed(raw)
    metadata = entries.pop(_METADATA, {})
    if type(metadata) is not dict or not all(type(text) is str for text in metadata.values()):
        raise UnsoundError("its metadata are not texts by name")
    for name, entry in entries.items():
        _check_entry(name, entry)
    checksums = _checksums(raw, len(entries))
    metadata.pop(_CHECKSUM, None)
    arrays = _placed(entries, checksums, LENGTH.size + len(raw), n_bytes)
    return Header(metadata, arrays, _of_all(checksums))


def _parsed(raw: bytes) -> dict[str, Any]:
    if not raw.startswith(b"{"):
        raise UnsoundError("its header does not begin with '{'")
    try:
        entries: dict[str, Any] = json.loads(
            raw.decode(),
            object_pairs_hook=_names_once,
            parse_int=_short_int,
            parse_float=_no_number,
            parse_constant=_no_number,
        )
    except RecursionError:
        raise UnsoundError("its header is nested too deeply") from None
    except ValueError as error:  # of JSON, of unicode, and our own
        raise UnsoundError(f"its header cannot be read ({error})") from None
    return entries


def _checksums(raw: bytes, n_arrays: int) -> list[str]:
    """Compare the header's checksum; give it and those of the arrays, or nothing."""
    if not raw.startswith(_OPENING):
        if f'"{_CHECKSUM}"'.encode() in raw:
            raise UnsoundError("its checksums are not where they were: another program rewrote it")
        return []
    first, last = len(_OPENING), len(_OPENING) + _DIGITS * (n_arrays + 1)
    text = raw[first:last].decode(errors="replace")
    as_written = zlib.crc32(b"0" * (last - first), zlib.crc32(_OPENING))
    if text[:_DIGITS] != as_digits(zlib.crc32(raw[last:], as_written)):
        raise UnsoundError("its header does not fit its checksum")
    return [text[k : k + _DIGITS] for k in range(0, len(text), _DIGITS)]


def _of_all(checksums: list[str]) -> str:
    """Digest checksums into one, which stands for every byte of the file."""
    return as_digits(zlib.crc32("".join(checksums).encode())) if checksums else ""


def _check_entry(name: str, entry: Any) -> None:
    shown = _shown(name)
    if type(entry) is not dict or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise UnsoundError(f"of array {shown} it gives not just dtype, shape and offsets")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if type(code) is not str or code not in _SIZES:
        known = ", ".join(_SIZES)
        raise UnsoundError(f"array {shown} is of dtype {_shown(code)}; known are {known}")
    if not _are_sizes(shape) or len(shape) > _MOST_DIMENSIONS:
        raise UnsoundError(f"the shape of array {shown} is none")
    # Also of an array with no elements: NumPy takes the other extents for a memory's.
    if _n_bytes(code, [max(extent, 1) for extent in shape]) > _LARGEST_BYTES:
        raise UnsoundError(f"array {shown} of shape {shape} is larger than any memory")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise UnsoundError(f"the offsets of array {shown} are not two numbers")


def _placed(
    entries: dict[str, Any], checksums: list[str], start: int, n_bytes: int
) -> dict[str, Stored]:
    """Check that the arrays lie one behind the other, up to the end of the file."""
    arrays = {}
    end = start
    ordered = sorted(entries.items(), key=lambda pair: pair[1]["data_offsets"])
    for number, (name, entry) in enumerate(ordered, 1):
        code, shape = entry["dtype"], entry["shape"]
        first, last = (start + offset for offset in entry["data_offsets"])
        n_needed = _n_bytes(code, shape)
        if first != end or last - first != n_needed:
            raise UnsoundError(
                f"array {_shown(name)}, {code}{shape}, must have the bytes "
                f"{[end - start, end - start + n_needed]}, and has {entry['data_offsets']}"
            )
        end = last
        checksum = checksums[number] if checksums else ""
        arrays[name] = Stored(code, tuple(shape), first, last, checksum)
    if end != n_bytes:
        raise UnsoundError(f"by its header it has {end} bytes, the file is {n_bytes}")
    return arrays


def _n_bytes(code: str, shape: list[int]) -> int:
    n = _SIZES[code]
    for extent in shape:
        n *= extent
    return n


def _are_sizes(numbers: Any) -> bool:
    return type(numbers) is list and all(type(n) is int and n >= 0 for n in numbers)


def _names_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise ValueError("a name stands twice")
    for name, value in pairs:
        name.encode()  # JSON can write halves of characters
        if type(value) is str:
            value.encode()
    return entries


def _short_int(digits: str) -> int:
    if len(digits) > _LONGEST_NUMBER:
        raise ValueError("a number has too many digits")
    return int(digits)


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text[:_LONGEST_NUMBER]} is not a whole number")


def _shown(text: object) -> str:
    """Write what a file says short enough for a message."""
    whole = repr(text)
    return whole if len(whole) <= _LONGEST_SHOWN else f"{whole[:_LONGEST_SHOWN]}…"
