"""Asks the GPU's driver and CuPy; run by `gpus` in processes that may die of it."""

from __future__ import annotations

import ctypes
import json
import uuid
from typing import Any

_DRIVER = "libcuda.so.1"
_NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE


def main(what: str) -> None:
    """Print an answer: of the ``driver``, of ``cupy``."""
    answers = {"driver": driver, "cupy": cupy}
    print(f"\n{json.dumps(answers[what]())}")


def driver() -> dict[str, Any]:
    """Ask the driver for its devices (cuInit and others)."""
    try:
        cuda = ctypes.CDLL(_DRIVER)
    except OSError:
        return {"driver": "", "devices": []}
    code = cuda.cuInit(0)
    version = ctypes.c_int()
    cuda.cuDriverGetVersion(ctypes.byref(version))
    named = f"{version.value // 1000}.{version.value % 1000 // 10}"
    if code == _NO_DEVICE:
        return {"driver": named, "devices": []}
    if code:
        return {"driver": named, "devices": [], "error": f"cuInit: {_error_of(cuda, code)}"}
    n = ctypes.c_int()
    cuda.cuDeviceGetCount(ctypes.byref(n))
    return {"driver": named, "devices": [_device(cuda, k, n.value) for k in range(n.value)]}


def cupy() -> dict[str, Any]:
    """Ask CuPy for its version, for NCCL's, and whether it can add on the first device."""
    import cupy
    from cupy.cuda import nccl

    number = nccl.get_version() if nccl.available else 0
    told = {"cupy": cupy.__version__, "nccl": _nccl_version(number)}
    if cupy.cuda.is_available():  # without a device CuPy imports all the same
        total = int((cupy.arange(4) + 1).sum().get())
        return told | ({} if total == 10 else {"cupy_error": f"1 + 2 + 3 + 4 gave {total}"})
    return told


def _device(cuda: ctypes.CDLL, index: int, n: int) -> dict[str, Any]:
    handle, name, own = ctypes.c_int(), ctypes.create_string_buffer(96), (ctypes.c_ubyte * 16)()
    cuda.cuDeviceGet(ctypes.byref(handle), index)
    cuda.cuDeviceGetName(name, len(name), handle)
    cuda.cuDeviceGetUuid(ctypes.byref(own), handle)
    peers = []
    for other in range(n):
        can, second = ctypes.c_int(), ctypes.c_int()
        cuda.cuDeviceGet(ctypes.byref(second), other)
        if other != index:
            cuda.cuDeviceCanAccessPeer(ctypes.byref(can), handle, second)
            peers += [other] if can.value else []
    return {
        "uuid": str(uuid.UUID(bytes=bytes(own))),
        "name": name.value.decode(errors="replace"),
        "peers": peers,
    }


def _error_of(cuda: ctypes.CDLL, code: int) -> str:
    text = ctypes.c_char_p()
    cuda.cuGetErrorString(code, ctypes.byref(text))
    return f"error {code}" + (f" ({text.value.decode()})" if text.value else "")


def _nccl_version(number: int) -> str:
    """Read NCCL's number: 23203 is 2.32.3."""
    return f"{number // 10000}.{number % 10000 // 100}.{number % 100}" if number else ""
