"""Optimizer states on disk: training goes on from a file as if it had not stopped."""

from __future__ import annotations

import inspect
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from marks import first_quick

import kvcoll
from kvcoll import KVStore, optimizer, tensors
from kvcoll.optimizer.create import _BY_NAME

Array = npt.NDArray[Any]

SHAPES: dict[str, tuple[Any, tuple[int, ...]]] = {
    "w": ("f4", (3, 5)),
    "half": ("f2", (4,)),
    "wide": ("f8", (2, 1)),
    "scalar": ("f4", ()),
    "none": ("f4", (0, 3)),
}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"learning_rate": 0.25},
    "sgd with momentum": {"learning_rate": 0.1, "momentum": 0.9, "wd": 0.01},
    "sgd in multi precision": {"learning_rate": 0.1, "momentum": 0.9, "multi_precision": True},
    "adam": {"learning_rate": 0.05, "clip_gradient": 3.0, "rescale_grad": 0.5},
    "adam in multi precision": {"multi_precision": True, "begin_num_update": 7},
}


def f32(*numbers: float) -> Array:
    return np.array(numbers, np.float32)


def close_to(array: Array, *numbers: float) -> None:
    np.testing.assert_allclose(array, numbers, rtol=1e-6)


def gradients(step: int, rank: int) -> list[Array]:
    """Give gradients whose sums over ranks are exact, other ones for each rank and key."""
    return [
        np.asarray((np.arange(np.prod(shape)) % 5 - 2) * (k + 1) + step + rank, dtype).reshape(
            shape
        )
        for k, (dtype, shape) in enumerate(SHAPES.values())
    ]


def values() -> list[Array]:
    return [np.full(shape, k + 1, dtype) for k, (dtype, shape) in enumerate(SHAPES.values())]


def train(kv: KVStore, steps: range) -> None:
    for step in steps:
        kv.push(list(SHAPES), gradients(step, kv.rank))
        kv.push("w", gradients(step, kv.rank)[0])  # so that keys differ in their counts


def total(step: int, size: int) -> list[Array]:
    """Give what the gradients of so many ranks sum to."""
    sums = [
        np.sum(parts, 0) for parts in zip(*[gradients(step, r) for r in range(size)], strict=True)
    ]
    return [np.asarray(s, v.dtype) for s, v in zip(sums, values(), strict=True)]


def bits(kv: KVStore) -> list[bytes]:
    return [array.tobytes() for array in kv.pull(list(SHAPES))]


def another(kv: KVStore, like: list[Array]) -> KVStore:
    """Make one more store of the same type with the same keys."""
    store: KVStore = kvcoll.create(kv.type)
    store.init(list(SHAPES), like)
    return store


@pytest.mark.parametrize(
    ("name", "dump"), first_quick(zip(OPTIMIZERS, [True, False] * 3, strict=False), 2)
)
def test_training_goes_on_with_the_bits_of_a_run_that_did_not_stop(
    kv: KVStore, tmp_path: Path, name: str, dump: bool
) -> None:
    kind, settings = name.split()[0], OPTIMIZERS[name]
    kv.init(list(SHAPES), values())
    kv.set_optimizer(kind, **settings)
    train(kv, range(3))
    kv.save_optimizer_states(tmp_path / "states", dump_optimizer=dump)
    with (
        another(kv, kv.pull(list(SHAPES))) as resumed,
        another(kv, kv.pull(list(SHAPES))) as forgetful,
    ):
        if not dump:
            resumed.set_optimizer(kind, **settings)
        resumed.load_optimizer_states(tmp_path / "states")
        forgetful.set_optimizer(kind, **settings)
        for store in (kv, resumed, forgetful):
            train(store, range(3, 6))
        assert bits(resumed) == bits(kv)
        if name != "sgd":
            assert bits(forgetful) != bits(kv)


