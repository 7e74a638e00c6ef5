"""A small array library of its own, as DLPack sees one: views of NumPy memory behind capsules.

The structures are those of dlpack.h, legacy (before 1.0) and versioned.
"""

from __future__ import annotations

import ctypes
from typing import Any, Final, final

import numpy.typing as npt

CPU: Final = 1
CUDA: Final = 2
CUDA_HOST: Final = 3
CODES: Final = {"i": 0, "u": 1, "f": 2, "V": 4, "c": 5, "b": 6}  # V: bfloat16 of ml_dtypes
LEGACY_NAME: Final = b"dltensor"
VERSIONED_NAME: Final = b"dltensor_versioned"
READ_ONLY: Final = 1
# What capsules point to. A consumer may call a deleter after all else is gone, so for ever.
HELD: Final[list[object]] = []


class _Device(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int32), ("id", ctypes.c_int32))


class _DataType(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16))


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", _Device),
        ("ndim", ctypes.c_int32),
        ("dtype", _DataType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


_Deleter = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class _Legacy(ctypes.Structure):
    _fields_ = (("tensor", _Tensor), ("context", ctypes.c_void_p), ("deleter", _Deleter))


class _Versioned(ctypes.Structure):
    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("context", ctypes.c_void_p),
        ("deleter", _Deleter),
        ("flags", ctypes.c_uint64),
        ("tensor", _Tensor),
    )


_new_capsule = ctypes.PyDLL(None).PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)


@final
class Foreign:
    """An array that is none of NumPy's and shows its memory by DLPack alone.

    `knows_versions`: whether it was written after DLPack 1.0, which lets a consumer ask
    for a versioned capsule; like torch and CuPy it gives a legacy one to who does not ask.
    `device`, `number`: where it says that its memory lies; `element`: which code, bits and lanes
    its elements have, if not those of the array. `streams`: what consumers asked for.
    """

    def __init__(
        self,
        array: npt.NDArray[Any],
        *,
        knows_versions: bool,
        read_only: bool = False,
        device: int = CPU,
        number: int = 0,
        element: tuple[int, int, int] | None = None,
    ) -> None:
        self.array = array
        self.device, self.number = device, number
        self.streams: list[object] = []
        self._element = element or (CODES[array.dtype.kind], 8 * array.itemsize, 1)
        self.n_given = self.n_freed = 0
        self._knows_versions = knows_versions
        self._read_only = read_only

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device, self.number

    def __dlpack__(self, **asked: object) -> Any:
        if not self._knows_versions and asked.keys() - {"stream"}:
            raise TypeError(f"__dlpack__() got unexpected arguments {sorted(asked)}")
        self.n_given += 1
        self.streams.append(asked.get("stream"))
        return self._versioned() if asked.get("max_version") else self._legacy()

    def _legacy(self) -> Any:
        managed = _Legacy(self._tensor(), None, self._deleter())
        HELD.append(managed)
        return _new_capsule(ctypes.addressof(managed), LEGACY_NAME, None)

    def _versioned(self) -> Any:
        flags = READ_ONLY if self._read_only else 0
        managed = _Versioned(1, 0, None, self._deleter(), flags, self._tensor())
        HELD.append(managed)
        return _new_capsule(ctypes.addressof(managed), VERSIONED_NAME, None)

    def _tensor(self) -> _Tensor:
        array = self.array
        extents = ctypes.c_int64 * array.ndim
        shape = extents(*array.shape)
        strides = extents(*(stride // array.itemsize for stride in array.strides))
        HELD.extend((shape, strides, array))
        return _Tensor(
            array.__array_interface__["data"][0],
            _Device(self.device, self.number),
            array.ndim,
            _DataType(*self._element),
            ctypes.cast(shape, ctypes.POINTER(ctypes.c_int64)),
            ctypes.cast(strides, ctypes.POINTER(ctypes.c_int64)),
            0,
        )

    def _deleter(self) -> Any:
        def free(_: int) -> None:
            self.n_freed += 1

        deleter = _Deleter(free)
        HELD.append(deleter)
        return deleter
