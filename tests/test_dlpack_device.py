"""What a DLPack producer says of memory on a GPU is read from its capsule, nothing touched."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from dlpack_object import CUDA, Foreign

from kvcoll.dlpack import device_tensor
from kvcoll.errors import ArrayError

pytestmark = pytest.mark.single


class Producer:
    """An array of another library, on a GPU: its capsule is one of NumPy's."""

    def __init__(self, array: npt.NDArray[Any], *, is_old: bool = False) -> None:
        self.array, self.is_old = array, is_old
        self.streams: list[int] = []

    def __dlpack__(self, *, stream: int, max_version: Any = None) -> Any:
        if self.is_old and max_version is not None:
            raise TypeError("__dlpack__() got an unexpected keyword argument 'max_version'")
        self.streams.append(stream)
        return self.array.__dlpack__() if self.is_old else self.array.__dlpack__(max_version=(1, 0))


@pytest.mark.parametrize("is_old", [False, True])
@pytest.mark.parametrize("dtype", ["?", "i1", "u2", "i8", "f2", "f4", "f8", "c8", "c16"])
def test_address_shape_strides_and_dtype_are_the_producers(dtype: str, is_old: bool) -> None:
    whole = np.zeros((4, 6), dtype)
    for array in (whole, whole[1:, ::2], whole.T, whole[2, 3:], whole[0, 0:0]):
        producer = Producer(array, is_old=is_old)
        tensor = device_tensor(producer, 7)
        assert tensor.dtype == array.dtype
        assert tensor.shape == array.shape
        assert producer.streams == [7]
        if array.size:
            assert tensor.address == array.__array_interface__["data"][0]
            assert tensor.strides == array.strides
        assert not tensor.is_read_only


@pytest.mark.parametrize("knows_versions", [False, True])
def test_what_lies_on_a_gpu_is_known_by_its_number_and_bfloat16_by_its_dtype(
    knows_versions: bool,
) -> None:
    bfloat16 = np.dtype(ml_dtypes.bfloat16)
    array = np.zeros((4, 3), bfloat16)[::2]
    foreign = Foreign(array, knows_versions=knows_versions, device=CUDA, number=5)
    tensor = device_tensor(foreign, 7)
    assert foreign.streams == [7]
    assert (tensor.device, tensor.dtype) == (5, bfloat16)
    assert (tensor.shape, tensor.strides) == ((2, 3), (12, 2))
    assert tensor.address == array.__array_interface__["data"][0]


@pytest.mark.parametrize(
    "element", [(0, 4, 1), (0, 128, 1), (7, 8, 1), (4, 8, 1), (6, 1, 1), (2, 32, 2)]
)
def test_elements_that_numpy_does_not_have_are_named(element: tuple[int, int, int]) -> None:
    foreign = Foreign(np.zeros(3), knows_versions=True, device=CUDA, element=element)
    code, bits, _ = element
    with pytest.raises(
        ArrayError, match=f"Foreign has elements of DLPack type {code}, {bits} bits"
    ):
        device_tensor(foreign, 7)


def test_memory_that_must_not_be_written_is_told() -> None:
    array = np.zeros(3)
    array.flags.writeable = False
    assert device_tensor(Producer(array), 7).is_read_only


def test_a_producer_that_refuses_is_named() -> None:
    class Refuses:
        def __dlpack__(self, **_: Any) -> Any:
            raise BufferError("it requires grad")

    with pytest.raises(ArrayError, match="Refuses cannot be read by DLPack: it requires grad"):
        device_tensor(Refuses(), 7)
