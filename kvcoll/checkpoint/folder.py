"""Checkpoints in a folder: their names, which of them are complete, and which go.

Rules of the file: a checkpoint is a folder with a number for its name, one up from the
last; it is complete once its manifest is in it, which is renamed into place last and
removed first; nothing is removed that does not bear a name of ours.
"""

from __future__ import annotations

import os
import re

from ..errors import FileError, NoCheckpointError
from ..files import make_folders, make_new_folder, names_in, remove, remove_folder, sync_folder

MANIFEST = "manifest.json"
FAILED = ".failed"  # how the name ends that tells rank 0 of a part that will not come
PART = re.compile(r"(part|rank)-\d{5,9}-of-\d{5,9}\.safetensors")
_NUMBER = re.compile(r"\d{8,18}")
_OURS = re.compile(rf"{PART.pattern}(\{FAILED})?|{re.escape(MANIFEST)}|\.kvcoll-.*")


def begin(path: str) -> str:
    """Make the folder of a new checkpoint under `path`.

    Raises
    ------
    FileError
        It cannot be made, or `path` is a checkpoint itself.
    """
    make_folders(path)
    if is_complete(path):
        raise FileError(
            f"{path!r} is a checkpoint itself: save to the folder above, which holds several"
        )
    folder = os.path.join(path, f"{max(_numbers(path), default=0) + 1:08d}")
    make_new_folder(folder)
    return folder


def find(path: str) -> str:
    """Give the newest complete checkpoint under `path`, or `path` if it is one.

    Raises
    ------
    NoCheckpointError
        There is none.
    FileError
        The folder cannot be read.
    """
    if is_complete(path):
        return path
    complete = complete_under(path) if os.path.lexists(path) else []
    if not complete:
        why = "" if os.path.lexists(path) else ": there is no such folder"
        raise NoCheckpointError(
            f"there is no complete checkpoint in {path!r}{why}; check the path, or begin anew"
        )
    return complete[-1]


def complete_under(path: str) -> list[str]:
    """List the complete checkpoints under `path`, the newest last."""
    folders = [_folder(path, number) for number in sorted(_numbers(path))]
    return [folder for folder in folders if is_complete(folder)]


def is_complete(folder: str) -> bool:
    """Say whether a folder is a checkpoint that was written to its end."""
    return os.path.exists(os.path.join(folder, MANIFEST))


def older_than(folder: str) -> str:
    """Give the complete checkpoint before another, or ``''``."""
    above, name = os.path.split(folder)
    try:
        older = [one for one in complete_under(above) if os.path.basename(one) < name]
    except FileError:
        return ""
    return older[-1] if older else ""


def prune(folder: str, keep: int | None) -> None:
    """Remove what a complete checkpoint makes superfluous.

    Parameters
    ----------
    folder : str
        The newest.
    keep : int or None
        How many complete ones stay, this one included; all if None. What saves that came
        to no end have left goes in any case.

    Raises
    ------
    FileError
        Something cannot be removed.
    """
    path, name = os.path.split(folder)
    complete = complete_under(path)
    stay = set(complete if keep is None else complete[-keep:]) | {folder}
    for number in sorted(_numbers(path)):
        other = _folder(path, number)
        # A link leads to what is somebody else's.
        if number < int(name) and other not in stay and not os.path.islink(other):
            discard(other)


def discard(folder: str) -> None:
    """Remove a checkpoint, complete or not; its manifest first, so that it never looks whole.

    Raises
    ------
    FileError
        Something cannot be removed.
    """
    names = names_in(folder)
    if MANIFEST in names:
        remove(os.path.join(folder, MANIFEST))
        sync_folder(folder)
    for name in names:
        if _OURS.fullmatch(name):
            remove(os.path.join(folder, name))
    remove_folder(folder)


def _numbers(path: str) -> list[int]:
    return [int(name) for name in names_in(path) if _NUMBER.fullmatch(name)]


def _folder(path: str, number: int) -> str:
    return os.path.join(path, f"{number:08d}")
