"""Stores over the GPUs of several ranks, end to end on fakes: sums, updates, files, mistakes."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from any_gpus import ARE_REAL, AnyGpus, check_closed, gpus_and_nccl, needs_kernels
from arrays_of import f32
from fake_gpu import FakeGpus
from fake_nccl import mailbox
from quick_first import quick_first
from raised_by_all import raised_by_all

import kvcoll
from kvcoll import KVStore, Watchdog, mpi_takes, on_gpus
from kvcoll.errors import ArgumentError, DeviceError, ShapeMismatchError, UpdaterError
from kvcoll.nccl.watch import Watch

pytestmark = needs_kernels

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


@pytest.fixture
def gpus(
    comm: Any,
    host_of: tuple[int, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[AnyGpus]:
    if len(set(host_of)) > 1:
        pytest.skip("fake GPUs of several processes find one another on one machine")
    with mailbox(comm) as folder:
        own, nccl = gpus_and_nccl(comm.size, folder)
        own.pump_in_background()
        monkeypatch.setattr(on_gpus, "find", lambda: (own, nccl))
        monkeypatch.setattr(on_gpus, "find_gpus", lambda: own)
        yield own
        check_closed(nccl)
    own.finish()


@pytest.fixture
def kv(gpus: AnyGpus) -> Iterator[KVStore]:
    with kvcoll.create("dist_device_sync") as store:
        yield store


def mine(kv: KVStore, gpus: AnyGpus, numbers: Any) -> Any:
    """Put numbers on this rank's GPU."""
    return gpus.array(numbers, kv.local_rank)


def test_a_push_sums_over_lists_and_ranks(kv: KVStore, gpus: AnyGpus, comm: Any) -> None:
    assert kv.type == "dist_device_sync"
    kv.init(3, mine(kv, gpus, np.full((2, 3), 2.0 + kv.rank, np.float32)))
    assert (kv.pull(3).get() == 2).all()  # rank 0's
    kv.push(3, [mine(kv, gpus, np.full((2, 3), 4.0**kv.rank, np.float32)), np.ones((2, 3))])
    expected = sum(4.0**rank + 1 for rank in range(comm.size))
    assert (kv.pull(3).get() == expected).all()
    assert (kv.pull(3, out=np.zeros((2, 3))) == expected).all()


@pytest.mark.ranks(at_least=2)
def test_lists_on_several_gpus_of_each_rank_are_added_there_before_the_ranks_are(
    kv: KVStore, gpus: AnyGpus, comm: Any
) -> None:
    sizes = {"a": 3, "b": 100_000}
    numbers = {
        (rank, key, k): np.random.default_rng([rank, n, k]).standard_normal(n).astype(np.float32)
        for rank in range(comm.size)
        for key, n in sizes.items()
        for k in range(3)
    }
    kv.init(list(sizes), [np.zeros(n, np.float32) for n in sizes.values()])
    for key, n in sizes.items():
        given = [numbers[kv.rank, key, k] for k in range(3)]
        there = [
            (kv.local_rank + k) % comm.size for k in range(3)
        ]  # the own one first, then others
        kv.push(key, [gpus.array(x, k) for x, k in zip(given, there, strict=True)])
        outs = [gpus.array(np.zeros(n, np.float32), k) for k in there]
        kv.pull(key, out=outs)
        total = None
        for rank in range(comm.size):
            of_rank = (numbers[rank, key, 0] + numbers[rank, key, 1]) + numbers[rank, key, 2]
            total = of_rank if total is None else total + of_rank
        assert total is not None
        assert [out.get().tobytes() for out in outs] == [total.tobytes()] * 3


