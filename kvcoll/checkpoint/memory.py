"""Memory for many arrays at once, and its neighbours as one.

Rules of the file: pure. One large piece of memory is had far quicker than many of a few MB,
as the system can give it in large pages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ..arrays import Array, DType


def take(sizes: Sequence[tuple[DType, int]]) -> list[Array]:
    """Give flat arrays of these dtypes and numbers of elements, one behind the other."""
    starts, end = [], 0
    for dtype, n_elements in sizes:
        starts.append(-(-end // dtype.itemsize) * dtype.itemsize)
        end = starts[-1] + dtype.itemsize * n_elements
    memory = np.empty(end, np.uint8)
    return [
        memory[start : start + dtype.itemsize * n_elements].view(dtype)
        for start, (dtype, n_elements) in zip(starts, sizes, strict=True)
    ]


def copied(files: Mapping[str, Mapping[str, Array]]) -> dict[str, dict[str, Array]]:
    """Copy arrays by file and name."""
    arrays = [array for of_file in files.values() for array in of_file.values()]
    copies = iter(take([(array.dtype, array.size) for array in arrays]))
    made = {}
    for file, of_file in files.items():
        made[file] = {name: next(copies).reshape(array.shape) for name, array in of_file.items()}
        for name, array in of_file.items():
            np.copyto(made[file][name], array)
    return made


def joined(arrays: Sequence[Array]) -> list[Array]:
    """Join flat arrays that follow one another in memory; give them as bytes."""
    runs: list[tuple[Array, int, int]] = []  # a memory, and which of its bytes
    for array in arrays:
        base = array if array.base is None else array.base
        if not isinstance(base, np.ndarray) or not base.flags.c_contiguous:
            base = array
        start = array.ctypes.data - base.ctypes.data
        stop = start + array.nbytes
        if runs and runs[-1][0] is base and runs[-1][2] == start:
            runs[-1] = base, runs[-1][1], stop
        elif array.size:
            runs.append((base, start, stop))
    return [base.reshape(-1).view(np.uint8)[start:stop] for base, start, stop in runs]
