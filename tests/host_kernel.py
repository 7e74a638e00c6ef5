"""Kernels as functions of the host: the body that goes to a GPU, in a loop that g++ compiles.

Compiled ones are kept in a folder of this user's for all ranks and runs, by the text of
their source, so that a suite compiles each once.
"""

from __future__ import annotations

import ctypes
import getpass
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, final

import numpy as np
import pytest

from kvcoll.errors import DeviceError
from kvcoll.gpu.array import DeviceArray
from kvcoll.gpu.kernel import Access, Argument, KernelSource

# Each operation rounds by itself, as NumPy's do: no product and sum in one.
_FLAGS = ("-O2", "-std=c++17", "-shared", "-fPIC", "-ffp-contract=off", "-fno-fast-math", "-w")
_C_TYPES: dict[str, tuple[str, Any]] = {
    "bool": ("?", ctypes.c_bool),
    "signed char": ("i1", ctypes.c_int8),
    "unsigned char": ("u1", ctypes.c_uint8),
    "short": ("i2", ctypes.c_int16),
    "unsigned short": ("u2", ctypes.c_uint16),
    "int": ("i4", ctypes.c_int32),
    "unsigned int": ("u4", ctypes.c_uint32),
    "long long": ("i8", ctypes.c_int64),
    "unsigned long long": ("u8", ctypes.c_uint64),
    "float": ("f4", ctypes.c_float),
    "double": ("f8", ctypes.c_double),
}
# Of types that the prelude of all kernels makes: arrays only.
_SIZES = {"kv_half": "u2", "kv_brain": "u2", "kv_complex64": "c8", "kv_complex128": "c16"}

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")


@cache
def _folder() -> Path:
    folder = Path(tempfile.gettempdir()) / f"kvcoll-test-kernels-{getpass.getuser()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


@final
class HostKernel:
    """One kernel, compiled."""

    def __init__(self, source: KernelSource) -> None:
        if shutil.which("g++") is None:
            pytest.skip("kernels of a fake GPU are compiled by g++, and there is none")
        self._source = source
        self._function = ctypes.CDLL(str(library_of(source.for_host())))[source.name]
        self._function.restype = None
        self._function.argtypes = [ctypes.c_longlong] + [
            _C_TYPES[p.c_type][1] if p.access is Access.VALUE else ctypes.c_void_p
            for p in source.parameters
        ]

    def check(self, arguments: Sequence[Argument]) -> None:
        """Check that each argument is of its parameter's type: a GPU would read rubbish."""
        for parameter, argument in zip(self._source.parameters, arguments, strict=True):
            name = f"{parameter.name} of {self._source.name}"
            known = _C_TYPES.get(parameter.c_type)
            dtype = np.dtype(known[0] if known else _SIZES[parameter.c_type])
            alignment = dtype.itemsize // (2 if dtype.kind == "c" else 1)
            if parameter.access is Access.VALUE:
                assert isinstance(argument, np.generic), f"{name} is a number of an exact dtype"
                assert argument.dtype == dtype, f"{name} is a {dtype}, got {argument.dtype}"
            else:
                assert isinstance(argument, DeviceArray), f"{name} is an array, got {argument!r}"
                assert argument.dtype.itemsize % dtype.itemsize == 0, f"{name}: {argument!r}"
                assert argument.address % alignment == 0, f"{name} is not aligned"

    def __call__(self, n: int, values: Sequence[int | np.generic]) -> None:
        """Run it over elements 0 to n; arrays are given by address."""
        plain = [v if isinstance(v, int) else v.item() for v in values]
        self._function(n, *plain)


def library_of(text: str) -> Path:
    """Compile C++ to a library, if that has not been done yet."""
    key = hashlib.sha256(repr((_FLAGS, text)).encode()).hexdigest()[:24]
    library = _folder() / f"{key}.so"
    if not library.exists():
        _compile(text, library)
    return library


def _compile(text: str, library: Path) -> None:
    part = library.with_suffix(f".{os.getpid()}")
    made = subprocess.run(
        ["g++", *_FLAGS, "-x", "c++", "-", "-o", str(part)],
        input=text,
        capture_output=True,
        text=True,
        check=False,
    )
    if made.returncode:
        raise DeviceError(f"the kernel does not compile: {made.stderr}")
    part.replace(library)  # whole, or not at all: other ranks compile the same
