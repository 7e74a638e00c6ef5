"""Many arrays on one GPU, known by their addresses: made one by one only where somebody looks.

So that a push of a thousand small keys costs no thousand objects.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final, overload

import numpy as np
import numpy.typing as npt

from .array import DeviceArray


@final
class ArraysAt(Sequence[DeviceArray]):
    """Contiguous arrays.

    Parameters
    ----------
    addresses : numpy.ndarray of int64, shape (n,)
    dtypes : sequence of numpy.dtype
    shapes : sequence of tuple of int
    device : int
    owners : sequence of object
        What keeps the memory of each.
    """

    def __init__(
        self,
        addresses: npt.NDArray[np.int64],
        dtypes: Sequence[np.dtype[Any]],
        shapes: Sequence[tuple[int, ...]],
        device: int,
        owners: Sequence[object],
    ) -> None:
        self.addresses, self.dtypes, self.shapes = addresses, dtypes, shapes
        self.device, self.owners = device, owners

    def __len__(self) -> int:
        return len(self.addresses)

    @overload
    def __getitem__(self, place: int) -> DeviceArray: ...

    @overload
    def __getitem__(self, place: slice) -> ArraysAt: ...

    def __getitem__(self, place: int | slice) -> DeviceArray | ArraysAt:
        if isinstance(place, slice):
            return ArraysAt(
                self.addresses[place],
                self.dtypes[place],
                self.shapes[place],
                self.device,
                self.owners[place],
            )
        address = int(self.addresses[place])
        shape, owner = self.shapes[place], self.owners[place]
        return DeviceArray(address, self.dtypes[place], shape, self.device, owner)

    def some(self, places: npt.NDArray[np.int64]) -> ArraysAt:
        """Give those at some places."""
        listed = places.tolist()
        shapes, dtypes = [self.shapes[k] for k in listed], [self.dtypes[k] for k in listed]
        owners = [self.owners[k] for k in listed]
        return ArraysAt(self.addresses[places], dtypes, shapes, self.device, owners)


@final
class ListsAt(Sequence[list[DeviceArray]]):
    """The same as one list of one array a key, as a push hands its values on."""

    def __init__(self, arrays: ArraysAt) -> None:
        self.arrays = arrays

    def __len__(self) -> int:
        return len(self.arrays)

    @overload
    def __getitem__(self, place: int) -> list[DeviceArray]: ...

    @overload
    def __getitem__(self, place: slice) -> ListsAt: ...

    def __getitem__(self, place: int | slice) -> list[DeviceArray] | ListsAt:
        if isinstance(place, slice):
            return ListsAt(self.arrays[place])
        return [self.arrays[place]]
