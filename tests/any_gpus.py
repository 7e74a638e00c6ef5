"""GPUs for tests of stores: fakes, or with KVCOLL_TEST_GPUS=real those of the machine.

A test sees the same of both: `array` makes an array of the user's, which has `get`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias, final

import numpy as np
import numpy.typing as npt
import pytest
from fake_gpu import FakeGpus
from fake_nccl import FakeNccl
from host_kernel import needs_compiler

from kvcoll.gpu.array import DeviceArray
from kvcoll.gpu.device import Gpus, HostArray, Stream
from kvcoll.gpu.door import import_cupy
from kvcoll.gpu.nccl import Nccl

ARE_REAL = os.environ.get("KVCOLL_TEST_GPUS") == "real"
#: Fakes run kernels that g++ compiles.
needs_kernels = pytest.mark.skipif(False, reason="") if ARE_REAL else needs_compiler


@final
class RealGpus(Gpus):
    """Those that CuPy finds, numbered round where a test wants more than there are."""

    def __init__(self, own: Gpus) -> None:
        self._own, self._cupy = own, import_cupy()
        self.devices, self.driver_version = own.devices, own.driver_version

    def pinned(self, n_bytes: int) -> HostArray:
        return self._own.pinned(n_bytes)

    def is_on_gpu(self, value: object) -> bool:
        return self._own.is_on_gpu(value)

    def adopt(self, value: object, on: Stream, *, to_write: bool = False) -> DeviceArray:
        return self._own.adopt(value, on, to_write=to_write)

    def addresses(
        self,
        values: Sequence[object],
        device: int,
        shapes: Sequence[tuple[int, ...]],
        dtypes: Sequence[np.dtype[Any]],
        on: Stream,
    ) -> list[int] | None:
        return self._own.addresses(values, device, shapes, dtypes, on)

    def give_back(self, value: object, on: Stream) -> None:
        self._own.give_back(value, on)

    def lend(self, array: DeviceArray) -> Any:
        return self._own.lend(array)

    def array(self, values: npt.ArrayLike, device: int = 0) -> Any:
        """Make an array of CuPy's."""
        with self._cupy.cuda.Device(device % len(self.devices)):
            try:
                return self._cupy.asarray(np.asarray(values))
            except (TypeError, ValueError, NotImplementedError) as error:
                pytest.skip(f"CuPy {self._cupy.__version__}: {error}")

    def pump_in_background(self) -> None:
        """Do nothing: GPUs need no help."""

    def finish(self) -> None:
        """Wait for all."""
        for device in self.devices:
            device.current_stream().synchronize()


AnyGpus: TypeAlias = "FakeGpus | RealGpus"


def gpus_and_nccl(count: int, folder: Path | None = None) -> tuple[AnyGpus, Nccl]:
    """Give GPUs, at least one if they are real, and the NCCL that goes with them.

    Parameters
    ----------
    count : int
        How many fakes.
    folder : Path, optional
        Where fakes of several ranks find one another; the same for all.
    """
    if ARE_REAL:
        from kvcoll.cuda import find

        own, nccl = find.find()
        return RealGpus(own), nccl
    fakes = FakeGpus(count, [f"gpu-{k}" for k in range(count)])
    return fakes, FakeNccl(fakes, folder)


def check_closed(nccl: Nccl) -> None:
    """Check that no communicator is open, where that can be seen."""
    if isinstance(nccl, FakeNccl):
        assert not nccl.open
