"""How a push runs: agree, pack, sum over the ranks, update.

Rules of the file: what it gets has been checked; memory is taken before the ranks
agree, so that nothing can fail on one rank alone once the others wait for it; the
user's updater is the one exception, and the ranks agree once more after it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import numpy as np

from .agreement import Agreement, Call, name_ranks
from .arrays import Array, DType, is_small_float, sum_in_order, wide
from .bucket import Bucket
from .errors import UpdaterError
from .schema import Spec
from .transport.contract import Transport
from .updater import Updater

# Flags of an agreement.
_WIDE = 1  # some rank sums several values, or wider ones, for keys of 16 or 8 bits
_FAILED = 2  # some rank's updater raised

_AFTER_UPDATE = Call("the end of a push", 0)


@dataclass(frozen=True)
class Push:
    """One list of keys, planned: the same on every rank."""

    call: Call
    specs: tuple[Spec, ...]
    buckets: tuple[Bucket, ...]


@final
class Engine:
    """Runs the calls of one store on one transport."""

    def __init__(self, transport: Transport, agreement: Agreement) -> None:
        self._transport = transport
        self._agreement = agreement
        self._scratch: dict[DType, Array] = {}
        self._last: tuple[Push | None, int, Call] = (None, 0, _AFTER_UPDATE)

    def reserve(
        self, push: Push, values: list[list[Array]], stored: list[Array], updater: Updater
    ) -> None:
        """Take the memory that a push needs; may fail, so the ranks do not wait yet."""
        for bucket in push.buckets:
            if is_small_float(bucket.dtype):
                self._reserve(wide(bucket.dtype), bucket.n_elements)
            if not (updater.assigns and len(bucket.specs) == 1):
                self._reserve(bucket.dtype, bucket.n_elements)
                continue
            # The sum goes straight into the replica: what is summed must not lie there, as
            # it does when an updater has kept its `stored` and pushes it.
            position = bucket.positions[0]
            values[position] = [
                value.copy() if np.may_share_memory(value, stored[position]) else value
                for value in values[position]
            ]

    def push(
        self, push: Push, values: list[list[Array]], stored: list[Array], updater: Updater
    ) -> None:
        """Sum the values of each key, over the ranks too, and update the stored ones.

        Parameters
        ----------
        push : Push
        values : list of list of numpy.ndarray
            For each key of `push` what this rank pushes.
        stored : list of numpy.ndarray
            For each key the replica, contiguous.
        updater : Updater
        """
        call = self._call(push, updater)
        flags = self._agreement.confirm(call, _WIDE if _needs_wide(push, values) else 0)
        if not updater.may_raise:
            for bucket in push.buckets:
                self._update(bucket, self._sum(bucket, values, stored, updater, flags), stored, updater)
            return
        failure = self._push_guarded(push, values, stored, updater, flags)
        if self._agreement.confirm(_AFTER_UPDATE, _FAILED if failure else 0) & _FAILED:
            self._mend(push, stored, failure)

    def _call(self, push: Push, updater: Updater) -> Call:
        """Add to a push what its updater does: ranks must not update in different ways."""
        own = updater.digest()
        if push is not self._last[0] or own != self._last[1]:
            items = (*push.call.items, updater.describe())
            self._last = push, own, Call(push.call.name, push.call.digest ^ own, items)
        return self._last[2]

    def broadcast(self, buckets: tuple[Bucket, ...], values: list[Array]) -> None:
        """Replace each rank's values by those of rank 0."""
        for bucket in buckets:
            if len(bucket.specs) == 1:
                self._transport.broadcast(values[bucket.positions[0]].reshape(-1))
                continue
            flat = self._scratch[bucket.dtype][: bucket.n_elements]
            parts = [flat[a:b] for a, b in zip(bucket.offsets, bucket.offsets[1:])]
            for part, position in zip(parts, bucket.positions):
                part[:] = values[position].reshape(-1)
            self._transport.broadcast(flat)
            for part, position in zip(parts, bucket.positions):
                values[position].reshape(-1)[:] = part

    def reserve_broadcast(self, buckets: tuple[Bucket, ...]) -> None:
        """Take the memory that `broadcast` needs."""
        for bucket in buckets:
            if len(bucket.specs) > 1:
                self._reserve(bucket.dtype, bucket.n_elements)

    def _reserve(self, dtype: DType, n_elements: int) -> None:
        if dtype not in self._scratch or self._scratch[dtype].size < n_elements:
            self._scratch[dtype] = np.empty(n_elements, dtype)

    def _sum(
        self,
        bucket: Bucket,
        values: list[list[Array]],
        stored: list[Array],
        updater: Updater,
        flags: int,
    ) -> Array:
        """Sum a bucket over values and ranks; into the replica itself where that is the update."""
        n = bucket.n_elements
        if len(bucket.specs) == 1 and updater.assigns:
            out = stored[bucket.positions[0]].reshape(-1)
        else:
            out = self._scratch[bucket.dtype][:n]
        travels_wide = flags & _WIDE and is_small_float(bucket.dtype)
        packed = self._scratch[wide(bucket.dtype)][:n] if travels_wide else out
        source = self._pack(bucket, values, packed)
        self._transport.all_reduce(source, out)
        return out

    def _pack(self, bucket: Bucket, values: list[list[Array]], packed: Array) -> Array:
        """Bring what this rank pushes into one flat array, without a copy if it is one."""
        if len(bucket.specs) == 1:
            arrays = values[bucket.positions[0]]
            first = arrays[0]
            if len(arrays) == 1 and first.dtype == packed.dtype and first.flags.c_contiguous:
                return first.reshape(-1)
        for spec, position, start in zip(bucket.specs, bucket.positions, bucket.offsets):
            part = packed[start : start + spec.n_elements]
            sum_in_order(values[position], part.reshape(spec.shape))
        return packed

    def _update(
        self, bucket: Bucket, total: Array, stored: list[Array], updater: Updater
    ) -> None:
        if len(bucket.specs) == 1 and updater.assigns:
            return
        for spec, position, start in zip(bucket.specs, bucket.positions, bucket.offsets):
            part = total[start : start + spec.n_elements].reshape(spec.shape)
            updater.apply(spec, part, stored[position])

    def _push_guarded(
        self,
        push: Push,
        values: list[list[Array]],
        stored: list[Array],
        updater: Updater,
        flags: int,
    ) -> Exception | None:
        failure: Exception | None = None
        for bucket in push.buckets:
            total = self._sum(bucket, values, stored, updater, flags)
            if failure is not None:
                continue  # the other ranks still wait for this rank's share of the sum
            try:
                self._update(bucket, total, stored, updater)
            except Exception as error:  # the user's own code: whatever it raises, all must hear
                failure = error
        return failure

    def _mend(self, push: Push, stored: list[Array], failure: Exception | None) -> None:
        """Bring the replicas in step again after an updater has raised, and raise."""
        said = "" if failure is None else f"{type(failure).__name__}: {failure}"
        reports = self._agreement.tell(said)
        failed = [rank for rank, text in enumerate(reports) if text]
        root = next((rank for rank, text in enumerate(reports) if not text), 0)
        for value in stored:
            self._transport.broadcast(value.reshape(-1), root)
        if failure is not None:
            raise failure
        raise UpdaterError(
            f"the updater raised on {name_ranks(failed)} in {push.call.name} "
            f"({reports[failed[0]]}); all replicas hold rank {root}'s values now"
        )


def _needs_wide(push: Push, values: list[list[Array]]) -> bool:
    """Say whether a 16-bit sum would be rounded before it travels, if it travelled in 16 bits."""
    return any(
        is_small_float(spec.dtype) and (len(arrays) > 1 or arrays[0].dtype != spec.dtype)
        for spec, arrays in zip(push.specs, values)
    )