@pytest.mark.parametrize(
    "dtype", quick_first(["float32", "bfloat16", "float16", "int8", "complex64", "bool"], 2)
)
def test_sums_have_the_bits_of_a_store_on_the_host(kv: KVStore, gpus: AnyGpus, dtype: str) -> None:
    kind = BFLOAT16 if dtype == "bfloat16" else np.dtype(dtype)
    random = np.random.default_rng(kv.rank)
    sizes = {"a": 3, "b": 100_000, "c": 0, "d": 70}
    keys = list(sizes)
    with kvcoll.create("dist_sync") as host:
        for store in (kv, host):
            store.init(keys, [np.zeros(n, kind) for n in sizes.values()])
        values = [(100 * random.standard_normal(n)).astype(kind) for n in sizes.values()]
        host.push(keys, values)
        kv.push(keys, [mine(kv, gpus, value) for value in values])
        expected = [value.tobytes() for value in host.pull(keys)]
        assert [value.get().tobytes() for value in kv.pull(keys)] == expected
        host.push(keys, [[value, value] for value in values])
        kv.push(keys, [[mine(kv, gpus, value), value] for value in values])
        expected = [value.tobytes() for value in host.pull(keys)]
        assert [value.get().tobytes() for value in kv.pull(keys)] == expected


@pytest.mark.parametrize("name", quick_first(["lamb", "adam", "sgd"], 1))
def test_optimizers_have_the_bits_of_a_store_on_the_host(
    kv: KVStore, gpus: AnyGpus, name: str, tmp_path: Path, comm: Any
) -> None:
    folder = Path(comm.bcast(str(tmp_path)))
    random = np.random.default_rng(10 + kv.rank)
    keys = ["a_weight", "b_bias", "c_weight"]
    first = [np.linspace(-1, 1, n, dtype=np.float32) for n in (300, 40_000, 5)]
    with kvcoll.create("dist_sync") as host:
        for store in (kv, host):
            store.init(keys, first)
            store.set_optimizer(name, wd=0.1, param_idx2name={key: key for key in keys})
        for step in range(3):
            grads = [random.standard_normal(n).astype(np.float32) for n in (300, 40_000, 5)]
            host.push(keys, grads)
            kv.push(keys, [mine(kv, gpus, grad) for grad in grads])
            if step == 1:
                kv.save(folder / "saved")
                kv.load(folder / "saved")
        expected = [value.tobytes() for value in host.pull(keys)]
        assert [value.get().tobytes() for value in kv.pull(keys)] == expected


@pytest.mark.skipif(ARE_REAL, reason="it holds the GPU up, as a fake one lets it")
@pytest.mark.parametrize("name", quick_first(["lars", "lamb", "sgd"], 1))
def test_a_push_over_ranks_waits_for_nothing_on_the_gpu(
    kv: KVStore, gpus: FakeGpus, name: str
) -> None:
    keys, sizes = ["a_weight", "b_bias", "c_weight"], (300, 70_000, 5)
    random = np.random.default_rng(20 + kv.rank)
    first = [np.linspace(-1, 1, n, dtype=np.float32) for n in sizes]
    with kvcoll.create("dist_sync") as host:
        for store in (kv, host):
            store.init(keys, first)
            store.set_optimizer(name, wd=0.1, param_idx2name={key: key for key in keys})
        outs = [mine(kv, gpus, np.zeros(n, np.float32)) for n in sizes]
        for _ in range(2):
            grads = [random.standard_normal(n).astype(np.float32) for n in sizes]
            ours, waits = [mine(kv, gpus, grad) for grad in grads], gpus.n_host_waits
            with gpus.held_up() as is_held_up:
                kv.push(keys, ours)
                kv.pull(keys, out=outs)
                assert is_held_up(), "the host has waited"
                assert gpus.n_host_waits == waits
            host.push(keys, grads)
            for out, expected in zip(outs, host.pull(keys), strict=True):
                assert out.get().tobytes() == expected.tobytes()


@pytest.mark.ranks(at_least=2)
def test_a_mistake_on_one_rank_is_the_same_error_on_all(
    kv: KVStore, gpus: AnyGpus, comm: Any
) -> None:
    kv.init(1, mine(kv, gpus, f32([1, 2])))
    wrong = f32([1, 2, 3] if kv.rank == 1 else [1, 2])
    error = raised_by_all(comm, lambda: kv.push(1, mine(kv, gpus, wrong)))
    assert type(error) is ShapeMismatchError
    assert kv.pull(1).get().tolist() == [1, 2]

    def update(key: Any, given: Any, stored: Any) -> None:
        stored += given
        if kv.rank == 0:
            raise ValueError("no")

    kv.set_updater(update)
    with pytest.raises(ValueError if kv.rank == 0 else UpdaterError):
        kv.push(1, mine(kv, gpus, f32([1, 1])))
    size = comm.size
    assert kv.pull(1).get().tolist() == [1 + size, 2 + size]  # those of rank 1, on all


