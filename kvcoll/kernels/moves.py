"""Kernels that move and add: many arrays into many places, in one launch.

Rules of the file: values of a list are added left to right, in the dtype in which the host
adds them, so that the bits are the host's.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from ..arrays import DType, wide
from ..gpu.kernel import KernelSource
from .prelude import LANES, PRELUDE, TILE, c_type, cast, plus
from .table import TABLE_PARAMETERS, Layout

#: Of `moved`: from where, to where.
MOVED = Layout(2)
#: Of `added`: to where, how many values, and at which word of the table these begin, each as its
#: address and the code of its dtype.
ADDED = Layout(1, 2)

_CODES = [
    "bool",
    "int8",
    "uint8",
    "int16",
    "uint16",
    "int32",
    "uint32",
    "int64",
    "uint64",
    "float16",
    "bfloat16",
    "float32",
    "float64",
    "complex64",
    "complex128",
]


def code_of(dtype: DType) -> int:
    """Give the number by which a table names a dtype."""
    return _CODES.index(dtype.name)


@lru_cache(maxsize=1024)
def moved(source: DType, target: DType) -> KernelSource:
    """Write the kernel that copies arrays of one dtype into arrays of another."""
    kind, other = c_type(source), c_type(target)
    body = f"""{_begin(MOVED)}
    const {kind} *from = (const {kind} *)own[{MOVED.address(0)}];
    {other} *to = ({other} *)own[{MOVED.address(1)}];
    {kind} v[{TILE // LANES}];
    {_each("v[k] = from[e];")}
    {_each(f"to[e] = {cast('v[k]', source, target)};")}"""
    return KernelSource(f"kvcoll_move_{source.name}_{target.name}", TABLE_PARAMETERS, body, PRELUDE)


@lru_cache(maxsize=1024)
def added(target: DType, *, mixed: bool) -> KernelSource:
    """Write the kernel that adds lists of arrays.

    Parameters
    ----------
    target : numpy.dtype
        Of the sums.
    mixed : bool
        Whether values may be of other dtypes than their sum.
    """
    total = wide(target)
    kind, own_kind = c_type(total), c_type(target)
    load = _load(total) if mixed else ""
    value = "kv_load((const void *)at[0], (int)at[1], e)"
    if not mixed:
        value = cast(f"((const {own_kind} *)at[0])[e]", target, total)
    body = f"""{_begin(ADDED)}
    {own_kind} *to = ({own_kind} *)own[{ADDED.address(0)}];
    const long long n_values = own[{ADDED.number(0)}];
    const long long *at = table + own[{ADDED.number(1)}];
    {kind} sum[{TILE // LANES}];
    {_each(f"sum[k] = {value};")}
    for (long long number = 1; number < n_values; ++number) {{
      at += 2;
      {kind} v[{TILE // LANES}];
      {_each(f"v[k] = {value};")}
      {_each(f"sum[k] = {plus('sum[k]', 'v[k]', total)};")}
    }}
    {_each(f"to[e] = {cast('sum[k]', total, target)};")}"""
    name = f"kvcoll_add_{'mixed_' if mixed else ''}{target.name}"
    return KernelSource(name, TABLE_PARAMETERS, body, PRELUDE + load)


def _begin(layout: Layout) -> str:
    return f"""    const long long tile = i / {LANES};
    const long long *own = kv_row(table, n_rows, {layout.n_words}, tile);
    const long long first = (tile - own[0]) * {TILE} + i % {LANES};"""


def _each(statement: str) -> str:
    """Write a loop over a lane's elements: each statement for all of them before the next."""
    return f"""_Pragma("unroll")
    for (int k = 0; k < {TILE // LANES}; ++k) {{
      const long long e = first + k * {LANES};
      if (e < own[1]) {statement}
    }}"""


def _load(total: DType) -> str:
    """Write a function that reads an element of whichever dtype casts to the sum's."""
    kind = c_type(total)
    cases = []
    for code, name in enumerate(_CODES):
        source = np.dtype(np.float32) if name == "bfloat16" else np.dtype(name)
        if not np.can_cast(source, total, "same_kind"):
            continue
        kind_of = "kv_brain" if name == "bfloat16" else c_type(source)
        value = f"((const {kind_of} *)from)[e]"
        if name == "bfloat16":  # which NumPy alone does not know
            value = f"kv_widened({value})"
        cases.append(f"    case {code}: return {cast(value, source, total)};")
    listed = "\n".join(cases)
    return f"""
KVCOLL_FUNCTION {kind} kv_load(const void *from, int code, long long e) {{
  switch (code) {{
{listed}
    default: return ((const {kind} *)from)[e];
  }}
}}
"""
