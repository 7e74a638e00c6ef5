"""A short measurement of push and pull over sizes, beside MPI_Allreduce."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np

from .._version import __version__
from ..create import create
from ..errors import LaunchError, MissingDependencyError
from ..transport import mpi
from ..transport.launcher import name_of_library
from .checks_net import micro
from .findings import counted

if TYPE_CHECKING:
    from mpi4py import MPI

SIZES = (1_000, 10_000, 100_000, 1_000_000, 10_000_000)
_BUDGET_S, _MOST_ROUNDS, _LEAST_ROUNDS = 0.6, 200, 9


@dataclass(frozen=True)
class Row:
    """Medians of one size, in seconds, of the slowest rank.

    Attributes
    ----------
    n_elements : int
        Of float32.
    push_pull_s : float
        A push of a plain array and a pull.
    own_arrays_s : float
        A push of the array that `KVStore.empty` gave; views need no pull.
    allreduce_s : float
        MPI_Allreduce.
    """

    n_elements: int
    push_pull_s: float
    own_arrays_s: float
    allreduce_s: float


def run(sizes: Sequence[int], *, as_json: bool) -> int:
    """Measure and print; all ranks call this.

    Returns
    -------
    int
        The exit code: 1 without an MPI, or under the launcher of another.
    """
    try:
        comm = mpi.default_communicator()
    except (MissingDependencyError, LaunchError) as error:
        print(f"kvcoll bench: {error}")
        return 1
    rows = []
    with create("dist_sync") as kv:
        if comm.rank == 0 and not as_json:
            library = name_of_library(mpi.import_mpi().Get_library_version())
            ranks, hosts = counted(comm.size, "rank"), counted(kv.num_hosts, "host")
            print(f"kvcoll {__version__}: {ranks} on {hosts}, {library}, float32\n{_HEADER}")
        for key, n in enumerate(sizes):
            value = np.ones(n, np.float32)
            out = np.empty_like(value)
            kv.init(key, value)

            def push_pull(key: int = key, value: object = value, out: object = out) -> None:
                kv.push(key, value)
                kv.pull(key, out=out)

            by_hand = _median_s(comm, lambda v=value, o=out: comm.Allreduce(v, o))  # type: ignore[misc]
            plain = _median_s(comm, push_pull)
            own = kv.empty(key)
            own[...] = value
            owned = _median_s(comm, lambda k=key, o=own: kv.push(k, o))  # type: ignore[misc]
            rows.append(Row(n, plain, owned, by_hand))
            if comm.rank == 0 and not as_json:
                print(_line(rows[-1]), flush=True)
        setting = {"kvcoll": __version__, "ranks": comm.size, "hosts": kv.num_hosts}
    if comm.rank == 0 and as_json:
        library = mpi.import_mpi().Get_library_version()
        told = setting | {"library": library, "rows": [asdict(row) for row in rows]}
        print(json.dumps(told, indent=1), flush=True)
    return 0


_HEADER = f"{'elements':>12} {'push + pull':>14} {'own arrays':>14} {'MPI_Allreduce':>14}"


def _line(row: Row) -> str:
    times = (row.push_pull_s, row.own_arrays_s, row.allreduce_s)
    return f"{row.n_elements:>12,} " + " ".join(f"{micro(one):>14}" for one in times)


def _median_s(comm: MPI.Intracomm, call: Callable[[], object]) -> float:
    """Give the median over rounds; after two to warm up it is decided how many there are."""
    took_s, times = np.zeros(1), list[float]()
    rounds = _LEAST_ROUNDS
    number = -2
    while number < rounds:
        comm.Barrier()
        began_s = time.perf_counter()
        call()
        took_s[0] = time.perf_counter() - began_s
        comm.Allreduce(mpi.import_mpi().IN_PLACE, took_s, mpi.import_mpi().MAX)
        number += 1
        if number > 0:
            times.append(float(took_s[0]))
        else:
            rounds = int(min(_MOST_ROUNDS, max(_LEAST_ROUNDS, _BUDGET_S / max(took_s[0], 1e-9))))
    return statistics.median(times)
