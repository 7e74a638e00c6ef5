"""Time MXNet's dist_sync: one of the processes that scripts/bench.py starts in MXNet's environment.

Rules of the file: MXNet learns from DMLC_* variables what a process is, when it is
imported; the scheduler and the servers never come back from that import.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from time import perf_counter
from typing import Any

from bench_worker import Answer, end_with_parent, parse_arguments, serve


def set_environment() -> None:
    """Tell MXNet what its launcher would; there are as many servers as workers."""
    os.environ.update(
        DMLC_ROLE=ARGUMENTS.role,
        DMLC_PS_ROOT_URI="127.0.0.1",
        DMLC_PS_ROOT_PORT=str(ARGUMENTS.port),
        DMLC_NUM_WORKER=str(ARGUMENTS.ranks),
        DMLC_NUM_SERVER=str(ARGUMENTS.ranks),
        DMLC_NODE_HOST="127.0.0.1",
        OMP_NUM_THREADS=str(ARGUMENTS.threads),
    )
    # MXNet 1.9.1 calls it by the name that Python 3.9 took away.
    vars(threading)["Thread"].isAlive = threading.Thread.is_alive


def push_pull(mx: Any, kv: Any, request: dict[str, Any], first: int) -> Callable[[int], float]:
    """Make what times a push and a pull of `keys` keys of `elements` each, by list."""
    keys = [first + number for number in range(request["keys"])]
    values = [mx.nd.ones(request["elements"]) for _ in keys]
    outs = [mx.nd.zeros(request["elements"]) for _ in keys]
    kv.init(keys, values)

    def run(calls: int) -> float:
        mx.nd.waitall()
        kv._barrier()
        began_s = perf_counter()
        for _ in range(calls):
            kv.push(keys, values)
            kv.pull(keys, out=outs)
            mx.nd.waitall()
        return (perf_counter() - began_s) / calls

    return run


def begin() -> tuple[str, Answer]:
    """Join the other processes; give MXNet's version and what answers requests."""
    import mxnet as mx  # type: ignore[import-not-found]

    kv = mx.kv.create("dist_sync")
    made: dict[str, Callable[[int], float]] = {}
    n_keys = 0

    def answer(request: dict[str, Any]) -> float:
        nonlocal n_keys
        if request["what"] == "forget":
            made.clear()
            return 0.0
        calls = request.pop("calls")
        name = repr(request)
        if name not in made:
            made[name] = push_pull(mx, kv, request, n_keys)
            n_keys += request["keys"]
        return made[name](calls)

    return mx.__version__, answer


if __name__ == "__main__":
    ARGUMENTS = parse_arguments("Times MXNet's dist_sync.")
    set_environment()
    if ARGUMENTS.role != "worker":
        end_with_parent()
    serve(begin)
