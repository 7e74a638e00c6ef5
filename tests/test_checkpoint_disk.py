"""Disks that fail and files that are damaged: one named error on all ranks, and nothing lost."""

from __future__ import annotations

import errno
import os
import resource
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpointed import (
    cut_small,
    f32,
    is_last,
    loadable,
    raised_alike,
    save_first,
    shared,
    unchanged,
)
from raised_by_all import raised_by_all

import kvcoll
from kvcoll import KVStore
from kvcoll.errors import (
    FileError,
    FileFormatError,
)

pytestmark = pytest.mark.limit(30)


@pytest.fixture
def path(kv: KVStore, tmp_path: Path, shared_tmp_path: Path) -> Path:
    return shared(kv, tmp_path, shared_tmp_path) / "run"


@pytest.fixture
def saved(kv: KVStore, path: Path) -> KVStore:
    return save_first(kv, path)


@pytest.mark.parametrize("wait", [True, False])
@pytest.mark.parametrize("call", ["write", "fsync", "replace", "open", "mkdir"])
def test_a_disk_that_fails_on_any_rank_loses_nothing(
    saved: KVStore,
    comm: Any,
    path: Path,
    call: str,
    wait: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kv = saved
    cut_small(monkeypatch)
    honest = getattr(os, call)

    def fail(*args: Any, **more: Any) -> Any:
        if call == "open" and not args[1] & os.O_CREAT:
            return honest(*args, **more)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if call == "mkdir" or is_last(kv):
        monkeypatch.setattr(f"kvcoll.files.os.{call}", fail)

    def save() -> None:
        kv.save(path, keep=1, wait=wait)
        kv.wait_saved()

    error = raised_alike(kv, comm, save)
    monkeypatch.undo()
    assert type(error) is FileError
    assert "(No space left on device): free some space, or choose another folder" in str(error)
    if kv.num_workers > 1 and call != "mkdir":
        assert f"rank {kv.num_workers - 1}: the file" in str(error)
    assert os.listdir(path) == ["00000001"]
    kv.wait_saved()  # it is said once
    loadable(kv, path)
    assert kv.save(path, keep=1) == str(path / "00000002")
    assert os.listdir(path) == ["00000002"]


@contextmanager
def longest_file(n_bytes: int) -> Iterator[None]:
    """Let the system refuse to make files longer, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("n_bytes", [100, 4000])
def test_the_systems_own_limit_loses_nothing(
    saved: KVStore, comm: Any, path: Path, n_bytes: int
) -> None:
    kv = saved

    def save() -> None:
        with longest_file(n_bytes):
            kv.save(path, wait=False)
            kv.wait_saved()

    error = raised_alike(kv, comm, save)
    assert type(error) is FileError
    assert "File too large" in str(error)
    assert os.listdir(path) == ["00000001"]
    loadable(kv, path)


@pytest.mark.single
def test_a_disk_that_is_full_or_read_only_loses_nothing(tmp_path: Path) -> None:
    def mount(*options: str) -> int:
        command = ["mount", "-t", "tmpfs", *options, "none", str(tmp_path)]
        return subprocess.run(command, capture_output=True).returncode

    if os.geteuid() != 0 or mount("-o", "size=200k"):
        pytest.skip("only root may mount a small disk")
    try:
        with kvcoll.create("local") as kv:
            kv.init("a", np.zeros(20_000, np.float32))
            kv.save(tmp_path)
            kv.push("a", np.ones(20_000, np.float32))
            kv.save(tmp_path)
            with pytest.raises(FileError, match="No space left on device"):
                kv.save(tmp_path)
            assert sorted(os.listdir(tmp_path)) == ["00000001", "00000002"]
            assert kvcoll.load(tmp_path)[0]["a"][0] == 1
            assert mount("-o", "remount,ro") == 0
            with pytest.raises(FileError, match=r"Read-only file system.*that can be written"):
                kv.save(tmp_path)
            assert kvcoll.load(tmp_path)[0]["a"][0] == 1
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


@pytest.mark.parametrize("damage", ["truncated", "header", "value", "state", "missing", "another"])
def test_a_part_that_is_not_as_it_was_changes_nothing_and_the_one_before_is_named(
    saved: KVStore, comm: Any, path: Path, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kv = saved
    cut_small(monkeypatch)
    folder = Path(kv.save(path))
    if kv.rank == 0 or kv.type == "local":
        part = sorted(folder.glob("part-*"))[0 if damage == "value" else -1]
        raw = bytearray(part.read_bytes())
        at = {"header": 200, "value": len(raw) // 2, "state": -1}.get(damage)
        if at is not None:
            raw[at] ^= 1
        part.write_bytes(raw[:-1] if damage == "truncated" else raw)
        if damage == "missing":
            part.unlink()
        elif damage == "another":
            part.write_bytes((path / "00000001" / "part-00000-of-00001.safetensors").read_bytes())
    kv.barrier()
    error = raised_alike(kv, comm, lambda: kv.load(path))
    assert type(error) is (FileError if damage == "missing" else FileFormatError)
    assert str(folder) in str(error)
    assert f"the complete checkpoint before it is {str(path / '00000001')!r}" in str(error)
    unchanged(kv)
    with kvcoll.create(kv.type) as empty:
        error = raised_alike(empty, comm, lambda: empty.load(path))
        assert str(folder) in str(error)
        empty.init(5, f32(5))  # it is as empty as before
        assert empty.pull(5) == 5
    if damage == "value":
        with pytest.raises(FileFormatError, match="do not fit their checksum"):
            kvcoll.load(path)
    loadable(kv, path / "00000001")


@pytest.mark.parametrize("at", [0, 5, 15, 60, 200, -40, -2])
def test_a_manifest_that_was_altered_or_truncated_changes_nothing(
    saved: KVStore, comm: Any, path: Path, at: int
) -> None:
    kv = saved
    folder = Path(kv.save(path))
    for alter in (lambda raw: raw[:at], lambda raw: _flipped(raw, at)):
        manifest = folder / "manifest.json"
        raw = manifest.read_bytes()
        kv.barrier()
        if kv.rank == 0 or kv.type == "local":
            manifest.write_bytes(alter(raw))
        kv.barrier()
        error = raised_alike(kv, comm, lambda: kv.load(path))
        assert type(error) is FileFormatError
        assert f"{str(folder)!r} is not a sound checkpoint: its manifest " in str(error)
        assert f"the complete checkpoint before it is {str(path / '00000001')!r}" in str(error)
        kv.barrier()
        if kv.rank == 0 or kv.type == "local":
            manifest.write_bytes(raw)
    unchanged(kv)
    loadable(kv, path / "00000001")


def _flipped(raw: bytes, at: int) -> bytes:
    altered = bytearray(raw)
    altered[at] ^= 4
    return bytes(altered)


@pytest.mark.parametrize("kind", ["dist_sync", "dist_async"])
def test_a_save_that_fails_behind_the_training_is_told_when_the_store_is_closed(
    comm: Any, shared_tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_small(monkeypatch)
    kv = kvcoll.create(kind)
    kv.init(3, np.zeros(900, np.float32))
    kv.set_optimizer("test")

    sync = os.fsync

    def fail(descriptor: int) -> None:
        if stat.S_ISREG(os.fstat(descriptor).st_mode) and os.fstat(descriptor).st_size > 100:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    if is_last(kv):
        monkeypatch.setattr("kvcoll.files.os.fsync", fail)
    kv.save(shared_tmp_path / "a", wait=False)
    kv.push(3, np.ones(900, np.float32))
    error = raised_by_all(comm, lambda: kv.save(shared_tmp_path / "b"))
    assert str(shared_tmp_path / "a") in str(error)
    kv.save(shared_tmp_path / "b", wait=False)
    kv.push(3, np.ones(900, np.float32))
    error = raised_by_all(comm, kv.close)
    assert type(error) is FileError
    assert str(shared_tmp_path / "b") in str(error)
    assert kv.closed
    kv.close()


def test_only_what_bears_a_name_of_ours_is_removed(saved: KVStore, path: Path) -> None:
    kv = saved
    if kv.rank == 0 or kv.type == "local":
        (path / "00000001" / "notes.txt").write_text("mine")
        (path / "00000001" / ".kvcoll-abc.tmp").write_text("left by a kill")
        (path / "00000000").symlink_to(sys.prefix)
    kv.save(path, keep=1)
    assert os.listdir(path / "00000001") == ["notes.txt"]
    assert os.path.isdir(sys.prefix)
    loadable_folder = path / "00000002"
    assert kvcoll.load(path)[1].path == str(loadable_folder)
