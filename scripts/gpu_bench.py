#!/usr/bin/env python3
"""Measure what a store does on a GPU, beside the copy bandwidth of the same run.

    python scripts/gpu_bench.py --out FOLDER
    mpirun -np 2 python scripts/gpu_bench.py --ranks --out FOLDER

It needs CuPy and a GPU, and no network; matplotlib for the picture. Rules of the file: the
bars are those that the project has set itself; what is measured is a call as a user makes it,
or the piece of work of which a store's calls are made; times are medians over rounds, each of
which ends when the GPU is done. Sizes and the clock are given, so that fakes can run it, too.

Exit codes: 0 measured, whatever the bars say; 2 no GPU, or a wrong option.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from bench_cases import resnet50_shapes

import kvcoll
from kvcoll import on_gpus, optimizer
from kvcoll.arrays import Array
from kvcoll.errors import DeviceError, MissingDependencyError
from kvcoll.gpu.array import DeviceArray, as_any, as_device
from kvcoll.gpu.device import Gpus
from kvcoll.gpu_place import GpuPlace
from kvcoll.optimizer.step import Step
from kvcoll.place import Update

_FLOAT = np.dtype(np.float32)
_MOMENTUM = 0.9


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Attributes
    ----------
    n_elements : int
        Of the large arrays, float32.
    n_keys, key_elements : int
        Of the push of many small keys.
    rounds, calls : int
        How often is measured, and how many calls are in a round.
    sums : tuple of int
        Sizes of the keys that are summed over ranks, in elements.
    """

    n_elements: int = 64 << 20
    n_keys: int = 1000
    key_elements: int = 1000
    rounds: int = 11
    calls: int = 10
    sums: tuple[int, ...] = (1000, 256 << 10, 4 << 20, 64 << 20)


@dataclass(frozen=True)
class Row:
    """One thing that was measured.

    Attributes
    ----------
    name : str
    time_s : float
        The median of a call.
    n_bytes : int
        How many bytes it must read and write at least; 0 where that does not matter.
    share : float or None
        Of the copy bandwidth that was measured.
    value, bar : str
        What was measured, and the bar that it is held against, as people read them.
    is_met : bool or None
        None where there is no bar.
    """

    name: str
    time_s: float
    n_bytes: int = 0
    share: float | None = None
    value: str = ""
    bar: str = ""
    is_met: bool | None = None


class Clock:
    """Times calls that put work on a store's stream.

    Parameters
    ----------
    finish : callable
        Waits until the GPU is done.
    sizes : Sizes
    """

    def __init__(self, finish: Callable[[], None], sizes: Sizes) -> None:
        self._finish, self._sizes = finish, sizes

    def median_s(self, call: Callable[[], object]) -> float:
        """Time a call; kernels are compiled, and memory is taken, before."""
        for _ in range(2):
            call()
        self._finish()
        samples = []
        for _ in range(self._sizes.rounds):
            started_s = perf_counter()
            for _ in range(self._sizes.calls):
                call()
            self._finish()
            samples.append((perf_counter() - started_s) / self._sizes.calls)
        return statistics.median(samples)


def measure(gpus: Gpus, sizes: Sizes) -> list[Row]:
    """Measure on the first GPU of this process.

    Parameters
    ----------
    gpus : Gpus
    sizes : Sizes

    Returns
    -------
    list of Row
        The first one is the copy, by which the others are measured.
    """
    place = GpuPlace(gpus, gpus.devices[0])
    clock = Clock(place.stream.synchronize, sizes)
    rows = _bandwidths(place, clock, sizes)
    return rows + _resnet50(gpus, sizes) + _many_keys(gpus, sizes)


