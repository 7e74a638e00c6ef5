"""What an array is to kvcoll, and how one of any library is read and written.

Rules of the file: CuPy is found by the array that the caller hands over, never
imported before; no other file asks which library an array is of; nothing here
changes an array that the caller pushes.
"""

from __future__ import annotations

import contextlib
import ctypes
from functools import lru_cache
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
import numpy.typing as npt

from . import dlpack
from .errors import ArrayError, DTypeMismatchError
from .gpu.door import import_cupy

Array: TypeAlias = npt.NDArray[Any]
DType: TypeAlias = np.dtype[Any]

_CPU_DEVICES = (1, 3)  # kDLCPU and kDLCUDAHost: memory that the CPU reads directly
_CUDA_DEVICES = (2, 13)  # kDLCUDA and kDLCUDAManaged


@runtime_checkable
class SupportsDLPack(Protocol):
    """An array of any library that follows the Python array API's DLPack protocol."""

    def __dlpack__(self, *, stream: Any = None, max_version: Any = None) -> Any: ...

    def __dlpack_device__(self) -> tuple[int, int]: ...


class Shaped(Protocol):
    """What has a shape and a dtype: an array, or what stands for one."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""

    @property
    def dtype(self) -> DType:
        """Its dtype."""


def describe(array: Shaped) -> str:
    """Write an array's dtype and shape as every message of kvcoll does: ``float32[2, 3]``."""
    return signature(array.shape, array.dtype)


def signature(shape: tuple[int, ...], dtype: DType) -> str:
    """Write a shape and a dtype as `describe` does."""
    return f"{dtype.name}[{', '.join(map(str, shape))}]"


def as_array(value: object) -> Array:
    """View a value as a NumPy array; only what lies on a GPU is copied.

    Parameters
    ----------
    value : array
        Of NumPy, or of any library that speaks DLPack (CuPy, torch, JAX).

    Raises
    ------
    ArrayError
        It is no array, or one with a mask.
    MissingDependencyError
        It lies on a GPU and CuPy is not installed.
    """
    if isinstance(value, np.ndarray):
        if isinstance(value, np.ma.MaskedArray):
            raise ArrayError("a masked array has no one sum: push its .filled(0)")
        return value.view(np.ndarray)
    if isinstance(value, np.generic):
        return np.asarray(value)
    if isinstance(value, SupportsDLPack):
        return _from_dlpack(value)
    raise ArrayError(
        f"expected an array of NumPy, CuPy or DLPack, got {type(value).__name__}: "
        "make it one, for example with numpy.asarray"
    )


def as_output(out: object) -> tuple[Array, Array | None]:
    """View an output as a NumPy array that can be written.

    Returns
    -------
    host : numpy.ndarray
        What to write.
    device : cupy.ndarray or None
        For an output on a GPU: to be filled from `host` by `fill_device`.

    Raises
    ------
    ArrayError
        It is no array, or is read-only.
    """
    if isinstance(out, np.ma.MaskedArray):
        raise ArrayError("a masked array is no output, since its mask would stay: give its .data")
    if isinstance(out, np.ndarray):
        host = out if type(out) is np.ndarray else out.view(np.ndarray)
    elif isinstance(out, SupportsDLPack):
        if out.__dlpack_device__()[0] in _CUDA_DEVICES:
            device = _by_cupy(out)
            return np.empty(device.shape, device.dtype), device
        host = _from_dlpack(out)
        if not host.flags.writeable and not dlpack.is_read_only(out):
            host = _writable_alias(host)
    else:
        raise ArrayError(f"an output must be an array, got {type(out).__name__}")
    if not host.flags.writeable:
        raise ArrayError(f"the output {describe(host)} is read-only: give one that can be written")
    return host, None


def fill_device(device: Array, host: Array) -> None:
    """Copy a filled host array into the GPU array that `as_output` gave with it."""
    device[...] = import_cupy().asarray(host)


def gpu_of(value: object) -> int | None:
    """Give the number of the GPU in whose memory an array lies; None for all else."""
    if isinstance(value, np.ndarray) or not isinstance(value, SupportsDLPack):
        return None
    kind, number = value.__dlpack_device__()
    return number if kind in _CUDA_DEVICES else None


