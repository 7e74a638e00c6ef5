"""What travels instead of gradients, and how it is added: small integers, or 16-bit floats.

Rules of the file: pure, and the bits of a sum depend on the ranks' codes alone, not on
who adds which of them first; so the ranks may add in whatever groups their hosts make.
A part is the sum of some ranks' codes, kept so that no bit of the total is decided
yet; the part of one rank is its code, as it was encoded.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TypeAlias, final

import numpy as np

from .arrays import Array
from .words import BLOCK_ELEMENTS, Words

_LINE_BYTES = 16  # every float of NumPy is aligned by it

Ranks: TypeAlias = tuple[int, ...]  # ascending
Part: TypeAlias = tuple[Ranks, Array]  # whose codes; their sum as bytes


class Code(ABC):
    """How the codes of all ranks are packed, added and read.

    Parameters
    ----------
    size : int
        How many ranks there are.
    """

    def __init__(self, size: int) -> None:
        self.size = size

    @abstractmethod
    def part_bytes(self, n_elements: int, ranks: Ranks) -> int:
        """Say how many bytes the sum of these ranks' codes takes."""

    @abstractmethod
    def total_bytes(self, n_elements: int) -> int:
        """Say how many bytes the sum of all ranks' codes takes as it is handed out."""

    @abstractmethod
    def merge(self, n_elements: int, parts: Sequence[Part], out: Array) -> None:
        """Add parts of different ranks to one.

        Parameters
        ----------
        n_elements : int
        parts : sequence of (tuple of int, numpy.ndarray of uint8)
        out : numpy.ndarray of uint8
            Of `part_bytes` for the ranks of all parts.
        """

    @abstractmethod
    def finish(self, n_elements: int, parts: Sequence[Part], out: Array) -> None:
        """Add parts that hold every rank once, for handing out.

        Parameters
        ----------
        n_elements, parts
            As for `merge`.
        out : numpy.ndarray of uint8
            Of `total_bytes`.
        """

    @abstractmethod
    def decode(self, n_elements: int, total: Array, start: int, out: Array) -> None:
        """Read some elements of what `finish` gave.

        Parameters
        ----------
        n_elements : int
        total : numpy.ndarray of uint8
        start : int
            The first element to be read, a multiple of 8.
        out : numpy.ndarray
            As many elements; of a float dtype of 32 bits or more.
        """


@final
class CountCode(Code):
    """Sums of codes as integers from 0 on, in as few bits as the largest one needs.

    The bits of a number lie in planes, least first, eight elements to a byte in each:
    so adding is a carry through whole planes, eight elements an operation.

    Parameters
    ----------
    size : int
    levels : int
        A code is a number from 0 to `levels`: 1 (one bit) or 2 (two bits).
    step : float
        A code stands for ``(code - levels / 2) * 2 / levels * step``: with two levels
        -step, 0, step, and with one -step, step.
    """

    def __init__(self, size: int, levels: int, step: float) -> None:
        super().__init__(size)
        self._levels = levels
        self._step = step
        self._width = self._bits(size)
        self._carry = np.empty((3, 0), np.uint8)
        self._count = np.empty(BLOCK_ELEMENTS, np.uint8 if self._width <= 8 else np.uint32)

    def part_bytes(self, n_elements: int, ranks: Ranks) -> int:
        """Count the planes that the largest sum of so many ranks needs."""
        return self._bits(len(ranks)) * plane_bytes(n_elements)

    def total_bytes(self, n_elements: int) -> int:
        """Take as many as a part of all ranks."""
        return self._width * plane_bytes(n_elements)

    def merge(self, n_elements: int, parts: Sequence[Part], out: Array) -> None:
        """Add number by number, with carries; see `Code.merge`."""
        each = plane_bytes(n_elements)
        if self._carry.shape[1] < each:
            self._carry = np.empty((3, each), np.uint8)
        total = out.reshape(-1, each) if each else out.reshape(0, 0)
        first = parts[0][1]
        out[: first.size] = first
        out[first.size :] = 0
        for _, part in parts[1:]:
            self._add(total, part.reshape(-1, each) if each else total)

    def finish(self, n_elements: int, parts: Sequence[Part], out: Array) -> None:
        """Merge all of them."""
        self.merge(n_elements, parts, out)

    @np.errstate(all="ignore")  # nothing may raise on one rank alone
    def decode(self, n_elements: int, total: Array, start: int, out: Array) -> None:
        """Read the planes from the highest down, and multiply once; see `Code.decode`."""
        each = plane_bytes(n_elements)
        planes = [total[k * each : (k + 1) * each] for k in reversed(range(self._width))]
        step = out.dtype.type(self._step)
        for low in range(0, out.size, BLOCK_ELEMENTS):
            piece = out[low : low + BLOCK_ELEMENTS]
            n, at = piece.size, (start + low) // 8
            count = self._count[:n]
            count[:] = 0
            for plane in planes:
                np.add(count, count, out=count)
                bits = np.unpackbits(plane[at : at + plane_bytes(n)])
                np.add(count, bits[:n], out=count)
            np.copyto(piece, count, casting="unsafe")
            if self._levels == 1:
                np.add(piece, piece, out=piece)
            np.subtract(piece, piece.dtype.type(self.size), out=piece)
            if self._step != 1:
                np.multiply(piece, step, out=piece)

    def _bits(self, n_ranks: int) -> int:
        return (self._levels * n_ranks).bit_length()

    def _add(self, total: Array, number: Array) -> None:
        """Add a number's planes to those of the total, which are as many or more."""
        carry, new, either = self._carry[:, : total.shape[1]]
        for k, plane in enumerate(total):
            if k == 0:
                np.bitwise_and(plane, number[0], out=carry)
                np.bitwise_xor(plane, number[0], out=plane)
            elif k < len(number):
                np.bitwise_xor(plane, number[k], out=either)
                np.bitwise_and(plane, number[k], out=new)
                np.bitwise_xor(either, carry, out=plane)
                np.bitwise_and(either, carry, out=either)
                np.bitwise_or(new, either, out=carry)
            else:
                np.bitwise_and(plane, carry, out=new)
                np.bitwise_xor(plane, carry, out=plane)
                carry, new = new, carry


