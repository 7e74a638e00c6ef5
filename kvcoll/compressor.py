"""The way of a compressed push: values are packed and checked, then codes are summed.

Rules of the file: `pack` comes before the ranks agree, and finds all that can be wrong;
residuals change when codes are written, after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

from .arrays import Array
from .bucket import Bucket
from .coded import CodedSum
from .compression import Compression
from .packing import as_flat, pack_into, wants_wide
from .residual import Residuals
from .slots import Slots
from .transport.contract import Sink, Transport


@final
class Compressor:
    """Compresses the gradients of one store.

    Parameters
    ----------
    transport : Transport
    compression : Compression
    before : Compressor or None
        What compressed them until now: its residuals are gone on with.
    """

    def __init__(
        self, transport: Transport, compression: Compression, before: Compressor | None
    ) -> None:
        self._compression = compression
        self._coded = CodedSum(transport, compression.code(transport.topology.size))
        self.residuals: Residuals = Residuals(compression) if before is None else before.residuals
        self._slots = Slots()
        self._taken: list[tuple[int, Array]] = []
        self._packed: dict[int, Array] = {}
        self._prepared: Sequence[Bucket] | None = None

    @property
    def compression(self) -> Compression:
        """The settings."""
        return self._compression

    def start(self) -> None:
        """Go on with these settings from now on, on all ranks."""
        self.residuals.change(self._compression)

    def pack(self, buckets: Sequence[Bucket], values: list[list[Array]]) -> None:
        """Pack what this rank pushes, and check it.

        Parameters
        ----------
        buckets : sequence of Bucket
        values : list of list of numpy.ndarray
            For each key of the push.

        Raises
        ------
        ArgumentError
            A gradient has no code; the message names the key.
        """
        self._let_go()
        if buckets is not self._prepared:
            self.residuals.prepare(buckets)
            self._prepared = buckets
        for bucket in buckets:
            entries = [member.entry for member in bucket.members]
            own = values[bucket.first : bucket.last]
            dtype = bucket.wide_dtype if wants_wide(entries, own) else bucket.dtype
            flat = as_flat(bucket, values, dtype)
            if flat is None:
                n_bytes = bucket.n_elements * bucket.wide_dtype.itemsize
                self._slots.reserve([n_bytes])
                slot = self._slots.take(n_bytes)
                self._taken.append((n_bytes, slot))
                flat = slot[: bucket.n_elements * dtype.itemsize].view(dtype)
                pack_into(bucket, values, flat)
            self.residuals.check(bucket, flat)
            self._packed[bucket.first] = flat

    def packed(self, bucket: Bucket) -> Array:
        """Give what was packed last for a bucket."""
        return self._packed[bucket.first]

    def sum(self, bucket: Bucket, flat: Array, sink: Sink) -> None:
        """Sum a bucket's codes over the ranks, and hand over what they stand for."""
        if bucket.n_elements:
            encode = self.residuals.encode(bucket, flat)
            self._coded.all_reduce(bucket.n_elements, encode, bucket.dtype, sink)

    def _let_go(self) -> None:
        for n_bytes, slot in self._taken:
            self._slots.give_back(n_bytes, slot)
        self._taken.clear()
        self._packed.clear()
