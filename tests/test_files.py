"""A file is there whole, old or new, whatever fails or dies while it is written."""

from __future__ import annotations

import errno
import os
import resource
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from kvcoll.errors import ArgumentError, FileError
from kvcoll.files import as_path, read_all, reading, replacing, write_all

pytestmark = pytest.mark.single

OLD, NEW = b"old" * 5000, b"new!" * 6000

# Writes NEW again and again, and is killed when it comes to its n-th call of the system.
KILLED = """
import os, signal, sys
from kvcoll.files import replacing, write_all
path, old = sys.argv[1], b"old" * 5000
kill, fork, wait = os.kill, os.fork, os.waitpid
def dying(call):
    def called(*args, **kwargs):
        global left
        if left == 0:
            kill(os.getpid(), signal.SIGKILL)
        left -= 1
        return call(*args, **kwargs)
    return called
def rewrite():
    for name in ("open", "write", "fchmod", "fsync", "replace", "close", "unlink"):
        setattr(os, name, dying(getattr(os, name)))
    with replacing(path) as file:
        write_all(file, memoryview(b"new!" * 3000))
        write_all(file, memoryview(b"new!" * 3000))
    os._exit(0)
for left in range(60):
    with open(path, "wb") as file:
        file.write(old)
    child = fork() or rewrite()
    status = wait(child, 0)[1]
    with open(path, "rb") as file:
        found = file.read()
    print(left, status, {old: "old", b"new!" * 6000: "new"}.get(found, "broken"))
    if status == 0:
        break
"""


def write(path: Path) -> None:
    with replacing(str(path)) as descriptor:
        write_all(descriptor, memoryview(NEW))


@contextmanager
def longest_file(n_bytes: int) -> Iterator[None]:
    """Let the system refuse to make files longer, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """Give a file that is there already."""
    path = tmp_path / "states"
    path.write_bytes(OLD)
    return path


def alone(path: Path) -> bool:
    return list(path.parent.iterdir()) == [path]


def test_a_file_takes_the_place_of_another(old: Path) -> None:
    write(old)
    assert old.read_bytes() == NEW
    assert alone(old)


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_a_file_is_private_until_it_is_whole_and_then_as_the_umask_says(
    tmp_path: Path, mask: int
) -> None:
    before = os.umask(mask)
    try:
        with replacing(str(tmp_path / "new")) as descriptor:
            drafts = list(tmp_path.iterdir())
            assert [stat.S_IMODE(path.stat().st_mode) for path in drafts] == [0o600]
            write_all(descriptor, memoryview(NEW))
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o666 & ~mask


def test_a_link_stays_and_its_file_is_replaced(old: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    link = tmp_path / "elsewhere" / "link"
    link.symlink_to(old)
    write(link)
    assert link.is_symlink()
    assert old.read_bytes() == NEW


def test_a_block_that_raises_leaves_all_as_it_was(old: Path) -> None:
    def write_and_raise() -> None:
        with replacing(str(old)) as descriptor:
            write_all(descriptor, memoryview(NEW))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_and_raise()
    assert old.read_bytes() == OLD
    assert alone(old)


@pytest.mark.parametrize("call", ["write", "fsync", "fchmod", "replace"])
def test_a_call_of_the_system_that_fails_leaves_all_as_it_was(
    old: Path, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(f"kvcoll.files.os.{call}", fail)
    with pytest.raises(FileError) as raised:
        write(old)
    monkeypatch.undo()
    assert str(raised.value) == (
        f"the file {str(old)!r} cannot be written (No space left on device): "
        "free some space, or choose another folder"
    )
    assert old.read_bytes() == OLD
    assert alone(old)


@pytest.mark.parametrize("number", [errno.EIO, errno.EINVAL])
def test_a_folder_that_cannot_be_synced_is_told_once_the_file_is_there(
    old: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync = os.fsync

    def fail(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        sync(descriptor)

    monkeypatch.setattr("kvcoll.files.os.fsync", fail)
    if number == errno.EINVAL:  # of file systems that do not have it
        write(old)
    else:
        with pytest.raises(FileError, match="is written, but its folder cannot be synced"):
            write(old)
    assert old.read_bytes() == NEW
    assert alone(old)


@pytest.mark.parametrize("n_bytes", [0, 1, 4096, len(NEW) - 1])
def test_a_disk_that_is_full_leaves_all_as_it_was(old: Path, n_bytes: int) -> None:
    with longest_file(n_bytes), pytest.raises(FileError, match="File too large"):
        write(old)
    assert old.read_bytes() == OLD
    assert alone(old)
    with longest_file(len(NEW)):
        write(old)
    assert old.read_bytes() == NEW


def test_a_process_killed_at_any_moment_leaves_the_old_file_or_the_new(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "f")],
        timeout=50,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    assert len(rows) > 10  # so many calls there are, and one more run that is not killed
    assert [int(status) for _, status, _ in rows] == [signal.SIGKILL] * (len(rows) - 1) + [0]
    found = [what for _, _, what in rows]
    renamed = found.index("new")
    assert found == ["old"] * renamed + ["new"] * (len(rows) - renamed)
    assert renamed > 6


def test_what_is_no_plain_file_is_neither_replaced_nor_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for path, why in [
        (tmp_path / "pipe", "no plain file"),
        (tmp_path / "folder", "it is a folder"),
        (Path("/dev/null"), "no plain file"),
    ]:
        with pytest.raises(FileError, match=f"{path.name}' cannot be written .*{why}"):
            write(path)
        with (
            pytest.raises(FileError, match=f"{path.name}' cannot be read .*{why}"),
            reading(str(path)),
        ):
            pass
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "pipe"]


def test_a_place_that_is_not_there_is_named(old: Path) -> None:
    for path, why in [
        (old.parent / "none" / "f", "No such file or directory"),
        (old / "f", "Not a directory"),
        (old.parent / ("f" * 300), "File name too long"),
    ]:
        with pytest.raises(FileError, match=f"cannot be written \\({why}"):
            write(path)
        with pytest.raises(FileError, match=f"cannot be read \\({why}"), reading(str(path)):
            pass
    assert alone(old)


def test_a_file_is_read_in_pieces_and_its_end_is_seen(old: Path) -> None:
    with reading(str(old)) as (descriptor, n_bytes):
        assert n_bytes == len(OLD)
        got = bytearray(n_bytes - 7)
        assert read_all(descriptor, memoryview(got), 7)
        assert bytes(got) == OLD[7:]
        assert not read_all(descriptor, memoryview(got), 8)


def test_a_path_is_a_str_bytes_or_a_path() -> None:
    assert as_path(Path("a") / "b") == as_path("a/b") == as_path(b"a/b") == "a/b"
    for wrong in (3, None, ["a"]):
        with pytest.raises(TypeError, match="the path of a file is a str or a Path, got"):
            as_path(wrong)
    for empty in ("", "a\0b"):
        with pytest.raises(ArgumentError, match="cannot be the path of a file"):
            as_path(empty)
