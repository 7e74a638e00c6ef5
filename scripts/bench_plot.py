"""The pictures of scripts/bench.py: dark text on a white card, so that any page can show them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import matplotlib as mpl
from bench_cases import IN_PLACE, OWN, PLAIN
from bench_clock import Job, Result
from bench_report import show_s

mpl.use("Agg")
from matplotlib import pyplot as plt

_INK, _GREY, _GRID = "#1f2328", "#59636e", "#e4e7eb"
# By role: kvcoll's are the strong ones. The signs tell them apart without colours, too.
_COLORS: Final = {
    "kvcoll": "#0b63ce",
    "raw": "#59636e",
    "by hand": "#c2571a",
    "torch": "#8250df",
    "MXNet": "#b3261e",
}
_STYLE: Final[Any] = {
    "font.family": "sans-serif",
    "font.size": 11,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _GREY,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "xtick.color": _GREY,
    "ytick.color": _GREY,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "legend.frameon": False,
}


def draw(results: Sequence[Result], folder: Path, subtitle: str) -> list[Path]:
    """Draw what was measured.

    Parameters
    ----------
    results : sequence of Result
    folder : Path
    subtitle : str
        Where it was measured.

    Returns
    -------
    list of Path
        The PNG files.
    """
    paths = []
    with mpl.rc_context(_STYLE):
        key = [r for r in results if r.job.case == "key"]
        if key:
            paths.append(_draw_sizes(key, folder / "sizes.png", subtitle))
        for case in ("keys", "resnet50"):
            of_case = [r for r in results if r.job.case == case]
            if of_case:
                paths.append(_draw_ways(of_case, folder / f"{case}.png", subtitle))
    return paths


def _lines(results: Sequence[Result]) -> list[tuple[str, str, str, dict[int, float]]]:
    """Give for each line its name, colour, style and medians by size; by hand the best."""
    lines = []
    for name, role, ways, style in (
        ("kvcoll, own arrays and views", "kvcoll", (OWN,), "o-"),
        ("kvcoll, plain arrays", "kvcoll", (PLAIN,), "o--"),
        (IN_PLACE, "raw", (IN_PLACE,), "s-"),
        ("MPI by hand: Allreduce and copies", "by hand", None, "D-"),
        ("torch gloo all_reduce", "torch", None, "^-"),
        ("MXNet dist_sync", "MXNet", None, "v"),
    ):
        found: dict[int, float] = {}
        for r in results:
            if r.role == role and (ways is None or r.way in ways):
                n = r.job.n_elements
                found[n] = min(r.median_s, found.get(n, r.median_s))
        if found:
            lines.append((name, _COLORS[role], style, dict(sorted(found.items()))))
    return lines


def _draw_sizes(results: Sequence[Result], path: Path, subtitle: str) -> Path:
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 5.2))
    lines = _lines(results)
    base = next((found for name, _, _, found in lines if name.startswith("MPI by hand")), {})
    for name, color, style, found in lines:
        look: dict[str, Any] = {"color": color, "lw": 1.5, "ms": 5.5, "label": name}
        if color == _COLORS["kvcoll"]:
            look |= {"lw": 2.4, "zorder": 3}
        if "--" in style:
            look["mfc"] = "white"
        left.loglog(list(found), [s * 1e3 for s in found.values()], style, **look)
        shared = [n for n in found if n in base]
        right.semilogx(shared, [base[n] / found[n] for n in shared], style, **look)
    left.set_title("Time: push and pull of one float32 key")
    left.set_ylabel("milliseconds (median)")
    right.set_title("Speed over MPI by hand (higher is better)")
    right.set_ylim(bottom=0)
    right.yaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    sizes = sorted({r.job.n_elements for r in results})
    for axes in (left, right):
        axes.set_xlabel("elements")
        axes.xaxis.set_major_formatter(lambda value, _: _short(value))
        axes.set_xlim(sizes[0] / 1.4, sizes[-1] * 1.4)
        axes.minorticks_off()
    left.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    handles, labels = left.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="lower center", ncols=3, handlelength=3.2, bbox_to_anchor=(0.5, 0.045)
    )
    return _save(figure, path, subtitle, bottom=0.17)


def _draw_ways(results: Sequence[Result], path: Path, subtitle: str) -> Path:
    """Draw the ways of one case, the quickest first: bars, or dots if they are decades apart."""
    ordered = sorted(results, key=lambda r: r.median_s)
    shortest_s, longest_s = ordered[0].quartiles_s[0], ordered[-1].quartiles_s[2]
    decades = longest_s > 15 * shortest_s
    figure, axes = plt.subplots(figsize=(10, 1.75 + 0.5 * len(ordered)))
    for place, result in enumerate(ordered):
        low_s, median_s, high_s = result.quartiles_s
        ours = result.role == "kvcoll"
        color = _COLORS[result.role]
        if decades:
            axes.plot(median_s * 1e3, place, "o", color=color, ms=11)
        else:
            axes.barh(place, median_s * 1e3, 0.66, color=color, alpha=1 if ours else 0.72)
        spread = [[(median_s - low_s) * 1e3], [(high_s - median_s) * 1e3]]
        axes.errorbar(median_s * 1e3, place, xerr=spread, color=_INK, lw=1.2, capsize=3)
        axes.annotate(
            show_s(median_s),
            (high_s * 1e3, place),
            xytext=(10, 0),
            textcoords="offset points",
            va="center",
            weight="bold" if ours else "normal",
        )
    axes.set_yticks(range(len(ordered)), [_way_name(r) for r in ordered])
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    if decades:
        axes.set_xscale("log")
        axes.set_xlim(shortest_s * 1e3 / 1.6, longest_s * 1e3 * 2.5)
    else:
        axes.set_xlim(0, longest_s * 1e3 * 1.15)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("milliseconds (median and quartiles; lower is better)")
    figure.text(0.012, 0.985, _title(results[0].job), weight="bold", fontsize=12, va="top")
    return _save(figure, path, subtitle, bottom=0.04, top=0.94)


def _title(job: Job) -> str:
    if job.case == "resnet50":
        return (
            f"ResNet-50's {job.n_keys} gradients, {job.n_bytes / 1e6:.0f} MB: "
            "summed over the ranks, SGD with momentum"
        )
    return f"Push and pull of {job.title}, float32"


def _way_name(result: Result) -> str:
    return "kvcoll, plain arrays" if result.way == PLAIN else result.way


def _short(n: float) -> str:
    for factor, letter in ((1e6, "M"), (1e3, "k")):
        if n >= factor:
            return f"{n / factor:g} {letter}"
    return f"{n:g}"


def _save(figure: Any, path: Path, subtitle: str, *, bottom: float, top: float = 1) -> Path:
    figure.text(0.012, 0.012, subtitle, color=_GREY, fontsize=8.5)
    figure.tight_layout(rect=(0, bottom, 1, top))
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path
