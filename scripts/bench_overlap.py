"""How much of the communication hides behind computing: a step with and without overlap.

The step pushes one key, computes for as long as push and pull take by themselves, and
pulls. Rules of the file: computing is NumPy in cache, one thread, and lets go of the
interpreter as training does; how long it takes is measured first, on the slowest rank,
and is the same number of rounds on all ranks and in all ways.
"""

from __future__ import annotations

import math
from contextlib import ExitStack
from time import perf_counter
from typing import TYPE_CHECKING, Any, final

import numpy as np
from bench_clock import Job, OwnWay, Way

import kvcoll

if TYPE_CHECKING:
    from mpi4py import MPI

ALONE, COMPUTE = "push and pull alone", "computing alone"
IN_LINE, OVERLAPPED = "step in line", "step with overlap"
_TRIALS = 5
_CACHED_ELEMENTS = 16_384


@final
class Computing:
    """Work for one core that is as long as a given time, on the slowest rank."""

    def __init__(self) -> None:
        self._numbers = np.linspace(0, 1, _CACHED_ELEMENTS)
        self._out = np.empty_like(self._numbers)
        self._rounds = 1

    def last_for(self, comm: MPI.Intracomm, seconds: float) -> None:
        """Find how many rounds take so long; collective."""
        self._rounds = 200
        for _ in range(_TRIALS):  # in ever longer runs, as short ones are quicker than they count
            comm.Barrier()
            took_s = max(comm.allgather(_seconds(self.run)))
            self._rounds = max(1, round(self._rounds * seconds / took_s))

    def run(self) -> None:
        """Compute."""
        for _ in range(self._rounds):
            np.sin(self._numbers, out=self._out)


def overlap(comm: MPI.Intracomm, stack: ExitStack, n: int) -> tuple[Job, list[Way]]:
    """Make the ways of a step with one key of `n` elements of float32."""
    stores = [
        stack.enter_context(kvcoll.create("dist_sync", comm=comm, overlap=on))
        for on in (False, True)
    ]
    value = np.full(n, comm.rank + 1, np.float32)
    total = comm.size * (comm.size + 1) // 2
    outs = [np.zeros(n, np.float32) for _ in stores]
    for kv, out in zip(stores, outs, strict=True):
        kv.init("w", out)
    computing = Computing()

    def step(kv: kvcoll.KVStore, out: Any, compute: bool) -> None:
        kv.push("w", value)
        if compute:
            computing.run()
        kv.pull("w", out=out)

    def alone() -> None:
        step(stores[0], outs[0], compute=False)

    samples = []
    for _ in range(_TRIALS):
        comm.Barrier()
        samples.append(max(comm.allgather(_seconds(alone))))
    computing.last_for(comm, float(np.median(samples[1:])))
    ways: list[Way] = [
        OwnWay(ALONE, "kvcoll", alone, lambda: bool(np.all(outs[0] == total))),
        OwnWay(COMPUTE, "kvcoll", computing.run),
        OwnWay(IN_LINE, "kvcoll", lambda: step(stores[0], outs[0], compute=True)),
        OwnWay(
            OVERLAPPED,
            "kvcoll",
            lambda: step(stores[1], outs[1], compute=True),
            lambda: bool(np.all(outs[1] == total)),
        ),
    ]
    return Job("overlap", f"{n:,} beside computing", 1, n), ways


def hidden(alone_s: float, compute_s: float, together_s: float) -> float:
    """Give the share of the communication that took no time of its own."""
    if math.isclose(alone_s, 0):
        return 0.0
    return (alone_s + compute_s - together_s) / alone_s


def _seconds(call: Any) -> float:
    began_s = perf_counter()
    call()
    return perf_counter() - began_s
