"""The Python stack of a rank whose threads cannot run, as C code holds the interpreter's lock.

Another process of the host asks for it by a signal, and reads it from memory. The thread that
gets the signal, the main one as a rule, writes its own stack (`faulthandler.register`). Nobody
else may: a thread that reads the calls of another one that runs, as that of
`faulthandler.dump_traceback_later`, now and then reads what is no more, and crashes.
"""

from __future__ import annotations

import faulthandler
import os
import signal
from contextlib import suppress
from pathlib import Path
from typing import Final, final

NO_FILE: Final = -1
_SIGNAL: Final = signal.SIGURG  # of no effect on a process that has no handler for it
_MOST_BYTES: Final = 1 << 16
_STATUS_OF_HANDLERS: Final = "SigCgt:"


@final
class HeldStack:
    """What writes the stack of this process's main thread when another process asks for it.

    Attributes
    ----------
    file : int
        The number of the file, for `read_stack`.
    """

    def __init__(self) -> None:
        self.file = os.memfd_create("kvcoll-held-stack", os.MFD_CLOEXEC)
        self._is_on = False

    def begin(self) -> bool:
        """Write it from now on; say whether: not if the program has a handler for the signal."""
        if not self._is_on and not _has_handler(os.getpid()):
            faulthandler.register(_SIGNAL, file=self.file, all_threads=False)
            self._is_on = True
        return self._is_on

    def clear(self) -> None:
        """Forget what was written: a thread of Python's can answer again."""
        if os.fstat(self.file).st_size:
            os.ftruncate(self.file, 0)
            os.lseek(self.file, 0, os.SEEK_SET)

    def close(self) -> None:
        """Give the file back."""
        self.end()
        os.close(self.file)

    def end(self) -> None:
        """Have nothing written any more."""
        if self._is_on:
            faulthandler.unregister(_SIGNAL)
            self._is_on = False


def ask_for_stack(pid: int) -> None:
    """Have a process of this host write its stack, if it has a `HeldStack`; does not wait.

    Parameters
    ----------
    pid : int
        Of a process that is known to have one: another one may use the signal otherwise.
    """
    if _has_handler(pid):
        with suppress(OSError):  # it has ended, or is somebody else's
            os.kill(pid, _SIGNAL)


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
    return last_stack(text)


def last_stack(text: str) -> str:
    """Find the last stack in what faulthandler wrote, each with its innermost call first."""
    lines = text.rpartition("hread 0x")[2].splitlines()[1:]
    return "".join(f"{line}\n" for line in reversed(lines) if line.startswith("  "))


def _has_handler(pid: int) -> bool:
    """Say whether a process has a handler for the signal, be it of Python's or of C's."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text(errors="replace").splitlines():
            if line.startswith(_STATUS_OF_HANDLERS):
                return bool(int(line.split()[1], 16) >> (_SIGNAL - 1) & 1)
    return False
