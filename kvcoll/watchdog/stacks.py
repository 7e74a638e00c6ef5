"""Python stacks of threads that are busy with something else."""

from __future__ import annotations

import os
import sys
import threading
import traceback
from pathlib import Path
from typing import Final

_MOST_FRAMES: Final = 24
_MOST_CHARACTERS: Final = 6000  # so that a message stays one that MPI sends at once
_PACKAGE: Final = str(Path(__file__).parents[1]) + os.sep


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
    lines = _shown(traceback.extract_stack(frame))
    text = "".join(lines[-_MOST_FRAMES:])
    return text if len(text) <= _MOST_CHARACTERS else f"  ...{text[-_MOST_CHARACTERS:]}"


def _shown(entries: list[traceback.FrameSummary]) -> list[str]:
    """Write calls; of those of kvcoll that follow one another the first and the last."""
    are_ours = [entry.filename.startswith(_PACKAGE) for entry in entries]
    lines = traceback.format_list(entries)
    shown, n = [], len(lines)
    for k, line in enumerate(lines):
        if 0 < k < n - 1 and all(are_ours[k - 1 : k + 2]):
            if not all(are_ours[max(k - 2, 0) : k]):
                shown.append("  ...\n")
            continue
        shown.append(line)
    return shown
