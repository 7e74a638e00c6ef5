"""Memory of a GPU as the ports see it: contiguous, of any dtype that NumPy can name.

Rules of the file: nothing here reads or writes that memory; an array keeps its memory
alive; CuPy need not know the dtype, as bfloat16 before CuPy 14.
"""

from __future__ import annotations

import math
from typing import Any, cast, final

import numpy as np
import numpy.typing as npt


@final
class DeviceArray:
    """A contiguous array in the memory of one GPU.

    It has what a flat NumPy array has that the layers above move around and never read:
    slices, views, shapes. Its numbers are reached only by work that is put on a stream.

    Parameters
    ----------
    address : int
        Of its first byte, in the address space of the device.
    dtype : numpy.dtype
    shape : tuple of int
    device : int
        The number of the GPU in this process.
    owner : object
        What frees the memory when it goes.
    """

    __slots__ = ("address", "device", "dtype", "owner", "shape", "size")

    def __init__(
        self, address: int, dtype: np.dtype[Any], shape: tuple[int, ...], device: int, owner: object
    ) -> None:
        self.address, self.dtype, self.shape = address, dtype, shape
        self.device, self.owner = device, owner
        self.size = math.prod(shape)

    @property
    def itemsize(self) -> int:
        """How many bytes an element has."""
        return self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """How many bytes it has."""
        return self.size * self.dtype.itemsize

    @property
    def ndim(self) -> int:
        """How many dimensions its shape has."""
        return len(self.shape)

    def __getitem__(self, part: slice) -> DeviceArray:
        """Give a part of a flat array, without a copy.

        Raises
        ------
        IndexError
            The array is not flat, or the slice has a step.
        """
        if len(self.shape) != 1 or part.step not in (None, 1):
            raise IndexError(f"a part of a flat array is a slice without a step, got {part}")
        start, stop, _ = part.indices(self.size)
        address = self.address + start * self.dtype.itemsize
        return DeviceArray(address, self.dtype, (max(0, stop - start),), self.device, self.owner)

    def reshape(self, shape: tuple[int, ...] | int) -> DeviceArray:
        """Give the same memory in another shape; -1 for all of it as a flat array.

        Raises
        ------
        ValueError
            That shape has another number of elements.
        """
        wanted = (self.size,) if shape == -1 else shape if isinstance(shape, tuple) else (shape,)
        if math.prod(wanted) != self.size:
            raise ValueError(f"{self.size} elements have no shape {wanted}")
        return DeviceArray(self.address, self.dtype, wanted, self.device, self.owner)

    def view(self, dtype: npt.DTypeLike) -> DeviceArray:
        """Give the same memory, of a flat array, as elements of another dtype.

        Raises
        ------
        ValueError
            It has no whole number of them, or is not flat.
        """
        other = np.dtype(dtype)
        if len(self.shape) != 1 or self.nbytes % other.itemsize:
            raise ValueError(f"{self!r} cannot be viewed as {other}")
        size = self.nbytes // other.itemsize
        return DeviceArray(self.address, other, (size,), self.device, self.owner)

    def __repr__(self) -> str:
        shape = ", ".join(map(str, self.shape))
        return f"<{self.dtype.name}[{shape}] on GPU {self.device}>"


def as_device(array: npt.NDArray[Any]) -> DeviceArray:
    """Take an array of a contract that is written for both places, where it lies on a GPU.

    The contracts of transports, updaters and the like say `Array`, whatever the place.
    """
    return cast(DeviceArray, array)


def as_any(array: DeviceArray) -> npt.NDArray[Any]:
    """Hand an array on a GPU to a contract that is written for both places."""
    return cast("npt.NDArray[Any]", array)
