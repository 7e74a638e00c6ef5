"""Sums over all elements, in the very order in which NumPy takes them on the host.

NumPy adds pairwise: blocks of up to 128 elements by eight running sums, then the blocks in a
tree. On a GPU eight lanes take a block, and one lane walks the tree of a piece.

Rules of the file: a sum is taken of pieces as optimizers cut them on the host, and the sums of
pieces are added there, in float64.
"""

from __future__ import annotations

from functools import lru_cache
from hashlib import blake2b

import numpy as np

from ..arrays import Array
from ..gpu.kernel import Access, KernelSource, Parameter
from .fused import declared, value_of
from .prelude import PRELUDE, c_type
from .table import Layout
from .trace import Program, without_unused

_BLOCK = 128
#: How many lanes sum a block.
LANES = 8
#: Of each block and sum: eight running sums, and what is left after the last eight elements.
_SLOT = 2 * LANES
_DEEPEST = 24

_PARAMETERS = (
    Parameter("long long", "table", Access.READ),
    Parameter("long long", "n_rows", Access.VALUE),
)


def layout_of(program: Program) -> Layout:
    """Say what a row holds: a piece's arrays, its shape, its room for blocks, its sums; numbers.

    A row's first word counts blocks, not tiles.
    """
    return Layout(len(program.dtypes) + 3, program.n_numbers)


@lru_cache(maxsize=1024)
def shape_of(n_elements: int) -> Array:
    """Give how NumPy cuts a piece.

    Returns
    -------
    numpy.ndarray of int64, shape (2 n + 2,)
        The number of blocks; where each begins, and the last one ends; and how many sums are
        complete after each.
    """
    starts: list[int] = []
    merges: list[int] = []

    def cut(start: int, n: int) -> None:
        if n <= _BLOCK:
            starts.append(start)
            merges.append(0)
            return
        half = n // 2
        half -= half % LANES
        cut(start, half)
        cut(start + half, n - half)
        merges[-1] += 1

    cut(0, n_elements)
    return np.array([len(starts), *starts, n_elements, *merges], np.int64)


def n_blocks(n_elements: int) -> int:
    """Say into how many blocks a piece is cut."""
    return int(shape_of(n_elements)[0])


def room_elements(program: Program, n_elements: int) -> int:
    """Say how much memory the blocks of a piece need, in elements of the sums' dtype."""
    return n_blocks(n_elements) * len(program.sums) * _SLOT


def n_lanes(blocks: int) -> int:
    """Say how many lanes sum so many blocks."""
    return blocks * LANES


@lru_cache(maxsize=1024)
def summing(program: Program) -> KernelSource:
    """Write the kernel that does what a program says, and sums blocks of eight lanes."""
    layout, used = layout_of(program), without_unused(program)
    kind = c_type(program.operations[program.sums[0]].dtype)
    n_arrays = len(program.dtypes)
    lines = [
        f"    const long long *own = kv_row(table, n_rows, {layout.n_words}, i / {LANES});",
        f"    const long long block = i / {LANES} - own[0], lane = i % {LANES};",
        f"    const long long *shape = (const long long *)own[{layout.address(n_arrays)}];",
        "    const long long first = shape[1 + block], n = shape[2 + block] - first;",
        f"    {kind} *room = ({kind} *)own[{layout.address(n_arrays + 1)}];",
        f"    room += block * {len(program.sums) * _SLOT};",
        *declared(program, used, layout),
    ]
    lines += [f"    {kind} sum{s} = 0;" for s in range(len(program.sums))]
    lines += [
        f"    for (long long at = lane; at < n; at += {LANES}) {{",
        "      const long long e = first + at;",
    ]
    for place in used:
        operation = program.operations[place]
        if operation.name == "load":
            value = f"a{operation.arguments[0]}[e]"
        elif operation.name == "number":
            continue
        else:
            value = value_of(operation, program)
        lines.append(f"      const {c_type(operation.dtype)} v{place} = {value};")
    lines += [f"      a{k}[e] = v{place};" for k, place in program.stores]
    for s, place in enumerate(program.sums):
        lines += [
            f"      if (at < n - n % {LANES}) sum{s} = at < {LANES} ? v{place} : "
            f"kv_add(sum{s}, v{place});",
            f"      else room[{s * _SLOT + LANES} + lane] = v{place};",
        ]
    lines += ["    }"]
    lines += [f"    room[{s * _SLOT} + lane] = sum{s};" for s in range(len(program.sums))]
    body = "\n".join(lines)
    name = "kvcoll_sum_" + blake2b(body.encode(), digest_size=6).hexdigest()
    return KernelSource(name, _PARAMETERS, body, PRELUDE)


@lru_cache(maxsize=1024)
def walking(program: Program) -> KernelSource:
    """Write the kernel that adds the blocks of each piece, one piece an index."""
    layout = layout_of(program)
    kind = c_type(program.operations[program.sums[0]].dtype)
    n_arrays, n_sums = len(program.dtypes), len(program.sums)
    body = f"""    const long long *own = table + i * {layout.n_words};
    const long long *shape = (const long long *)own[{layout.address(n_arrays)}];
    const {kind} *room = (const {kind} *)own[{layout.address(n_arrays + 1)}];
    {kind} *out = ({kind} *)own[{layout.address(n_arrays + 2)}];
    const long long n_blocks = shape[0];
    for (int s = 0; s < {n_sums}; ++s) {{
      {kind} stack[{_DEEPEST}];
      int depth = 0;
      for (long long block = 0; block < n_blocks; ++block) {{
        const long long n = shape[2 + block] - shape[1 + block];
        const {kind} *r = room + (block * {n_sums} + s) * {_SLOT};
        {kind} sum = 0;
        if (n >= {LANES}) {{
          const {kind} low = kv_add(kv_add(r[0], r[1]), kv_add(r[2], r[3]));
          const {kind} high = kv_add(kv_add(r[4], r[5]), kv_add(r[6], r[7]));
          sum = kv_add(low, high);
        }}
        for (long long k = 0; k < n % {LANES}; ++k) sum = kv_add(sum, r[{LANES} + k]);
        stack[depth++] = sum;
        for (long long k = shape[2 + n_blocks + block]; k > 0; --k) {{
          --depth;
          stack[depth - 1] = kv_add(stack[depth - 1], stack[depth]);
        }}
      }}
      out[s] = stack[0];
    }}"""
    return KernelSource(f"kvcoll_walk_{kind}_{n_sums}_{layout.n_words}", _PARAMETERS, body, PRELUDE)