@pytest.mark.single
@pytest.mark.parametrize("name", _BY_NAME)
def test_every_optimizer_goes_on_from_its_file(tmp_path: Path, name: str) -> None:
    has_momentum = "momentum" in inspect.signature(_BY_NAME[name]).parameters
    more = {"momentum": 0.9} if has_momentum else {}
    with kvcoll.create("local") as kv, kvcoll.create("local") as resumed:
        kv.init(list(SHAPES), values())
        kv.set_optimizer(name, multi_precision=True, **more)
        train(kv, range(4))
        kv.save_optimizer_states(tmp_path / "states", dump_optimizer=True)
        resumed.init(list(SHAPES), kv.pull(list(SHAPES)))
        resumed.load_optimizer_states(tmp_path / "states")
        for store in (kv, resumed):
            train(store, range(4, 8))
        assert bits(resumed) == bits(kv)


@pytest.mark.parametrize("name", ["sgd in multi precision", "adam"])
def test_states_go_from_many_ranks_to_one_and_back(comm: Any, tmp_path: Path, name: str) -> None:
    kind, settings = name.split()[0], OPTIMIZERS[name]
    path = comm.bcast(str(tmp_path / "states"))
    with kvcoll.create("dist_sync") as many, kvcoll.create("local") as one:
        for store in (many, one):
            store.init(list(SHAPES), values())
            store.set_optimizer(kind, **settings)
        train(many, range(3))
        many.save_optimizer_states(path)
        one.pushpull(list(SHAPES), values())  # states that the file's replace
        with another(one, many.pull(list(SHAPES))) as resumed:
            resumed.set_optimizer(kind, **settings)
            resumed.load_optimizer_states(path)
            for step in range(3, 5):
                resumed.push(list(SHAPES), total(step, comm.size))
                many.push(list(SHAPES), gradients(step, many.rank))
            assert bits(resumed) == bits(many)
            resumed.save_optimizer_states(tmp_path / "of one")
            many.set_optimizer(kind, **settings)
            many.load_optimizer_states(tmp_path / "of one")
            many.push(list(SHAPES), gradients(5, many.rank))
            resumed.push(list(SHAPES), total(5, comm.size))
            assert bits(resumed) == bits(many)


def test_the_file_holds_the_states_and_says_of_what(kv: KVStore, tmp_path: Path) -> None:
    kv.init([3, -5], [f32(0, 0), np.array([2048], np.float16)])
    kv.set_optimizer("sgd", learning_rate=0.5, momentum=0.5, multi_precision=True)
    kv.push([3, -5], [f32(1, 2), np.array([1], np.float16)])
    kv.push(3, f32(0, 4))
    kv.save_optimizer_states(str(tmp_path / "states"))
    n = kv.num_workers
    if kv.type == "dist_sync" and kv.rank:
        assert list(tmp_path.iterdir()) == []
        return
    with tensors.opened(str(tmp_path / "states")) as file:
        assert set(file.arrays) == {"state0:3", "state0:-5", "master:-5"}
        close_to(file.read("state0:3"), -0.25 * n, -0.5 * n - 2 * n)
        close_to(file.read("state0:-5"), -0.5 * n)
        close_to(file.read("master:-5"), 2048 - 0.5 * n)
        assert file.metadata["optimizer"] == "SGD"
        assert file.metadata["num_update"] == "2"
        assert json.loads(file.metadata["keys"]) == [
            [-5, "float16[1]", 1, ["state0", "master"]],
            [3, "float32[2]", 2, ["state0"]],
        ]
        arguments = json.loads(file.metadata["settings"])["arguments"]
        expected = {"learning_rate": 0.5, "momentum": 0.5, "wd": 0, "clip_gradient": None}
        assert {word: arguments[word] for word in expected} == expected
        assert arguments["multi_precision"] is True


def test_keys_that_are_not_in_the_file_begin_anew(kv: KVStore, tmp_path: Path) -> None:
    mean = 1 / kv.num_workers
    kv.init([1, 2], [f32(0), f32(0)])
    kv.set_optimizer("sgd", learning_rate=1.0, momentum=0.5, rescale_grad=mean)
    kv.push(1, f32(-8))
    kv.save_optimizer_states(tmp_path / "states")
    kv.push([1, 2], [f32(-8), f32(-8)])
    kv.load_optimizer_states(tmp_path / "states")
    kv.push([1, 2], [f32(0), f32(0)])
    close_to(kv.pull(1), 8 + (4 + 8) + 4)  # the momentum was 8 again
    close_to(kv.pull(2), 8)


