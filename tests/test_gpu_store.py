"""Stores on a GPU, end to end on a fake one: what every call does, with the bits of the host."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from any_gpus import ARE_REAL, AnyGpus, check_closed, gpus_and_nccl, needs_kernels
from arrays_of import f32, f64
from fake_gpu import FakeGpus
from fake_nccl import FakeNccl
from quick_first import quick_first

import kvcoll
from kvcoll import on_gpus
from kvcoll.gpu.nccl import Nccl
from kvcoll.testing import Flip, faults

pytestmark = [pytest.mark.single, needs_kernels]

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


@pytest.fixture
def found() -> tuple[AnyGpus, Nccl]:
    return gpus_and_nccl(2)


@pytest.fixture
def nccl(found: tuple[AnyGpus, Nccl]) -> Nccl:
    return found[1]


@pytest.fixture
def gpus(found: tuple[AnyGpus, Nccl], monkeypatch: pytest.MonkeyPatch) -> Iterator[AnyGpus]:
    own, nccl = found
    monkeypatch.setattr(on_gpus, "find", lambda: found)
    monkeypatch.setattr(on_gpus, "find_gpus", lambda: own)
    yield own
    on_gpus.end_own()
    check_closed(nccl)
    own.finish()


@pytest.fixture(params=["device", "nccl"])
def kv(gpus: AnyGpus, request: pytest.FixtureRequest) -> Any:
    return kvcoll.create(request.param)


def test_the_tutorial_is_the_same_on_a_gpu(kv: Any, gpus: AnyGpus) -> None:
    ones, zeros = (gpus.array(np.full((2, 3), k, np.float32)) for k in (1, 0))
    printed: list[Any] = []

    def update(key: Any, given: Any, stored: Any) -> None:
        printed.append((key, type(given), type(stored)))
        stored += given * 2

    kv.init(3, ones * 2)
    assert (kv.pull(3).get() == 2).all()
    kv.push(3, ones * 8)
    assert (kv.pull(3, out=zeros).get() == 8).all()
    kv.push(3, [ones] * 4)
    assert (kv.pull(3).get() == 4).all()
    kv.set_updater(update)
    assert (kv.pull(3).get() == 4).all()
    kv.push(3, ones)
    outs = [gpus.array(np.zeros((2, 3), np.float32), k % 2) for k in range(4)]
    kv.pull(3, out=outs)
    assert all((out.get() == 6).all() for out in outs)
    kv.init([5, 7, 9], [ones] * 3)
    kv.push([5, 7, 9], [ones] * 3)
    assert [(array.get() == 3).all() for array in kv.pull([5, 7, 9])] == [True] * 3
    kv.push([5, 7, 9], [[ones] * 4] * 3)
    assert [(array.get() == 11).all() for array in kv.pull([5, 7, 9])] == [True] * 3
    assert printed == [(key, type(ones), type(ones)) for key in (3, 5, 7, 9, 5, 7, 9)]


def test_values_of_the_host_and_of_several_gpus_are_one_sum(kv: Any, gpus: AnyGpus) -> None:
    parts = [f32([2.0**-k, 3.0, k]) for k in (20, 1, 0)]
    kv.init("w", gpus.array(np.zeros(3, np.float32)))
    kv.push("w", [gpus.array(parts[0], 1), parts[1], gpus.array(parts[2])])
    host, there = np.zeros(3), gpus.array(np.zeros(3, np.float32), 1)
    kv.pull("w", out=[host, there])
    expected = (parts[0] + parts[1]) + parts[2]
    assert host.tolist() == there.get().tolist() == expected.tolist()


@pytest.mark.parametrize("kind", ["nccl", "device"])
def test_large_values_on_several_gpus_are_added_in_the_order_of_the_list(
    gpus: AnyGpus, nccl: Nccl, kind: str
) -> None:
    random = np.random.default_rng(3)
    parts = [random.standard_normal(200_000).astype(np.float16) for _ in range(4)]
    kv = kvcoll.create(kind)
    kv.init("w", gpus.array(np.zeros(200_000, np.float16)))
    kv.push("w", [gpus.array(part, k % 2) for k, part in enumerate(parts)])
    wide = [part.astype(np.float32) for part in parts]
    expected = (((wide[0] + wide[1]) + wide[2]) + wide[3]).astype(np.float16)
    assert kv.pull("w").get().tobytes() == expected.tobytes()
    if isinstance(nccl, FakeNccl):
        assert len(nccl.open) == (2 if kind == "nccl" else 0)  # by NCCL, or by copies


@pytest.mark.skipif(ARE_REAL, reason="it holds the GPU up, as a fake one lets it")
@pytest.mark.parametrize("name", ["lamb", "lars", "adam"])
def test_a_push_waits_for_nothing_on_the_gpu(gpus: FakeGpus, name: str) -> None:
    keys, sizes = ["a_weight", "b_bias", "c_weight"], (300, 70_000, 5)
    random = np.random.default_rng(5)
    first = [random.standard_normal(n).astype(np.float32) for n in sizes]
    kv, host = kvcoll.create("device"), kvcoll.create("local")
    for store, values in ((kv, [gpus.array(x) for x in first]), (host, first)):
        store.init(keys, values)
        names = {key: key for key in keys}
        store.set_optimizer(name, learning_rate=0.1, wd=0.1, param_idx2name=names)
    outs = [gpus.array(np.zeros(n, np.float32)) for n in sizes]
    for _ in range(3):
        grads = [random.standard_normal(n).astype(np.float32) for n in sizes]
        ours, waits = [gpus.array(grad) for grad in grads], gpus.n_host_waits
        with gpus.held_up() as is_held_up:
            kv.push(keys, ours)
            kv.pull(keys, out=outs)
            assert is_held_up(), "the host has waited"
            assert gpus.n_host_waits == waits
        host.push(keys, grads)
        for out, expected in zip(outs, host.pull(keys), strict=True):
            assert out.get().tobytes() == expected.tobytes()


def test_a_first_value_of_the_host_keeps_a_device_store_there(gpus: AnyGpus) -> None:
    kv = kvcoll.create("device")
    kv.init(1, np.ones(2))
    assert type(kv.pull(1)) is np.ndarray


def test_a_first_call_that_fails_decides_nothing(gpus: AnyGpus) -> None:
    kv = kvcoll.create("device")
    with pytest.raises(kvcoll.errors.KVCollError, match="True"):
        kv.init(True, gpus.array(np.ones(2)))
    kv.init(1, np.ones(2))
    assert type(kv.pull(1)) is np.ndarray


def test_an_nccl_store_takes_values_of_the_host(gpus: AnyGpus) -> None:
    kv = kvcoll.create("NCCL")
    assert kv.type == "nccl"
    kv.init(1, f64([1, 2]))
    kv.push(1, [f32([1, 1]), f64([3, 4])])
    assert gpus.is_on_gpu(kv.pull(1))
    assert kv.pull(1, out=np.zeros(2)).tolist() == [4, 5]


def test_the_caller_may_change_what_it_has_pushed(kv: Any, gpus: AnyGpus) -> None:
    mine, host = gpus.array(np.ones(4)), np.ones(4)
    kv.init("w", mine)
    kv.set_updater(lambda key, given, stored: stored.__iadd__(given))
    kv.push("w", [mine, host])
    mine[...] = 100
    host[...] = 100
    kv.push("w", mine)
    assert kv.pull("w").get().tolist() == [103] * 4
    assert mine.get().tolist() == [100] * 4


SETTINGS: list[tuple[str, dict[str, Any]]] = [
    ("adam", {}),
    ("lamb", {}),
    ("sgd", {"momentum": 0.9}),
    ("nag", {"momentum": 0.9}),
    ("adamw", {}),
    ("lars", {"momentum": 0.9}),
    ("rmsprop", {"centered": True}),
    ("adagrad", {}),
    ("adadelta", {}),
    ("adamax", {}),
    ("nadam", {}),
    ("ftrl", {}),
    ("signum", {}),
    ("test", {}),
]


@pytest.mark.parametrize("multi_precision", [False, True])
@pytest.mark.parametrize(("name", "own"), quick_first(SETTINGS, 2))
def test_optimizers_give_the_bits_of_a_store_on_the_host(
    gpus: AnyGpus, name: str, own: dict[str, Any], multi_precision: bool
) -> None:
    dtypes = [np.dtype(np.float32), BFLOAT16, np.dtype(np.float64), np.dtype(np.float16)]
    keys = [f"{part}_{kind}" for part in "ab" for kind in ("weight", "bias")]
    random = np.random.default_rng(5)
    values = [random.standard_normal((3, 4 + k)).astype(dtypes[k]) for k in range(4)]
    host, device = kvcoll.create("local"), kvcoll.create("nccl")
    for kv in (host, device):
        kv.init(keys, values)
        settings = {**own, "wd": 0.01, "multi_precision": multi_precision}
        kv.set_optimizer(name, param_idx2name={k: k for k in keys}, **settings)
    for _ in range(3):
        grads = [random.standard_normal(v.shape).astype(v.dtype) for v in values]
        host.push(keys, [[grad, grad] for grad in grads])
        device.push(keys, [[gpus.array(grad), grad] for grad in grads])
        host.push(keys, grads)
        device.push(keys, [gpus.array(grad) for grad in grads])
    for one, other in zip(host.pull(keys), device.pull(keys), strict=True):
        assert one.tobytes() == other.get().tobytes()


def test_a_push_and_a_pull_of_many_keys_are_one_launch_each(gpus: AnyGpus) -> None:
    kv = kvcoll.create("nccl")
    keys = list(range(50))
    kv.init(keys, [np.full(10 + k, k, np.float32) for k in keys])
    kv.set_optimizer("sgd", learning_rate=0.5, momentum=0.9)
    grads = [gpus.array(np.full(10 + k, 2 * k, np.float32)) for k in keys]
    kv.push(keys, grads)
    border = kv._border
    assert border is not None
    launcher = border.place.launcher
    before = launcher.n_launches
    kv.push(keys, grads)
    kv.pull(keys, out=grads)
    assert launcher.n_launches == before + 2
    for k, array in zip(keys, grads, strict=True):
        assert array.get().tolist() == [k - k - 1.9 * k] * (10 + k) or np.allclose(
            array.get(), k - k - 1.9 * k
        )


def test_lists_of_many_keys_on_one_gpu_are_added_in_one_launch(gpus: AnyGpus) -> None:
    kv = kvcoll.create("nccl")
    keys = list(range(20))
    kv.init(keys, [np.zeros(10 + k, np.float32) for k in keys])
    kv.set_optimizer("test")  # adds what is pushed
    lists = [[gpus.array(np.full(10 + k, 4**j, np.float32)) for j in range(4)] for k in keys]
    kv.push(keys, lists)
    border = kv._border
    assert border is not None
    before = border.place.launcher.n_launches
    kv.push(keys, lists)
    assert border.place.launcher.n_launches == before + 2  # the sums, and the updates
    for k, array in zip(keys, kv.pull(keys), strict=True):
        assert array.get().tolist() == [2 * (1 + 4 + 16 + 64)] * (10 + k)


def test_pushpull_and_broadcast_fill_in_place(kv: Any, gpus: AnyGpus) -> None:
    value = gpus.array(f32([1, 2]))
    other = gpus.array(f32([0, 0]), 1)
    assert kv.broadcast("w", value, other) is other
    assert other.get().tolist() == [1, 2]
    assert kv.pushpull("w", [value, other]) == [value, other]
    assert value.get().tolist() == other.get().tolist() == [2, 4]


def test_own_arrays_and_views_are_on_the_gpu(kv: Any, gpus: AnyGpus) -> None:
    kv.init([1, 2], [gpus.array(f32([1, 2])), gpus.array(f32([3]))])
    grads = kv.empty([1, 2])
    assert kv.empty(1) is grads[0]
    grads[0][...] = gpus.array(f32([5, 6]))
    grads[1][...] = 7
    kv.push([1, 2], grads)
    views = kv.view([1, 2])
    assert [view.get().tolist() for view in views] == [[5, 6], [7]]
    adopted = kv.adopt([1, 2], [f32([8, 9]), gpus.array(f32([10]))])
    assert adopted[0] is grads[0]
    kv.push([1, 2], adopted)
    assert [view.get().tolist() for view in views] == [[8, 9], [10]]
    kv.push([1, 2], views)
    assert [view.get().tolist() for view in views] == [[8, 9], [10]]


def test_an_updater_may_keep_what_it_was_given_and_push_it(kv: Any, gpus: AnyGpus) -> None:
    kept: list[Any] = []

    def update(key: Any, given: Any, stored: Any) -> None:
        kept.append(given)
        stored += given

    kv.init(1, gpus.array(f32([1, 1])))
    kv.set_updater(update)
    kv.push(1, gpus.array(f32([1, 2])))
    kv.push(1, [kept[0], kept[0]])
    assert kv.pull(1).get().tolist() == [1 + 1 + 2, 1 + 2 + 4]


@pytest.mark.parametrize("call", ["wait", "barrier"])
def test_who_waits_waits_for_the_gpu(kv: Any, gpus: AnyGpus, call: str) -> None:
    kv.init(1, gpus.array(f32([1, 2])))
    kv.push(1, gpus.array(f32([3, 4])))
    place, entry = kv._border.place, kv._replica.entries[1]
    seen = gpus.pinned(8).view(np.float32)
    place.device.download(entry.flat, seen, place.stream)
    (kv.wait if call == "wait" else kv.barrier)()
    assert seen.tolist() == [3, 4]


def test_a_closed_store_has_given_back_its_communicators(gpus: AnyGpus, nccl: Nccl) -> None:
    value = np.ones(200_000, np.float32)
    with kvcoll.create("nccl") as kv:
        kv.init(1, value)
        kv.push(1, [gpus.array(value, k) for k in range(2)])
        assert kv.pull(1, out=value)[0] == 2
    check_closed(nccl)


def test_mistakes_are_named_and_nothing_is_applied(kv: Any, gpus: AnyGpus) -> None:
    kv.init(1, gpus.array(f32([1, 2])))
    rows = kvcoll.RowSparse(np.ones((1, 2), np.float32), np.array([0]), (2, 2))
    for wrong, named in [
        (gpus.array(f32([1])), "float32\\[2\\], pushed float32\\[1\\]: reshape"),
        (gpus.array(np.array([1, 2], np.complex64)), "complex64 does not cast to float32"),
        (rows, "RowSparse: row-sparse values lie on the host"),
        (np.ones(2, ml_dtypes.float8_e5m2), "a store on a GPU sums"),
        ("text", "expected an array"),
    ]:
        with pytest.raises(kvcoll.errors.KVCollError, match=named):
            kv.push(1, wrong)
    with pytest.raises(kvcoll.errors.KVCollError, match="does not cast to int32"):
        kv.pull(1, out=gpus.array(np.array([1, 2], np.int32)))
    with pytest.raises(kvcoll.errors.KVCollError, match="row-sparse values lie on the host"):
        kv.row_sparse_pull(1, row_ids=np.array([0]))
    with pytest.raises(kvcoll.errors.KVCollError, match="gradients on a GPU travel as they are"):
        kv.set_gradient_compression({"type": "fp16"})
    with pytest.raises(kvcoll.errors.KVCollError, match="a store on a GPU sums"):
        kv.init(2, np.ones(2, ml_dtypes.float8_e5m2))
    assert kv.pull(1).get().tolist() == [1, 2]


def test_a_checkpoint_goes_from_a_gpu_to_the_host_and_back(
    kv: Any, gpus: AnyGpus, tmp_path: Path
) -> None:
    keys, first = [1, 2], [f32([1, 2]), f64([3])]
    grads = [f32([0.5, 0.25]), f64([1])]
    kv.init(keys, [gpus.array(value) for value in first])
    kv.set_optimizer("adam", learning_rate=0.1)
    kv.push(keys, grads)
    kv.save(tmp_path / "saved", metadata={"epoch": 3})
    kv.save_optimizer_states(tmp_path / "states", dump_optimizer=True)
    host = kvcoll.create("local")
    assert host.load(tmp_path / "saved").metadata == {"epoch": 3}
    again = kvcoll.create("nccl")
    again.load(tmp_path / "saved")
    for store in (kv, host, again):
        store.push(keys, grads)
    expected = [value.tobytes() for value in host.pull(keys)]
    for store in (kv, again):
        assert [value.get().tobytes() for value in store.pull(keys)] == expected
    kv.load(tmp_path / "saved")  # in place
    kv.load_optimizer_states(tmp_path / "states")
    kv.push(keys, grads)
    assert [value.get().tobytes() for value in kv.pull(keys)] == expected


def test_a_flipped_bit_shows_in_the_fingerprint_that_the_host_has_too(
    kv: Any, gpus: AnyGpus
) -> None:
    keys, values = ["a", "b"], [np.arange(50, dtype=np.float32), f64([3])]
    host = kvcoll.create("local")
    for store in (kv, host):
        store.init(keys, [gpus.array(v) if store is kv else v for v in values])
        store.set_optimizer("adam")
        with faults(Flip(rank=0, key="a", element=7, what="state")):
            store.push(keys, [gpus.array(v) if store is kv else v for v in values])
    flipped = kv.verify()
    assert flipped == host.verify()
    for store in (kv, host):
        with faults(Flip(rank=0, key="b", what="gradient")):
            store.push(keys, [gpus.array(v) if store is kv else v for v in values])
    assert flipped != kv.verify() == host.verify()
