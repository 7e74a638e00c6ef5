"""Where the arrays of a training lie: in the memory of the host, or on this rank's GPU.

Rules of the file: CuPy is loaded only for a store on GPUs; the network's code is the same for
both, since NumPy hands its functions over to CuPy where they get arrays of it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, final

import numpy as np

ON_GPUS = ("nccl", "dist_device_sync", "dist_sync_device")


class Arrays(ABC):
    """A kind of memory."""

    @abstractmethod
    def put(self, array: Any) -> Any:
        """Give an array of the host as one of this kind."""

    @abstractmethod
    def at_host(self, array: Any) -> Any:
        """Give an array of this kind as one of the host."""

    @abstractmethod
    def finish(self) -> None:
        """Wait until all work on these arrays is done, so that it can be timed."""


@final
class HostArrays(Arrays):
    """NumPy's."""

    def put(self, array: Any) -> Any:
        """Give it as it is."""
        return array

    def at_host(self, array: Any) -> Any:
        """Give it as it is."""
        return array

    def finish(self) -> None:
        """Do nothing: NumPy returns when it is done."""


@final
class GpuArrays(Arrays):
    """CuPy's, on the GPU of this number."""

    def __init__(self, local_rank: int) -> None:
        import cupy

        self._cupy = cupy
        self._device = cupy.cuda.Device(local_rank % cupy.cuda.runtime.getDeviceCount())
        self._device.use()  # the store's own choice, too: the rank's number on its host

    def put(self, array: Any) -> Any:
        """Copy it to the GPU."""
        return self._cupy.asarray(array)

    def at_host(self, array: Any) -> Any:
        """Copy it to the host."""
        return self._cupy.asnumpy(array)

    def finish(self) -> None:
        """Wait for the GPU."""
        self._device.synchronize()


def arrays_for(kv_store: str, local_rank: int) -> Arrays:
    """Give the arrays that a type of store works on.

    Parameters
    ----------
    kv_store : str
        As for `kvcoll.create`.
    local_rank : int
        Of this process on its host.
    """
    return GpuArrays(local_rank) if kv_store.lower() in ON_GPUS else HostArrays()


def beside(kv_store: str) -> str:
    """Give the type of store for sums that are wanted on the host at once, as of losses."""
    kind = kv_store.lower()
    if kind == "nccl":
        return "local"
    if kind in ON_GPUS:
        return "dist_sync"
    return kind.replace("dist_async", "dist_sync")


def one_hot(digits: Any) -> Any:
    """Give for each of the digits 0 to 9 a row of float32 that is 1 there, and 0 elsewhere."""
    return (digits[:, None] == np.arange(10)).astype(np.float32)
