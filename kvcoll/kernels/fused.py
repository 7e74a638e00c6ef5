"""One kernel for a traced program, over as many pieces of memory as a launch names.

Rules of the file: a launch's table says for each piece where its arrays lie and what its
numbers are, so that pieces with other learning rates are one launch, and no number is in the
source.
"""

from __future__ import annotations

from functools import lru_cache
from hashlib import blake2b

from ..arrays import DType
from ..gpu.kernel import KernelSource
from .prelude import LANES, PRELUDE, TILE, c_type, cast
from .table import TABLE_PARAMETERS, Layout
from .trace import Operation, Program, same_for_all, without_unused


def layout_of(program: Program) -> Layout:
    """Say what a table's rows hold: an address an array and scalar, and the numbers."""
    return Layout(len(program.dtypes) + program.n_scalars, program.n_numbers)


@lru_cache(maxsize=4096)
def kernel_of(program: Program) -> KernelSource:
    """Write the kernel that does to each element what a program says."""
    layout = layout_of(program)
    used = without_unused(program)
    loads = [place for place in used if program.operations[place].name == "load"]
    lines = [
        f"    const long long tile = i / {LANES};",
        f"    const long long *own = kv_row(table, n_rows, {layout.n_words}, tile);",
        f"    const long long first = (tile - own[0]) * {TILE} + i % {LANES};",
        *declared(program, used, layout),
    ]
    lines += _read_first(program, loads)
    lines += _each(used, program)
    source = "\n".join(lines)
    name = "kvcoll_fused_" + blake2b(source.encode(), digest_size=6).hexdigest()
    return KernelSource(name, TABLE_PARAMETERS, source, PRELUDE)


def declared(program: Program, used: list[int], layout: Layout) -> list[str]:
    """Write down where a row's arrays are, its numbers, and what is made of these alone."""
    operations = program.operations
    touched = {operations[p].arguments[0] for p in used if operations[p].name == "load"}
    lines = []
    for k in sorted(touched | {k for k, _ in program.stores}):
        kind = c_type(program.dtypes[k])
        lines.append(f"    {kind} *a{k} = ({kind} *)own[{layout.address(k)}];")
    once = same_for_all(program)
    for place in used:
        name, dtype, arguments = operations[place]
        if name == "number":
            value = number_of(dtype, f"own[{layout.number(arguments[0])}]")
        elif name == "scalar":
            value = f"*(const double *)own[{layout.address(len(program.dtypes) + arguments[0])}]"
        elif place in once:
            value = value_of(operations[place], program)
        else:
            continue
        lines.append(f"    const {c_type(dtype)} v{place} = {value};")
    return lines


def _read_first(program: Program, loads: list[int]) -> list[str]:
    """Read all of a lane's elements before the first is written, so that reads overlap."""
    lines = []
    for place in loads:
        operation = program.operations[place]
        lines.append(f"    {c_type(operation.dtype)} r{place}[{TILE // LANES}];")
    lines += [
        '    _Pragma("unroll")',
        f"    for (int k = 0; k < {TILE // LANES}; ++k) {{",
        f"      const long long e = first + k * {LANES};",
        "      if (e < own[1]) {",
    ]
    lines += [f"        r{p}[k] = a{program.operations[p].arguments[0]}[e];" for p in loads]
    return [*lines, "      }", "    }"]


def _each(used: list[int], program: Program) -> list[str]:
    lines = [
        '    _Pragma("unroll")',
        f"    for (int k = 0; k < {TILE // LANES}; ++k) {{",
        f"      const long long e = first + k * {LANES};",
        "      if (e < own[1]) {",
    ]
    once = same_for_all(program)
    for place in used:
        operation = program.operations[place]
        if place not in once:
            is_load = operation.name == "load"
            value = f"r{place}[k]" if is_load else value_of(operation, program)
            lines.append(f"        const {c_type(operation.dtype)} v{place} = {value};")
    lines += [f"        a{k}[e] = v{place};" for k, place in program.stores]
    return [*lines, "      }", "    }"]


def value_of(operation: Operation, program: Program) -> str:
    """Write an operation on what others have given."""
    name, dtype, arguments = operation
    given = [f"v{argument}" for argument in arguments]
    if name == "cast":
        return cast(given[0], program.operations[arguments[0]].dtype, dtype)
    if name == "select":
        return f"{given[0]} ? {given[1]} : {given[2]}"
    return f"kv_{name}({', '.join(given)})"


def number_of(dtype: DType, word: str) -> str:
    """Write a number whose bits are a word of a table."""
    if dtype.name == "float32":
        return f"kv_float((kv_u32){word})"
    if dtype.name == "float64":
        return f"kv_double((kv_u64){word})"
    if dtype.name == "bool":
        return f"(unsigned char)({word} & 1)"
    if dtype.name in ("float16", "bfloat16"):
        return f"{{(unsigned short){word}}}"
    return f"({c_type(dtype)}){word}"
