"""What NumPy does not read of DLPack: bfloat16, and whether memory may be written.

Rules of the file: a capsule is looked into, never consumed, so that its producer frees
what it holds when the capsule goes; the layouts are those of dlpack.h, version 1.0.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import ArrayError, MissingDependencyError

_LEGACY, _VERSIONED = b"dltensor", b"dltensor_versioned"
_BFLOAT_CODE, _BFLOAT_BITS = 4, 16
_FLAG_READ_ONLY = 1


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _Versioned(ctypes.Structure):
    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", _Tensor),
    )


_CODES = {0: "int", 1: "uint", 2: "float", 4: "bfloat", 5: "complex", 6: "bool"}


@dataclass(frozen=True)
class DeviceTensor:
    """What a DLPack producer says of memory that NumPy cannot read.

    Attributes
    ----------
    address : int
    dtype : numpy.dtype
    shape, strides : tuple of int
        Strides in bytes.
    device : int
        The number of its GPU.
    is_read_only : bool
        Whether its producer says that it must not be written.
    capsule : object
        Keeps the memory.
    """

    address: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    device: int
    is_read_only: bool
    capsule: object


def device_tensor(producer: Any, stream: int) -> DeviceTensor:
    """Ask a producer for an array on a GPU, to be used on a stream from now on.

    Raises
    ------
    ArrayError
        It is of a dtype that kvcoll does not know, or the producer refuses.
    MissingDependencyError
        It is of bfloat16, and ml_dtypes is not installed.
    """
    try:
        try:
            capsule = producer.__dlpack__(stream=stream, max_version=(1, 0))
        except TypeError:
            capsule = producer.__dlpack__(stream=stream)  # older than DLPack 1.0
    except (BufferError, RuntimeError) as error:
        name = type(producer).__name__
        raise ArrayError(f"{name} cannot be read by DLPack: {error}") from error
    tensor = _tensor_of(capsule)
    dtype = _dtype_of(tensor)
    if dtype is None:
        raise ArrayError(
            f"{type(producer).__name__} has elements of DLPack type {tensor.code}, {tensor.bits} "
            "bits: kvcoll takes floats, integers, bools and complex numbers"
        )
    shape = tuple(tensor.shape[k] for k in range(tensor.ndim))
    address = (tensor.data or 0) + tensor.byte_offset
    strides = _strides(tensor, shape)
    fixed = _is_fixed(capsule)
    return DeviceTensor(address, dtype, shape, strides, tensor.device_id, fixed, capsule)


def is_read_only(producer: Any) -> bool:
    """Say whether the memory of a DLPack producer must not be written.

    A capsule from before DLPack 1.0 cannot say it, and NumPy marks what comes from one
    read-only to be on the safe side; so the producer is asked for a capsule that can.
    """
    return _is_fixed(_capsule(producer))


def bfloat16_array(producer: Any) -> npt.NDArray[Any] | None:
    """View a bfloat16 tensor in the CPU's memory as an array of ``ml_dtypes.bfloat16``.

    Returns
    -------
    numpy.ndarray or None
        The same memory, read-only where the producer's is; None if the tensor is of
        another dtype. It keeps the tensor's memory.

    Raises
    ------
    MissingDependencyError
        ml_dtypes is not installed.
    """
    capsule = _capsule(producer)
    tensor = _tensor_of(capsule)
    if (tensor.code, tensor.bits, tensor.lanes) != (_BFLOAT_CODE, _BFLOAT_BITS, 1):
        return None
    dtype = extension_dtype("bfloat16")
    shape = tuple(tensor.shape[k] for k in range(tensor.ndim))
    if 0 in shape:
        return np.empty(shape, dtype)
    strides = _strides(tensor, shape)
    reach = [(n - 1) * stride for n, stride in zip(shape, strides, strict=True)]
    first = tensor.data + tensor.byte_offset
    low = first + sum(min(0, r) for r in reach)
    high = first + sum(max(0, r) for r in reach) + dtype.itemsize
    memory = (ctypes.c_char * (high - low)).from_address(low)
    memory.capsule = capsule  # lives as long as the array
    array: npt.NDArray[Any] = np.ndarray(shape, dtype, memory, first - low, strides)
    array.flags.writeable = not is_read_only(producer)
    return array


def extension_dtype(name: str) -> np.dtype[Any]:
    """Give a dtype of ml_dtypes, as bfloat16 is.

    Raises
    ------
    MissingDependencyError
        ml_dtypes is not installed, or is too old for it.
    """
    try:
        import ml_dtypes  # noqa: F401 - makes the names known to NumPy

        return np.dtype(name)
    except (ImportError, TypeError) as error:
        raise MissingDependencyError(
            f"{name} arrays need ml_dtypes: pip install --upgrade ml_dtypes"
        ) from error


def _dtype_of(tensor: _Tensor) -> np.dtype[Any] | None:
    """Give the dtype of a tensor's elements; None if NumPy has no such one."""
    kind = _CODES.get(tensor.code, "")
    if not kind or tensor.lanes != 1 or tensor.bits % 8:  # of 4 bits: two share a byte
        return None
    if kind == "bfloat":
        return extension_dtype("bfloat16") if tensor.bits == _BFLOAT_BITS else None
    if kind == "bool":
        return np.dtype("?") if tensor.bits == 8 else None
    try:
        return np.dtype(f"{kind}{tensor.bits}")
    except TypeError:  # integers of 128 bits, say
        return None


def _strides(tensor: _Tensor, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Give the strides in bytes; those of a compact tensor may be left out."""
    itemsize = tensor.bits // 8
    if tensor.strides:
        return tuple(tensor.strides[k] * itemsize for k in range(tensor.ndim))
    strides, step = [], itemsize
    for extent in reversed(shape):
        strides.append(step)
        step *= extent
    return tuple(reversed(strides))


def _capsule(producer: Any) -> Any:
    try:
        return producer.__dlpack__(max_version=(1, 0))
    except TypeError:
        return producer.__dlpack__()  # older than DLPack 1.0


def _is_fixed(capsule: Any) -> bool:
    if not _is_versioned(capsule):
        return False
    told = _Versioned.from_address(_address(capsule, _VERSIONED))
    return bool(told.flags & _FLAG_READ_ONLY)


def _tensor_of(capsule: Any) -> _Tensor:
    """Look into a capsule; what is seen is there as long as the capsule."""
    if _is_versioned(capsule):
        tensor: _Tensor = _Versioned.from_address(_address(capsule, _VERSIONED)).tensor
        return tensor
    return _Tensor.from_address(_address(capsule, _LEGACY))


def _is_versioned(capsule: Any) -> bool:
    return f'"{_VERSIONED.decode()}"' in repr(capsule)


def _address(capsule: Any, name: bytes) -> int:
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
    address: int = pointer(capsule, name)
    return address
