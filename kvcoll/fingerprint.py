"""Fingerprints: short digests of arrays, of equal bits equal ones, at the speed of memory.

A real hash of every byte would take ten times as long as reading it. So an array is cut into
blocks, each of which is read as a matrix of 513 rows of 512 words of 8 bytes, and as one of 512
rows of 513; the sums over the rows and the columns of the first and over the columns of the second
are hashed (BLAKE2b), with what the array is: its name, dtype and shape. A changed word changes
one sum of each kind, and no five words can be changed so that all these sums stay: two words of a
row stand in different columns, four at the corners of a rectangle in different columns of the
other matrix. More words escape only if they cancel along every row and both kinds of columns,
which needs an intent. So a fingerprint finds errors; it is no seal against people.

Rules of the file: pure; a fingerprint depends on what an array holds and not on where it lies.
"""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import blake2b

import numpy as np

from .arrays import Array

_WIDTH = 512
_WORD_BYTES = 8
BLOCK_BYTES = _WIDTH * (_WIDTH + 1) * _WORD_BYTES
_HASHED_BYTES = 16 << 10  # below, hashing every byte is as quick
_DIGEST_BYTES = 16
# Of the 16 bytes of an extended float 6 are padding, which additions leave as they were.
_EXTENDED = (np.dtype(np.longdouble), np.dtype(np.clongdouble))
_EXTENDED_BYTES = 10


def of(array: Array, *words: object) -> str:
    """Give the fingerprint of an array.

    Parameters
    ----------
    array : numpy.ndarray, shape (n,)
        Contiguous.
    *words : object
        What else shall count, as its name and shape: by their `repr`.

    Returns
    -------
    str
        32 hexadecimal digits.

    Notes
    -----
    Cost: one pass, at 10 to 13 GB/s a core from 1 MB on (`scripts/bench_verify.py`); two thirds
    of that for arrays that do not begin at a multiple of 8 bytes; 5 microseconds at least.
    """
    told = "\x1f".join(map(repr, (array.dtype.name, array.size, *words)))
    digest = blake2b(told.encode("utf-8", "surrogatepass"), digest_size=_DIGEST_BYTES)
    raw: Array = _without_padding(array).view(np.uint8)
    for start in range(0, raw.size, BLOCK_BYTES):
        block = raw[start : start + BLOCK_BYTES]
        if block.size <= _HASHED_BYTES:
            digest.update(block.data)
        else:
            for part in _folded(block):
                digest.update(part.data)
    return digest.hexdigest()


def of_all(fingerprints: Mapping[str, str]) -> str:
    """Join the fingerprints of named arrays to one, whatever their order."""
    digest = blake2b(digest_size=_DIGEST_BYTES)
    for name in sorted(fingerprints):
        digest.update(f"{fingerprints[name]}{name}\x1f".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def _folded(block: Array) -> tuple[Array, ...]:
    """Give the sums of a block, and the bytes at its end that are in none or not in all."""
    n_words = block.size // _WORD_BYTES
    if block.ctypes.data % _WORD_BYTES:
        block = block.copy()
    words: Array = block[: n_words * _WORD_BYTES].view(np.uint64)
    n_narrow, n_wide = n_words // _WIDTH, n_words // (_WIDTH + 1)
    narrow = words[: n_narrow * _WIDTH].reshape(n_narrow, _WIDTH)
    wide = words[: n_wide * (_WIDTH + 1)].reshape(n_wide, _WIDTH + 1)
    in_all = min(narrow.size, wide.size) * _WORD_BYTES
    sums = (np.add.reduce(narrow, axis=1), np.add.reduce(narrow), np.add.reduce(wide))
    return (*sums, block[in_all:])


def _without_padding(array: Array) -> Array:
    if array.dtype not in _EXTENDED or array.dtype.itemsize % 16:
        return array
    raw: Array = array.view(np.uint8).reshape(-1, 16).copy()
    raw[:, _EXTENDED_BYTES:] = 0
    return raw.reshape(-1)
