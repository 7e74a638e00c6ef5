"""Memory that the ranks of one host share, without a name that could stay behind.

Rules of the file: the memory is anonymous (memfd_create), so that a crash leaves
nothing and the size of /dev/shm does not matter; where the kernel or a sandbox does
not allow it, all ranks of the host learn that at once and none of them maps it; what a
child made by fork writes, no rank sees.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
import os
import secrets
import struct
import weakref
from collections.abc import Callable
from typing import final

import numpy as np

from ..arrays import Array

_TOKEN_BYTES = 16
_WHERE = struct.Struct(f"<qq{_TOKEN_BYTES}s")
_NOWHERE = -1
_MAP_FIXED = 0x10

# Of each mapping of this process its address, its length, and the file that it shows. By a number
# of their own: an address may be another mapping's before the last one there is forgotten, as
# memory is given back in whichever thread collects garbage.
_mapped: dict[int, tuple[int, int, int]] = {}
_numbers = itertools.count()


@final
class SharedMemory:
    """Bytes that several processes have mapped.

    Parameters
    ----------
    descriptor : int
        An open file of `n_bytes`, which this closes.
    n_bytes : int

    Attributes
    ----------
    raw : numpy.ndarray, shape (n_bytes,)
        Of uint8. Pages cost memory once they are touched; all of it is given back
        with the last array that shows it.
    """

    def __init__(self, descriptor: int, n_bytes: int) -> None:
        try:
            mapping = mmap.mmap(descriptor, n_bytes)
        except BaseException:
            os.close(descriptor)
            raise
        self.raw: Array = np.frombuffer(mapping, np.uint8)
        address = self.raw.ctypes.data
        number = next(_numbers)
        _mapped[number] = address, n_bytes, descriptor
        weakref.finalize(mapping, _forget, number).atexit = False


def share(
    rank: int, n_bytes: int, broadcast: Callable[[bytes], bytes], all_true: Callable[[bool], bool]
) -> SharedMemory | None:
    """Map the same new memory in several processes of one host; collective.

    Parameters
    ----------
    rank : int
        Rank 0 makes it.
    n_bytes : int
        At least 16; zeroed.
    broadcast : callable
        Gives on every rank the bytes that rank 0 gave; their number is always the same.
    all_true : callable
        Says on every rank whether all ranks gave True.

    Returns
    -------
    SharedMemory or None
        None on every rank if one of them could not map it.
    """
    token = secrets.token_bytes(_TOKEN_BYTES)
    made = _make(n_bytes, token) if rank == 0 else None
    where = (os.getpid(), _NOWHERE if made is None else made, token)
    pid, number, token = _WHERE.unpack(broadcast(_WHERE.pack(*where)))
    memory = None
    if number != _NOWHERE:
        memory = _map(made, f"/proc/{pid}/fd/{number}", n_bytes, token)
    everywhere = all_true(memory is not None)  # all have opened it and have seen the token
    if made is not None:
        os.close(made)
    if not everywhere or memory is None:
        return None
    if rank == 0:
        memory.raw[:_TOKEN_BYTES] = 0
    all_true(True)
    return memory


def _make(n_bytes: int, token: bytes) -> int | None:
    try:
        descriptor = os.memfd_create("kvcoll", os.MFD_CLOEXEC)
    except OSError:
        return None
    try:
        os.fchmod(descriptor, 0o600)  # beside what /proc allows, other users must not open it
        os.ftruncate(descriptor, n_bytes)
        os.pwrite(descriptor, token, 0)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _map(made: int | None, path: str, n_bytes: int, token: bytes) -> SharedMemory | None:
    """Map rank 0's memory; its token shows that the process found is the one meant."""
    try:
        descriptor = os.dup(made) if made is not None else os.open(path, os.O_RDWR)
    except OSError:
        return None
    try:
        memory = SharedMemory(descriptor, n_bytes)
    except (OSError, ValueError):
        return None
    return memory if memory.raw[:_TOKEN_BYTES].tobytes() == token else None


def _forget(number: int) -> None:
    os.close(_mapped.pop(number)[2])


def _part() -> None:
    """Map the same again, but so that writing copies: in a child made by fork."""
    map_again = ctypes.CDLL(None, use_errno=True).mmap
    map_again.restype = ctypes.c_void_p
    map_again.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    protection, flags = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | _MAP_FIXED
    for address, n_bytes, descriptor in _mapped.values():
        if map_again(address, n_bytes, protection, flags, descriptor, 0) != address:
            raise OSError(ctypes.get_errno(), "memory is shared with a child made by fork")


os.register_at_fork(after_in_child=_part)
