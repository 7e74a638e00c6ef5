"""The one file that imports CuPy; the doctor alone asks it elsewhere, in a process of its own."""

from __future__ import annotations

from typing import Any

from ..errors import MissingDependencyError

_CURE = "pip install 'kvcoll[gpu]' (or 'kvcoll[gpu13]', where the driver is for CUDA 13)"


def import_cupy() -> Any:
    """Import ``cupy``.

    Raises
    ------
    MissingDependencyError
        It is not installed, or lacks something itself.
    """
    try:
        import cupy
    except ImportError as error:
        is_there = not (isinstance(error, ModuleNotFoundError) and error.name == "cupy")
        what = (
            f"does not import: {' '.join(str(error).split())}" if is_there else "is not installed"
        )
        raise MissingDependencyError(
            f"an array lies on a GPU, or a store is to be there, and CuPy {what}: {_CURE}"
        ) from error
    return cupy


def import_nccl() -> Any:
    """Import ``cupy.cuda.nccl``, which CuPy does not do by itself.

    Raises
    ------
    MissingDependencyError
        CuPy is not installed, or finds no NCCL.
    """
    import_cupy()
    from cupy.cuda import nccl

    if not nccl.available:
        raise MissingDependencyError(
            "CuPy finds no NCCL, which several GPUs need: pip install nvidia-nccl-cu12 "
            "(or -cu13, as your CuPy)"
        )
    return nccl
