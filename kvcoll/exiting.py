"""The end of a process after a loss: MPI_Finalize may hang then, and must not hold it up.

Rules of the file: the exit code stays what the program made it, as the process ends by itself:
MPI_Finalize is called beforehand, in a thread, which is left alone if it takes too long (MPI counts
as finalized from early on in that call, so that nobody calls it again).
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Final

_LIMIT_S: Final = 3.0
_NAP_S: Final = 0.01
_ENDED_FILE: Final = "KVCOLL_ENDED_FILE"

_armed = False


def arm() -> None:
    """Let the end of this process not wait for MPI for long."""
    global _armed
    _armed = True


def is_armed() -> bool:
    """Say whether a loss has been seen."""
    return _armed


def finish(finalize: Callable[[], None], is_finalized: Callable[[], bool]) -> None:
    """Finalize MPI within a limit, if `arm` was called; at the very end.

    Parameters
    ----------
    finalize : callable
        MPI_Finalize; it must let other threads run.
    is_finalized : callable
        Says whether MPI counts as finalized.
    """
    if not _armed or is_finalized():
        return
    if within_limit(finalize):
        return
    sys.stdout.flush()
    sys.stderr.flush()
    end_s = time.monotonic() + _LIMIT_S
    while not is_finalized() and time.monotonic() < end_s:
        time.sleep(_NAP_S)
    if not is_finalized():  # Python's own end would call it once more, and hang
        os._exit(_code())


def within_limit(step: Callable[[], object]) -> bool:
    """Take a step that may hang, in a thread; say whether it came to its end in time."""
    thread = threading.Thread(target=step, name="kvcoll-exit", daemon=True)
    thread.start()
    thread.join(_LIMIT_S)
    return not thread.is_alive()


def say_ended() -> None:
    """Leave a word where the command that started the job asks for it.

    Open MPI's mpirun (5.0.11) often gives exit code 0 when a whole host is lost: always under
    ``--with-ft ulfm``, else where it hears of its daemon's connection before that of ssh.
    """
    path = os.environ.get(_ENDED_FILE)
    if path:
        with contextlib.suppress(OSError), open(path, "w") as file:
            file.write("ended\n")


def _code() -> int:
    """Give the exit code as far as it can be known here: 1 after an exception."""
    return 0 if vars(sys).get("last_value") is None else 1


def forget() -> None:
    """Start anew: in a child made by fork MPI is its parent's."""
    global _armed
    _armed = False
