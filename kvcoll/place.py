"""Where a store's values lie, and what is done with them there: the memory of the host, or a GPU.

Rules of the file: arrays are flat or of a key's shape, and of the place they belong to; what
is asked of a GPU is put on its stream and not waited for.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeAlias, final

import numpy as np

from .arrays import Array, DType, round_to, sum_in_order

if TYPE_CHECKING:
    from .optimizer.base import Optimizer
    from .optimizer.step import Step
    from .schema import Spec

#: Gives the bytes of each array as they were when they were kept.
Kept: TypeAlias = "Callable[[], Sequence[bytes]]"


class Update(NamedTuple):
    """One step of neighbours that share it."""

    weight: Array
    grad: Array
    states: list[Array]
    step: Step


@dataclass(frozen=True, eq=False)
class Parts:
    """Parts of flat memory.

    Attributes
    ----------
    flat : Array
    starts, sizes : numpy.ndarray of int64, shape (n,)
        Where each begins, and how long it is, in elements.
    """

    flat: Array
    starts: Array
    sizes: Array

    def __iter__(self) -> Iterator[Array]:
        for start, size in zip(self.starts.tolist(), self.sizes.tolist(), strict=True):
            yield self.flat[start : start + size]


class UpdateEach(NamedTuple):
    """One step of neighbours that share it, each with a gradient of its own."""

    weight: Parts
    states: list[Array]  # flat, as that of the weights
    grads: Sequence[Array]
    step: Step


class Place(ABC):
    """Memory, and work on it."""

    is_host: ClassVar[bool]

    @abstractmethod
    def check(self, spec: Spec) -> None:
        """Raise unless the place can hold a key like this.

        Raises
        ------
        DTypeMismatchError
            Its work knows nothing of the dtype.
        """

    @abstractmethod
    def empty(self, n_elements: int, dtype: DType) -> Array:
        """Take memory of any contents."""

    @abstractmethod
    def zeros(self, n_elements: int, dtype: DType) -> Array:
        """Take memory of zeros."""

    @abstractmethod
    def copy(self, source: Array, out: Array) -> None:
        """Copy into an array of the same shape and any dtype."""

    @abstractmethod
    def is_flat(self, array: Array) -> bool:
        """Say whether elements lie one after another, and here."""

    @abstractmethod
    def add_lists(self, lists: Sequence[Sequence[Array]], outs: Sequence[Array]) -> None:
        """Add each list of arrays left to right, into an array of the accumulating dtype."""

    @abstractmethod
    def share_memory(self, one: Array, other: Array) -> bool:
        """Say whether arrays may have bytes in common."""

    @abstractmethod
    def clone(self, array: Array) -> Array:
        """Copy into new memory."""

    @abstractmethod
    def update(self, optimizer: Optimizer, work: Sequence[Update]) -> None:
        """Apply steps of an optimizer, each to its own memory."""

    @abstractmethod
    def update_each(self, optimizer: Optimizer, work: Sequence[UpdateEach]) -> None:
        """Apply steps of an optimizer to keys whose gradients lie apart."""

    @abstractmethod
    def copy_each(self, sources: Sequence[Array], outs: Parts) -> None:
        """Copy arrays, each into a part of flat memory."""

    @abstractmethod
    def at_host(self, array: Array) -> Array:
        """Give an array of the host with the same contents: the array itself, if it lies there."""

    @abstractmethod
    def keep(self, arrays: Sequence[Array]) -> Kept:
        """Keep what small flat arrays hold now; give what tells their bytes later."""

    @abstractmethod
    def lend(self, array: Array) -> Any:
        """Show the place's memory to code of the user's."""

    @abstractmethod
    def lending(self) -> AbstractContextManager[None]:
        """Hold while the user's code works on what is lent."""

    @abstractmethod
    def joined(self) -> AbstractContextManager[None]:
        """Let copies and updates of the block be few pieces of work; they must not overlap."""


@final
class HostPlace(Place):
    """The memory of the host, worked on by NumPy."""

    is_host = True

    def check(self, spec: Spec) -> None:
        """Take all that NumPy sums."""

    def empty(self, n_elements: int, dtype: DType) -> Array:
        """Take memory."""
        return np.empty(n_elements, dtype)

    def zeros(self, n_elements: int, dtype: DType) -> Array:
        """Take memory."""
        return np.zeros(n_elements, dtype)

    def copy(self, source: Array, out: Array) -> None:
        """Copy, and round."""
        if source.dtype is out.dtype:
            np.copyto(out, source)
        else:
            round_to(source, out)

    def is_flat(self, array: Array) -> bool:
        """Ask NumPy."""
        return array.flags.c_contiguous

    def add_lists(self, lists: Sequence[Sequence[Array]], outs: Sequence[Array]) -> None:
        """One list after the other."""
        for values, out in zip(lists, outs, strict=True):
            sum_in_order(list(values), out)

    def share_memory(self, one: Array, other: Array) -> bool:
        """Ask NumPy."""
        return np.may_share_memory(one, other)

    def clone(self, array: Array) -> Array:
        """Ask NumPy."""
        copied: Array = array.copy()
        return copied

    def update(self, optimizer: Optimizer, work: Sequence[Update]) -> None:
        """Step after step."""
        for weight, grad, states, step in work:
            optimizer.update_flat(weight, grad, states, step)

    def update_each(self, optimizer: Optimizer, work: Sequence[UpdateEach]) -> None:
        """Step after step, key after key."""
        for weights, flat_states, grads, step in work:
            states = [Parts(flat, weights.starts, weights.sizes) for flat in flat_states]
            for weight, grad, *own in zip(weights, grads, *states, strict=True):
                optimizer.update_flat(weight, grad.reshape(-1), own, step)

    def copy_each(self, sources: Sequence[Array], outs: Parts) -> None:
        """One after the other."""
        for source, out in zip(sources, outs, strict=True):
            self.copy(source.reshape(-1), out)

    def at_host(self, array: Array) -> Array:
        """Give the array itself."""
        return array

    def keep(self, arrays: Sequence[Array]) -> Kept:
        """Copy the bytes."""
        kept = [array.tobytes() for array in arrays]
        return lambda: kept

    def lend(self, array: Array) -> Any:
        """Show the array itself."""
        return array

    def lending(self) -> AbstractContextManager[None]:
        """Hold nothing."""
        return nullcontext()

    def joined(self) -> AbstractContextManager[None]:
        """Do nothing: work is done at once."""
        return nullcontext()


#: The one place of all stores that are not on a GPU.
HOST = HostPlace()
