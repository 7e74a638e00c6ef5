"""How much memory a rank needs beyond its replicas and gradients, for ResNet-50's parameters.

Rules of the file: memory is what the kernel says (/proc); pages that ranks share count
for each of them its share; what the caller holds anyway is touched before.
"""

from __future__ import annotations

import ctypes
import gc
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bench_cases import LEARNING_RATE, MOMENTUM, OWN, PLAIN, new_arrays, resnet50_shapes

import kvcoll

if TYPE_CHECKING:
    from mpi4py import MPI

_PUSHES = 3


@dataclass(frozen=True)
class Memory:
    """What a store took at its peak; bytes, of the rank that took the most.

    Attributes
    ----------
    way : str
    peak_bytes : int
        How much more than before the store was made.
    replica_bytes, momentum_bytes : int
        The values, and the optimizer's state.
    window_bytes : int
        The arrays that `empty` gave, which take the place of the caller's gradients.
    """

    way: str
    peak_bytes: int
    replica_bytes: int
    momentum_bytes: int
    window_bytes: int

    @property
    def beyond_bytes(self) -> int:
        """What is neither values, nor state, nor gradients."""
        return self.peak_bytes - self.replica_bytes - self.momentum_bytes - self.window_bytes


def measure(comm: MPI.Intracomm) -> list[Memory]:
    """Push ResNet-50's gradients a few times, in both ways; collective.

    Parameters
    ----------
    comm : mpi4py.MPI.Intracomm

    Returns
    -------
    list of Memory
        On every rank; empty where the kernel does not let a process reset its peak.
    """
    if not all(comm.allgather(_reset_peak())):
        return []
    return [_measure(comm, own=False), _measure(comm, own=True)]


def _measure(comm: MPI.Intracomm, *, own: bool) -> Memory:
    shapes = resnet50_shapes()
    keys = [f"p{number}" for number in range(len(shapes))]
    params = new_arrays(shapes, 1)
    grads = [] if own else new_arrays(shapes, 1)
    n_bytes = sum(param.nbytes for param in params)
    kvcoll.create("dist_sync", comm=comm).close()  # lets go of what the store before it held
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed must not serve again, and go uncounted
    comm.Barrier()
    _reset_peak()
    before = _read("/proc/self/status", "VmRSS")
    with ExitStack() as stack:
        kv = stack.enter_context(kvcoll.create("dist_sync", comm=comm))
        kv.init(keys, params)
        kv.set_optimizer("sgd", learning_rate=LEARNING_RATE, momentum=MOMENTUM)
        if own:
            grads = kv.empty(keys)
            for grad in grads:
                grad.fill(1)
        for _ in range(_PUSHES):
            kv.push(keys, grads)
            if not own:
                kv.pull(keys, out=params)
        peak = _read("/proc/self/status", "VmHWM") - before
        # What is mapped counts as whole in the peak, whoever else has mapped it.
        peak -= _read("/proc/self/status", "RssShmem") - _read(
            "/proc/self/smaps_rollup", "Pss_Shmem"
        )
        del grads
    peak = max(comm.allgather(peak))
    return Memory(OWN if own else PLAIN, peak, n_bytes, n_bytes, n_bytes if own else 0)


def _reset_peak() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return "Pss_Shmem" in Path("/proc/self/smaps_rollup").read_text()


def _read(path: str, name: str) -> int:
    """Give a number of bytes from a file of lines such as 'VmHWM:  123 kB'."""
    for line in Path(path).read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise LookupError(f"{path} has no {name}")
