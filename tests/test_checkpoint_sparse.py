"""Checkpoints of row-sparse keys: they come back as such, and lazy updates go on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpointed import cut_small, raised_alike, shared
from sparse_values import F32, SHAPE, numbers, rows_of

import kvcoll
from kvcoll import KVStore, RowSparse
from kvcoll.errors import ArgumentError, CheckpointMismatchError

KEYS = ["rows", "plain"]
LAZY: list[tuple[str, dict[str, Any]]] = [
    ("adam", {}),
    ("sgd", {"momentum": 0.9}),
    ("adagrad", {}),
]


@pytest.fixture
def path(kv: KVStore, tmp_path: Path, shared_tmp_path: Path) -> Path:
    return shared(kv, tmp_path, shared_tmp_path) / "run"


def start(kv: KVStore, *, rows: int = 1, plain: int = 2) -> None:
    kv.init(KEYS, [RowSparse.from_dense(numbers(SHAPE, rows)), numbers(SHAPE, plain)])


def train(kv: KVStore, turns: range) -> None:
    """Push rows to both keys; decay would move every row if an update were not lazy."""
    for turn in turns:
        kv.push(KEYS, [rows_of(kv.rank, turn), rows_of(kv.rank, turn + 1)])
        kv.push("rows", rows_of(kv.rank, turn + 2))  # so that keys differ in their counts


def bits(kv: KVStore) -> list[bytes]:
    return [table.tobytes() for table in kv.pull(KEYS, ignore_sparse=False)]


def is_row_sparse(kv: KVStore, key: Any) -> bool:
    """Ask by a pull, which refuses row-sparse keys unless it is told to take them."""
    try:
        kv.pull(key)
    except ArgumentError as error:
        assert "row-sparse" in str(error)  # noqa: PT017
        return True
    return False


@pytest.mark.parametrize(("name", "settings"), LAZY)
def test_lazy_training_goes_on_with_the_bits_of_a_run_that_did_not_stop(
    kv: KVStore,
    path: Path,
    name: str,
    settings: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cut_small(monkeypatch)  # so that tables are cut between ranks
    settings = {"learning_rate": 0.05, "wd": 0.01, **settings}
    start(kv)
    kv.set_optimizer(name, **settings)
    train(kv, range(3))
    kv.save(path)
    half = bits(kv)
    with kvcoll.create(kv.type) as empty, kvcoll.create(kv.type) as filled:
        start(filled, rows=3, plain=4)
        filled.set_optimizer(name)
        train(filled, range(1))
        for store in (empty, filled):
            store.load(path)
            assert bits(store) == half
            assert [is_row_sparse(store, key) for key in KEYS] == [True, False]
        for store in (kv, empty, filled):
            train(store, range(3, 6))
        assert bits(empty) == bits(filled) == bits(kv)
        assert all(now != then for now, then in zip(bits(kv), half, strict=True))


@pytest.mark.parametrize("name", ["adam", "sgd"])
def test_lazy_training_goes_on_from_a_file_of_states(kv: KVStore, path: Path, name: str) -> None:
    settings: dict[str, Any] = {"learning_rate": 0.05, "wd": 0.01, "multi_precision": True}
    if name == "sgd":
        settings["momentum"] = 0.9
    file = path.parent / "states"
    start(kv)
    kv.set_optimizer(name, **settings)
    train(kv, range(3))
    kv.save_optimizer_states(file)
    rows, plain = kv.pull(KEYS, ignore_sparse=False)
    with kvcoll.create(kv.type) as resumed, kvcoll.create(kv.type) as without:
        for store in (resumed, without):
            store.init(KEYS, [RowSparse.from_dense(rows), plain])
            store.set_optimizer(name, **settings)
        resumed.load_optimizer_states(file)
        for store in (kv, resumed, without):
            train(store, range(3, 6))
        assert bits(resumed) == bits(kv)
        assert all(one != other for one, other in zip(bits(without), bits(kv), strict=True))


def test_row_sparse_keys_come_back_as_they_were_and_plain_load_gives_arrays(
    kv: KVStore, path: Path
) -> None:
    given: dict[int, Any] = {
        5: RowSparse(np.array([[1 + 2j], [-3j]]), [4, 0], (6, 1)),
        -1: np.array([7, 8], np.int16),
        9: RowSparse.empty((3, 0), F32),
        2: RowSparse(np.array([3], np.uint8), [2], (4,)),
        0: RowSparse.empty((0, 5), np.float64),
        1: np.array(2.5),
    }
    for key, value in given.items():
        kv.init(key, value)
    kv.save(path)
    with kvcoll.create(kv.type) as other:
        other.load(path)
        assert [is_row_sparse(other, key) for key in given] == [
            isinstance(value, RowSparse) for value in given.values()
        ]
        other.save(path)  # what was loaded is kept as well as what was given
        pulled = dict(zip(given, other.pull(list(given), ignore_sparse=False), strict=True))
    for number in ("00000001", "00000002"):
        read, _ = kvcoll.load(path / number)
        for got in (read, pulled):
            assert list(got) == list(given)
            for key, value in given.items():
                dense = np.zeros(value.shape, value.dtype)
                if isinstance(value, RowSparse):
                    dense[value.indices] = value.data
                else:
                    dense[...] = value
                assert type(got[key]) is np.ndarray
                assert (got[key].shape, got[key].dtype) == (dense.shape, dense.dtype)
                assert got[key].tobytes() == dense.tobytes()


@pytest.mark.parametrize("saved_as", ["row-sparse", "dense"])
def test_a_row_sparse_key_and_a_dense_one_are_not_taken_for_each_other(
    kv: KVStore, comm: Any, path: Path, saved_as: str
) -> None:
    table = numbers(SHAPE, 1)
    rows = RowSparse.from_dense(table)
    saved, own = (rows, table * 2) if saved_as == "row-sparse" else (table, rows)
    kv.init("w", saved)
    kv.save(path)
    with kvcoll.create(kv.type) as other:
        other.init("w", own)
        before = other.pull("w", ignore_sparse=False)
        error = raised_alike(other, comm, lambda: other.load(path))
        assert type(error) is CheckpointMismatchError
        if saved_as == "row-sparse":
            said = "key 'w' holds float32[40, 3], in "
            assert " it held row-sparse float32[40, 3]: load it into an empty" in str(error)
        else:
            said = "key 'w' holds row-sparse float32[40, 3], in "
            assert " it held float32[40, 3]: load it into an empty" in str(error)
        assert said in str(error)
        assert other.pull("w", ignore_sparse=False).tobytes() == before.tobytes()
