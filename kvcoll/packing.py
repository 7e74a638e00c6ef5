"""From the arrays that a rank pushes to the flat one that travels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .arrays import Array, DType, sum_in_order
from .bucket import Bucket
from .gpu.at import ListsAt
from .place import HOST, Parts, Place
from .replica import Entry


def wants_wide(entries: Sequence[Entry], values: list[list[Array]]) -> bool:
    """Say whether a 16-bit sum would be rounded before it travels, if it travelled in 16 bits."""
    return any(
        len(arrays) > 1 or arrays[0].dtype != entry.spec.dtype
        for entry, arrays in zip(entries, values, strict=True)
        if arrays  # none where only rows are pushed
    )


def as_flat(
    bucket: Bucket, values: list[list[Array]], dtype: DType, place: Place = HOST
) -> Array | None:
    """Give what is pushed as one flat array of a dtype without a copy, if that can be."""
    if len(bucket.members) > 1:
        return None
    arrays = values[bucket.members[0].position]
    first = arrays[0]
    is_flat = len(arrays) == 1 and first.dtype == dtype and place.is_flat(first)
    return first.reshape(-1) if is_flat else None


def pack_into(
    bucket: Bucket, values: list[list[Array]], packed: Array, place: Place = HOST
) -> None:
    """Sum each key's list of values into its place in a flat array.

    Parameters
    ----------
    bucket : Bucket
    values : list of list of numpy.ndarray
        For each key of the push that the bucket is of.
    packed : numpy.ndarray, shape (bucket.n_elements,)
        Of the bucket's dtype, or of the one in which its sums are taken.
    place : Place, optional
        Where all of them lie.
    """
    if isinstance(values, ListsAt):
        own: Any = values.arrays[bucket.first : bucket.last]
        place.copy_each(own, Parts(packed, bucket.starts, bucket.sizes))
        return
    if not place.is_host:
        lists = [values[member.position] for member in bucket.members]
        place.add_lists(lists, [packed[member.start : member.stop] for member in bucket.members])
        return
    singles = [arrays[0] for arrays in values[bucket.first : bucket.last] if len(arrays) == 1]
    with np.errstate(all="ignore"):  # a cast that overflows may not raise on one rank alone
        if len(singles) == len(bucket.members):
            np.concatenate(singles, axis=None, out=packed, casting="unsafe")
            return
        for entry, position, start, stop in bucket.members:
            sum_in_order(values[position], packed[start:stop].reshape(entry.spec.shape))
