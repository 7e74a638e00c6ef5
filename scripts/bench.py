#!/usr/bin/env python3
"""Measure kvcoll beside what people would use in its place, all in one run.

    mpirun -np 2 python scripts/bench.py
    scripts/bench_peers.sh ~/peers     # once, for torch and MXNet
    mpirun -np 2 python scripts/bench.py --torch ~/peers/torch/bin/python \
--mxnet ~/peers/mxnet/bin/python

Rules of the file: every rank makes the same calls; rank 0 alone prints and writes.
Exit codes: 0 done, whether or not bars are met; 1 a peer or a check failed; 2 a wrong option.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TypeAlias

import mpi4py
import numpy as np
from bench_bars import bars_of
from bench_cases import OVERLAP_ELEMENTS, Cases
from bench_clock import Job, Pace, Result, Way, compare
from bench_memory import measure
from bench_peer import Peer, PeerError
from bench_report import Setting, as_json, bar_rows, header, machine, rows
from bench_wire import measure_wire
from mpi4py import MPI

import kvcoll

CASES = ("barrier", "sizes", "keys", "resnet50", "overlap", "memory", "wire")
SIZES = (1_000, 4_000, 16_000, 64_000, 250_000, 1_000_000, 4_000_000, 10_000_000, 64_000_000)
QUICK_SIZES = (1_000, 64_000, 1_000_000, 10_000_000)
PACE = Pace(sample_s=0.02, budget_s=8.0, least_rounds=11, most_rounds=61)
QUICK_PACE = Pace(sample_s=0.002, budget_s=0.3, least_rounds=3, most_rounds=9)

MakeCase: TypeAlias = Callable[[ExitStack], "tuple[Job, list[Way]]"]


def main() -> int:
    """Run the command line; return the exit code, which is the same on every rank."""
    comm = MPI.COMM_WORLD.Dup()
    args = parse_args(comm)
    hosts = len(set(comm.allgather(MPI.Get_processor_name())))
    say(comm, describe(comm, args, hosts))
    try:
        with ExitStack() as stack:
            run(comm, args, hosts, stack)
    except PeerError as error:
        say(comm, f"bench.py: error: {error}")
        return 1
    return 0


def run(comm: MPI.Intracomm, args: argparse.Namespace, hosts: int, stack: ExitStack) -> None:
    """Measure, print, write."""
    memory = measure(comm) if "memory" in args.cases else []
    wire = measure_wire(comm, OVERLAP_ELEMENTS) if "wire" in args.cases and hosts > 1 else []
    torch = mxnet = None
    if args.torch:
        torch = stack.enter_context(Peer(comm, args.torch, "bench_torch.py"))
    if args.mxnet:
        servers = ("scheduler", *["server"] * comm.size)
        mxnet = stack.enter_context(Peer(comm, args.mxnet, "bench_mxnet.py", servers))
    results: list[Result] = []
    say(comm, header())
    for make in chosen(args, Cases(comm, torch, mxnet)):
        with ExitStack() as of_case:
            job, ways = make(of_case)
            new = compare(comm, job, ways, QUICK_PACE if args.quick else PACE)
            del ways
        say(comm, rows(new, comm.size, hosts) + "\n")
        results += new
    if comm.rank == 0:
        bars = bars_of(
            results, memory, wire, ranks=comm.size, hosts=hosts, link_mbit=args.link_mbit
        )
        print("\n".join(bar_rows(bars, memory)))
        setting = setting_of(comm, args, hosts, torch, mxnet)
        args.out.mkdir(parents=True, exist_ok=True)
        with (args.out / "bench.json").open("w") as file:
            json.dump(as_json(setting, results, bars, memory, wire), file, indent=1)
        if not args.no_plots:
            from bench_plot import draw

            draw(results, args.out, subtitle(setting))
        print(f"written to {args.out}")


def chosen(args: argparse.Namespace, cases: Cases) -> Iterator[MakeCase]:
    """Give what makes each case that was asked for; memory is no case of times."""
    if "barrier" in args.cases:
        yield cases.barrier
    if "sizes" in args.cases:
        for n in args.sizes:
            yield lambda stack, n=n: cases.key(stack, n)  # type: ignore[misc]
    if "keys" in args.cases:
        yield cases.hundred_keys
    if "resnet50" in args.cases:
        yield cases.resnet50
    if "overlap" in args.cases:
        yield cases.overlap


def parse_args(comm: MPI.Intracomm) -> argparse.Namespace:
    """Read the command line; a mistake ends every rank and is told once."""
    parser = argparse.ArgumentParser(
        description="Measure kvcoll beside what people would use in its place."
    )
    parser.add_argument("--out", type=Path, default=Path("out/bench"), metavar="FOLDER")
    parser.add_argument("--quick", action="store_true", help="fewer sizes, seconds, not minutes")
    parser.add_argument("--sizes", type=int, nargs="+", metavar="ELEMENTS", help="of one key")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--torch", metavar="PYTHON", help="the Python of an environment with torch")
    parser.add_argument("--mxnet", metavar="PYTHON", help="... with MXNet 1.9.1")
    parser.add_argument(
        "--link-mbit", type=float, help="what each host's link carries each way, for P6"
    )
    parser.add_argument("--no-plots", action="store_true")
    with ExitStack() as quiet:
        if comm.rank:
            nowhere = quiet.enter_context(open(os.devnull, "w"))
            quiet.enter_context(contextlib.redirect_stdout(nowhere))
            quiet.enter_context(contextlib.redirect_stderr(nowhere))
        args = parser.parse_args()
        hosts = len(set(comm.allgather(MPI.Get_processor_name())))
        for name, python in (("--torch", args.torch), ("--mxnet", args.mxnet)):
            if python and hosts > 1:
                parser.error(f"{name} runs on one host, and there are {hosts}")
            if python and not comm.bcast(shutil.which(python)):
                parser.error(f"{name}: there is no program {python}")
    args.sizes = args.sizes or (QUICK_SIZES if args.quick else SIZES)
    return args


def describe(comm: MPI.Intracomm, args: argparse.Namespace, hosts: int) -> str:
    """Say in one line what is measured where."""
    where = machine()
    left_out = [name for name in ("torch", "mxnet") if not vars(args)[name]]
    missing = f"; without {' and '.join(left_out)}" if left_out else ""
    return (
        f"{comm.size} ranks on {hosts} host(s), {where['cores']} cores each, {where['cpu']}, "
        f"load {where['load_average'][0]:.1f}, {mpi_name()}{missing}; medians over rounds, "
        "slowest rank; / is this way over the best of the peer\n"
    )


def setting_of(
    comm: MPI.Intracomm,
    args: argparse.Namespace,
    hosts: int,
    torch: Peer | None,
    mxnet: Peer | None,
) -> Setting:
    """Gather what else belongs to a result."""
    versions = {
        "kvcoll": kvcoll.__version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "mpi4py": mpi4py.__version__,
    }
    versions |= {"torch": torch.version} if torch else {}
    versions |= {"mxnet": mxnet.version} if mxnet else {}
    return Setting(
        command=f"mpirun -np {comm.size} python {shlex.join(sys.argv)}",
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        mpi=mpi_name(),
        versions=versions,
        ranks=comm.size,
        hosts=hosts,
    )


def mpi_name() -> str:
    """Name the MPI in use, e.g. 'Open MPI 5.0.11'."""
    name, version = MPI.get_vendor()
    return f"{name} {'.'.join(map(str, version))}"


def subtitle(setting: Setting) -> str:
    """Say below a picture where it was measured."""
    where = machine()
    hosts = f" on {setting.hosts} hosts" if setting.hosts > 1 else ""
    versions = setting.versions
    others = "".join(
        f", {shown} {versions[name]}"
        for name, shown in (("torch", "torch"), ("mxnet", "MXNet"))
        if name in versions
    )
    return (
        f"{setting.ranks} ranks{hosts}, {where['cores']} cores of {where['cpu']}; {setting.mpi}, "
        f"NumPy {versions['numpy']}{others}; {setting.date[:10]}"
    )


def say(comm: MPI.Intracomm, text: str) -> None:
    """Print on rank 0, at once."""
    if comm.rank == 0:
        print(text, flush=True)


def abort_all(kind: type[BaseException], error: BaseException, trace: object) -> None:
    """End all ranks when one fails, as the others wait for it."""
    sys.__excepthook__(kind, error, getattr(error, "__traceback__", None))
    sys.stderr.flush()
    MPI.COMM_WORLD.Abort(1)


if __name__ == "__main__":
    sys.excepthook = abort_all
    sys.exit(main())
