"""An array of a checkpoint: its name, dtype and shape, and how a file holds it.

Rules of the file: pure. The safetensors format has no complex128; such an array is held as
one of float64, with real and imaginary parts along one more axis.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from .. import tensors
from ..arrays import Array, DType, signature
from ..errors import DTypeMismatchError

_PAIRS = np.dtype(np.complex128)
_HALVES = np.dtype(np.float64)


class Kept(NamedTuple):
    """An array of a checkpoint: a key's value, one of its states, or a rank's own."""

    name: str
    dtype: DType
    shape: tuple[int, ...]

    @property
    def n_elements(self) -> int:
        """How many elements it has."""
        return math.prod(self.shape)

    @property
    def n_bytes(self) -> int:
        """How many bytes it has."""
        return self.n_elements * self.dtype.itemsize

    def check(self) -> None:
        """Raise unless a file can hold it.

        Raises
        ------
        DTypeMismatchError
            The format has no such dtype: long double.
        """
        if self.dtype != _PAIRS and not tensors.is_storable(self.dtype):
            raise DTypeMismatchError(
                f"{self.name!r} is {signature(self.shape, self.dtype)}, and a checkpoint holds no "
                f"{self.dtype.name}: save it by yourself, or init the key with another dtype"
            )


def as_stored(flat: Array) -> Array:
    """View a flat array as one that a file holds."""
    return flat.view(_HALVES) if flat.dtype == _PAIRS else flat


def stored_shape(dtype: DType, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Give the shape that an array has in a file."""
    return (*shape, 2) if dtype == _PAIRS else shape


def dtype_named(name: str) -> DType | None:
    """Give the dtype of this name, if a checkpoint can hold it."""
    return _PAIRS if name == _PAIRS.name else tensors.dtype_named(name)
