"""Stores that tests of checkpoints train, and where they save them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from raised_by_all import raised_by_all

from kvcoll import KVStore

Array = npt.NDArray[Any]

SHAPES: dict[str, tuple[Any, tuple[int, ...]]] = {
    "w": ("f4", (3, 5)),
    "half": ("f2", (4,)),
    "wide": ("f8", (2, 9)),
    "scalar": ("f4", ()),
    "none": ("f4", (0, 3)),
}
KEYS = list(SHAPES)


def f32(*numbers: float) -> Array:
    return np.array(numbers, np.float32)


def values() -> list[Array]:
    """Give a first value for each key, other ones for each element."""
    return [
        np.asarray(np.arange(np.prod(shape)) + k + 1, dtype).reshape(shape)
        for k, (dtype, shape) in enumerate(SHAPES.values())
    ]


def gradients(step: int, rank: int) -> list[Array]:
    """Give gradients whose sums over ranks are exact, other ones for each rank and key."""
    return [
        np.asarray((np.arange(np.prod(shape)) % 5 - 2) * (k + 1) + step + rank, dtype).reshape(
            shape
        )
        for k, (dtype, shape) in enumerate(SHAPES.values())
    ]


def total(step: int, size: int) -> list[Array]:
    """Give what the gradients of so many ranks sum to."""
    parts = zip(*[gradients(step, rank) for rank in range(size)], strict=True)
    return [np.asarray(np.sum(p, 0), v.dtype) for p, v in zip(parts, values(), strict=True)]


def train(kv: KVStore, steps: range) -> None:
    for step in steps:
        kv.push(KEYS, gradients(step, kv.rank))
        kv.push("w", gradients(step, kv.rank)[0])  # so that keys differ in their counts


def bits(kv: KVStore) -> list[bytes]:
    return [array.tobytes() for array in kv.pull(KEYS)]


def shared(kv: KVStore, own: Path, of_rank_0: Path) -> Path:
    """Choose a folder that all ranks of the store have in common."""
    return own if kv.type == "local" else of_rank_0


def raised_alike(kv: KVStore, comm: Any, call: Callable[[], object]) -> Exception:
    """Get the error of a call; in a distributed store the same one on every rank."""
    if kv.type != "local":
        return raised_by_all(comm, call)
    with pytest.raises(Exception) as raised:  # noqa: PT011
        call()
    return raised.value


def cut_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let small checkpoints be cut into parts as large ones are."""
    monkeypatch.setattr("kvcoll.checkpoint.shares.PART_BYTES", 64)
    monkeypatch.setattr("kvcoll.checkpoint.shares.CUT_BYTES", 100)


def save_first(kv: KVStore, path: Path) -> KVStore:
    """Train two keys by SGD with momentum, and save them; 'b' is 1 in it, and 2 after it."""
    kv.init(["a", "b"], [f32(0, 0), np.zeros(900, np.float32)])
    mean = 1 / kv.num_workers
    kv.set_optimizer("sgd", learning_rate=1.0, momentum=0.5, rescale_grad=-mean)
    kv.push(["a", "b"], [f32(1, 1), np.ones(900, np.float32)])
    kv.save(path)
    kv.push("b", np.full(900, 0.5, np.float32))
    return kv


def unchanged(kv: KVStore) -> None:
    """Check that 'b' of `save_first` is still 2, with a momentum of 1."""
    np.testing.assert_array_equal(kv.pull("b"), np.full(900, 2, np.float32))
    kv.push("b", np.zeros(900, np.float32))
    np.testing.assert_array_equal(kv.pull("b"), np.full(900, 2.5, np.float32))


def loadable(kv: KVStore, path: Path) -> None:
    """Check that the checkpoint of `save_first` is still found, and go back to it."""
    kv.load(path)
    np.testing.assert_array_equal(kv.pull("b"), np.full(900, 1, np.float32))
    kv.push("b", np.zeros(900, np.float32))
    np.testing.assert_array_equal(kv.pull("b"), np.full(900, 1.5, np.float32))


def is_last(kv: KVStore) -> bool:
    return kv.rank == kv.num_workers - 1
