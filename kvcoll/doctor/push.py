"""Measures what a user of the store pays: a push and a pull, beside MPI_Allreduce."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from ..create import create
from ..errors import KVCollError
from ..transport import mpi
from .talk import Talk

FULL_BYTES = 100_000_000
_SMALL_ELEMENTS = 1000
_ROUNDS = 5
_SMALL_ROUNDS = 50
_BUDGET_S, _LONGEST_S = 4.0, 1.5
_FIRST_BYTES = 1_000_000
# Of a rank: the gradient, where it comes out, the replica, and MPI's scratch.
_COPIES = 5
_SHARE_OF_MEMORY = 4


def bytes_for(memory_bytes: int, ranks: int) -> int:
    """Say how large a push this host's memory allows to measure: 100 MB, or less."""
    most = memory_bytes // (_SHARE_OF_MEMORY * _COPIES * max(1, ranks))
    n_bytes = FULL_BYTES
    while n_bytes > max(most, _FIRST_BYTES):
        n_bytes //= 2
    return n_bytes // 4 * 4


def shares_memory() -> bool:
    """Say whether the ranks of this host can map the same memory; all ranks call this."""
    world = mpi.import_mpi().COMM_WORLD
    here = world.Split_type(mpi.import_mpi().COMM_TYPE_SHARED)
    shared = mpi.share_memory(here, 4096, everywhere=here) is not None
    here.Free()
    return shared


def measure(talk: Talk, n_bytes: int, limit_s: float) -> dict[str, Any]:
    """Push with a store of all ranks; all ranks call this.

    Returns
    -------
    dict
        Of this rank, in seconds: ``push_s`` and ``allreduce_s`` of `n_bytes`, ``small_s`` of
        1,000 elements, ``pull_s``. Or ``error``, the same on all ranks.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a finding of its own says it
            kv = create("dist_sync", create_limit_s=limit_s)
        with kv:
            kv.init("small", np.ones(_SMALL_ELEMENTS, np.float32))
            small = np.ones(_SMALL_ELEMENTS, np.float32)
            told = {"small_s": _median_s(talk, lambda: kv.push("small", small), _SMALL_ROUNDS)}
            first = np.ones(_FIRST_BYTES // 4, np.float32)
            kv.init("first", first)
            first_s = _median_s(talk, lambda: kv.push("first", first), _ROUNDS)
            # Where it is slow, as with several ranks on a core, a smaller one tells as much.
            most = int(_LONGEST_S / first_s) * _FIRST_BYTES
            n_bytes = max(_FIRST_BYTES, min(n_bytes, most))
            large = np.ones(n_bytes // 4, np.float32)
            out = np.empty_like(large)
            kv.init("large", large)
            told |= {
                "push_s": _median_s(talk, lambda: kv.push("large", large), _ROUNDS),
                "pull_s": _median_s(talk, lambda: kv.pull("large", out=out), _ROUNDS),
            }
            wrong = bool((out != talk.size).any())
            reduce = mpi.import_mpi().SUM
            told["allreduce_s"] = _median_s(
                talk, lambda: talk.comm.Allreduce(large, out, reduce), _ROUNDS
            )
    except KVCollError as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return told | {
        "n_bytes": n_bytes,
        "num_hosts": kv.num_hosts,
        **({"error": "a sum came out wrong"} if wrong else {}),
    }


def _median_s(talk: Talk, call: Callable[[], object], rounds: int) -> float:
    """Give the median time of a call, after one to warm up; fewer rounds if it is slow."""
    times = []
    took_s = np.zeros(1)
    for number in range(rounds + 1):
        talk.comm.Barrier()
        began_s = time.perf_counter()
        call()
        took_s[0] = time.perf_counter() - began_s
        # The slowest rank's; so that all make the same number of rounds, too.
        talk.comm.Allreduce(mpi.import_mpi().IN_PLACE, took_s, mpi.import_mpi().MAX)
        times += [float(took_s[0])] if number else []
        if took_s[0] * (number + 1) > _BUDGET_S and times:
            break
    return statistics.median(times)