def _bandwidths(place: GpuPlace, clock: Clock, sizes: Sizes) -> list[Row]:
    """Measure what memory alone should limit."""
    n = sizes.n_elements
    n_bytes = n * _FLOAT.itemsize
    arrays = [_filled(place, n, 0.01 * k) for k in range(5)]
    out = arrays[4]
    copy_s = clock.median_s(lambda: place.copy(arrays[0], out))
    copy = Row("copy", copy_s, 2 * n_bytes, value=_rate(2 * n_bytes, copy_s))

    def against(name: str, time_s: float, n_passes: int, bar: float | None) -> Row:
        moved = n_passes * n_bytes
        share = (moved / time_s) / (copy.n_bytes / copy_s)
        value = f"{100 * share:.0f} % of a copy ({_rate(moved, time_s)})"
        told = "" if bar is None else f"{100 * bar:.0f} %"
        return Row(name, time_s, moved, share, value, told, None if bar is None else share >= bar)

    size = _size(n_bytes)
    rows = [copy]
    time_s = clock.median_s(lambda: place.add_lists([arrays[:4]], [out]))
    rows.append(against(f"sum of 4 x {size} to one", time_s, 5, 0.8))
    step = Step(1e-3, 0.0, 1)
    sgd = optimizer.SGD(momentum=_MOMENTUM)
    own = Update(arrays[0], arrays[1], arrays[2:3], step)
    time_s = clock.median_s(lambda: place.update(sgd, [own]))
    rows.append(against(f"SGD with momentum, {size}", time_s, 5, 0.8))
    both = Update(arrays[0], arrays[1], arrays[2:4], step)
    adam = optimizer.Adam()
    time_s = clock.median_s(lambda: place.update(adam, [both]))
    rows.append(against(f"Adam, {size}", time_s, 7, 0.8))
    lamb = optimizer.LAMB()
    time_s = clock.median_s(lambda: place.update(lamb, [both]))
    rows.append(against(f"LAMB, {size} (norms, then the step)", time_s, 10, None))
    half = np.dtype(np.float16)
    halves = [_filled(place, n, 0.5 * k, half) for k in range(2)]
    master = Update(halves[0], halves[1], [arrays[2], arrays[3]], step)
    mixed = optimizer.SGD(momentum=_MOMENTUM, multi_precision=True)
    time_s = clock.median_s(lambda: place.update(mixed, [master]))
    name = f"the same with float16 and a float32 master copy, {_size(2 * n)}"
    rows.insert(3, against(name, time_s, 5, None))
    return rows


def _resnet50(gpus: Gpus, sizes: Sizes) -> list[Row]:
    """Push and pull ResNet-50's keys, as a training does."""
    shapes = resnet50_shapes() if sizes.n_elements > 1 << 20 else [(7, 3), (5,)]
    kv, keys, grads, place = _store(gpus, shapes)
    params = kv.pull(keys)

    def step() -> None:
        kv.push(keys, grads)
        kv.pull(keys, out=params)

    step()
    before = place.launcher.n_launches
    step()
    n_launches = place.launcher.n_launches - before
    n_buckets = len(kv._plan(keys).push.buckets)
    step_s = Clock(place.stream.synchronize, sizes).median_s(step)
    value = f"{1e3 * step_s:.2f} ms, {n_launches} launches for {n_buckets} bucket(s)"
    is_met = step_s < 1e-3 and n_launches < 3 * n_buckets
    name = f"push and pull of ResNet-50's {len(keys)} keys, SGD with momentum"
    return [Row(name, step_s, value=value, bar="1 ms, under 3 launches a bucket", is_met=is_met)]


def _many_keys(gpus: Gpus, sizes: Sizes) -> list[Row]:
    """Push and pull many small keys, and one key of as many elements."""
    many = _push_and_pull_s(gpus, [(sizes.key_elements,)] * sizes.n_keys, sizes)
    one = _push_and_pull_s(gpus, [(sizes.key_elements * sizes.n_keys,)], sizes)
    rows = []
    for name, many_s, one_s in zip(("push", "pull"), many, one, strict=True):
        each_s = (many_s - one_s) / sizes.n_keys
        told = f"{name} of {sizes.n_keys:,} keys of {sizes.key_elements:,}"
        value = f"{1e6 * many_s:.0f} us, {1e6 * each_s:.2f} us a key over one key of that size"
        rows.append(Row(told, many_s, value=value, bar="1 us a key", is_met=each_s < 1e-6))
    return rows


