"""Which keys travel together, and where their sum goes: pure planning."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from .arrays import Array, DType, is_small_float, wide
from .replica import Chunk, Entry

# Many small keys make one message; a key of this size is all bandwidth by itself, and
# alone it need not be packed.
OWN_BUCKET_BYTES = 1 << 20
BUCKET_BYTES = 16 << 20


class Member(NamedTuple):
    """One key in a bucket."""

    entry: Entry
    position: int  # its place in the list that was planned
    start: int  # where it begins in the bucket, in elements
    stop: int


class Run(NamedTuple):
    """Members of a bucket that are neighbours in the replica, too."""

    chunk: Chunk
    chunk_start: int  # where it begins in the chunk, in elements
    start: int  # where it begins in the bucket
    stop: int
    first: int  # its members: bucket.members[first:last]
    last: int


@dataclass(frozen=True)
class Bucket:
    """Keys of one dtype, summed as one flat array.

    Attributes
    ----------
    dtype : numpy.dtype
    wide_dtype : numpy.dtype
        In which the sums are taken.
    is_small_float : bool
        Whether these differ.
    members : tuple of Member
    runs : tuple of Run
        The same keys, neighbours joined.
    n_elements : int
    is_sparse : bool
        Whether it is one key of which only rows are pushed.
    first, last : int
        The members' places in the list that was planned: from `first` to before `last`.
    """

    dtype: DType
    wide_dtype: DType
    is_small_float: bool
    members: tuple[Member, ...]
    runs: tuple[Run, ...]
    n_elements: int
    first: int
    last: int
    is_sparse: bool = False

    @cached_property
    def starts(self) -> Array:
        """Where each member begins, in elements."""
        return np.array([member.start for member in self.members], np.int64)

    @cached_property
    def sizes(self) -> Array:
        """How many elements each member has."""
        return np.array([member.stop - member.start for member in self.members], np.int64)


def plan(
    entries: Sequence[Entry],
    bucket_bytes: int = BUCKET_BYTES,
    own_bucket_bytes: int = OWN_BUCKET_BYTES,
    sparse: Collection[int] = (),
) -> list[Bucket]:
    """Cut a list of keys into buckets.

    Parameters
    ----------
    entries : sequence of Entry
        The plan depends on nothing else than their keys' order, shapes and dtypes, so
        it is the same on all ranks.
    bucket_bytes : int, optional
        When a bucket is full. A larger key has a bucket of its own.
    own_bucket_bytes : int, optional
        From which size on a key has a bucket of its own in any case.
    sparse : collection of int, optional
        Of which of them, by place in the list, only rows are pushed: these stand alone.

    Returns
    -------
    list of Bucket
        Neighbours of one dtype share a bucket, so the order of the keys is kept.
    """
    lists: list[list[int]] = []
    n_bytes, is_open = 0, False
    for position, entry in enumerate(entries):
        own_bytes = entry.value.nbytes
        alone = own_bytes >= min(own_bucket_bytes, bucket_bytes) or position in sparse
        fits = (
            is_open
            and not alone
            and entries[lists[-1][0]].spec.dtype == entry.spec.dtype
            and n_bytes + own_bytes <= bucket_bytes
        )
        if fits:
            lists[-1].append(position)
            n_bytes += own_bytes
        else:
            lists.append([position])
            n_bytes = own_bytes
        is_open = not alone
    return [_bucket(entries, own, is_sparse=own[0] in sparse) for own in lists]


def _bucket(entries: Sequence[Entry], positions: list[int], *, is_sparse: bool) -> Bucket:
    members = []
    stop = 0
    for position in positions:
        start, stop = stop, stop + entries[position].spec.n_elements
        members.append(Member(entries[position], position, start, stop))
    dtype = members[0].entry.spec.dtype
    return Bucket(
        dtype=dtype,
        wide_dtype=wide(dtype),
        is_small_float=is_small_float(dtype),
        members=tuple(members),
        runs=tuple(_runs(members)),
        n_elements=stop,
        first=positions[0],
        last=positions[-1] + 1,
        is_sparse=is_sparse,
    )


def _runs(members: list[Member]) -> list[Run]:
    runs: list[Run] = []
    for number, (entry, _, start, stop) in enumerate(members):
        if runs:
            last = runs[-1]
            follows = last.chunk_start + last.stop - last.start == entry.start
            if last.chunk is entry.chunk and follows:
                runs[-1] = last._replace(stop=stop, last=number + 1)
                continue
        runs.append(Run(entry.chunk, entry.start, start, stop, number, number + 1))
    return runs
