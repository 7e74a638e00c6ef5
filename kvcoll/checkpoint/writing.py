"""One save under way on this rank: its files, and on rank 0 the manifest, which comes last.

Rules of the file: no MPI, as this may run in a thread beside the training. The ranks that
write see one folder; so rank 0 knows by a file's being there that it is complete, and by
one of another name that it will not come.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import final

from .. import tensors
from ..arrays import Array
from ..errors import FileError, text_of
from ..files import make_empty, names_in
from . import folder as folders

_SHORTEST_NAP_S, _LONGEST_NAP_S = 0.002, 0.2
_LONGEST_STILL_S = 10.0  # how long rank 0 waits at its end for a folder in which nothing grows
_METADATA = {"format": "kvcoll.checkpoint"}

_under_way: set[Writing] = set()


@final
class Writing:
    """A save under way.

    Parameters
    ----------
    folder : str
        Of the checkpoint.
    parts : mapping of str to mapping of str to numpy.ndarray
        For each file that this rank writes its arrays, by name. They are let go of when
        they are written.
    expected : list of str, or None
        On rank 0 all files of all ranks; None on the others.
    complete : callable
        Writes the manifest; called on rank 0 once all files are there.
    """

    def __init__(
        self,
        folder: str,
        parts: Mapping[str, Mapping[str, Array]],
        expected: list[str] | None,
        complete: Callable[[], None],
    ) -> None:
        self.folder = folder
        #: What went wrong with this rank's files, and with what comes after them.
        self.part_error: Exception | None = None
        self.end_error: Exception | None = None
        self._parts = dict(parts)
        self._expected = expected
        self._complete = complete
        self._parts_done = threading.Event()
        self._give_up = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Write beside the caller, who must not change the arrays."""
        thread = threading.Thread(target=self._run, name="kvcoll-checkpoint", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:  # the system has no more threads
            self.part_error = error
            self._parts_done.set()
            return
        self._thread = thread
        _under_way.add(self)

    def write_parts(self) -> None:
        """Write this rank's files; `part_error` tells of what goes wrong."""
        try:
            while self._parts:
                name, arrays = self._parts.popitem()
                tensors.write(os.path.join(self.folder, name), arrays, _METADATA)
        except Exception as error:  # whatever it is: told by `part_error`
            self.part_error = error
            self._parts.clear()
            self._mark_failed(name)
        finally:
            self._parts_done.set()

    def wait_for_parts(self) -> None:
        """Wait until this rank's files are written, or have failed."""
        self._parts_done.wait()

    def give_up(self) -> None:
        """Wait for no files of other ranks any more: one of them will not come."""
        self._give_up.set()

    def end(self) -> None:
        """Wait until all is written; on rank 0 that is when the manifest is in place."""
        if self._thread is not None:
            self._thread.join()
            _under_way.discard(self)
        elif not self._give_up.is_set():
            self._finish()

    def end_alone(self) -> None:
        """Do so at the end of the process, when other ranks cannot be asked any more."""
        if self._thread is None:
            return
        self._parts_done.wait()
        n_bytes, still_since_s = -1, time.monotonic()
        while self._thread.is_alive() and time.monotonic() < still_since_s + _LONGEST_STILL_S:
            self._thread.join(_LONGEST_NAP_S)
            grown = _bytes_in(self.folder)
            if grown != n_bytes:
                n_bytes, still_since_s = grown, time.monotonic()
        self.give_up()
        self._thread.join()
        error = self.part_error or self.end_error
        if error is None and self._expected is not None and not folders.is_complete(self.folder):
            error = FileError("other ranks have not written their parts")
        if error is not None:
            said = f"kvcoll: the checkpoint {self.folder!r} was not saved: {text_of(error)}"
            print(said, file=sys.stderr)

    def _run(self) -> None:
        self.write_parts()
        if self.part_error is None and self._all_there():
            self._finish()

    def _finish(self) -> None:
        if self._expected is None:
            return
        try:
            self._complete()
        except Exception as error:  # whatever it is: told by `end_error`
            self.end_error = error

    def _all_there(self) -> bool:
        """Wait for the files of the other ranks; say whether they have come."""
        nap_s = _SHORTEST_NAP_S
        while self._expected is not None:
            try:
                names = set(names_in(self.folder))
            except FileError as error:
                self.end_error = error
                return False
            if names.issuperset(self._expected):
                return True
            if self._give_up.is_set() or any(name.endswith(folders.FAILED) for name in names):
                return False
            time.sleep(nap_s)
            nap_s = min(2 * nap_s, _LONGEST_NAP_S)
        return True

    def _mark_failed(self, name: str) -> None:
        """Tell rank 0 not to wait; where that cannot be, it hears of it at the next call."""
        with contextlib.suppress(FileError):
            make_empty(os.path.join(self.folder, name + folders.FAILED))


def _bytes_in(folder: str) -> int:
    with contextlib.suppress(OSError):
        return sum(entry.stat().st_size for entry in os.scandir(folder))
    return -1


@atexit.register
def _end_all() -> None:
    """Let the process end only when what it saves is written."""
    for writing in list(_under_way):
        writing.end_alone()


# The threads of a parent do not run in a child made by fork.
os.register_at_fork(after_in_child=_under_way.clear)
