"""Floats of 16 bits as words: rounding to them and back, in blocks that stay in cache."""

from __future__ import annotations

from typing import final

import numpy as np

from .arrays import Array

# Measured for all kinds of codes: half and twice of it are equal, a quarter is 20 % slower.
# A multiple of 8, so that blocks of single bits end with a byte.
BLOCK_ELEMENTS = 1 << 15


@final
class Words:
    """Rounding to 16-bit floats and back, a block at a time: ties to even, as IEEE 754.

    Parameters
    ----------
    brain : bool
        bfloat16, which needs no library here, instead of float16.
    """

    def __init__(self, *, brain: bool) -> None:
        self.brain = brain
        #: The largest finite number.
        self.largest = float.fromhex("0x1.fep127") if brain else 65504.0
        self._narrow = np.empty(BLOCK_ELEMENTS, np.float32)
        self._odd = np.empty(BLOCK_ELEMENTS, np.uint32)

    @np.errstate(all="ignore")  # what is too large becomes infinite
    def round(self, source: Array, words: Array) -> None:
        """Round floats of 32 bits or more into uint16 words; wider ones to float32 first."""
        if not self.brain:
            np.copyto(words.view(np.float16), source, casting="unsafe")
            return
        for start in range(0, source.size, BLOCK_ELEMENTS):
            piece = source[start : start + BLOCK_ELEMENTS]
            self._round_brain(piece, words[start : start + piece.size])

    def widen(self, words: Array, out: Array) -> None:
        """Write what words stand for."""
        if not self.brain:
            np.copyto(out, words.view(np.float16))
            return
        for start in range(0, out.size, BLOCK_ELEMENTS):
            piece = out[start : start + BLOCK_ELEMENTS]
            wide = piece if piece.dtype == np.float32 else self._narrow[: piece.size]
            bits = wide.view(np.uint32)
            np.copyto(bits, words[start : start + piece.size])
            np.left_shift(bits, np.uint32(16), out=bits)
            if wide is not piece:
                np.copyto(piece, wide)

    def _round_brain(self, source: Array, words: Array) -> None:
        if source.dtype != np.float32:
            narrow = self._narrow[: source.size]
            np.copyto(narrow, source, casting="unsafe")
            source = narrow
        bits, odd = source.view(np.uint32), self._odd[: source.size]
        np.right_shift(bits, np.uint32(16), out=odd)
        np.bitwise_and(odd, np.uint32(1), out=odd)
        np.add(odd, np.uint32(0x7FFF), out=odd)
        np.add(odd, bits, out=odd)
        np.right_shift(odd, np.uint32(16), out=odd)
        np.copyto(words, odd, casting="unsafe")
        nan = np.isnan(source)
        if nan.any():  # the carry may have gone through all bits of it
            words[nan] = 0x7FC0
