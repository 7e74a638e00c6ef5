"""Writing and reading files of arrays.

Rules of the file: whatever is wrong with a file is a `FileFormatError`; no memory is taken
that is larger than the file; nothing in a file can run. What other programs wrote is read,
too, only without checksums.
"""

from __future__ import annotations

import os
import sys
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NoReturn, final

import numpy as np

from ..arrays import Array, DType
from ..errors import FileFormatError
from ..files import PIECE_BYTES, read_all, reading, replacing, write_all
from .header import (
    CHECKSUM_AT,
    LENGTH,
    LONGEST_HEADER_BYTES,
    Header,
    UnsoundError,
    as_digits,
    encode,
    parse,
)


def write(path: str, arrays: Mapping[str, Array], metadata: Mapping[str, str]) -> None:
    """Write arrays and texts to a file, which is written whole or not at all.

    Parameters
    ----------
    path : str
    arrays : mapping of str to numpy.ndarray
        Of any layout. Those of larger elements come first in the file, so that each is
        aligned; else their order is kept.
    metadata : mapping of str to str

    Raises
    ------
    DTypeMismatchError
        A dtype that the format does not have (complex128, long double).
    ArgumentError
        A name that is no valid unicode, or is the format's own, or names so many and
        long that the header would exceed 100 MB.
    FileError
        The file cannot be written; it is as it was.

    Notes
    -----
    Cost: one pass over the arrays, no copy of what is contiguous; 1 to 2 GB/s a core for
    the checksum (zlib's CRC-32, which finds accidents and not forgery), then the disk.
    """
    ordered = sorted(arrays.items(), key=lambda pair: -pair[1].dtype.itemsize)
    header = encode(ordered, metadata)
    with replacing(path) as descriptor:
        write_all(descriptor, memoryview(LENGTH.pack(len(header)) + header))
        checksums = [zlib.crc32(header)]
        for _, array in ordered:
            checksums.append(_write_array(descriptor, array))
        # Over the zeros that are in the file already.
        os.lseek(descriptor, CHECKSUM_AT, os.SEEK_SET)
        write_all(descriptor, memoryview("".join(map(as_digits, checksums)).encode()))


def _write_array(descriptor: int, array: Array) -> int:
    data = np.ascontiguousarray(array)
    if _is_big_endian(array.dtype):
        data = data.byteswap()
    raw = data.reshape(-1).view(np.uint8).data
    checksum = 0
    for start in range(0, len(raw), PIECE_BYTES):
        piece = raw[start : start + PIECE_BYTES]
        checksum = zlib.crc32(piece, checksum)
        write_all(descriptor, piece)
    return checksum


@contextmanager
def opened(path: str) -> Iterator[TensorFile]:
    """Open a file, check its header, and give what it holds for a with-block.

    Raises
    ------
    FileError
        It cannot be read.
    FileFormatError
        It is no safetensors file, or a truncated or altered one.
    """
    with reading(path) as (descriptor, n_bytes):
        yield TensorFile(path, descriptor, n_bytes)


@final
class TensorFile:
    """A file whose header has been checked; given by `opened`.

    Attributes
    ----------
    metadata : dict of str to str
    arrays : dict of str to Stored
        In the order of their bytes.
    n_bytes : int
        The size of the file.
    checksum : str
        One for all its bytes; ``''`` if it has none, so that no altered byte is noticed.
    """

    def __init__(self, path: str, descriptor: int, n_bytes: int) -> None:
        self._path = path
        self._descriptor = descriptor
        header = self._header(n_bytes)
        self.metadata = header.metadata
        self.arrays = header.arrays
        self.n_bytes = n_bytes
        self.checksum = header.checksum

    @property
    def has_checksums(self) -> bool:
        """Whether an altered byte is noticed."""
        return bool(self.checksum)

    def read(self, name: str) -> Array:
        """Read an array into new memory; see `read_into`."""
        stored = self.arrays[name]
        array = np.empty(stored.shape, stored.dtype)
        self.read_into(name, array)
        return array

    def read_into(self, name: str, out: Array) -> None:
        """Read an array into memory that is there, and compare its checksum.

        Parameters
        ----------
        name : str
        out : numpy.ndarray
            Contiguous, of the array's dtype and number of elements.

        Raises
        ------
        FileFormatError
            Its bytes are not those that were written; `out` holds anything then.
        """
        stored = self.arrays[name]
        raw = out.reshape(-1).view(np.uint8)
        checksum = 0
        for start in range(0, raw.size, PIECE_BYTES):
            piece = raw[start : start + PIECE_BYTES].data
            self._fill(piece, stored.start + start)
            checksum = zlib.crc32(piece, checksum)
        if stored.checksum and stored.checksum != as_digits(checksum):
            self.refuse(f"the bytes of array {name!r} do not fit their checksum")
        if stored.code == "BOOL" and raw.size and raw.max() > 1:
            self.refuse(f"array {name!r} is of bools, and has bytes that are neither 0 nor 1")
        if _is_big_endian(out.dtype):
            out.byteswap(inplace=True)

    def refuse(self, what: str) -> NoReturn:
        """Raise that the file is not as it should be."""
        raise FileFormatError(
            f"{self._path!r} is not a sound safetensors file: {what}; "
            "take another copy of it, or write it again"
        )

    def _header(self, n_bytes: int) -> Header:
        if n_bytes < LENGTH.size:
            self.refuse(f"it is {n_bytes} bytes long, and the header's length alone takes 8")
        raw = bytearray(LENGTH.size)
        self._fill(memoryview(raw), 0)
        length = LENGTH.unpack(raw)[0]
        if length > min(LONGEST_HEADER_BYTES, n_bytes - LENGTH.size):
            self.refuse(
                f"its header would be {length} bytes long, the file is {n_bytes}, "
                f"and the format allows {LONGEST_HEADER_BYTES}"
            )
        raw = bytearray(length)
        self._fill(memoryview(raw), LENGTH.size)
        try:
            return parse(bytes(raw), n_bytes)
        except UnsoundError as error:
            self.refuse(str(error))

    def _fill(self, piece: memoryview, offset: int) -> None:
        if not read_all(self._descriptor, piece, offset):
            self.refuse("it was truncated while it was read")


def _is_big_endian(dtype: DType) -> bool:
    return dtype.byteorder == ">" or (dtype.byteorder == "=" and sys.byteorder == "big")
