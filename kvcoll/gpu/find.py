"""The GPUs and the NCCL of this process, found when a store asks for them."""

from __future__ import annotations

from .device import Gpus
from .nccl import Nccl


def find_gpus() -> Gpus:
    """Give the GPUs that this process sees, always the same object.

    Raises
    ------
    MissingDependencyError
        CuPy is not installed.
    DeviceError
        There is no GPU, or the driver is too old for this CuPy.
    """
    from .with_cupy import gpus

    return gpus()


def find() -> tuple[Gpus, Nccl]:
    """Give the GPUs that this process sees, and NCCL.

    Raises
    ------
    MissingDependencyError
        CuPy or NCCL is not installed.
    DeviceError
        As `find_gpus`.
    """
    from .with_cupy import nccl

    return find_gpus(), nccl()
