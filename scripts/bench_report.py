"""What scripts/bench.py says: tables for people, and the same as JSON with all samples."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench_bars import Bar
from bench_clock import Result
from bench_memory import Memory
from bench_wire import Wire

PEER_ROLES = ("raw", "by hand", "torch", "MXNet")
_COLUMNS = (
    ("case", 28),
    ("way", 44),
    ("dtype", 8),
    ("bytes", 12),
    ("ranks", 6),
    ("hosts", 6),
    ("warm-up", 8),
    ("median", 9),
    ("quartiles", 18),
    *((f"/ {role}", 10) for role in PEER_ROLES),
)


@dataclass(frozen=True)
class Setting:
    """Where and how it was measured.

    Attributes
    ----------
    command, date : str
    mpi : str
    versions : dict of str to str
    ranks, hosts : int
    """

    command: str
    date: str
    mpi: str
    versions: dict[str, str]
    ranks: int
    hosts: int


def ratios(result: Result, of_case: Sequence[Result]) -> dict[str, float]:
    """Divide a median by that of the best way of each peer.

    Parameters
    ----------
    result : Result
    of_case : sequence of Result
        All ways of the same case.
    """
    best = {
        role: min((r.median_s for r in of_case if r.role == role), default=0.0)
        for role in PEER_ROLES
    }
    return {role: result.median_s / best_s for role, best_s in best.items() if best_s > 0}


def header() -> str:
    """Give the head of the table."""
    names = "".join(_cell(name, width) for name, width in _COLUMNS).rstrip()
    return f"{names}\n{'-' * len(names)}"


def rows(of_case: Sequence[Result], ranks: int, hosts: int) -> str:
    """Give the rows of one case."""
    return "\n".join(_row(result, of_case, ranks, hosts) for result in of_case)


def bar_rows(bars: Sequence[Bar], memory: Sequence[Memory]) -> Iterator[str]:
    """Give a line a bar, and what the memory is made of."""
    for bar in bars:
        sign = ">=" if bar.at_least else "<="
        verdict = "met, by" if bar.met else "MISSED by"
        yield (
            f"{bar.name:8}{bar.what:84}{bar.value:9.3g} {sign} {bar.limit:<7.3g} {bar.unit:4}"
            f"{verdict} {abs(bar.margin):.0%}"
        )
    for one in memory:
        parts = asdict(one) | {"beyond_bytes": one.beyond_bytes}
        shown = ", ".join(
            f"{name.removesuffix('_bytes')} {n / 2**20:.0f}"
            for name, n in parts.items()
            if n != one.way
        )
        yield f"memory a rank in MiB, {one.way}: {shown}"


def show_s(seconds: float) -> str:
    """Show a time with three digits and its unit."""
    for factor, unit in ((1e6, "us"), (1e3, "ms")):
        if seconds * factor < 999.5:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds:.3g} s"


def as_json(
    setting: Setting,
    results: Sequence[Result],
    bars: Sequence[Bar],
    memory: Sequence[Memory],
    wire: Sequence[Wire] = (),
) -> dict[str, Any]:
    """Give everything that was measured, as JSON takes it."""
    return {
        **asdict(setting),
        "machine": machine(),
        "results": [_result_as_json(r, results, setting) for r in results],
        "bars": [asdict(bar) | {"met": bar.met, "margin": bar.margin} for bar in bars],
        "wire": [asdict(one) for one in wire],
        "memory": [asdict(one) | {"beyond_bytes": one.beyond_bytes} for one in memory],
    }


def machine() -> dict[str, Any]:
    """Say what machine rank 0 is on, and how busy it has been."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.machine(),
        "cores": os.cpu_count(),
        "cores_of_rank_0": sorted(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": platform.release(),
        "load_average": list(os.getloadavg()),
    }


def _result_as_json(result: Result, results: Sequence[Result], setting: Setting) -> dict[str, Any]:
    low_s, median_s, high_s = result.quartiles_s
    return {
        **asdict(result.job),
        "bytes": result.job.n_bytes,
        "way": result.way,
        "role": result.role,
        "ranks": setting.ranks,
        "hosts": setting.hosts,
        "warm_up_calls": result.warm_up,
        "rounds": len(result.samples_s),
        "calls_a_sample": result.calls,
        "median_s": median_s,
        "quartiles_s": [low_s, high_s],
        "samples_s": result.samples_s,
        "ratios": ratios(result, [r for r in results if r.job == result.job]),
    }


def _row(result: Result, of_case: Sequence[Result], ranks: int, hosts: int) -> str:
    low_s, median_s, high_s = result.quartiles_s
    ratio = ratios(result, of_case)
    cells = (
        result.job.title if result is of_case[0] else "",
        result.way,
        result.job.dtype if result.job.n_bytes else "",
        f"{result.job.n_bytes:,}",
        ranks,
        hosts,
        result.warm_up,
        show_s(median_s),
        f"{show_s(low_s)}-{show_s(high_s)}",
        *(f"{ratio[role]:.2f}" if role in ratio else "" for role in PEER_ROLES),
    )
    pairs = zip(cells, _COLUMNS, strict=True)
    return "".join(_cell(str(cell), width) for cell, (_, width) in pairs).rstrip()


def _cell(text: str, width: int) -> str:
    return f"{text:{width}}"
