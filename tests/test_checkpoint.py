"""Checkpoints: training goes on as if it had not stopped, with any number of ranks."""

from __future__ import annotations

import inspect
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpointed import (
    KEYS,
    bits,
    cut_small,
    f32,
    shared,
    train,
    values,
)
from marks import first_quick

import kvcoll
from kvcoll import KVStore, optimizer
from kvcoll.optimizer.create import _BY_NAME

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"learning_rate": 0.25},
    "sgd with momentum": {"learning_rate": 0.1, "momentum": 0.9, "wd": 0.01},
    "sgd in multi precision": {"learning_rate": 0.1, "momentum": 0.9, "multi_precision": True},
    "adam": {"learning_rate": 0.05, "clip_gradient": 3.0, "rescale_grad": 0.5},
    "adam in multi precision": {"multi_precision": True, "begin_num_update": 7},
}


@pytest.mark.parametrize(
    ("name", "parts"), first_quick(zip(OPTIMIZERS, ["one part", "parts"] * 3, strict=False), 2)
)
def test_training_goes_on_with_the_bits_of_a_run_that_did_not_stop(
    kv: KVStore,
    tmp_path: Path,
    shared_tmp_path: Path,
    name: str,
    parts: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if parts == "parts":
        cut_small(monkeypatch)
    path = shared(kv, tmp_path, shared_tmp_path) / "run"
    kv.init(KEYS, values())
    kv.set_optimizer(name.split()[0], **OPTIMIZERS[name])
    train(kv, range(3))
    kv.save(path)
    with kvcoll.create(kv.type) as empty, kvcoll.create(kv.type) as filled:
        filled.init(KEYS, [np.asarray(value + 9, value.dtype) for value in values()])
        filled.set_optimizer(name.split()[0])
        train(filled, range(1))
        for store in (empty, filled):
            store.load(path)
            assert bits(store) == bits(kv)
            assert store.version == kv.version == 6
        for store in (kv, empty, filled):
            train(store, range(3, 6))
        assert bits(empty) == bits(filled) == bits(kv)
        assert bits(kv) != [value.tobytes() for value in values()]


@pytest.mark.parametrize(
    "params",
    first_quick(
        [
            {"type": "2bit", "threshold": 1.5},
            {"type": "1bit"},
            {"type": "fp16", "error_feedback": True},
            {"type": "bf16"},
        ]
    ),
    ids=lambda params: params["type"],
)
def test_compression_goes_on_with_what_it_had_left_over(
    kv: KVStore, tmp_path: Path, shared_tmp_path: Path, params: dict[str, Any]
) -> None:
    path = shared(kv, tmp_path, shared_tmp_path)
    kv.init(KEYS, values())
    kv.set_optimizer("sgd", learning_rate=0.3)
    kv.save(path, metadata="without")
    kv.set_gradient_compression(params)
    train(kv, range(3))
    kv.save(path)
    with kvcoll.create(kv.type) as empty, kvcoll.create(kv.type) as filled:
        filled.init(KEYS, values())
        filled.set_optimizer("sgd")
        filled.set_gradient_compression({"type": "2bit", "threshold": 9})
        train(filled, range(1))
        for store in (empty, filled):
            store.load(path)
        for store in (kv, empty, filled):
            train(store, range(3, 6))
        assert bits(empty) == bits(filled) == bits(kv)
        assert filled.load(path / "00000001").metadata == "without"
        filled.set_gradient_compression(params)
        train(filled, range(3))  # with nothing left over from before
        empty.load(path)
        assert bits(filled) == bits(empty)


@pytest.mark.single
@pytest.mark.parametrize("name", _BY_NAME)
def test_every_optimizer_goes_on_from_its_checkpoint(tmp_path: Path, name: str) -> None:
    has_momentum = "momentum" in inspect.signature(_BY_NAME[name]).parameters
    more = {"momentum": 0.9} if has_momentum else {}
    with kvcoll.create("local") as kv, kvcoll.create("local") as resumed:
        kv.init(KEYS, values())
        kv.set_optimizer(name, multi_precision=True, **more)
        train(kv, range(4))
        kv.save(tmp_path)
        resumed.load(tmp_path)
        for store in (kv, resumed):
            train(store, range(4, 8))
        assert bits(resumed) == bits(kv)


def test_values_come_back_in_their_order_shape_and_dtype(
    kv: KVStore, tmp_path: Path, shared_tmp_path: Path
) -> None:
    bfloat16 = np.dtype(pytest.importorskip("ml_dtypes").bfloat16)
    path = shared(kv, tmp_path, shared_tmp_path)
    given = {
        7: np.array([[1 + 2j, -3j]], np.complex128),
        -5: np.array([1, 2, 300], bfloat16),
        2**40: np.array(True),
        0: np.arange(6, dtype=np.int16).reshape(3, 2),
        3: np.zeros((2, 0), np.uint64),
    }
    for key, value in given.items():
        kv.init(key, value)
    assert kv.save(path) == str(path / "00000001")
    read, about = kvcoll.load(path)
    assert about.num_workers == kv.num_workers
    with kvcoll.create(kv.type) as other:
        other.load(path)
        assert other.save(path) == str(path / "00000002")
        again, _ = kvcoll.load(path)
        for got in (read, again, dict(zip(given, other.pull(list(given)), strict=True))):
            assert list(got) == list(given)
            for key, value in given.items():
                assert (got[key].dtype, got[key].shape) == (value.dtype, value.shape)
                assert got[key].tobytes() == value.tobytes()
        other.init(4, f32(1))
        with pytest.raises(TypeError, match="key 'a' is of type str"):
            other.init("a", f32(1))


def test_metadata_come_back_those_of_each_rank_too(
    kv: KVStore, tmp_path: Path, shared_tmp_path: Path
) -> None:
    path = shared(kv, tmp_path, shared_tmp_path)
    kv.init("ä", f32(1))
    metadata = {"epoch": 3, "loss": [0.1, 1e-300], "name": "é\n\0", "none": None, "big": 2**80}
    kv.push("ä", f32(2))
    own = {"rank": kv.rank, "state": 10**30 + kv.rank}
    kv.save(path, metadata=metadata, rank_metadata=own)
    for about in (kv.load(path), kvcoll.load(path)[1]):
        assert about.metadata == metadata
        ranks = range(kv.num_workers)
        assert about.rank_metadata == tuple({"rank": r, "state": 10**30 + r} for r in ranks)
        assert (about.version, about.path) == (1, str(path / "00000001"))


def test_the_last_ones_are_kept_and_any_of_them_can_be_loaded(
    kv: KVStore, tmp_path: Path, shared_tmp_path: Path
) -> None:
    path = shared(kv, tmp_path, shared_tmp_path)
    kv.init(3, f32(0))
    for number in range(1, 6):
        kv.push(3, f32(number / kv.num_workers))
        kv.save(path, keep=2, wait=number % 2 == 0)
    kv.wait_saved()
    assert sorted(os.listdir(path)) == ["00000004", "00000005"]
    kv.load(path / "00000004")
    np.testing.assert_allclose(kv.pull(3), 4, rtol=1e-6)
    kv.load(path)
    np.testing.assert_allclose(kv.pull(3), 5, rtol=1e-6)
    kv.barrier()
    kv.save(path)
    assert sorted(os.listdir(path)) == ["00000004", "00000005", "00000006"]


def test_what_is_saved_beside_the_training_is_what_was_there_at_the_call(
    kv: KVStore, tmp_path: Path, shared_tmp_path: Path
) -> None:
    path = shared(kv, tmp_path, shared_tmp_path)
    kv.init("a", np.full(1 << 20, 1, np.float32))
    kv.set_optimizer("sgd", learning_rate=1.0, momentum=0.5, rescale_grad=-1 / kv.num_workers)
    kv.push("a", np.ones(1 << 20, np.float32))
    kv.save(path, wait=False, metadata="first")
    for _ in range(3):
        kv.push("a", np.ones(1 << 20, np.float32))
    kv.save(path, wait=False, metadata="second")  # which waits for the first
    kv.push("a", np.ones(1 << 20, np.float32))
    assert kv.load(path / "00000001").metadata == "first"  # so does load, for the second
    np.testing.assert_array_equal(kv.pull("a"), np.full(1 << 20, 2, np.float32))
    assert kv.load(path).metadata == "second"
    kv.push("a", np.zeros(1 << 20, np.float32))
    np.testing.assert_array_equal(kv.pull("a")[:1], f32(2 + 1.5 + 1.75 + 1.875 + 0.9375))


@pytest.mark.parametrize("kind", ["overlap", "dist_async"])
def test_pushes_that_still_run_behind_their_caller_are_in_it(
    comm: Any, shared_tmp_path: Path, kind: str
) -> None:
    n = 300_000
    name, overlap = ("dist_sync", "always") if kind == "overlap" else (kind, False)
    with kvcoll.create(name, overlap=overlap) as kv, kvcoll.create("dist_sync") as other:
        for store, place in ((kv, "one"), (other, "other")):
            store.init(1, np.zeros(n, np.float32))
            store.set_optimizer("sgd", learning_rate=1.0, momentum=0.5)
            for step in range(4):
                store.push(1, np.full(n, step + comm.rank, np.float32))
            store.save(shared_tmp_path / place, wait=False)
            for step in range(4):
                store.push(1, np.full(n, step, np.float32))
            store.load(shared_tmp_path / place)
            store.push(1, np.full(n, -1, np.float32))
            store.barrier()
        np.testing.assert_array_equal(kv.pull(1), other.pull(1))
        one, two = (kvcoll.load(shared_tmp_path / place)[0][1] for place in ("one", "other"))
        np.testing.assert_array_equal(one, two)
        assert one[0] != 0


def test_a_schedule_and_a_class_of_the_users_stay_theirs(
    kv: KVStore, tmp_path: Path, shared_tmp_path: Path
) -> None:
    path = shared(kv, tmp_path, shared_tmp_path)
    own = optimizer.SGD(momentum=0.5, lr_scheduler=lambda n: 0.5 ** (n - 1))
    kv.init("a", f32(0))
    kv.set_optimizer(own)
    kv.push("a", f32(-8 / kv.num_workers))
    kv.push("a", f32(0))
    kv.save(path)
    kv.push("a", f32(0))
    expected = kv.pull("a")
    kv.load(path)
    assert own.num_update == 2
    kv.push("a", f32(0))
    np.testing.assert_array_equal(kv.pull("a"), expected)
    np.testing.assert_allclose(expected, 8 + 4 + 2, rtol=1e-6)


def test_a_view_shows_what_was_loaded(kv: KVStore, tmp_path: Path, shared_tmp_path: Path) -> None:
    path = shared(kv, tmp_path, shared_tmp_path)
    kv.init(["a", "b"], [f32(1, 2), f32(3)])
    view = kv.view("a")
    kv.save(path)
    kv.push("a", f32(7, 7))
    kv.load(path)
    np.testing.assert_array_equal(view, f32(1, 2))


def test_an_empty_store_is_saved_too(kv: KVStore, tmp_path: Path, shared_tmp_path: Path) -> None:
    path = shared(kv, tmp_path, shared_tmp_path)
    kv.save(path, metadata=[])
    assert kv.load(path).metadata == []
    assert kvcoll.load(path)[0] == {}
    kv.init(3, f32(1))
