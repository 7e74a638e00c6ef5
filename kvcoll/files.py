"""Files that are written whole or not at all, and opened for reading: errors are named.

Rules of the file: bytes only, no format, no MPI; nothing but regular files is written to
or read, so that no device is replaced and no pipe is waited for; every OSError becomes a
`FileError` that names the file.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from . import faults
from .errors import ArgumentError, FileError

PIECE_BYTES = 4 << 20  # the most that is written or read at once

_CURES = {
    errno.ENOENT: "check the path, and make the folder first",
    errno.EEXIST: "another program works there at the same time: give each a place of its own",
    errno.ENOTDIR: "check the path",
    errno.EISDIR: "give the path of a file, not of a folder",
    errno.ENAMETOOLONG: "give a shorter name",
    errno.EACCES: "choose a place that this user may use",
    errno.EPERM: "choose a place that this user may use",
    errno.EROFS: "choose a folder that can be written to",
    errno.ENOSPC: "free some space, or choose another folder",
    errno.EDQUOT: "free some space, or choose another folder",
    errno.EFBIG: "raise the limit on a file's size (ulimit -f)",
}


def as_path(path: object) -> str:
    """Check a path that a user gave.

    Raises
    ------
    TypeError
        It is neither a str, nor bytes, nor an os.PathLike.
    ArgumentError
        It is empty, or holds a zero byte.
    """
    if not isinstance(path, (str, bytes, os.PathLike)):
        raise TypeError(f"the path of a file is a str or a Path, got {type(path).__name__}")
    name = os.fsdecode(path)
    if not name or "\0" in name:
        raise ArgumentError(f"{name!r} cannot be the path of a file: give another")
    return name


@contextmanager
def replacing(path: str) -> Iterator[int]:
    """Give a new file that takes the place of another at the end of a with-block.

    Until then it lies in the same folder, under a name of its own, and only this user may
    read it. A block that raises leaves no trace, and the old file as it was; a process
    that is killed may leave ``.kvcoll-*.tmp`` beside it, which nobody needs any more.

    Parameters
    ----------
    path : str
        A link is followed, and stays.

    Yields
    ------
    int
        A file descriptor, for `write_all` and `os.pwrite`.

    Raises
    ------
    FileError
        The file cannot be written, whyever: no such folder, no right, no space.

    Notes
    -----
    Cost: the file is synced (fsync), then renamed, then its folder is synced.
    """
    target = os.path.realpath(path)
    parent = os.path.dirname(target)
    with _named(path, "written"):
        with contextlib.suppress(FileNotFoundError):
            _require_regular(os.stat(target).st_mode)
        # Opened first: what fails, fails before the old file is gone.
        folder = os.open(parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            descriptor, draft = tempfile.mkstemp(".tmp", ".kvcoll-", parent)  # with mode 0600
            try:
                yield descriptor
                os.fchmod(descriptor, _mode_of_new_files(f"{draft}.mode"))
                os.fsync(descriptor)
                os.replace(draft, target)
            except BaseException:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(draft)
                raise
            finally:
                os.close(descriptor)
            _sync_folder(folder, path)
        finally:
            os.close(folder)


@contextmanager
def reading(path: str) -> Iterator[tuple[int, int]]:
    """Open a regular file for a with-block.

    Yields
    ------
    descriptor : int
    n_bytes : int
        The size of the file.

    Raises
    ------
    FileError
        It cannot be read, or is no regular file.
    """
    with _named(path, "read"):
        # Without waiting, as opening a pipe does.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            status = os.fstat(descriptor)
            _require_regular(status.st_mode)
            yield descriptor, status.st_size
        finally:
            os.close(descriptor)


def write_all(descriptor: int, data: memoryview) -> None:
    """Write all bytes, where the system may take only some at once."""
    if faults.armed is not None:
        faults.armed.before_write()
    while data:
        data = data[os.write(descriptor, data[:PIECE_BYTES]) :]


def read_all(descriptor: int, data: memoryview, offset: int) -> bool:
    """Fill `data` from `offset` on; say whether the file had so many bytes."""
    while data:
        n = os.preadv(descriptor, [data[:PIECE_BYTES]], offset)
        if n == 0:
            return False
        data, offset = data[n:], offset + n
    return True


def read_small(path: str, most_bytes: int) -> bytes:
    """Read a file as a whole.

    Raises
    ------
    FileError
        It cannot be read, or is longer than `most_bytes`.
    """
    with reading(path) as (descriptor, n_bytes):
        if n_bytes > most_bytes:
            raise FileError(f"the file {path!r} has {n_bytes} bytes, at most {most_bytes} are read")
        raw = bytearray(n_bytes)
        read_all(descriptor, memoryview(raw), 0)
        return bytes(raw)


def write_small(path: str, raw: bytes) -> None:
    """Write a file as `replacing` does.

    Raises
    ------
    FileError
        It cannot be written.
    """
    with replacing(path) as descriptor:
        write_all(descriptor, memoryview(raw))


def make_empty(path: str) -> None:
    """Make a file that says something by being there.

    Raises
    ------
    FileError
        It cannot be made.
    """
    with _named(path, "made"):
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))


def make_folders(path: str) -> None:
    """Make a folder, and those above it, unless they are there.

    Raises
    ------
    FileError
        They cannot be made.
    """
    with _named(path, "made", "folder"):
        os.makedirs(path, exist_ok=True)


def make_new_folder(path: str) -> None:
    """Make a folder that is not there yet, and sync the one above it.

    Raises
    ------
    FileError
        It cannot be made, or is there.
    """
    with _named(path, "made", "folder"):
        os.mkdir(path)
        try:
            sync_folder(os.path.dirname(path))
        except OSError:
            os.rmdir(path)
            raise


def names_in(path: str) -> list[str]:
    """List a folder.

    Raises
    ------
    FileError
        It cannot be read.
    """
    with _named(path, "read", "folder"):
        return os.listdir(path)


def remove(path: str) -> None:
    """Remove a file, unless it is gone.

    Raises
    ------
    FileError
        It cannot be removed.
    """
    with _named(path, "removed"), contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def remove_folder(path: str) -> None:
    """Remove a folder, unless something is in it, or it is gone.

    Raises
    ------
    FileError
        It cannot be removed.
    """
    with _named(path, "removed", "folder"), contextlib.suppress(FileNotFoundError):
        try:
            os.rmdir(path)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise


def sync_folder(path: str) -> None:
    """Bring to disk what was made in a folder, removed from it, or renamed."""
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that syncs no folders
            raise
    finally:
        os.close(folder)


@contextmanager
def _named(path: str, done: str, what: str = "file") -> Iterator[None]:
    try:
        yield
    except FileError:
        raise
    except OSError as error:
        why = error.strerror or str(error)
        cure = _CURES.get(error.errno or 0, "try another place")
        raise FileError(f"the {what} {path!r} cannot be {done} ({why}): {cure}") from error


def _require_regular(mode: int) -> None:
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "it is a folder")
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "it is a device, a pipe or a socket, and no plain file")


def _mode_of_new_files(unused: str) -> int:
    """Find out what the umask leaves; to ask for it is to set it, for all threads."""
    descriptor = os.open(unused, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o666)
    try:
        return stat.S_IMODE(os.fstat(descriptor).st_mode)
    finally:
        os.close(descriptor)
        os.unlink(unused)


def _sync_folder(folder: int, path: str) -> None:
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that syncs no folders
            raise FileError(
                f"the file {path!r} is written, but its folder cannot be synced "
                f"({error.strerror}): the old one may be back after a crash of the machine"
            ) from error
