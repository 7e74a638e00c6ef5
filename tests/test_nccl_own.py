"""Lists of values on several GPUs of one process are summed left to right, wherever they lie."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from fake_gpu import FakeGpus
from fake_nccl import FakeNccl
from host_kernel import needs_compiler
from transport_contract import bits, in_order, pushed

from kvcoll.nccl.own import OwnGpus
from kvcoll.nccl.watch import Watch

pytestmark = [pytest.mark.single, needs_compiler]

PLACES = [(0, 1), (1, 0), (0, 1, 2, 3), (2, 2, 0, 2), (3, 1), (1, 1, 1), (0, 1, 1, 0, 2, 0)]


class Store:
    """What a store has: a GPU, a stream, and sums over the others."""

    def __init__(self, count: int = 4, scratch_bytes: int = 6 << 10) -> None:
        self.gpus = FakeGpus(count)
        self.nccl = FakeNccl(self.gpus)
        self.home = self.gpus.devices[0]
        self.stream = self.home.stream()
        self.watch = Watch([], 30, "rank 0 of 1")
        self.own = OwnGpus(
            self.gpus,
            self.nccl,
            self.home,
            self.stream,
            self.watch,
            scratch_bytes=scratch_bytes,
            small_bytes=1 << 10,
        )

    def sum(
        self, arrays: Sequence[npt.NDArray[Any]], places: Sequence[int], dtype: np.dtype[Any]
    ) -> npt.NDArray[Any]:
        users = [self.gpus.array(a, k) for a, k in zip(arrays, places, strict=True)]
        values = [self.gpus.adopt(user, self.stream) for user in users]
        out = self.home.empty(arrays[0].size, dtype, self.stream)
        self.own.add(values, out)
        for user in users:
            self.gpus.give_back(user, self.stream)
        for user in users:
            user[...] = 0  # the caller's, as soon as the push has returned
        return self.gpus.read(out, self.stream)


@pytest.mark.parametrize("places", PLACES, ids=str)
@pytest.mark.parametrize(
    "dtype", ["f4", "f2", *(pytest.param(d, marks=pytest.mark.long) for d in ("i8", "?", "c8"))]
)
def test_values_are_added_left_to_right_wherever_they_lie(
    places: Sequence[int], dtype: str
) -> None:
    store, kind = Store(), np.dtype(dtype)
    for n in (1, 97, 1500, 4001):
        arrays = pushed(kind, n, len(places))
        total = store.sum(arrays, places, kind)
        assert bits(total) == bits(in_order(arrays, kind, [range(len(places))]))
    gc.collect()
    store.gpus.finish()


def test_sums_of_few_bits_are_handed_on_in_float32() -> None:
    store = Store()
    for kind in (np.dtype("f2"), np.dtype(ml_dtypes.bfloat16)):
        arrays = pushed(kind, 3000, 3)
        total = store.sum(arrays, (0, 2, 1), np.dtype("f4"))
        assert bits(total) == bits(in_order(arrays, np.dtype("f4"), [range(3)]))
    store.gpus.finish()


def test_a_list_suits_if_it_is_large_and_of_one_dtype_on_several_gpus() -> None:
    store = Store()

    def suits(places: Sequence[int], sizes: Sequence[int], dtypes: Sequence[str]) -> bool:
        return store.own.suits(
            [
                store.gpus.devices[k].empty(n, d, store.gpus.devices[k].stream())
                for k, n, d in zip(places, sizes, dtypes, strict=True)
            ]
        )

    assert suits((0, 1), (256, 256), ("f4", "f4"))
    assert not suits((0, 0), (256, 256), ("f4", "f4"))
    assert not suits((0, 1), (255, 255), ("f4", "f4"))
    assert not suits((0, 1), (256, 256), ("f4", "f8"))
    assert not suits((1,), (256,), ("f4",))


def test_each_gpu_carries_its_share() -> None:
    store = Store()
    n = 1024
    store.sum(pushed(np.dtype("f4"), n, 4), (0, 1, 2, 3), np.dtype("f4"))
    kernels = [label for label in store.gpus.launches if label.startswith("kvcoll_add")]
    assert len(kernels) == 4
    assert "copy" not in store.gpus.launches


def test_an_error_of_nccl_comes_before_the_first_sum() -> None:
    store = Store()
    store.nccl.init_error = "no way from GPU 0 to GPU 1"
    values = [store.gpus.adopt(store.gpus.array(np.ones(9), k), store.stream) for k in (0, 1)]
    with pytest.raises(Exception, match="no way from GPU 0 to GPU 1"):
        store.own.prepare(values)


def test_communicators_are_closed_once() -> None:
    store = Store()
    store.sum(pushed(np.dtype("f4"), 500, 2), (0, 1), np.dtype("f4"))
    store.sum(pushed(np.dtype("f4"), 500, 2), (0, 2), np.dtype("f4"))
    assert len(store.nccl.open) == 4
    store.stream.synchronize()
    store.own.end(ended=True)
    assert not store.nccl.open
    store.own.end(ended=True)
