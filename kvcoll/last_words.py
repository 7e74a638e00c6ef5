"""What a rank says before it ends its job, said so that people get to read it.

A launcher that hears of an abort before it has read a rank's last line may drop the line.
"""

from __future__ import annotations

import array
import fcntl
import os
import stat
import sys
import termios
import time
from typing import Final

LONGEST_WAIT_S: Final = 3.0
ON_ITS_WAY_S: Final = 0.1  # from the launcher's own part on this host to the terminal
PAUSE_S: Final = 0.01


def say_last(text: str) -> None:
    """Print a line on stderr, and wait until the launcher has read it; at most some 3 s."""
    if sys.stderr is None:
        return  # the program has none
    print(text, file=sys.stderr, flush=True)
    if sys.stderr is not sys.__stderr__ or not stat.S_ISFIFO(os.fstat(2).st_mode):
        return
    deadline = time.monotonic() + LONGEST_WAIT_S
    while unread_bytes(2) and time.monotonic() < deadline:
        time.sleep(PAUSE_S)
    time.sleep(ON_ITS_WAY_S)


def unread_bytes(pipe: int) -> int:
    """Return how many bytes in a pipe wait for who reads it (ioctl FIONREAD)."""
    waiting = array.array("i", [0])
    fcntl.ioctl(pipe, termios.FIONREAD, waiting)
    return waiting[0]
