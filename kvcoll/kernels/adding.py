"""The kernel that adds the rows of several ranks, in the order of all other sums.

Rules of the file: each row comes by an address of its own, so that a rank's own row is added
where it lies; sums are taken in the dtype of `wide` and rounded once.
"""

from __future__ import annotations

from functools import lru_cache

from ..arrays import DType, wide
from ..gpu.kernel import Access, KernelSource, Parameter
from ..sums import Order
from .prelude import PRELUDE, c_type, cast, plus

#: How many rows one launch takes: a kernel has 4 KB for its arguments.
MOST_ROWS = 256


@lru_cache(maxsize=256)
def added_rows(order: Order, row_dtype: DType, out_dtype: DType) -> KernelSource:
    """Write the kernel that adds rows of one dtype.

    Parameters
    ----------
    order : int or tuple
        Of the rows, as `sums.order_of` gives it: what stands in a tuple is added from left
        to right.
    row_dtype, out_dtype : numpy.dtype
        Sums are taken in the dtype that is the wider one of both.

    Returns
    -------
    KernelSource
        Of one address a row, and that of the sum, which may be one of the rows.
    """
    total = wide(out_dtype)
    numbers = sorted(_numbers(order))
    rows = [Parameter(c_type(row_dtype), f"row_{k}", Access.READ) for k in numbers]
    out = Parameter(c_type(out_dtype), "out", Access.WRITE)
    value = cast(_written(order, row_dtype, total), total, out_dtype)
    name = f"kvcoll_add_{len(rows)}_{row_dtype.name}_{out_dtype.name}"
    return KernelSource(name, (*rows, out), f"    out[i] = {value};", PRELUDE)


def _numbers(order: Order) -> list[int]:
    if isinstance(order, int):
        return [order]
    return [number for part in order for number in _numbers(part)]


def _written(order: Order, row_dtype: DType, total: DType) -> str:
    if isinstance(order, int):
        return cast(f"row_{order}[i]", row_dtype, total)
    value = _written(order[0], row_dtype, total)
    for part in order[1:]:
        value = plus(value, _written(part, row_dtype, total), total)
    return value
