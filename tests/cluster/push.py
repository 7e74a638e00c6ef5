"""Pushes one key from every rank of a job, and leaves what each rank saw in a folder.

Usage: mpirun ... python push.py FOLDER ELEMENTS
"""

from __future__ import annotations

import json
import socket
import sys
import time
from pathlib import Path

import numpy as np

import kvcoll

COUNTERS = Path("/sys/class/net/eth0/statistics")


def counters() -> list[int]:
    """Return how many bytes this host's network card has received and sent."""
    return [int((COUNTERS / name).read_text()) for name in ("rx_bytes", "tx_bytes")]


def main(folder: Path, n_elements: int) -> None:
    """Push; write RANK.json and RANK.npy."""
    kv = kvcoll.create("dist_sync")
    kv.init("w", np.zeros(n_elements, np.float32))
    value = np.arange(n_elements, dtype=np.float32) % 1000 + 1000 * kv.rank
    kv.barrier()
    before, began_s = counters(), time.perf_counter()
    kv.push("w", value)
    took_s = time.perf_counter() - began_s
    kv.barrier()
    report = {
        "host": socket.gethostname(),
        "local_rank": kv.local_rank,
        "num_hosts": kv.num_hosts,
        "num_workers": kv.num_workers,
        "crossed_bytes": [b - a for a, b in zip(before, counters(), strict=True)],
        "push_s": took_s,
    }
    kv.barrier()  # none of what follows is counted
    np.save(folder / f"{kv.rank}.npy", kv.pull("w"))
    (folder / f"{kv.rank}.json").write_text(json.dumps(report))


main(Path(sys.argv[1]), int(sys.argv[2]))
