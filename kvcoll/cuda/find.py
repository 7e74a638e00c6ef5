"""The GPUs and the NCCL of this process, found when a store asks for them."""

from __future__ import annotations

from functools import cache

from ..gpu.device import Gpus
from ..gpu.nccl import Nccl
from .gpus import CupyGpus
from .nccl import CupyNccl


@cache
def find_gpus() -> Gpus:
    """Give the GPUs that this process sees, always the same object.

    Raises
    ------
    MissingDependencyError
        CuPy is not installed.
    DeviceError
        There is no driver, one that is too old for this CuPy, or no GPU.
    """
    return CupyGpus()


@cache
def _nccl() -> Nccl:
    return CupyNccl()


def find() -> tuple[Gpus, Nccl]:
    """Give the GPUs that this process sees, and NCCL.

    Raises
    ------
    MissingDependencyError
        CuPy or NCCL is not installed.
    DeviceError
        As `find_gpus`.
    """
    return find_gpus(), _nccl()
