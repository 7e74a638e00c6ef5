#!/usr/bin/env python3
"""What comparing replicas costs: fingerprints, verify() of ResNet-50, its share of a push.

    mpirun -n 2 python scripts/bench_verify.py [--json FILE]

Rules of the file: the quickest and the median of calls that all ranks begin together; pushes with
and without are taken in turn, since a shared machine has good and bad minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeAlias

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from bench_cases import resnet50_shapes

import kvcoll
from kvcoll import fingerprint

Times: TypeAlias = "tuple[float, float]"  # the quickest and the median, in ms

_CALLS: Final = 31
_SIZES: Final = (1 << 10, 1 << 16, 1 << 20, 1 << 24, 1 << 28)


def main() -> int:
    """Measure, and print on rank 0."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures")
    args = parser.parse_args()
    with kvcoll.create("dist_sync") as sync:
        ms = {**_of_fingerprints(sync), **_of_resnet50(sync), **_of_small_pushes(sync)}
        if sync.rank == 0:
            print(f"{'in ms':48} {'quickest':>10} {'median':>10}")
            for name, (quickest, median) in ms.items():
                print(f"{name:48} {quickest:10.4f} {median:10.4f}")
            if args.json is not None:
                about = {
                    "ranks": sync.num_workers,
                    "numpy": np.__version__,
                    "load": os.getloadavg()[0],
                    "ms": ms,
                }
                args.json.write_text(json.dumps(about, indent=1) + "\n")
    return 0


def _of_fingerprints(sync: kvcoll.KVStore) -> dict[str, Times]:
    """Take fingerprints of one array over and over, on rank 0 alone."""
    found = {}
    for n_bytes in _SIZES if sync.rank == 0 else ():
        array = np.random.default_rng(0).integers(0, 2**64, n_bytes // 8, np.uint64)
        times = [_once(partial(fingerprint.of, array)) for _ in range(_CALLS)]
        found[f"fingerprint of {n_bytes} bytes"] = _times(times)
    sync.barrier()
    return found


def _of_resnet50(sync: kvcoll.KVStore) -> dict[str, Times]:
    shapes = resnet50_shapes()
    keys = [f"p{k}" for k in range(len(shapes))]
    values = [np.full(shape, 0.1, np.float32) for shape in shapes]
    with ExitStack() as stack:
        stores, grads = {}, {}
        for every in (None, 1, 10**9):
            kv = stores[every] = stack.enter_context(kvcoll.create("dist_sync", verify_every=every))
            kv.init(keys, values)
            kv.set_optimizer("sgd", learning_rate=0.01, momentum=0.9)
            grads[every] = kv.adopt(keys, values)
        calls: dict[str, Callable[[], object]] = {
            f"push of ResNet-50, {name}": partial(stores[every].push, keys, grads[every])
            for name, every in (("plain", None), ("verify_every=1", 1), ("sampled", 10**9))
        }
        calls["verify() of values and momentum"] = stores[None].verify
        bare = stack.enter_context(kvcoll.create("dist_sync"))
        bare.init(keys, values)
        calls["verify() of values alone"] = bare.verify
        return _in_turn(sync, calls)


def _of_small_pushes(sync: kvcoll.KVStore) -> dict[str, Times]:
    one = np.ones(1000, np.float32)
    with ExitStack() as stack:
        calls: dict[str, Callable[[], object]] = {}
        for name, every in (("plain", None), ("verify_every=1", 1), ("sampled", 10**9)):
            kv = stack.enter_context(kvcoll.create("dist_sync", verify_every=every))
            kv.init("w", one)
            kv.set_optimizer("sgd", learning_rate=0.01, momentum=0.9)

            def push(kv: kvcoll.KVStore = kv) -> None:
                for _ in range(100):
                    kv.push("w", one)

            calls[f"100 pushes of 1,000 elements, {name}"] = push
        return _in_turn(sync, calls)


def _in_turn(sync: kvcoll.KVStore, calls: dict[str, Callable[[], Any]]) -> dict[str, Times]:
    """Time calls in turn."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(_CALLS + 2):
        for name, call in calls.items():
            sync.barrier()
            took = _once(call)
            if turn >= 2:  # the first ones touch memory for the first time
                times[name].append(took)
    return {name: _times(taken) for name, taken in times.items()}


def _times(taken: list[float]) -> Times:
    return min(taken), float(np.median(taken))


def _once(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return (time.perf_counter() - began) * 1e3


if __name__ == "__main__":
    sys.exit(main())
