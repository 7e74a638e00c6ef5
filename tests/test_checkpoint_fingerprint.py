"""A checkpoint has the fingerprints of what it holds, and what is loaded is compared with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpointed import KEYS, cut_small, raised_alike, shared, train, values
from raised_by_all import raised_by_all

import kvcoll
from kvcoll import KVStore
from kvcoll.checkpoint.reading import read_part
from kvcoll.errors import FileFormatError


def trained(kv: KVStore) -> None:
    kv.init(KEYS, values())
    kv.set_optimizer("sgd", momentum=0.5, multi_precision=True)
    train(kv, range(2))


def test_a_checkpoint_has_the_fingerprint_of_the_store(
    kv: KVStore, tmp_path: Path, shared_tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_small(monkeypatch)
    path = shared(kv, tmp_path, shared_tmp_path)
    trained(kv)
    kv.save(path)
    own = kv.verify()
    train(kv, range(2, 3))
    assert kv.verify() != own
    assert kv.load(path).fingerprint == own == kv.verify()
    assert kvcoll.load(path)[1].fingerprint == own


@pytest.mark.ranks(at_least=2)
@pytest.mark.parametrize("what", ["value", "state"])
def test_a_checkpoint_of_replicas_that_differ_is_not_loaded(
    comm: Any, shared_tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    cut_small(monkeypatch)
    with kvcoll.create("dist_sync") as kv:
        kv.init("w", np.arange(600.0))
        kv.set_optimizer("sgd", momentum=0.5)
        kv.push("w", np.arange(600.0))
        kv.save(shared_tmp_path)
        kv.push("w", np.arange(600.0))
        own = kv.verify()
        drifted = 0 if what == "value" else kv.num_workers - 1  # who writes it, in part at least
        if kv.rank == drifted:
            entry, updater = kv._replica.entries["w"], vars(kv)["_updater"]
            flat = entry.flat if what == "value" else updater.states_of(entry)[0]
            right = flat.copy()
            flat[:] += 1
        kv.save(shared_tmp_path)
        if kv.rank == drifted:
            flat[:] = right
        assert kv.verify() == own
        error = raised_by_all(comm, lambda: kv.load(shared_tmp_path))
        assert type(error) is FileFormatError
        assert "does not fit its fingerprint, though the files fit their checksums" in str(error)
        assert str(error).endswith(
            f"the complete checkpoint before it is {str(shared_tmp_path / '00000001')!r}"
        )
        assert kv.verify() == own
        kv.load(shared_tmp_path / "00000001")
        assert kv.version == 1


def test_memory_that_is_at_fault_after_a_file_was_read_is_found(
    kv: KVStore, comm: Any, tmp_path: Path, shared_tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = shared(kv, tmp_path, shared_tmp_path)
    trained(kv)
    kv.save(path)

    def faulty(folder: str, part: Any, wanted: Any) -> None:
        read_part(folder, part, wanted)
        wanted[0].out.view(np.uint8)[1] ^= 4

    if kv.rank == 0:
        monkeypatch.setattr("kvcoll.checkpoint.loading.read_part", faulty)
    error = raised_alike(kv, comm, lambda: kv.load(path))
    assert type(error) is FileFormatError
    assert "array 'value:" in str(error)