def _from_dlpack(value: SupportsDLPack) -> Array:
    kind = value.__dlpack_device__()[0]
    if kind in _CUDA_DEVICES:
        host: Array = _by_cupy(value).get()
        return host
    if kind not in _CPU_DEVICES:
        raise ArrayError(
            f"{type(value).__name__} lies on a device of DLPack type {kind}: "
            "kvcoll reads the memory of the CPU and of CUDA"
        )
    try:
        return np.from_dlpack(value)
    except (BufferError, TypeError, RuntimeError) as error:
        with contextlib.suppress(BufferError, TypeError, RuntimeError):
            array = dlpack.bfloat16_array(value)
            if array is not None:
                return array
        raise ArrayError(f"{type(value).__name__} cannot be read by DLPack: {error}") from error


def _by_cupy(value: SupportsDLPack) -> Any:
    """View an array on a GPU as one of CuPy's, which a store on the host copies down or fills."""
    cupy = import_cupy()
    try:
        return cupy.from_dlpack(value)
    except (BufferError, TypeError, ValueError, RuntimeError) as error:  # bfloat16 is no CuPy's
        raise ArrayError(
            f"{type(value).__name__} on a GPU cannot be read by CuPy {cupy.__version__}: {error}. "
            "Push a copy in the memory of the host, or take a store on GPUs ('device', 'nccl', "
            "'dist_device_sync')"
        ) from error


def _writable_alias(array: Array) -> Array:
    if array.size == 0:
        return np.empty(array.shape, array.dtype)
    first = array.__array_interface__["data"][0]
    reach = [(n - 1) * stride for n, stride in zip(array.shape, array.strides, strict=True)]
    low = first + sum(min(0, r) for r in reach)
    high = first + sum(max(0, r) for r in reach) + array.itemsize
    memory = (ctypes.c_char * (high - low)).from_address(low)
    alias: Array = np.ndarray(array.shape, array.dtype, memory, first - low, array.strides)
    return alias


def is_small_float(dtype: DType) -> bool:
    """Say whether sums of this dtype are taken in float32 (float16, bfloat16, float8)."""
    return dtype == np.float16 or _is_extension_float(dtype)


def wide(dtype: DType) -> DType:
    """Give the dtype in which sums of `dtype` are accumulated."""
    return np.dtype(np.float32) if is_small_float(dtype) else dtype


def _is_extension_float(dtype: DType) -> bool:
    return dtype.type.__module__ == "ml_dtypes" and "float" in dtype.name


@lru_cache(maxsize=256)
def native(dtype: DType) -> DType:
    """Give the dtype, in this machine's byte order, under which values are stored.

    Raises
    ------
    DTypeMismatchError
        NumPy has no sum of numbers for it.
    """
    if dtype.kind not in "biufc" and not _is_extension_float(dtype):
        raise DTypeMismatchError(
            f"values of dtype {dtype} cannot be summed: use a float, complex, integer or bool dtype"
        )
    return np.dtype(dtype.type)  # NumPy's one object for it, so that `is` compares quickly


@lru_cache(maxsize=1024)
def can_cast(source: DType, target: DType) -> bool:
    """Say whether `source` goes into `target` by NumPy's ``same_kind`` rule.

    Floats that NumPy does not know itself (bfloat16, float8) count as floats.
    """
    known = [np.dtype(np.float16) if _is_extension_float(d) else d for d in (source, target)]
    return np.can_cast(known[0], known[1], casting="same_kind")


@np.errstate(all="ignore")  # what is too large becomes infinite, and nothing raises
def round_to(source: Array, out: Array) -> None:
    """Copy an array into one of another dtype."""
    np.copyto(out, source, casting="unsafe")


@np.errstate(all="ignore")  # infinities go through, and nothing may raise on one rank alone
def sum_in_order(values: list[Array], out: Array) -> None:
    """Add arrays of one shape left to right, into an array of the accumulating dtype.

    Parameters
    ----------
    values : list of numpy.ndarray
        One or more, each of any dtype that casts to `out`'s by ``same_kind``.
    out : numpy.ndarray
        Of the same shape; must not overlap the values.
    """
    np.copyto(out, values[0], casting="unsafe")
    for value in values[1:]:
        # With the dtype named, NumPy casts in small buffers and not in a copy of the whole.
        np.add(out, value, out=out, dtype=out.dtype, casting="unsafe")