def test_a_schedule_goes_on_counting(kv: KVStore, tmp_path: Path) -> None:
    seen: list[int] = []

    def schedule(n_updates: int) -> float:
        seen.append(n_updates)
        return 1.0

    kv.init(3, f32(0))
    kv.set_optimizer("sgd", lr_scheduler=schedule)
    for _ in range(5):
        kv.push(3, f32(1))
    kv.save_optimizer_states(tmp_path / "states", dump_optimizer=True)
    own = optimizer.SGD(lr_scheduler=schedule)
    kv.set_optimizer(own)
    kv.load_optimizer_states(tmp_path / "states")
    assert own.num_update == 5
    seen.clear()
    kv.push(3, f32(1))
    assert max(seen) == 6
    assert min(seen) >= 5  # the rate so far, for comparison


def test_a_dumped_optimizer_comes_back_with_its_settings(kv: KVStore, tmp_path: Path) -> None:
    mean = 1 / kv.num_workers
    saved = optimizer.SGD(
        learning_rate=np.float32(0.5),
        momentum=0.25,
        rescale_grad=mean,
        clip_gradient=4,
        param_idx2name={1: "a_weight", 2: "a_bias"},
        wd=0.125,
    )
    saved.set_lr_mult({"a_bias": 2.0})
    saved.set_wd_mult({1: 0.5})
    kv.init([1, 2], [f32(8), f32(8)])
    kv.set_optimizer(saved)
    kv.push([1, 2], [f32(100), f32(1)])
    close_to(kv.pull(1), 8 - 0.5 * (4 + 0.125 * 0.5 * 8))
    close_to(kv.pull(2), 8 - 1.0 * 1)
    kv.save_optimizer_states(tmp_path / "states", True)
    same_kind = optimizer.SGD(learning_rate=9.0)
    for other in (same_kind, optimizer.Adam()):
        with kvcoll.create(kv.type) as resumed:
            resumed.init([1, 2], [f32(8), f32(8)])
            resumed.set_optimizer(other)
            resumed.load_optimizer_states(tmp_path / "states")
            resumed.push([1, 2], [f32(0), f32(-3)])
            close_to(resumed.pull(1), 8 + 0.25 * -2.25 - 0.5 * 0.125 * 0.5 * 8)
            close_to(resumed.pull(2), 8 + 0.25 * -1 + 3)
            if other is same_kind:  # which is the caller's own object still
                assert other.settings() == saved.settings()
                same_kind.lr, same_kind.momentum = 0.0, 1e-30
                resumed.push([1, 2], [f32(1), f32(1)])
                close_to(resumed.pull(2), 8 + 0.25 * -1 + 3)


def test_without_a_dump_the_settings_stay_those_that_are_set(kv: KVStore, tmp_path: Path) -> None:
    kv.init(3, f32(0))
    kv.set_optimizer("sgd", learning_rate=1.0, momentum=0.5, rescale_grad=1 / kv.num_workers)
    kv.push(3, f32(-8))
    kv.save_optimizer_states(tmp_path / "states")
    kv.set_optimizer("sgd", learning_rate=0.0, momentum=0.25)
    kv.load_optimizer_states(tmp_path / "states")
    kv.push(3, f32(1))
    close_to(kv.pull(3), 8 + 2)