def _push_and_pull_s(
    gpus: Gpus, shapes: Sequence[tuple[int, ...]], sizes: Sizes
) -> tuple[float, float]:
    kv, keys, grads, place = _store(gpus, shapes)
    params = kv.pull(keys)
    clock = Clock(place.stream.synchronize, sizes)
    push_s = clock.median_s(lambda: kv.push(keys, grads))
    return push_s, clock.median_s(lambda: kv.pull(keys, out=params))


def measure_ranks(sizes: Sizes) -> list[Row]:
    """Measure pushes over the GPUs of all ranks; collective, and the rows are rank 0's.

    Parameters
    ----------
    sizes : Sizes
    """
    rows = []
    with kvcoll.create("dist_device_sync") as kv:
        border = kv._border
        if border is None:
            raise DeviceError("the store is not on a GPU")
        place, size = border.place, kv.num_workers
        for n in sizes.sums:
            time_s = _sum_s(kv, place, n, sizes)
            n_bytes = n * _FLOAT.itemsize
            # Of a ring: so many of the bytes leave each GPU.
            bus = 2 * (size - 1) / size * n_bytes / time_s
            value = f"{1e6 * time_s:.0f} us, {bus / 1e9:.2f} GB/s of each GPU's link"
            hosts = f"{size} ranks on {kv.num_hosts} host(s)"
            rows.append(Row(f"push of {_size(n_bytes)} over {hosts}", time_s, n_bytes, value=value))
    return rows


def _sum_s(kv: kvcoll.KVStore, place: GpuPlace, n: int, sizes: Sizes) -> float:
    key = f"of {n}"
    kv.init(key, np.zeros(n, np.float32))
    grad = place.lend(_filled(place, n, kv.rank))
    place.stream.synchronize()
    kv.barrier()
    return Clock(place.stream.synchronize, sizes).median_s(lambda: kv.push(key, grad))


def _store(
    gpus: Gpus, shapes: Sequence[tuple[int, ...]]
) -> tuple[kvcoll.KVStore, list[int], list[Any], GpuPlace]:
    """Make a store on the first GPU, and gradients there."""
    beside = GpuPlace(gpus, gpus.devices[0])
    grads = []
    for shape in shapes:
        flat = as_device(_filled(beside, int(np.prod(shape)), 0.1))
        grads.append(beside.lend(as_any(flat.reshape(shape))))
    beside.stream.synchronize()
    kv, keys = kvcoll.create("device"), list(range(len(shapes)))
    kv.init(keys, grads)
    kv.set_optimizer("sgd", learning_rate=1e-3, momentum=_MOMENTUM)
    border = kv._border
    if border is None:
        raise DeviceError("the store is not on a GPU")
    return kv, keys, grads, border.place


def _filled(place: GpuPlace, n: int, value: float, dtype: np.dtype[Any] = _FLOAT) -> Array:
    """Take an array on the GPU of one number."""
    made = place.empty(n, dtype)
    piece: DeviceArray = as_device(made)
    step = 1 << 22
    numbers = np.full(min(n, step), value, dtype)
    for start in range(0, n, step):
        part = piece[start : start + step]
        place.upload(numbers[: part.size], part)
    return made


def _rate(n_bytes: int, time_s: float) -> str:
    return f"{n_bytes / time_s / 1e9:,.0f} GB/s"


def _size(n_bytes: int) -> str:
    if n_bytes >= 1 << 20:
        return f"{n_bytes / (1 << 20):,.0f} MB"
    return f"{n_bytes / (1 << 10):,.1f} KB"


# What is written


def about(gpus: Gpus, version: str) -> dict[str, Any]:
    """Say on what was measured.

    Parameters
    ----------
    gpus : Gpus
    version : str
        NCCL's, or empty where it was not needed.
    """
    cupy = sys.modules.get("cupy")
    return {
        "gpus": [device.name for device in gpus.devices],
        "driver_cuda": gpus.driver_version,
        "nccl": version,
        "cupy": vars(cupy).get("__version__", "") if cupy else "none: fakes",
        "numpy": np.__version__,
        "python": platform.python_version(),
        "kvcoll": kvcoll.__version__,
        "machine": platform.platform(),
    }


