"""Kernels run on the host: the C++ of a kernel's source, compiled by g++ and called as a loop."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvcoll.gpu.kernel import Access, KernelSource

#: As the device's compiler is told to: no product and sum as one, no arithmetic of its own.
_OPTIONS = ("-O1", "-std=c++14", "-ffp-contract=off", "-fno-fast-math", "-fPIC", "-shared", "-w")

_folder = tempfile.TemporaryDirectory(prefix="kvcoll-kernels-")

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None, reason="g++, which stands in for nvrtc, is not installed"
)

HostKernel = Callable[[int, Sequence[Any]], None]


@lru_cache(maxsize=None)
def compiled(source: KernelSource) -> HostKernel:
    """Compile a kernel as a loop of the host.

    Returns
    -------
    callable
        Takes n and the arguments: addresses as int for pointers, NumPy's scalars for numbers.
    """
    text = source.for_host()
    library = Path(_folder.name) / f"{source.name}_{abs(hash(text)):x}.so"
    made = subprocess.run(
        ["g++", *_OPTIONS, "-x", "c++", "-", "-o", str(library)],
        input=text,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    if made.returncode:
        raise AssertionError(f"{source.name} does not compile:\n{made.stderr}\n{text}")
    function = ctypes.CDLL(str(library))[source.name]
    function.restype = None
    parameters = source.parameters

    def call(n: int, arguments: Sequence[Any]) -> None:
        given: list[Any] = [ctypes.c_longlong(n)]
        for parameter, argument in zip(parameters, arguments, strict=True):
            is_value = parameter.access is Access.VALUE
            given.append(_as_value(argument) if is_value else ctypes.c_void_p(int(argument)))
        function(*given)

    return call


def _as_value(number: Any) -> Any:
    if not isinstance(number, np.generic):
        raise TypeError(f"a number of its exact dtype is needed, got {type(number).__name__}")
    return np.ctypeslib.as_ctypes_type(number.dtype)(number.item())
