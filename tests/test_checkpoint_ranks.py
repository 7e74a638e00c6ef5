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


@pytest.mark.parametrize("sees", ["all see", "rank 0 sees"])
def test_what_is_a_ranks_own_comes_back_to_it_or_its_sum_stays(
    comm: Any, shared_tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sees: str
) -> None:
    def own(rank: int) -> dict[str, Any]:
        return {"left:a": f32(rank, 10 * rank), "left:b": np.full(1, 2**rank, np.float64)}

    with kvcoll.create("dist_sync") as kv, kvcoll.create("local") as one:
        if sees == "rank 0 sees" and comm.rank:
            _hide(monkeypatch)
        kv.init("a", f32(1))
        kv._rank_states = own(comm.rank)
        kv.save(shared_tmp_path)
        for number in (1, 2):
            kv._rank_states = {}
            kv.load(shared_tmp_path / f"{number:08d}")
            assert set(kv._rank_states) == {"left:a", "left:b"}
            for name, array in own(comm.rank).items():
                np.testing.assert_array_equal(kv._rank_states[name], array)
            kv.save(shared_tmp_path)
        monkeypatch.undo()
        one.load(shared_tmp_path)  # one rank in the place of many
        np.testing.assert_array_equal(
            one._rank_states["left:a"], f32(sum(range(comm.size)), 10 * sum(range(comm.size)))
        )
        assert one._rank_states["left:b"][0] == 2**comm.size - 1
        if comm.rank == 0:
            one.save(shared_tmp_path)
        comm.Barrier()
        kv.load(shared_tmp_path)  # many in the place of one
        everyones = comm.allgather(kv._rank_states)
        assert everyones[0]["left:b"][0] == 2**comm.size - 1
        assert everyones[1:] == [{}] * (comm.size - 1)