def table(rows: Sequence[Row]) -> str:
    """Write the rows for people."""
    lines = []
    for row in rows:
        verdict = {None: "", True: f"   met ({row.bar})", False: f"   MISSED ({row.bar})"}
        lines.append(f"{row.name:62} {row.value}{verdict[row.is_met]}")
    return "\n".join(lines)


def write(folder: Path, name: str, rows: Sequence[Row], told: dict[str, Any]) -> list[Path]:
    """Write numbers and, where matplotlib is installed, a picture.

    Parameters
    ----------
    folder : Path
    name : str
        Of the files, without their endings.
    rows : sequence of Row
    told : dict
        What `about` gave.

    Returns
    -------
    list of Path
        What was written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    numbers = folder / f"{name}.json"
    content = {"about": told, "rows": [asdict(row) for row in rows]}
    numbers.write_text(json.dumps(content, indent=1) + "\n")
    try:
        import matplotlib as mpl
    except ImportError:
        print("no picture: matplotlib is not installed")
        return [numbers]
    mpl.use("Agg")
    picture = folder / f"{name}.png"
    _draw(picture, rows, ", ".join(sorted(set(told["gpus"]))))
    return [numbers, picture]


def _draw(path: Path, rows: Sequence[Row], subtitle: str) -> None:
    from matplotlib.figure import Figure

    shares = [row for row in rows if row.share is not None] or list(rows)
    has_shares = shares[0].share is not None
    figure = Figure(figsize=(9, 1.2 + 0.5 * len(shares)), dpi=150, layout="constrained")
    axes = figure.subplots()
    names = [row.name for row in shares]
    lengths = [100 * (row.share or 0) if has_shares else 1e6 * row.time_s for row in shares]
    colors = ["#b3261e" if row.is_met is False else "#0b63ce" for row in shares]
    axes.barh(names, lengths, color=colors)
    axes.invert_yaxis()
    if has_shares:
        axes.axvline(80, color="#59636e", linestyle="--", linewidth=1)
        axes.set_xlabel("% of the bandwidth of a copy (dashed: the bar)")
    else:
        axes.set_xscale("log")
        axes.set_xlabel("microseconds a push")
    for number, row in enumerate(shares):
        axes.annotate(
            row.value, (lengths[number], number), (4, 0), textcoords="offset points", va="center"
        )
    axes.margins(x=0.45)
    axes.set_title(f"kvcoll on {subtitle}", loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, format="png")


def main(arguments: Sequence[str] | None = None, sizes: Sizes | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where to write")
    parser.add_argument(
        "--ranks", action="store_true", help="under mpirun: measure pushes over all ranks' GPUs"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="arrays of 16 MB, which a GPU's cache holds, fewer rounds",
    )
    args = parser.parse_args(arguments)
    if sizes is None:
        sizes = Sizes(4 << 20, rounds=5, sums=(1000, 4 << 20)) if args.quick else Sizes()
    try:
        gpus, version = on_gpus.find_gpus(), ""
        if args.ranks:
            version = ".".join(map(str, on_gpus.find()[1].version))
        rows = measure_ranks(sizes) if args.ranks else measure(gpus, sizes)
    except (DeviceError, MissingDependencyError) as error:
        print(f"gpu_bench.py: {error}", file=sys.stderr)
        return 2
    if args.ranks and _rank() > 0:
        return 0
    print(table(rows))
    name = "gpu_ranks" if args.ranks else "gpu_bench"
    for path in write(args.out, name, rows, about(gpus, version)):
        print(f"wrote {path}")
    return 0


def _rank() -> int:
    from mpi4py import MPI

    return MPI.COMM_WORLD.rank


if __name__ == "__main__":
    sys.exit(main())
