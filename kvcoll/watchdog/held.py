"""The Python stack of a rank whose threads cannot run, as C code holds the interpreter's lock.

A thread of C (that of `faulthandler.dump_traceback_later`) writes it to memory that other
processes of the host may read, unless the watchdog's own thread comes by in time and puts it
off. Python has one such thread: so this is only done if the user asks for it.
"""

from __future__ import annotations

import faulthandler
import os
from pathlib import Path
from typing import Final, final

NO_FILE: Final = -1
_HELD_S: Final = 1.0
_MOST_BYTES: Final = 1 << 16


@final
class HeldStack:
    """What writes the stack of this process, should nothing else in it run.

    Attributes
    ----------
    file : int
        The number of the file, for `read_stack`.
    """

    def __init__(self) -> None:
        self.file = os.memfd_create("kvcoll-held-stack", os.MFD_CLOEXEC)

    def put_off(self) -> None:
        """Have it written in a second, unless this is called again before."""
        if os.fstat(self.file).st_size:
            os.ftruncate(self.file, 0)
            os.lseek(self.file, 0, os.SEEK_SET)
        faulthandler.dump_traceback_later(_HELD_S, file=self.file)

    def end(self) -> None:
        """Have nothing written any more."""
        faulthandler.cancel_dump_traceback_later()


def read_stack(pid: int, file: int) -> str:
    """Give the stack of another process's main thread, innermost call last; ``''`` for none.

    Parameters
    ----------
    pid, file : int
        Of this host.
    """
    if file == NO_FILE:
        return ""
    try:
        with Path(f"/proc/{pid}/fd/{file}").open("rb") as stream:
            text = stream.read(_MOST_BYTES).decode(errors="replace")
    except OSError:
        return ""
    return main_stack(text)


def main_stack(text: str) -> str:
    """Find the main thread in what faulthandler wrote: the last, its innermost call first."""
    lines = text.rpartition("Thread 0x")[2].splitlines()[1:]
    return "".join(f"{line}\n" for line in reversed(lines) if line.startswith("  "))
