"""Pushes of which some keys come as rows: what travels as rows, and what the ranks agree on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

from .agreement import Call
from .arrays import Array, as_array, native
from .bucket import plan as plan_buckets
from .engine import Push
from .replica import Entry
from .schema import Key, Spec, digest
from .sparse import Rows, RowSparse, combine

Value: TypeAlias = "Array | RowSparse"


def first_value(key: Key, value: object, order: int) -> tuple[Spec, Array | Rows]:
    """Check the value with which a key begins, and say what the key will hold.

    Parameters
    ----------
    key : int or str
    value : array or RowSparse
    order : int
        See `Spec`.
    """
    if isinstance(value, RowSparse):
        value.check()
        spec = Spec(key, value.shape, native(value.dtype), order, row_sparse=True)
        return spec, combine([value], spec.dtype)
    array = as_array(value)
    return Spec(key, array.shape, native(array.dtype), order), array


def separate(
    lists: Sequence[Sequence[Value]],
) -> tuple[list[list[Array]], dict[int, list[RowSparse]]]:
    """Tell keys of which only rows are pushed from the others.

    Parameters
    ----------
    lists : sequence of sequence of numpy.ndarray or RowSparse
        For each key what this rank pushes.

    Returns
    -------
    arrays : list of list of numpy.ndarray
        For each key its arrays: what a list with both kinds has as rows is made an array.
        Empty where there are only rows.
    rows : dict
        The others, by place in the list.
    """
    arrays: list[list[Array]] = []
    rows: dict[int, list[RowSparse]] = {}
    for place, values in enumerate(lists):
        sparse = [value for value in values if isinstance(value, RowSparse)]
        for value in sparse:
            value.check()  # it may have been written to since it was made
        if len(sparse) == len(values):
            rows[place] = sparse
            arrays.append([])
        else:
            arrays.append([v.to_dense() if isinstance(v, RowSparse) else v for v in values])
    return arrays, rows


def ready(push: Push, rows: Mapping[int, list[RowSparse]]) -> list[Rows]:
    """Add the rows of each list, in memory of their own; in the order of `push.sparse`."""
    return [combine(rows[place], push.entries[place].spec.dtype) for place in sorted(rows)]


def variant(plain: Push, given: Sequence[Entry], places: Sequence[int]) -> Push:
    """Plan the same push with some keys as rows; all ranks must choose the same.

    Parameters
    ----------
    plain : Push
    given : sequence of Entry
        In the order of the caller's list.
    places : sequence of int
        Of which of `plain.entries` only rows are pushed.
    """
    keys = [plain.entries[place].spec.key for place in places]
    items = [f"{e.spec}, as rows" if e.spec.key in keys else str(e.spec) for e in given]
    told, _ = plain.call.keys
    call = Call(plain.call.name, digest("push", *items), items, (told, keys))
    return Push(call, plain.entries, tuple(plan_buckets(plain.entries, sparse=frozenset(places))))
