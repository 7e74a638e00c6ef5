"""How many bytes a push sends, counted at the hosts' network interfaces."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import kvcoll

if TYPE_CHECKING:
    from mpi4py import MPI

_PUSHES = 4
FLOAT32 = "float32"
WAYS: tuple[tuple[str, dict[str, Any]], ...] = (
    (FLOAT32, {"type": "none"}),
    ("fp16", {"type": "fp16"}),
    ("bf16", {"type": "bf16"}),
    ("2bit", {"type": "2bit", "threshold": 0.5}),
    ("1bit", {"type": "1bit", "threshold": 0.5}),
)


@dataclass(frozen=True)
class Wire:
    """What one way sends.

    Attributes
    ----------
    way : str
    n_elements : int
        Of the one key that is pushed.
    sent_bytes : float
        A push, by the host that sends most, all its interfaces but the loopback together,
        with the headers of TCP, IP and Ethernet.
    """

    way: str
    n_elements: int
    sent_bytes: float


def measure_wire(comm: MPI.Intracomm, n: int) -> list[Wire]:
    """Push one key of `n` elements in each way; collective, over several hosts."""
    found = []
    for way, params in WAYS:
        with kvcoll.create("dist_sync", comm=comm) as kv:
            value = np.random.default_rng(comm.rank).standard_normal(n).astype(np.float32)
            kv.init("w", np.zeros(n, np.float32))
            kv.set_gradient_compression(params)
            kv.push("w", value)  # connections are made
            comm.Barrier()
            before = _sent_bytes()
            for _ in range(_PUSHES):
                kv.push("w", value)
            comm.Barrier()
            most = max(comm.allgather(_sent_bytes() - before))
        found.append(Wire(way, n, most / _PUSHES))
    return found


def _sent_bytes() -> int:
    """Give what this host has sent so far."""
    lines = Path("/proc/net/dev").read_text().splitlines()[2:]
    fields = (line.partition(":") for line in lines)
    return sum(int(rest.split()[8]) for name, _, rest in fields if name.strip() != "lo")
