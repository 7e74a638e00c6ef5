"""Memory that the ranks of one host share, without a name that could stay behind.

Rules of the file: the memory is anonymous (memfd_create), so that a crash leaves
nothing and the size of /dev/shm does not matter; where the kernel or a sandbox does
not allow it, all ranks of the host learn that at once and none of them maps it.
"""

from __future__ import annotations

import mmap
import os
import secrets
import struct
from collections.abc import Callable
from typing import final

import numpy as np

from ..arrays import Array

_TOKEN_BYTES = 16
_WHERE = struct.Struct(f"<qq{_TOKEN_BYTES}s")
_NOWHERE = -1


@final
class SharedMemory:
    """Bytes that several processes have mapped.

    Parameters
    ----------
    descriptor : int
        An open file of `n_bytes`.
    n_bytes : int

    Attributes
    ----------
    raw : numpy.ndarray, shape (n_bytes,)
        Of uint8. Pages cost memory once they are touched; all of it is given back
        with the last array that shows it.
    """

    def __init__(self, descriptor: int, n_bytes: int) -> None:
        self.raw: Array = np.frombuffer(mmap.mmap(descriptor, n_bytes), np.uint8)


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
    finally:
        os.close(descriptor)
    return memory if memory.raw[:_TOKEN_BYTES].tobytes() == token else None
