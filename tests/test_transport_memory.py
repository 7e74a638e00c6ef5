"""Each mapping of shared memory keeps its own file, whatever address it has."""

from __future__ import annotations

import gc
import os
from typing import Any

import numpy as np
import pytest

from kvcoll.transport.memory import SharedMemory

pytestmark = pytest.mark.single


def file_of(n_bytes: int) -> int:
    descriptor = os.memfd_create("kvcoll-test")
    os.ftruncate(descriptor, n_bytes)
    return descriptor


def test_memory_at_an_address_that_another_has_just_left_keeps_its_file(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    held: list[Any] = []
    shown = np.zeros(4096, np.uint8)

    def at_one_address(mapping: Any, dtype: Any) -> Any:
        held.append(mapping)
        return shown

    # As where another thread maps before the one that unmaps has come to forget.
    monkeypatch.setattr("kvcoll.transport.memory.np.frombuffer", at_one_address)
    first, second = file_of(4096), file_of(4096)
    kept = [SharedMemory(first, 4096), SharedMemory(second, 4096)]
    assert len(kept) == 2
    del held[0]
    gc.collect()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(first)
    assert os.fstat(second).st_size == 4096
    held.clear()
    gc.collect()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(second)
