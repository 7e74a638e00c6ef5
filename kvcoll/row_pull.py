"""Rows of stored values, copied into row-sparse ones.

Rules of the file: all is checked before anything is filled.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from .arrays import Array
from .errors import ArgumentError, ArrayError, ShapeMismatchError
from .replica import Entry
from .schema import Spec, one_per_key
from .sparse import RowSparse, as_indices, check_range, pull_rows


def row_sparse_pull(entries: Sequence[Entry], is_list: bool, out: Any, row_ids: Any) -> Any:
    """Fill `out`; see `KVStore.row_sparse_pull`.

    Parameters
    ----------
    entries : sequence of Entry
        Of the keys that were given.
    is_list : bool
        Whether they were given as a list.
    out, row_ids
        As the user gave them.
    """
    specs = [entry.spec for entry in entries]
    ids = _ids_of(specs, is_list, row_ids)
    if out is None:
        new = [
            [RowSparse.empty(spec.shape, spec.dtype) for _ in own.arrays]
            for spec, own in zip(specs, ids, strict=True)
        ]
        given = [outs if own.is_list else outs[0] for outs, own in zip(new, ids, strict=True)]
        out = given if is_list else given[0]
    outputs: list[tuple[Array, Array, RowSparse]] = []
    lists = one_per_key([spec.key for spec in specs], is_list, out, "outputs")
    for entry, outs, own in zip(entries, lists, ids, strict=True):
        for one, indices in zip(outs, own.for_outputs(entry.spec, len(outs)), strict=True):
            outputs.append((entry.value, indices, _as_output(entry.spec, one)))
    for stored, indices, one in outputs:
        pull_rows(stored, indices, one)
    return out


class _Ids(NamedTuple):
    """What was given as row_ids for one key."""

    arrays: list[Array]
    is_list: bool

    def for_outputs(self, spec: Spec, n: int) -> list[Array]:
        """Give one array for each output."""
        if len(self.arrays) == 1:
            return self.arrays * n
        if len(self.arrays) != n:
            raise ArgumentError(
                f"{spec}: {n} outputs but {len(self.arrays)} arrays of row_ids: give one for "
                "all, or one for each output"
            )
        return self.arrays


def _ids_of(specs: Sequence[Spec], is_list: bool, row_ids: Any) -> list[_Ids]:
    """Sort row_ids by key, and check them."""
    if row_ids is None:
        raise ArgumentError("row_sparse_pull needs row_ids: an array of the rows to be copied")
    if _is_one(row_ids):
        given = [row_ids] * len(specs)
    elif not is_list:
        given = [row_ids]
    elif len(row_ids) == len(specs):
        given = list(row_ids)
    else:
        raise ArgumentError(
            f"{len(specs)} keys but {len(row_ids)} entries of row_ids: give one for each key, "
            "or one array for all"
        )
    return [_checked(spec, own) for spec, own in zip(specs, given, strict=True)]


def _checked(spec: Spec, given: Any) -> _Ids:
    ids = (
        _Ids([as_indices(given)], False)
        if _is_one(given)
        else _Ids([as_indices(one) for one in given], True)
    )
    if not spec.shape:
        raise ShapeMismatchError(f"{spec}, which has no rows: pull it")
    for indices in ids.arrays:
        check_range(indices, spec.shape, spec.dtype)
    return ids


def _as_output(spec: Spec, out: object) -> RowSparse:
    if not isinstance(out, RowSparse):
        raise ArrayError(
            f"{spec}: an output of row_sparse_pull is a RowSparse, got {type(out).__name__}; "
            "an array takes all rows, by pull with ignore_sparse=False"
        )
    spec.check_output(out)
    return out


def _is_one(row_ids: object) -> bool:
    """Say whether this is one array of rows: a list of ints is one, too."""
    if not isinstance(row_ids, (list, tuple)):
        return True
    return all(isinstance(one, (int, np.integer)) for one in row_ids)
