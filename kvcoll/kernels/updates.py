"""The rows of an update's table: one a key, whichever way its arrays are known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ..arrays import Array
from ..gpu.array import DeviceArray, as_device
from ..gpu.at import ArraysAt
from ..place import Parts, Update, UpdateEach
from .fused import layout_of
from .table import columns_of
from .trace import Program, Traced


class Rows(NamedTuple):
    """Rows of a table, and what lies at their addresses."""

    table: Array
    reads: list[Sequence[DeviceArray]]
    writes: list[DeviceArray]


class Whole(NamedTuple):
    """An update of one array, its step written down, and its factor if that lies on the GPU."""

    update: Update
    traced: Traced
    trust: DeviceArray | None


def rows_of_whole(program: Program, work: Sequence[Whole]) -> Rows:
    """Write a row an update; all of the same program.

    Raises
    ------
    ValueError
        The program reads a factor that an update lacks, or the other way round.
    """
    arrays = [
        [as_device(one) for one in (update.weight, update.grad, *update.states)]
        for update, _, _ in work
    ]
    trusts = [trust for _, _, trust in work if trust is not None]
    sizes = np.array([own[0].size for own in arrays], np.int64)
    columns = np.array([[one.address for one in own] for own in arrays], np.int64).T
    scalars = [np.array([one.address for one in trusts], np.int64)] if trusts else []
    numbers = np.array([traced.numbers for _, traced, _ in work], np.int64)
    table = _fitting(program, columns_of(sizes, [*columns, *scalars], numbers))
    writes = [own[k] for own in arrays for k, _ in program.stores]
    return Rows(table, [*arrays, trusts], writes)


def rows_of_parts(program: Program, update: UpdateEach, traced: Traced) -> Rows:
    """Write a row a key of an update whose gradients lie apart.

    Raises
    ------
    ValueError
        The program reads a factor, which such keys do not have.
    """
    weight, states, grads, _ = update
    flats = [as_device(array) for array in (weight.flat, *states)]
    bases = [flat.address + weight.starts * flat.itemsize for flat in flats]
    numbers = np.array(traced.numbers, np.int64)
    columns = [bases[0], addresses_of(grads), *bases[1:]]
    table = _fitting(program, columns_of(weight.sizes, columns, numbers))
    extents = [extent_of(flat, weight) for flat in flats]
    stored = {k for k, _ in program.stores}
    numbered = enumerate([extents[0], None, *extents[1:]])  # the gradient is only read
    writes = [flat for k, flat in numbered if flat is not None and k in stored]
    return Rows(table, [extents, devices_of(grads)], writes)


def _fitting(program: Program, table: Array) -> Array:
    """Give the table: a kernel would read words of the next row where one is missing."""
    n_words, own = layout_of(program).n_words, table.shape[1]
    if own != n_words:
        raise ValueError(
            f"a step's kernel reads rows of {n_words} words, this table has {own}: "
            f"{program.n_scalars} of the numbers are to lie on the GPU"
        )
    return table


def addresses_of(arrays: Any) -> Array:
    """Give where arrays on the GPU lie."""
    if isinstance(arrays, ArraysAt):
        return arrays.addresses
    return np.array([array.address for array in arrays], np.int64)


def devices_of(arrays: Any) -> Sequence[DeviceArray]:
    """Take arrays of a contract that is written for both places; see `as_device`."""
    own: Sequence[DeviceArray] = arrays
    return own


def extent_of(flat: DeviceArray, parts: Parts) -> DeviceArray:
    """Give the memory from the lowest part to the end of the highest."""
    return flat[int(parts.starts.min()) : int((parts.starts + parts.sizes).max())]
