#!/usr/bin/env python3
"""Measure what `elastic=True` costs, and how long a lost rank holds up the others, on one machine.

    mpirun --with-ft ulfm -np 4 python scripts/bench_lost.py --kill 2    # Open MPI 5
    mpirun -np 4 python scripts/bench_lost.py                            # any MPI: only the cost

A rank that is killed writes down when it dies (CLOCK_MONOTONIC: one for all processes of a host);
the others are in pushes just then, and say when they know of it, and when the next push is done.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from bench_cases import new_arrays, resnet50_shapes
from mpi4py import MPI

import kvcoll
from kvcoll.errors import RankLostError

SIZES = (1_000, 1_000_000, 10_000_000)
STEPS_BEFORE = 20


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Measure what elastic=True and a loss cost.")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--kill", type=int, default=0, help="how many ranks to kill at the end")
    args = parser.parse_args()
    comm = MPI.COMM_WORLD.Dup()
    if comm.rank == 0:
        print(f"{comm.size} ranks, {os.cpu_count()} cores, float32, medians of {args.rounds}")
    for n in SIZES:
        calls = max(1, 200_000 // n)
        compare(comm, f"push of {n:,} elements", [(n,)], calls, args.rounds)
    compare(comm, "push of ResNet-50, SGD with momentum", resnet50_shapes(), 1, args.rounds)
    if args.kill:
        folder = Path(comm.bcast(tempfile.mkdtemp() if comm.rank == 0 else None))
        lose(args.kill, folder)


def compare(
    comm: MPI.Intracomm, what: str, shapes: list[tuple[int, ...]], calls: int, rounds: int
) -> None:
    """Push into an elastic store and a plain one, in turn; print medians of the slowest rank."""
    keys, grads = [f"p{number}" for number in range(len(shapes))], new_arrays(shapes, 0)
    times: dict[bool, list[float]] = {False: [], True: []}
    with ExitStack() as stack:
        stores = {
            is_elastic: stack.enter_context(kvcoll.create("dist_sync", elastic=is_elastic))
            for is_elastic in times
        }
        for kv in stores.values():
            kv.init(keys, grads)
            if len(keys) > 1:
                kv.set_optimizer("sgd", learning_rate=0.1, momentum=0.9)
        for number in range(rounds + 1):
            for is_elastic, kv in stores.items():
                comm.Barrier()
                began_s = time.perf_counter()
                for _ in range(calls):
                    kv.push(keys, grads)
                took_s = comm.allreduce((time.perf_counter() - began_s) / calls, MPI.MAX)
                if number:
                    times[is_elastic].append(took_s)
    plain_us, elastic_us = (1e6 * statistics.median(times[which]) for which in (False, True))
    if comm.rank == 0:
        ratio = elastic_us / plain_us
        print(f"{what}: {plain_us:,.1f} us, elastic {elastic_us:,.1f} us: {ratio:.3f}", flush=True)


def lose(n_lost: int, folder: Path) -> None:
    """Kill the last rank, so many times, in the midst of pushes of ResNet-50, and go on."""
    shapes = resnet50_shapes()
    keys, grads = [f"p{number}" for number in range(len(shapes))], new_arrays(shapes, 0)
    kv, moments = kvcoll.create("dist_sync", elastic=True), kvcoll.create("dist_sync")
    kv.init(keys, grads)
    kv.set_optimizer("sgd", learning_rate=0.1, momentum=0.9)
    for _ in range(n_lost):
        died = folder / str(kv.num_workers)
        for _ in range(STEPS_BEFORE):
            kv.push(keys, grads)
        if kv.rank == kv.num_workers - 1:
            died.write_text(str(time.monotonic()))
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            while True:
                kv.push(keys, grads)
        except RankLostError as error:
            lost, told_s = error, time.monotonic()
        kv.recover()
        recovered_s = time.monotonic()
        kv.push(keys, grads)
        after_s = np.array([told_s, recovered_s, time.monotonic()]) - float(died.read_text())
        every = np.zeros((kv.num_workers, 3))  # each rank adds its own row
        moments.init(died.name, every)
        every[kv.rank] = after_s
        told, recovered, pushed = moments.pushpull(died.name, every).max(axis=0)
        if kv.rank == 0:
            print(
                f"{lost}\n  after the kill: named on all ranks {told:.3f} s, recover() done "
                f"{recovered:.3f} s, next push done {pushed:.3f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
