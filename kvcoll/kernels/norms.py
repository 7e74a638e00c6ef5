"""Norms of keys and what they make of a step, on the GPU, in the very order of the host.

NumPy adds pairwise: blocks of up to 128 elements by eight running sums, then the blocks in a
tree. Optimizers cut a key into pieces, and add the pieces' sums one after the other, in float64.
On a GPU eight lanes take a block, one lane a branch of the tree of a piece, one the branches of
a piece, and one the pieces of a key, which it then makes the factor of the key's step of.

Rules of the file: what one kernel writes the next one reads, and the host sees none of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from hashlib import blake2b

import numpy as np

from ..arrays import Array, DType
from ..gpu.kernel import Access, KernelSource, Parameter
from .fused import declared, number_of, value_of
from .prelude import PRELUDE, c_type
from .table import Layout
from .trace import Program, same_for_all, without_unused

_BLOCK = 128
#: How many elements at most are a branch, which one lane walks: as many blocks as a piece of the
#: host's has branches, about.
_BRANCH = 2048
#: How many lanes sum a block.
LANES = 8
#: Of each block and sum: eight running sums, and what is left after the last eight elements.
SLOT = 2 * LANES
_DEEPEST = 24
_AHEAD = 8  # sums of pieces that are read at once, as reads wait for one another otherwise

_PARAMETERS = (
    Parameter("long long", "table", Access.READ),
    Parameter("long long", "n_rows", Access.VALUE),
)

#: What a row of pieces holds after the addresses of its arrays: addresses of its shape, of room
#: for its blocks and for its branches, of its sums, and the number of branches before it.
OF_PIECE = SHAPE, BLOCKS, BRANCHES, SUMS, FIRST_BRANCH = (0, 1, 2, 3, 4)
#: Of a row of keys: where the sums of its pieces are, and where its factor goes.
OF_KEY = KEY_SUMS, FACTOR = (0, 1)


def layout_of(program: Program) -> Layout:
    """Say what a row of pieces holds; its first word counts blocks, not tiles."""
    return Layout(len(program.dtypes) + len(OF_PIECE), program.n_numbers)


def key_layout_of(program: Program) -> Layout:
    """Say what a row of keys holds; its second word counts pieces."""
    return Layout(len(OF_KEY), program.n_numbers)


@lru_cache(maxsize=1024)
def shape_of(n_elements: int) -> Array:
    """Give how NumPy cuts a piece.

    Returns
    -------
    numpy.ndarray of int64, shape (2 n + 2 m + 4,)
        The number of blocks, n, and of branches, m; where each block begins, and the last one
        ends; how many sums of its branch are complete after each; the first block of each
        branch, and n; how many sums of the piece are complete after each branch.
    """
    starts: list[int] = []
    merges: list[int] = []
    firsts: list[int] = []
    joins: list[int] = []

    def cut(start: int, n: int, *, inside: bool) -> None:
        if not inside and n <= _BRANCH:
            inside = True
            firsts.append(len(starts))
            joins.append(0)
        if n <= _BLOCK:
            starts.append(start)
            merges.append(0)
            return
        half = n // 2
        half -= half % LANES
        cut(start, half, inside=inside)
        cut(start + half, n - half, inside=inside)
        (merges if inside else joins)[-1] += 1

    cut(0, n_elements, inside=False)
    counts = len(starts), len(firsts)
    words = [*counts, *starts, n_elements, *merges, *firsts, len(starts), *joins]
    return np.array(words, np.int64)


def n_lanes(blocks: int) -> int:
    """Say how many lanes sum so many blocks."""
    return blocks * LANES


@lru_cache(maxsize=1024)
def summing(program: Program) -> KernelSource:
    """Write the kernel that does what a program says, and sums blocks of eight lanes."""
    layout, used, once = layout_of(program), without_unused(program), same_for_all(program)
    kind = c_type(program.operations[program.sums[0]].dtype)
    n_arrays = len(program.dtypes)
    lines = [
        f"    const long long *own = kv_row(table, n_rows, {layout.n_words}, i / {LANES});",
        f"    const long long block = i / {LANES} - own[0], lane = i % {LANES};",
        f"    const long long *shape = (const long long *)own[{layout.address(n_arrays + SHAPE)}];",
        "    const long long first = shape[2 + block], n = shape[3 + block] - first;",
        f"    {kind} *room = ({kind} *)own[{layout.address(n_arrays + BLOCKS)}];",
        f"    room += block * {len(program.sums) * SLOT};",
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
        elif place in once:
            continue
        else:
            value = value_of(operation, program)
        lines.append(f"      const {c_type(operation.dtype)} v{place} = {value};")
    lines += [f"      a{k}[e] = v{place};" for k, place in program.stores]
    for s, place in enumerate(program.sums):
        lines += [
            f"      if (at < n - n % {LANES}) sum{s} = at < {LANES} ? v{place} : "
            f"kv_add(sum{s}, v{place});",
            f"      else room[{s * SLOT + LANES} + lane] = v{place};",
        ]
    lines += ["    }"]
    lines += [f"    room[{s * SLOT} + lane] = sum{s};" for s in range(len(program.sums))]
    body = "\n".join(lines)
    name = "kvcoll_sum_" + blake2b(body.encode(), digest_size=6).hexdigest()
    return KernelSource(name, _PARAMETERS, body, PRELUDE)


@lru_cache(maxsize=1024)
def folding(program: Program) -> KernelSource:
    """Write the kernel that adds the blocks of each branch, one branch an index."""
    layout, n_sums = layout_of(program), len(program.sums)
    kind = c_type(program.operations[program.sums[0]].dtype)
    n_arrays = len(program.dtypes)
    count = layout.address(n_arrays + FIRST_BRANCH)
    of_block = f"""const {kind} *r = room + (block * {n_sums} + s) * {SLOT};
        const long long n = shape[3 + block] - shape[2 + block];
        {kind} sum = 0;
        if (n >= {LANES}) {{
          const {kind} low = kv_add(kv_add(r[0], r[1]), kv_add(r[2], r[3]));
          const {kind} high = kv_add(kv_add(r[4], r[5]), kv_add(r[6], r[7]));
          sum = kv_add(low, high);
        }}
        for (long long k = 0; k < n % {LANES}; ++k) sum = kv_add(sum, r[{LANES} + k]);"""
    body = f"""    const long long *at = kv_row(table + {count}, n_rows, {layout.n_words}, i);
    const long long *own = at - {count};
    const long long branch = i - at[0];
    const long long *shape = (const long long *)own[{layout.address(n_arrays + SHAPE)}];
    const {kind} *room = (const {kind} *)own[{layout.address(n_arrays + BLOCKS)}];
    {kind} *out = ({kind} *)own[{layout.address(n_arrays + BRANCHES)}] + branch * {n_sums};
    const long long *merges = shape + 3 + shape[0];
    const long long *firsts = merges + shape[0];
    for (int s = 0; s < {n_sums}; ++s) {{
{_walked(kind, "block", "firsts[branch]", "firsts[branch + 1]", of_block, "merges[block]")}
      out[s] = stack[0];
    }}"""
    name = f"kvcoll_fold_{kind}_{n_sums}_{layout.n_words}_{n_arrays}"
    return KernelSource(name, _PARAMETERS, body, PRELUDE)


@lru_cache(maxsize=1024)
def walking(program: Program) -> KernelSource:
    """Write the kernel that adds the branches of each piece, one piece an index."""
    layout, n_sums = layout_of(program), len(program.sums)
    kind = c_type(program.operations[program.sums[0]].dtype)
    n_arrays = len(program.dtypes)
    of_branch = f"const {kind} sum = branches[branch * {n_sums} + s];"
    body = f"""    const long long *own = table + i * {layout.n_words};
    const long long *shape = (const long long *)own[{layout.address(n_arrays + SHAPE)}];
    const {kind} *branches = (const {kind} *)own[{layout.address(n_arrays + BRANCHES)}];
    {kind} *out = ({kind} *)own[{layout.address(n_arrays + SUMS)}];
    const long long *joins = shape + 4 + 2 * shape[0] + shape[1];
    for (int s = 0; s < {n_sums}; ++s) {{
{_walked(kind, "branch", "0", "shape[1]", of_branch, "joins[branch]")}
      out[s] = stack[0];
    }}"""
    name = f"kvcoll_walk_{kind}_{n_sums}_{layout.n_words}_{n_arrays}"
    return KernelSource(name, _PARAMETERS, body, PRELUDE)


def _walked(kind: str, one: str, first: str, end: str, read: str, complete: str) -> str:
    """Write the walk of a tree: what is read goes on a stack, and what is complete is added."""
    return f"""      {kind} stack[{_DEEPEST}];
      int depth = 0;
      for (long long {one} = {first}; {one} < {end}; ++{one}) {{
        {read}
        stack[depth++] = sum;
        for (long long k = {complete}; k > 0; --k) {{
          --depth;
          stack[depth - 1] = kv_add(stack[depth - 1], stack[depth]);
        }}
      }}"""


@lru_cache(maxsize=1024)
def trusting(program: Program, kind: DType, sums: tuple[int, int]) -> KernelSource:
    """Write the kernel that adds the pieces of each key, and makes its factor, a key an index.

    Parameters
    ----------
    program : Program
        Of `trace_trust`.
    kind : numpy.dtype
        Of the pieces' sums.
    sums : (int, int)
        Which of them are the program's two arrays.
    """
    layout, n_sums, c_kind = key_layout_of(program), len(sums), c_type(kind)
    read, ahead = f"next[k * {n_sums} + s]", f"sums[(piece + k) * {n_sums} + s]"
    lines = [
        f"    const long long *own = table + i * {layout.n_words};",
        f"    const {c_kind} *sums = (const {c_kind} *)own[{layout.address(KEY_SUMS)}];",
        "    const long long n_pieces = own[1];",
        f"    double total[{n_sums}] = {{0}};",
        f"    for (long long piece = 0; piece < n_pieces; piece += {_AHEAD}) {{",
        f"      {c_kind} next[{_AHEAD * n_sums}];",
        '      _Pragma("unroll")',
        f"      for (int k = 0; k < {_AHEAD}; ++k) if (piece + k < n_pieces)",
        f"        for (int s = 0; s < {n_sums}; ++s) {read} = {ahead};",
        '      _Pragma("unroll")',
        f"      for (int k = 0; k < {_AHEAD}; ++k) if (piece + k < n_pieces)",
        f"        for (int s = 0; s < {n_sums}; ++s) total[s] = kv_add(total[s], (double){read});",
        "    }",
        *_factor(program, layout, sums),
    ]
    body = "\n".join(lines)
    name = "kvcoll_trust_" + blake2b(body.encode(), digest_size=6).hexdigest()
    return KernelSource(name, _PARAMETERS, body, PRELUDE)


def _factor(program: Program, layout: Layout, sums: Sequence[int]) -> list[str]:
    lines = []
    for place in without_unused(program):
        operation = program.operations[place]
        name, dtype, arguments = operation
        if name == "load":
            value = f"total[{sums[arguments[0]]}]"
        elif name == "number":
            value = number_of(dtype, f"own[{layout.number(arguments[0])}]")
        else:
            value = value_of(operation, program)
        lines.append(f"    const {c_type(dtype)} v{place} = {value};")
    ((_, result),) = program.stores
    return [*lines, f"    *(double *)own[{layout.address(FACTOR)}] = v{result};"]
