"""Kinds of gradient compression: their settings, and how a gradient becomes codes.

Rules of the file: nothing is sent and no key is known here; what a code leaves of a
gradient stays in the caller's array, the residual, which is added to the next gradient;
nothing is allocated in proportion to a gradient.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from numbers import Real
from typing import Any, final

import numpy as np

from .arrays import Array, is_small_float, wide
from .codes import Code, CountCode, HalfCode
from .errors import ArgumentError
from .schema import Spec
from .words import BLOCK_ELEMENTS, Words

_OPTIONS = {
    "2bit": ("threshold",),
    "1bit": ("threshold",),
    "fp16": ("error_feedback",),
    "bf16": ("error_feedback",),
    "none": (),
}


def parse(params: object) -> Compression | None:
    """Check what a user gave to ``set_gradient_compression``.

    Parameters
    ----------
    params : mapping
        ``{'type': '2bit' or '1bit', 'threshold': 0.5}``, ``{'type': 'fp16' or 'bf16',
        'error_feedback': False}``, or ``{'type': 'none'}``; what stands behind a type may
        be left out.

    Returns
    -------
    Compression or None
        None for ``'none'``.

    Raises
    ------
    ArgumentError
        The type or an option is not known, or a setting is not what it must be.
    """
    if not isinstance(params, Mapping):
        raise ArgumentError(
            f"compression is set by a dict such as {{'type': '2bit', 'threshold': 0.5}}, "
            f"got {params!r}"
        )
    kind = params.get("type")
    if not isinstance(kind, str) or kind not in _OPTIONS:
        got = repr(kind) if "type" in params else "no type"
        raise ArgumentError(f"the type of compression is one of {', '.join(_OPTIONS)}, got {got}")
    unknown = [name for name in params if name != "type" and name not in _OPTIONS[kind]]
    if unknown:
        known = " and ".join(("type", *_OPTIONS[kind]))
        raise ArgumentError(f"{kind} compression takes {known}, got {unknown[0]!r}")
    if kind == "none":
        return None
    if kind in ("2bit", "1bit"):
        threshold = _number(kind, params.get("threshold", 0.5))
        return TwoBit(threshold) if kind == "2bit" else OneBit(threshold)
    error_feedback = params.get("error_feedback", False)
    if not isinstance(error_feedback, (bool, np.bool_)):
        raise ArgumentError(
            f"error_feedback of {kind} compression is True or False, got {error_feedback!r}"
        )
    return Half(brain=kind == "bf16", error_feedback=bool(error_feedback))


def describe(compression: Compression | None) -> str:
    """Write the settings down, for the digest of a call and for messages."""
    return "no compression" if compression is None else compression.describe()


def _number(kind: str, threshold: object) -> float:
    if isinstance(threshold, Real) and not isinstance(threshold, bool):
        try:
            number = float(threshold)
        except OverflowError:  # an integer or a fraction beyond all floats
            number = math.inf
        if math.isfinite(number) and (number > 0 or kind == "1bit"):
            return number
    expected = "a finite number" + (" above 0" if kind == "2bit" else "")
    raise ArgumentError(f"the threshold of {kind} compression is {expected}, got {threshold!r}")


class Compression(ABC):
    """Turns gradients into codes, and says how the ranks' codes are added."""

    #: Whether what a code leaves of a gradient is added to the next one.
    has_residual = True

    @abstractmethod
    def describe(self) -> str:
        """Name the kind and its settings, all digits of them."""

    @abstractmethod
    def params(self) -> dict[str, Any]:
        """Give what `parse` makes it of, as JSON holds it."""

    @abstractmethod
    def code(self, size: int) -> Code:
        """Say how the codes of so many ranks are packed and added."""

    @abstractmethod
    def encode(self, accumulated: Array, codes: Array, start: int = 0) -> None:
        """Write the codes of a gradient.

        Parameters
        ----------
        accumulated : numpy.ndarray, shape (n,)
            The gradient plus the residual of before, in the dtype in which sums are taken,
            finite where there is a residual. Becomes the new residual where the kind has
            one, and else stays as it is.
        codes : numpy.ndarray of uint8
            Of the bytes that `Code.part_bytes` gives for one rank, for these elements and
            maybe others.
        start : int, default 0
            The first of these elements, a multiple of 8.
        """

    def accepts(self, gradient: Array) -> bool:
        """Say whether there is a code for all elements; NaN has none.

        A kind with a residual does not accept infinities either: they would stay in the
        residual for good, and hide every gradient to come.

        Parameters
        ----------
        gradient : numpy.ndarray, shape (n,)
            In the dtype in which sums are taken.
        """
        if not gradient.size:
            return True
        low, high = gradient.min(), gradient.max()  # NaN if any is
        if self.has_residual:
            return bool(-np.inf < low and high < np.inf)
        return not np.isnan(high)

    def check(self, spec: Spec) -> None:
        """Raise unless gradients of such a key can be compressed.

        Raises
        ------
        ArgumentError
            The key does not hold real floats, or not the threshold.
        """
        if not (spec.dtype.kind == "f" or is_small_float(spec.dtype)):
            raise ArgumentError(
                f"{spec}, which {self.describe()} cannot take: it is for keys of real floats"
            )


