"""Tensors of torch on real GPUs, and arrays of others, go in and out of a store where they are.

It is for machines with GPUs, where scripts/gpu_check.sh runs it; test_cuda_ports is for fakes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from any_gpus import ARE_REAL

import kvcoll
from kvcoll.gpu.door import import_cupy

pytestmark = [
    pytest.mark.single,
    pytest.mark.skipif(not ARE_REAL, reason="it is for real GPUs: KVCOLL_TEST_GPUS=real"),
]


class Shown:
    """An array of CuPy's of which others know no more than what DLPack says."""

    def __init__(self, array: Any) -> None:
        self._array = array

    def __dlpack_device__(self) -> Any:
        return self._array.__dlpack_device__()

    def __dlpack__(self, **asked: Any) -> Any:
        return self._array.__dlpack__(**asked)


def devices() -> list[int]:
    """Give the first GPU, and the last one if there are several."""
    return sorted({0, int(import_cupy().cuda.runtime.getDeviceCount()) - 1})


def test_arrays_known_by_dlpack_alone_are_pushed_and_filled() -> None:
    cupy = import_cupy()
    for device in devices():
        with cupy.cuda.Device(device):
            grad = cupy.asarray(np.arange(6, dtype=np.float32).reshape(2, 3))
            out = cupy.asarray(np.zeros((2, 3), np.float32))
            wide = cupy.asarray(np.repeat(grad.get(), 2, axis=1))
        kv = kvcoll.create("device")
        kv.init("w", Shown(out))
        kv.push("w", [Shown(grad), grad, Shown(wide[:, ::2])])
        shown = Shown(out)
        assert kv.pull("w", out=shown) is shown
        np.testing.assert_array_equal(out.get(), 3 * np.arange(6).reshape(2, 3))


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16", "int64"])
def test_tensors_of_torch_are_pushed_and_filled_in_the_order_of_its_stream(name: str) -> None:
    torch: Any = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this torch has no CUDA")
    dtype, n = getattr(torch, name), 1 << 20
    for device in devices():
        grad, out = (torch.zeros(n, dtype=dtype, device=f"cuda:{device}") for _ in range(2))
        kv = kvcoll.create("device")
        kv.init("w", grad)
        with torch.cuda.device(devices()[0]), torch.cuda.stream(torch.cuda.Stream(device)):
            for turn in range(1, 20):
                grad.fill_(turn)
                kv.push("w", [grad, grad])
                grad.fill_(-1)  # after the push
                assert kv.pull("w", out=out) is out
                assert bool((out == 2 * turn).all())
