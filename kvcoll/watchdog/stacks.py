"""Python stacks of threads that are busy with something else."""

from __future__ import annotations

import sys
import threading
import traceback
from typing import Final

MOST_FRAMES: Final = 24
MOST_CHARACTERS: Final = 6000  # so that a message stays one that MPI sends at once


def stack_of(ident: int | None) -> str:
    """Write the stack of a thread, innermost call last; ``''`` if there is none.

    Parameters
    ----------
    ident : int or None
        As `threading.get_ident` gives it; None for the main thread.
    """
    if ident is None:
        ident = threading.main_thread().ident
    frame = sys._current_frames().get(ident or 0)
    if frame is None:
        return ""
    entries = traceback.extract_stack(frame)
    lines = traceback.format_list(entries[-MOST_FRAMES:])
    while len(lines) > 1 and sum(map(len, lines)) > MOST_CHARACTERS:
        del lines[0]
    left_out = len(entries) - len(lines)
    above = [f"  ({left_out} outer calls are left out)\n"] if left_out else []
    return "".join(above + lines)[-2 * MOST_CHARACTERS :]
