"""Which part of a checkpoint holds what: arrays one behind the other, cut into equal shares.

Rules of the file: pure. Small arrays are never cut, so that tools find them whole; a part
says where it begins, and goes up to where the next one does.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

from .kept import Kept

PART_BYTES = 32 << 20  # below, one more file costs more than it saves
CUT_BYTES = 16 << 20  # the smallest array that is cut

Start = tuple[int, int]  # number of an array, and of an element of it


class Piece(NamedTuple):
    """Neighbouring elements of one array, in one part."""

    array: int
    start: int
    stop: int


def cut(arrays: Sequence[Kept], most_parts: int) -> list[Start]:
    """Say where each part begins: at most so many parts, none much below `PART_BYTES`."""
    ends = list(accumulate(array.n_bytes for array in arrays))
    total = ends[-1] if ends else 0
    n_parts = max(1, min(most_parts, total // PART_BYTES))
    starts: list[Start] = [(0, 0)]
    for k in range(1, n_parts):
        at = total * k // n_parts
        number = bisect_right(ends, at)
        array = arrays[number]
        before = at - (ends[number] - array.n_bytes)
        if array.n_bytes >= CUT_BYTES:
            start = number, before // array.dtype.itemsize
        else:
            start = (number if before < array.n_bytes / 2 else number + 1), 0
        if starts[-1] < start < (len(arrays), 0):
            starts.append(start)
    return starts


def pieces(arrays: Sequence[Kept], starts: Sequence[Start]) -> list[list[Piece]]:
    """Give for each part the pieces in it, in order."""
    return [_between(arrays, start, stop) for start, stop in pairwise([*starts, (len(arrays), 0)])]


def name_of(arrays: Sequence[Kept], piece: Piece) -> str:
    """Name a piece in a file: as its array, if it is all of it, else ``value[0:9]:w``."""
    array = arrays[piece.array]
    if is_whole(array, piece):
        return array.name
    kind, _, key = array.name.partition(":")
    return f"{kind}[{piece.start}:{piece.stop}]:{key}"


def is_whole(array: Kept, piece: Piece) -> bool:
    """Say whether a piece is all of its array."""
    return (piece.start, piece.stop) == (0, array.n_elements)


def worker_of(part: int, n_parts: int, n_workers: int) -> int:
    """Say which rank writes or reads a part: spread over the ranks, and so over the hosts."""
    return part * n_workers // n_parts if n_parts <= n_workers else part % n_workers


def _between(arrays: Sequence[Kept], start: Start, stop: Start) -> list[Piece]:
    found = []
    for number in range(start[0], min(stop[0] + 1, len(arrays))):
        n = arrays[number].n_elements
        low = start[1] if number == start[0] else 0
        high = stop[1] if number == stop[0] else n
        # An array without elements is a piece, too, where it begins.
        if low < high or (n == 0 and number < stop[0]):
            found.append(Piece(number, low, high))
    return found
