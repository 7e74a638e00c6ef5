"""The smallest store there is: one process, broadcast and pushpull, nothing kept."""

from __future__ import annotations

from typing import Any, final

import numpy as np

from .arrays import as_array, as_output, fill_device, native, round_to, sum_in_order, wide
from .base import KVStoreBase
from .errors import ArgumentError
from .schema import Spec, as_keys, one_per_key


@final
class TestStore(KVStoreBase):
    """``create('teststore')``: for programs that need no more than the two calls.

    It is one process and stores nothing: `broadcast` copies, `pushpull` sums a list.
    """

    __test__ = False  # pytest takes classes of this name for tests

    def broadcast(self, key: Any, value: Any, out: Any, priority: int = 0) -> Any:
        """Copy a value into every array of `out`.

        Parameters
        ----------
        key : int, str, or list of them
        value : array, or list of arrays
            One a key.
        out : array, or list of arrays; for a list of keys a list of either
        priority : int, default 0
            Taken for MXNet's sake.

        Returns
        -------
        array, or list
            `out`.

        Raises
        ------
        ArgumentError, ShapeMismatchError, DTypeMismatchError, ArrayError, KeyKindError
            As `KVStore.broadcast` does.
        """
        keys, is_list = as_keys(key)
        values = one_per_key(keys, is_list, value, "values")
        for own_key, entries in zip(keys, values, strict=True):
            if len(entries) > 1:
                raise ArgumentError(
                    f"key {own_key!r}: broadcast takes one value, or a list of one, "
                    f"got {len(entries)}"
                )
        return self._fill(key, value, out)

    def pushpull(self, key: Any, value: Any, out: Any = None, priority: int = 0) -> Any:
        """Sum the values of each key into every array of `out`.

        Parameters
        ----------
        key : int, str, or list of them
        value : array, or list of arrays; for a list of keys a list of either
        out : array or list, optional
            By default `value`, which is then changed in place.
        priority : int, default 0
            Taken for MXNet's sake.

        Returns
        -------
        array, or list
            What was filled.

        Raises
        ------
        ArgumentError, ShapeMismatchError, DTypeMismatchError, ArrayError, KeyKindError
            As `KVStore.pushpull` does.
        """
        return self._fill(key, value, value if out is None else out)

    def is_capable(self, capability: str) -> bool:
        """Say no: it keeps no values that an optimizer could update."""
        if not isinstance(capability, str) or capability.lower() != self.OPTIMIZER:
            raise ArgumentError(f"unknown capability {capability!r}: known is {self.OPTIMIZER}")
        return False

    @property
    def type(self) -> str:
        """``'teststore'``."""
        return "teststore"

    @property
    def rank(self) -> int:
        """0."""
        return 0

    @property
    def num_workers(self) -> int:
        """1."""
        return 1

    def _fill(self, key: Any, value: Any, out: Any) -> Any:
        keys, is_list = as_keys(key)
        values = one_per_key(keys, is_list, value, "values")
        outs = one_per_key(keys, is_list, out, "outputs")
        filled = []
        for number, own_key in enumerate(keys):
            arrays = [as_array(one) for one in values[number]]
            spec = Spec(own_key, arrays[0].shape, native(arrays[0].dtype), number)
            for array in arrays[1:]:
                spec.check_pushed(array)
            total = np.empty(spec.shape, wide(spec.dtype))
            sum_in_order(arrays, total)
            for one in outs[number]:
                host, device = as_output(one)
                spec.check_output(host)
                filled.append((total.astype(spec.dtype), host, device))
        for total, host, device in filled:  # once all has been checked
            round_to(total, host)
            if device is not None:
                fill_device(device, host)
        return out
