#!/usr/bin/env python3
"""Measure what the watchdog costs: the same pushes with its thread and without, in turn.

    mpirun -np 2 python scripts/bench_watchdog.py
    mpirun -np 2 python scripts/bench_watchdog.py --idle-s 60    # what it takes of a core

What each call writes down for it, with the thread or without, is timed by itself.
"""

from __future__ import annotations

import argparse
import statistics
import time
import timeit
from collections.abc import Callable

import numpy as np
from bench_cases import new_arrays, resnet50_shapes
from mpi4py import MPI

import kvcoll
from kvcoll.watchdog import patrol

ROUNDS = 40


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Measure what the watchdog costs.")
    parser.add_argument("--idle-s", type=float, default=0.0, help="sleep so long, count CPU time")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    args = parser.parse_args()
    comm = MPI.COMM_WORLD.Dup()
    with kvcoll.create("dist_sync") as kv:
        if args.idle_s:
            began_s = time.process_time()
            time.sleep(args.idle_s)
            used_s = time.process_time() - began_s
            say(comm, f"idle: {used_s * 1e3:.1f} ms of CPU time in {args.idle_s:g} s")
            return
        one = np.ones(1000, np.float32)
        kv.init("one", one)

        def small() -> None:
            kv.push("one", one)
            kv.pull("one", out=one)

        shapes = resnet50_shapes()
        keys = [f"p{number}" for number in range(len(shapes))]
        grads = new_arrays(shapes, 0)
        kv.init(keys, grads)
        kv.set_optimizer("sgd", learning_rate=0.1, momentum=0.9)
        compare(comm, "push and pull of 1,000 elements", small, 300, args.rounds)
        compare(comm, "push of ResNet-50", lambda: kv.push(keys, grads), 2, args.rounds)
        say(comm, f"what a call writes down: {written_ns():.0f} ns")


def compare(
    comm: MPI.Intracomm, what: str, call: Callable[[], None], calls: int, rounds: int
) -> None:
    """Time a call with the thread and without, in turn; print medians of the slowest rank.

    The ratio is the median over neighbouring rounds, between those at a quarter and at three.
    """
    times: dict[bool, list[float]] = {True: [], False: []}
    for number in range(2 * rounds + 2):
        is_on = number % 2 == 0
        (patrol.start if is_on else patrol.stop)()
        comm.Barrier()
        began_s = time.perf_counter()
        for _ in range(calls):
            call()
        took_s = comm.allreduce((time.perf_counter() - began_s) / calls, MPI.MAX)
        if number >= 2:
            times[is_on].append(took_s)
    on_s, off_s = statistics.median(times[True]), statistics.median(times[False])
    ratios = [one / other for one, other in zip(times[True], times[False], strict=True)]
    low, ratio, high = statistics.quantiles(ratios, n=4)
    say(
        comm,
        f"{what}: {on_s * 1e6:.2f} us with, {off_s * 1e6:.2f} us without; "
        f"ratio {ratio:.4f} ({low:.4f} to {high:.4f})",
    )


def written_ns() -> float:
    """Time the two attributes that a call sets for the watchdog, and one comparison."""
    setup = "class A: pass\na, n = A(), 1\na.ends_push = False"
    statement = "if not a.ends_push:\n    a.call = a\na.passed = n + 1"
    number = 1_000_000
    return min(timeit.repeat(statement, setup, number=number, repeat=7)) / number * 1e9


def say(comm: MPI.Intracomm, text: str) -> None:
    """Print on rank 0."""
    if comm.rank == 0:
        print(text, flush=True)


if __name__ == "__main__":
    main()
