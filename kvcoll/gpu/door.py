"""The one file that imports CuPy; the doctor alone asks it elsewhere, in a process of its own."""

from __future__ import annotations

from typing import Any

from ..errors import MissingDependencyError


def import_cupy() -> Any:
    """Import ``cupy``.

    Raises
    ------
    MissingDependencyError
        It is not installed.
    """
    try:
        import cupy
    except ImportError as error:
        raise MissingDependencyError(
            "an array lies on a GPU, or a store is to be there, and CuPy is not installed: "
            "pip install 'kvcoll[gpu]'"
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
