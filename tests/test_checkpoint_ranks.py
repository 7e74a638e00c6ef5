"""Checkpoints of several ranks: each its share, and any number of ranks goes on from them."""

from __future__ import annotations

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
    gradients,
    total,
    train,
    values,
)

import kvcoll
from kvcoll import KVStore
from kvcoll.errors import FileError


@pytest.mark.parametrize("name", ["sgd in multi precision", "adam"])
def test_a_run_goes_from_many_ranks_to_one_and_back(
    comm: Any, shared_tmp_path: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_small(monkeypatch)
    settings: dict[str, Any] = {"multi_precision": True, "wd": 0.01}
    with kvcoll.create("dist_sync") as many, kvcoll.create("local") as one:
        many.init(KEYS, values())
        many.set_optimizer(name.split()[0], **settings)
        train(many, range(3))
        many.save(shared_tmp_path / "many")
        one.load(shared_tmp_path / "many")
        for step in range(3, 5):
            one.push(KEYS, total(step, comm.size))
            many.push(KEYS, gradients(step, comm.rank))
        assert bits(one) == bits(many)
        one.save(tmp_path / "one")
        comm.Barrier()
        with kvcoll.create("dist_sync") as again:
            again.load(shared_tmp_path / "one")
            again.push(KEYS, gradients(5, comm.rank))
            many.push(KEYS, gradients(5, comm.rank))
            assert bits(again) == bits(many)


@pytest.mark.parametrize("sees", ["all see", "rank 0 sees"])
def test_ranks_that_see_one_folder_write_and_read_their_shares(
    comm: Any, shared_tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sees: str
) -> None:
    cut_small(monkeypatch)
    n = 10_000
    reads: list[str] = []
    _record_reads(monkeypatch, reads)
    with kvcoll.create("dist_sync") as kv, kvcoll.create("dist_sync") as other:
        if sees == "rank 0 sees" and comm.rank:
            _hide(monkeypatch)
        kv.init(["a", "b"], [np.arange(n, dtype=np.float32), np.arange(n / 2)])
        kv.set_optimizer("adam")
        kv.push(["a", "b"], [np.ones(n, np.float32), np.ones(n // 2)])
        kv.save(shared_tmp_path / "run")
        n_parts = comm.size if sees == "all see" else 1
        files = [f"part-{k:05d}-of-{n_parts:05d}.safetensors" for k in range(n_parts)]
        folder = shared_tmp_path / "run" / "00000001"
        assert sorted(os.listdir(folder)) == ["manifest.json", *files]
        sizes = [(folder / file).stat().st_size for file in files]
        assert max(sizes) - min(sizes) < 3000
        assert sum(sizes) > 6 * 4 * n
        reads.clear()
        other.load(shared_tmp_path / "run")
        mine = files[comm.rank : comm.rank + 1] if sees == "all see" or comm.rank == 0 else []
        assert [Path(path).name for path in reads] == mine
        for store in (kv, other):
            store.push(["a", "b"], [np.ones(n, np.float32), np.ones(n // 2)])
        for one, two in zip(kv.pull(["a", "b"]), other.pull(["a", "b"]), strict=True):
            np.testing.assert_array_equal(one, two)


def _record_reads(monkeypatch: pytest.MonkeyPatch, reads: list[str]) -> None:
    from kvcoll import tensors

    opened = tensors.opened

    def recorded(path: str) -> Any:
        reads.append(path)
        return opened(path)

    monkeypatch.setattr("kvcoll.checkpoint.reading.tensors.opened", recorded)


def _hide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this rank see no file, as one whose host has other disks."""

    def fail(*args: object) -> bytes:
        raise FileError("not on this host")

    monkeypatch.setattr("kvcoll.checkpoint.checkpoints.read_small", fail)
    monkeypatch.setattr("kvcoll.checkpoint.checkpoints.read_manifest", fail)


def residuals(kv: KVStore) -> dict[str, Any]:
    """Give what compression has left over on this rank."""
    compressor = kv._engine.compressor[0]
    assert compressor is not None
    entries = kv._replica.entries
    return {str(k): compressor.residuals.of(entries[k]).copy() for k in entries}


@pytest.mark.parametrize("sees", ["all see", "rank 0 sees"])
def test_what_compression_left_over_comes_back_to_its_rank_or_its_sum_stays(
    comm: Any, shared_tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sees: str
) -> None:
    def gradients_of(rank: int) -> list[Any]:  # below the threshold: all of it is left over
        return [f32(rank + 1, 10 * rank), np.full(1, 2.0**rank)]

    with kvcoll.create("dist_sync") as kv, kvcoll.create("local") as one:
        if sees == "rank 0 sees" and comm.rank:
            _hide(monkeypatch)
        kv.init(["a", "b"], [f32(1, 1), np.zeros(1)])
        kv.set_gradient_compression({"type": "2bit", "threshold": 1000})
        kv.push(["a", "b"], gradients_of(comm.rank))
        kv.save(shared_tmp_path)
        kv.push(["a", "b"], gradients_of(comm.rank))
        for _ in range(2):
            kv.load(shared_tmp_path)
            left = residuals(kv)
            for key, array in zip("ab", gradients_of(comm.rank), strict=True):
                np.testing.assert_array_equal(left[key], array)
            kv.save(shared_tmp_path)
        monkeypatch.undo()
        one.load(shared_tmp_path)  # one rank in the place of many
        left = residuals(one)
        n = comm.size
        np.testing.assert_array_equal(left["a"], f32(n * (n + 1) / 2, 10 * n * (n - 1) / 2))
        np.testing.assert_array_equal(left["b"], [2.0**n - 1])
        if comm.rank == 0:
            one.save(shared_tmp_path)
        comm.Barrier()
        kv.load(shared_tmp_path)  # many in the place of one
        own = residuals(kv)["b"] if comm.rank == 0 else np.zeros(1)
        np.testing.assert_array_equal(own, [2.0**n - 1] if comm.rank == 0 else [0])
        total = kv.pushpull("b", np.full(1, 1000.0) if comm.rank == 0 else np.zeros(1))
        np.testing.assert_array_equal(total, [1000])  # the others had nothing left over


@pytest.mark.parametrize("now", ["many", "fewer"])
def test_two_ranks_in_the_place_of_more_share_what_was_left_over(
    comm: Any, shared_tmp_path: Path, now: str
) -> None:
    size = comm.size if now == "many" else max(1, comm.size - 1)
    with kvcoll.create("dist_sync") as kv:
        kv.init(3, f32(0))
        kv.set_gradient_compression({"type": "1bit", "threshold": 0.0})
        kv.push(3, f32(1.5 + 2**comm.rank))  # the code is 1
        kv.save(shared_tmp_path)
    part = comm.Split(comm.rank < size)
    try:
        if comm.rank < size:
            with kvcoll.create("dist_sync", comm=part) as kv:
                kv.load(shared_tmp_path)
                owners = range(comm.rank, comm.size, size)
                assert residuals(kv)["3"][0] == sum(0.5 + 2**rank for rank in owners)
                assert kv._engine.compressor[1]
                kv.set_gradient_compression({"type": "none"})
                kv.save(shared_tmp_path)
                kv.load(shared_tmp_path)  # paused, it keeps what is left over
                assert not kv._engine.compressor[1]
                assert residuals(kv)["3"][0] == sum(0.5 + 2**rank for rank in owners)
    finally:
        part.Free()