def test_all_ranks_hold_the_same_states_after_a_load(comm: Any, tmp_path: Path) -> None:
    with kvcoll.create("dist_sync") as kv:
        keys = list(range(40))
        sizes = [1 + 997 * (k % 7) for k in keys]
        kv.init(keys, [np.full(n, k, np.float32) for k, n in zip(keys, sizes, strict=True)])
        kv.set_optimizer("adam")
        kv.push(
            keys, [np.full(n, k + kv.rank, np.float32) for k, n in zip(keys, sizes, strict=True)]
        )
        kv.save_optimizer_states(tmp_path / "states")
        kv.set_optimizer("adam")
        kv.load_optimizer_states(tmp_path / "states")
        kv.push(keys, [np.full(n, 3, np.float32) for n in sizes])
        assert len(set(comm.allgather(b"".join(v.tobytes() for v in kv.pull(keys))))) == 1
        total = sum(range(comm.size)) + 5 * comm.size
        mean = 0.9 * 0.1 * total + 0.1 * 3 * comm.size
        variance = 0.999 * 0.001 * total**2 + 0.001 * (3 * comm.size) ** 2
        first = 5 - 1e-3 * total / (total + 1e-8)
        rate = 1e-3 * np.sqrt(1 - 0.999**2) / (1 - 0.9**2)
        np.testing.assert_allclose(kv.pull(5), first - rate * mean / np.sqrt(variance), rtol=1e-6)


def test_an_optimizer_that_has_not_updated_yet_is_saved_too(kv: KVStore, tmp_path: Path) -> None:
    kv.init(3, f32(1))
    kv.set_optimizer("adam")
    kv.save_optimizer_states(tmp_path / "states", dump_optimizer=True)
    kv.set_optimizer("sgd", learning_rate=1.0)
    kv.load_optimizer_states(tmp_path / "states")
    kv.push(3, f32(5))
    close_to(kv.pull(3), 1 - 1e-3)


@pytest.mark.parametrize("replaced", ["nothing", "sgd", "adam"])
def test_what_was_loaded_is_saved_again_byte_for_byte(
    kv: KVStore, tmp_path: Path, replaced: str
) -> None:
    kv.init(list(SHAPES), values())
    kv.set_optimizer("sgd", momentum=0.5, wd=0.1, multi_precision=True)
    train(kv, range(2))
    kv.save_optimizer_states(tmp_path / "one", dump_optimizer=True)
    with another(kv, values()) as other:
        if replaced != "nothing":
            other.set_optimizer(replaced)
            train(other, range(3))
        other.load_optimizer_states(tmp_path / "one")
        other.save_optimizer_states(tmp_path / "other", dump_optimizer=True)
    if kv.type == "local" or kv.rank == 0:
        assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()


@pytest.mark.parametrize("kind", ["overlap", "dist_async"])
def test_pushes_that_still_run_behind_their_caller_are_in_the_file(
    comm: Any, tmp_path: Path, kind: str
) -> None:
    n = 300_000
    name, overlap = ("dist_sync", True) if kind == "overlap" else (kind, False)
    with kvcoll.create(name, overlap=overlap) as kv, kvcoll.create("dist_sync") as other:
        for store in (kv, other):
            store.init(1, np.zeros(n, np.float32))
            store.set_optimizer("sgd", learning_rate=1.0, momentum=0.5)
            for step in range(4):
                store.push(1, np.full(n, step + comm.rank, np.float32))
            store.save_optimizer_states(tmp_path / ("one" if store is kv else "other"))
            for step in range(4):
                store.push(1, np.full(n, step, np.float32))
            store.load_optimizer_states(tmp_path / ("one" if store is kv else "other"))
            store.push(1, np.full(n, -1, np.float32))
        if comm.rank == 0:
            assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()
        kv.barrier()
        other.barrier()
        np.testing.assert_array_equal(kv.pull(1), other.pull(1))


@pytest.mark.long
def test_ranks_that_wait_for_a_file_leave_their_cores_to_others(
    comm: Any, shared_tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = os.fsync

    def slow(descriptor: int) -> None:
        time.sleep(0.2)
        honest(descriptor)

    monkeypatch.setattr(os, "fsync", slow)
    with kvcoll.create("dist_sync") as kv:
        kv.init(1, np.ones(4, np.float32))
        kv.set_optimizer("sgd", momentum=0.5)
        kv.push(1, np.ones(4, np.float32))
        for save in (kv.save_optimizer_states, kv.save):
            began_s, cpu_s = time.monotonic(), time.thread_time()
            save(shared_tmp_path / save.__name__)
            took_s, cpu_s = time.monotonic() - began_s, time.thread_time() - cpu_s
            assert took_s > 0.15
            assert cpu_s < took_s / 3
