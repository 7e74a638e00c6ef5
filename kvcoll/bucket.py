"""Which keys travel together, and in which order they are updated: pure planning."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .arrays import DType
from .schema import Spec

# Large enough that a bucket is all bandwidth, small enough to be a small scratch.
BUCKET_BYTES = 16 << 20


@dataclass(frozen=True)
class Bucket:
    """Keys of one dtype that are summed as one flat array.

    Attributes
    ----------
    dtype : numpy.dtype
    specs : tuple of Spec
    positions : tuple of int
        For each key its place in the list that was planned.
    offsets : tuple of int
        For each key where it begins, in elements; one more entry, the end of all.
    """

    dtype: DType
    specs: tuple[Spec, ...]
    positions: tuple[int, ...]
    offsets: tuple[int, ...]

    @property
    def n_elements(self) -> int:
        """How many elements the bucket has."""
        return self.offsets[-1]


def in_update_order(specs: Iterable[Spec]) -> list[Spec]:
    """Sort keys as they are updated: int keys ascending, str keys in the order of init."""
    return sorted(specs, key=lambda spec: spec.key if isinstance(spec.key, int) else spec.order)


def plan(specs: list[Spec], bucket_bytes: int = BUCKET_BYTES) -> list[Bucket]:
    """Cut a list of keys into buckets.

    Parameters
    ----------
    specs : list of Spec
        In update order; the plan depends on nothing else, so it is the same on all ranks.
    bucket_bytes : int, optional
        When a bucket is full. A larger key has a bucket of its own.

    Returns
    -------
    list of Bucket
        Neighbours of one dtype share a bucket, so the order of the keys is kept.
    """
    runs: list[list[int]] = []
    n_bytes = 0
    for position, spec in enumerate(specs):
        own_bytes = spec.n_elements * spec.dtype.itemsize
        fits = runs and specs[runs[-1][0]].dtype == spec.dtype and n_bytes + own_bytes <= bucket_bytes
        if fits:
            runs[-1].append(position)
            n_bytes += own_bytes
        else:
            runs.append([position])
            n_bytes = own_bytes
    return [_bucket(specs, run) for run in runs]


def _bucket(specs: list[Spec], positions: list[int]) -> Bucket:
    members = [specs[p] for p in positions]
    offsets = [0]
    for spec in members:
        offsets.append(offsets[-1] + spec.n_elements)
    return Bucket(members[0].dtype, tuple(members), tuple(positions), tuple(offsets))