@final
class TwoBit(Compression):
    """-t, 0 or t for each element, and the rest in the residual.

    With ``r += gradient``: t where ``r >= t``, -t where ``r <= -t``, else 0; then ``r -=``
    that. Sources: MXNet's 2-bit compression; Strom, Scalable Distributed DNN Training
    Using Commodity GPU Cloud Computing, Interspeech 2015.
    """

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self._bits = np.empty((2, BLOCK_ELEMENTS), np.bool_)
        self._floats = np.empty(BLOCK_ELEMENTS, np.complex128)

    def describe(self) -> str:
        """Name the threshold, too."""
        return f"2bit compression with threshold {self.threshold!r}"

    def params(self) -> dict[str, Any]:
        """Give the type and the threshold."""
        return {"type": "2bit", "threshold": self.threshold}

    def code(self, size: int) -> Code:
        """Add numbers from 0, for -t, to 2."""
        return CountCode(size, 2, self.threshold)

    @np.errstate(all="ignore")  # nothing may raise on one rank alone
    def encode(self, accumulated: Array, codes: Array, start: int = 0) -> None:
        """Compare twice, and take off what was found; see `Compression.encode`."""
        each = codes.size // 2
        low_plane, high_plane = codes[:each], codes[each:]
        step = accumulated.dtype.type(self.threshold)
        for low in range(0, accumulated.size, BLOCK_ELEMENTS):
            piece = accumulated[low : low + BLOCK_ELEMENTS]
            n, at = piece.size, (start + low) // 8
            above, not_below = self._bits[:, :n]
            np.greater_equal(piece, step, out=above)
            np.greater(piece, -step, out=not_below)
            packed, other = np.packbits(above), np.packbits(not_below)
            high_plane[at : at + packed.size] = packed  # 2 is above
            np.bitwise_xor(packed, other, out=low_plane[at : at + packed.size])  # 1 is neither
            code = above.view(np.int8)
            np.add(code, not_below.view(np.int8), out=code)
            taken = self._floats.view(piece.dtype)[:n]
            np.copyto(taken, code)
            np.subtract(taken, piece.dtype.type(1), out=taken)
            np.multiply(taken, step, out=taken)
            np.subtract(piece, taken, out=piece)

    def check(self, spec: Spec) -> None:
        """Look at the threshold, too; see `Compression.check`."""
        super().check(spec)
        dtype = wide(spec.dtype)
        with np.errstate(all="ignore"):
            step = float(dtype.type(self.threshold))
        if not 0 < step < math.inf:
            raise ArgumentError(
                f"{spec}, in which the threshold {self.threshold!r} of 2bit compression would be "
                f"{step!r}: set one that {dtype.name} can hold"
            )


@final
class OneBit(Compression):
    """-1 or 1 for each element, and the rest in the residual.

    With ``r += gradient``: 1 where ``r > threshold``, else -1; then ``r -=`` that. Sources:
    MXNet's 1-bit compression; Seide et al., 1-Bit Stochastic Gradient Descent and its
    Application to Data-Parallel Distributed Training of Speech DNNs, Interspeech 2014.
    """

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self._bits = np.empty(BLOCK_ELEMENTS, np.bool_)
        self._floats = np.empty(BLOCK_ELEMENTS, np.complex128)

    def describe(self) -> str:
        """Name the threshold, too."""
        return f"1bit compression with threshold {self.threshold!r}"

    def params(self) -> dict[str, Any]:
        """Give the type and the threshold."""
        return {"type": "1bit", "threshold": self.threshold}

    def code(self, size: int) -> Code:
        """Add numbers that are 0, for -1, or 1."""
        return CountCode(size, 1, 1.0)

    @np.errstate(all="ignore")  # a threshold that is too large is infinite
    def encode(self, accumulated: Array, codes: Array, start: int = 0) -> None:
        """Compare, and take off what was found; see `Compression.encode`."""
        threshold = accumulated.dtype.type(self.threshold)
        one = accumulated.dtype.type(1)
        for low in range(0, accumulated.size, BLOCK_ELEMENTS):
            piece = accumulated[low : low + BLOCK_ELEMENTS]
            n, at = piece.size, (start + low) // 8
            above = self._bits[:n]
            np.greater(piece, threshold, out=above)
            packed = np.packbits(above)
            codes[at : at + packed.size] = packed
            taken = self._floats.view(piece.dtype)[:n]
            np.copyto(taken, above)
            np.add(taken, taken, out=taken)
            np.subtract(taken, one, out=taken)
            np.subtract(piece, taken, out=piece)


@final
class Half(Compression):
    """float16 or bfloat16, with the error of rounding in the residual if asked for."""

    def __init__(self, *, brain: bool, error_feedback: bool) -> None:
        self.brain = brain
        self.has_residual = error_feedback
        self._words = Words(brain=brain)
        self._floats = np.empty(BLOCK_ELEMENTS, np.complex128)

    def describe(self) -> str:
        """Name the kind, and whether errors are fed back."""
        return f"{'bf16' if self.brain else 'fp16'} compression" + (
            " with error feedback" if self.has_residual else ""
        )

    def params(self) -> dict[str, Any]:
        """Give the type, and whether errors are fed back."""
        return {"type": "bf16" if self.brain else "fp16", "error_feedback": self.has_residual}

    def code(self, size: int) -> Code:
        """Add floats."""
        return HalfCode(size, brain=self.brain)

    @np.errstate(all="ignore")  # what is too large becomes infinite
    def encode(self, accumulated: Array, codes: Array, start: int = 0) -> None:
        """Round, and keep the rest if asked for; see `Compression.encode`."""
        words = codes.view(np.uint16)[start:]
        for low in range(0, accumulated.size, BLOCK_ELEMENTS):
            piece = accumulated[low : low + BLOCK_ELEMENTS]
            own = words[low : low + piece.size]
            if not self.has_residual:
                self._words.round(piece, own)
                continue
            taken = self._floats.view(piece.dtype)[: piece.size]
            # What 16 bits cannot hold at once goes with the next pushes.
            np.clip(piece, -self._words.largest, self._words.largest, out=taken)
            self._words.round(taken, own)
            self._words.widen(own, taken)
            np.subtract(piece, taken, out=piece)
