"""What the codes of a rank's gradients have left, key by key, and so the way to new codes.

Rules of the file: a residual belongs to the rank and to the key, lies as the values do,
and outlives a change of settings; what can fail is found before the ranks agree, by
`prepare` and `check`, and leaves every residual as it was.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import final

import numpy as np

from .arrays import Array, DType, wide
from .bucket import Bucket, Run
from .coded import Encode
from .compression import Compression
from .errors import ArgumentError
from .replica import Chunk, Entry
from .words import BLOCK_ELEMENTS


@final
class Residuals:
    """The residuals of one rank's keys, zero until a gradient leaves something.

    Parameters
    ----------
    compression : Compression
    """

    def __init__(self, compression: Compression) -> None:
        self._compression = compression
        self._of_chunk: dict[Chunk, Array] = {}
        self._joined = np.empty(BLOCK_ELEMENTS, np.complex128)
        self._widened = np.empty(BLOCK_ELEMENTS, np.complex128)  # maybe in another thread

    def change(self, compression: Compression) -> None:
        """Go on with other settings; the residuals stay."""
        self._compression = compression

    def prepare(self, buckets: Sequence[Bucket]) -> None:
        """Take the memory for the keys of these buckets.

        Raises
        ------
        ArgumentError
            Gradients of a key cannot be compressed.
        """
        for bucket in buckets:
            for entry, _, _, _ in bucket.members:
                self._compression.check(entry.spec)
            if self._compression.has_residual:
                self._take(bucket)

    def check(self, bucket: Bucket, gradient: Array) -> None:
        """Raise unless all elements of a gradient have codes.

        It looks at no residual: a push that still waits may change that.

        Parameters
        ----------
        bucket : Bucket
        gradient : numpy.ndarray, shape (bucket.n_elements,)
            Of the bucket's dtype, or the one in which its sums are taken.

        Raises
        ------
        ArgumentError
            It has a NaN or, where something is left over for the next push, an infinity.
            The message names the key.
        """
        if self._accepts(bucket, 0, bucket.n_elements, gradient):
            return
        for entry, _, start, stop in bucket.members:
            if not self._accepts(bucket, start, stop, gradient):
                what = "NaN or an infinity" if self._compression.has_residual else "NaN"
                raise ArgumentError(
                    f"{entry.spec}, pushed {what}, for which {self._compression.describe()} has "
                    "no code: leave the push out, or set_gradient_compression({'type': 'none'})"
                )

    def encode(self, bucket: Bucket, gradient: Array) -> Encode:
        """Say how the bucket's elements become codes, for `CodedSum.all_reduce`.

        The residuals change as the codes are written.

        Parameters
        ----------
        bucket, gradient
            As for `check`, which has passed.
        """

        def encode(start: int, stop: int, codes: Array) -> None:
            for low in range(start, stop, BLOCK_ELEMENTS):
                high = min(low + BLOCK_ELEMENTS, stop)
                self._encode_block(bucket, low, high, gradient[low:high], codes, low - start)

        return encode

    def has(self, entry: Entry) -> bool:
        """Say whether one key may have a residual that is not 0."""
        return entry.chunk in self._of_chunk

    def of(self, entry: Entry) -> Array:
        """Give the residual of one key that has one, flat, to be saved or to be set."""
        return self._of_chunk[entry.chunk][entry.start : entry.stop]

    def adopt(self, entry: Entry, residual: Array) -> None:
        """Set the residual of one key."""
        self._take_for(entry.chunk, wide(entry.spec.dtype))
        np.copyto(self.of(entry), residual)

    def _take(self, bucket: Bucket) -> None:
        for run in bucket.runs:
            self._take_for(run.chunk, bucket.wide_dtype)

    def _take_for(self, chunk: Chunk, dtype: DType) -> None:
        if chunk not in self._of_chunk:
            # Memory of zeros that is not touched costs nothing.
            self._of_chunk[chunk] = np.zeros(chunk.flat.size, dtype)

    def _encode_block(
        self, bucket: Bucket, start: int, stop: int, gradient: Array, codes: Array, at: int
    ) -> None:
        own: Array = self._joined.view(bucket.wide_dtype)[: stop - start]
        if not self._compression.has_residual:
            if gradient.dtype != bucket.wide_dtype:
                np.copyto(own, gradient)
                gradient = own
            self._compression.encode(gradient, codes, at)
            return
        spans = self._spans(bucket, start, stop)
        if len(spans) == 1:
            own = spans[0][1]
            _add(own, gradient, own)
            self._compression.encode(own, codes, at)
            return
        for low, residual in spans:
            part = slice(low, low + residual.size)
            _add(residual, gradient[part], own[part])
        self._compression.encode(own, codes, at)
        for low, residual in spans:
            residual[:] = own[low : low + residual.size]

    def _spans(self, bucket: Bucket, start: int, stop: int) -> list[tuple[int, Array]]:
        """Find where the residuals of some elements lie, and from which element on."""
        runs, found = bucket.runs, []
        first = bisect_right(runs, start, key=_start_of) - 1
        for number in range(first, len(runs)):
            run = runs[number]
            if run.start >= stop:
                break
            low, high = max(start, run.start), min(stop, run.stop)
            if low < high:
                to = run.chunk_start - run.start
                found.append((low - start, self._of_chunk[run.chunk][to + low : to + high]))
        return found

    def _accepts(self, bucket: Bucket, start: int, stop: int, gradient: Array) -> bool:
        for low in range(start, stop, BLOCK_ELEMENTS):
            block = gradient[low : min(low + BLOCK_ELEMENTS, stop)]
            if block.dtype != bucket.wide_dtype:
                widened: Array = self._widened.view(bucket.wide_dtype)[: block.size]
                np.copyto(widened, block)
                block = widened
            if not self._compression.accepts(block):
                return False
        return True


def _start_of(run: Run) -> int:
    return run.start


@np.errstate(all="ignore")  # nothing may raise on one rank alone
def _add(residual: Array, gradient: Array, out: Array) -> None:
    """Add a gradient to what was left; what overflows stays at the largest number."""
    np.add(residual, gradient, out=out, dtype=out.dtype, casting="unsafe")
    largest = np.finfo(out.dtype).max
    np.clip(out, -largest, largest, out=out)
