"""Stored values into what a caller wants filled.

Rules of the file: all is checked before anything is filled.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np

from .arrays import Array, as_output, fill_device, round_to
from .errors import ArrayError
from .replica import Entry
from .schema import Spec, one_per_key
from .sparse import RowSparse, fill_rows

Output: TypeAlias = "tuple[Entry, Array | RowSparse, Array | None]"  # stored, host, device


def checked_outputs(
    entries: Sequence[Entry], is_list: bool, out: Any, *, takes_rows: bool = False
) -> list[Output]:
    """Check outputs, and put beside each the key that fills it.

    Parameters
    ----------
    entries : sequence of Entry
        Of the keys that were given.
    is_list : bool
        Whether they were given as a list.
    out : object
        As the user gave it.
    takes_rows : bool, default False
        Whether a `RowSparse` gets the rows that it names.

    Raises
    ------
    ArgumentError, ArrayError, ShapeMismatchError, DTypeMismatchError, IndexError
        An output that cannot be filled.
    """
    if not is_list and type(out) is np.ndarray and out.flags.writeable:
        entries[0].spec.check_output(out)
        return [(entries[0], out, None)]
    lists = one_per_key([entry.spec.key for entry in entries], is_list, out, "outputs")
    outputs: list[Output] = []
    for entry, outs in zip(entries, lists, strict=True):
        spec = entry.spec
        for one in outs:
            host: Array | RowSparse
            if isinstance(one, RowSparse):
                host, device = _named_rows(spec, one, takes_rows=takes_rows), None
            elif type(one) is np.ndarray and one.flags.writeable:
                host, device = one, None
            else:
                host, device = as_output(one)
            if host.shape != spec.shape or host.dtype is not spec.dtype:
                spec.check_output(host)
            outputs.append((entry, host, device))
    return outputs


def fill(outputs: Sequence[Output]) -> None:
    """Copy stored values into outputs that were checked."""
    for entry, host, device in outputs:
        stored = entry.value
        if isinstance(host, RowSparse):
            fill_rows(stored, host)
            continue
        if host.dtype is stored.dtype:
            np.copyto(host, stored)
        else:
            round_to(stored, host)  # the cast was checked
        if device is not None:
            fill_device(device, host)


def _named_rows(spec: Spec, out: RowSparse, *, takes_rows: bool) -> RowSparse:
    """Check a row-sparse output that gets the rows it names.

    Raises
    ------
    ArrayError
        A call that could not know which rows are meant, or rows that cannot be written.
    IndexError
        It names a row that is not there.
    """
    if not takes_rows:
        raise ArrayError(
            f"{spec}, the output is a RowSparse: copy rows with row_sparse_pull(key, out, "
            "row_ids=...), or give an array"
        )
    if not out.data.flags.writeable:
        raise ArrayError(f"{spec}, the rows of the output are read-only: give others")
    out.check()
    return out
