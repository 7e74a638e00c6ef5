"""Memory in which values lie while their sum waits; used again and again."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable
from typing import final

import numpy as np

from .arrays import Array


@final
class Slots:
    """Pieces of memory by size, taken in one thread and given back in another."""

    def __init__(self) -> None:
        self._free: dict[int, list[Array]] = {}
        self._lock = threading.Lock()

    def reserve(self, sizes_bytes: Iterable[int]) -> None:
        """See to it that so many slots of these sizes can be taken without fail."""
        for n_bytes, count in Counter(sizes_bytes).items():
            with self._lock:
                free = self._free.setdefault(n_bytes, [])
                # Of 16-byte elements, so that it is aligned for every dtype.
                while len(free) < count:
                    free.append(np.empty(-(-n_bytes // 16), np.complex128).view(np.uint8))

    def take(self, n_bytes: int) -> Array:
        """Take a slot of a size that was reserved; it may be a little longer."""
        with self._lock:
            return self._free[n_bytes].pop()

    def give_back(self, n_bytes: int, slot: Array) -> None:
        """Give a slot back that was taken with this size."""
        with self._lock:
            self._free[n_bytes].append(slot)
