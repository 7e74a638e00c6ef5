"""What this process can do with GPUs, or the error that says why it can do nothing."""

from __future__ import annotations

from ..gpu.device import Gpus
from ..gpu.nccl import Nccl
from .gpus import CupyGpus
from .nccl import CupyNccl


def find() -> tuple[Gpus, Nccl]:
    """Give the GPUs and NCCL.

    Raises
    ------
    MissingDependencyError
        CuPy is not installed.
    DeviceError
        There is no driver, one that is too old, or no GPU.
    """
    return CupyGpus(), CupyNccl()