def plane_bytes(n_elements: int) -> int:
    """Say how many bytes one bit of each element takes."""
    return -(-n_elements // 8)


@final
class HalfCode(Code):
    """Floats of 16 bits; their sum is taken in float32, and rounded once to 16 bits.

    It is taken over a fixed binary tree on the ranks, ``(0 + 1) + (2 + 3)``, wherever they
    are. A part holds the sums of the largest branches whose leaves are all in it, in
    float32, and lone leaves in 16 bits.

    Parameters
    ----------
    size : int
    brain : bool
        bfloat16 instead of float16.
    """

    def __init__(self, size: int, *, brain: bool) -> None:
        super().__init__(size)
        self._words = Words(brain=brain)
        depth = size.bit_length() + 1
        self._sums = np.empty((depth + 1, BLOCK_ELEMENTS), np.float32)

    def part_bytes(self, n_elements: int, ranks: Ranks) -> int:
        """Count two bytes a lone rank and four a branch, for each element."""
        return sum(_node_bytes(n_elements, node) for node in self._cover(ranks))

    def total_bytes(self, n_elements: int) -> int:
        """Count two bytes an element."""
        return 2 * n_elements

    def merge(self, n_elements: int, parts: Sequence[Part], out: Array) -> None:
        """Add what makes up larger branches; see `Code.merge`."""
        nodes = self._nodes(n_elements, parts)
        ranks = tuple(sorted(rank for own, _ in parts for rank in own))
        for node, to in self._nodes(n_elements, [(ranks, out)]).items():
            if node in nodes:
                to[:] = nodes[node]
                continue
            for start in range(0, n_elements, BLOCK_ELEMENTS):
                to[start : start + BLOCK_ELEMENTS] = self._sum(nodes, node, start, n_elements, 0)

    def finish(self, n_elements: int, parts: Sequence[Part], out: Array) -> None:
        """Add all, and round; see `Code.finish`."""
        nodes = self._nodes(n_elements, parts)
        words = out.view(np.uint16)
        if self.size == 1:
            words[:] = nodes[0, 1]  # of 16 bits already
            return
        for start in range(0, n_elements, BLOCK_ELEMENTS):
            total = self._sum(nodes, (0, self.size), start, n_elements, 0)
            self._words.round(total, words[start : start + BLOCK_ELEMENTS])

    def decode(self, n_elements: int, total: Array, start: int, out: Array) -> None:
        """Widen the words; see `Code.decode`."""
        self._words.widen(total.view(np.uint16)[start : start + out.size], out)

    def _cover(self, ranks: Ranks) -> list[tuple[int, int]]:
        """Find the largest branches of the tree of which all leaves are among the ranks."""
        have = set(ranks)

        def branches(low: int, high: int) -> list[tuple[int, int]]:
            n = len(have.intersection(range(low, high)))
            if n == high - low:
                return [(low, high)]
            if n == 0:
                return []
            middle = _middle(low, high)
            return branches(low, middle) + branches(middle, high)

        return branches(0, self.size)

    def _nodes(self, n_elements: int, parts: Sequence[Part]) -> dict[tuple[int, int], Array]:
        """Find where each branch lies in the parts: float32, or words for a leaf."""
        found: dict[tuple[int, int], Array] = {}
        for ranks, part in parts:
            at = 0
            for node in self._cover(ranks):
                stop = at + _node_bytes(n_elements, node)
                dtype = np.uint16 if node[1] - node[0] == 1 else np.float32
                found[node] = part[at:stop].view(dtype)[:n_elements]
                at = stop
        return found

    @np.errstate(all="ignore")  # infinities go through, and nothing may raise on one rank alone
    def _sum(
        self,
        nodes: dict[tuple[int, int], Array],
        node: tuple[int, int],
        start: int,
        n_elements: int,
        depth: int,
    ) -> Array:
        """Sum one block of one branch; the result is valid until the next call."""
        stop = min(start + BLOCK_ELEMENTS, n_elements)
        own: Array = self._sums[depth][: stop - start]
        if node in nodes:
            given = nodes[node][start:stop]
            if given.dtype == np.float32:
                return given
            self._words.widen(given, own)
            return own
        middle = _middle(*node)
        left = self._sum(nodes, (node[0], middle), start, n_elements, depth)
        right = self._sum(nodes, (middle, node[1]), start, n_elements, depth + 1)
        np.add(left, right, out=own)
        return own


def _middle(low: int, high: int) -> int:
    """Cut a tree's leaves as many as a power of two holds from the rest."""
    return low + (1 << (high - low - 1).bit_length() - 1)


def _node_bytes(n_elements: int, node: tuple[int, int]) -> int:
    """Give a branch so many bytes that what lies behind it is aligned, too."""
    itemsize = 2 if node[1] - node[0] == 1 else 4
    return -(-n_elements * itemsize // _LINE_BYTES) * _LINE_BYTES