@pytest.mark.ranks(at_least=2)
def test_ranks_may_make_different_numbers_of_pushes(kv: KVStore, gpus: AnyGpus, comm: Any) -> None:
    kv.init(1, mine(kv, gpus, f32([0])))
    kv.set_optimizer("test")
    with kv.join():
        for _ in range(1 + kv.rank):
            kv.push(1, mine(kv, gpus, f32([1])))
    assert kv.pull(1).get().tolist() == [sum(1 + rank for rank in range(comm.size))]


@pytest.mark.ranks(at_least=2)
def test_a_rank_without_a_gpu_is_an_error_on_all(
    gpus: AnyGpus, comm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none() -> Any:
        raise DeviceError("this process sees no GPU")

    if comm.rank == 1:
        monkeypatch.setattr(on_gpus, "find", none)
    error = raised_by_all(comm, lambda: kvcoll.create("dist_sync_device"))
    assert type(error) is DeviceError
    assert "rank 1" in str(error)


def test_overlap_is_refused_by_name(gpus: AnyGpus) -> None:
    with pytest.raises(ArgumentError, match="a push of 'dist_device_sync' returns while"):
        kvcoll.create("dist_device_sync", overlap=True)


LIMITS: list[tuple[dict[str, str], Watchdog | bool, float]] = [
    ({}, Watchdog(limit_s=77), 77),
    ({}, Watchdog(limit_s=None), np.inf),
    ({}, False, 300),
    ({on_gpus.STALL_VARIABLE: "12.5"}, Watchdog(limit_s=77), 12.5),
    ({on_gpus.STALL_VARIABLE: "off"}, True, np.inf),
]


@pytest.mark.parametrize(("environ", "watchdog", "expected"), LIMITS)
def test_a_transfer_may_stall_for_as_long_as_the_watchdog_or_the_environment_says(
    gpus: AnyGpus,
    monkeypatch: pytest.MonkeyPatch,
    environ: dict[str, str],
    watchdog: Watchdog | bool,
    expected: float,
) -> None:
    monkeypatch.setattr("os.environ", {**os.environ, **environ})
    made: list[float] = []
    honest = Watch.__init__

    def init(self: Watch, comms: Any, limit_s: float, *args: Any, **options: Any) -> None:
        made.append(limit_s)
        honest(self, comms, limit_s, *args, **options)

    monkeypatch.setattr(Watch, "__init__", init)
    with kvcoll.create("dist_device_sync", watchdog=watchdog):
        assert made == [expected]


def test_a_limit_that_is_no_number_is_the_same_error_on_all_ranks(
    gpus: AnyGpus, comm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if comm.rank == comm.size - 1:
        monkeypatch.setenv(on_gpus.STALL_VARIABLE, "soon")
    error = raised_by_all(comm, lambda: kvcoll.create("dist_device_sync"))
    assert type(error) is ArgumentError
    assert "KVCOLL_NCCL_LIMIT_S is a number of seconds above 0, or off, got 'soon'" in str(error)


def test_a_way_to_mpi_that_is_none_is_the_same_error_on_all_ranks(
    gpus: AnyGpus, comm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if comm.rank == comm.size - 1:
        monkeypatch.setenv(mpi_takes.VARIABLE, "pinned")
    error = raised_by_all(comm, lambda: kvcoll.create("dist_device_sync"))
    assert type(error) is ArgumentError
    assert "KVCOLL_GPU_MPI is auto, staged or direct, got 'pinned'" in str(error)


def test_the_benchmark_measures_pushes_over_ranks(
    gpus: AnyGpus, monkeypatch: pytest.MonkeyPatch, comm: Any
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "scripts"))
    bench = importlib.import_module("gpu_bench")
    rows = bench.measure_ranks(bench.Sizes(rounds=1, calls=1, sums=(5, 70_000)))
    assert [row.n_bytes for row in rows] == [20, 280_000]
    assert all(f"over {comm.size} ranks on" in row.name and row.time_s > 0 for row in rows)
