"""What every store has, kvcoll's own and those of others; and names for the latter."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, TypeVar

from .errors import ArgumentError

_Store = TypeVar("_Store", bound="type[KVStoreBase]")

OWN_NAMES = (
    *("local", "local_update_cpu", "local_allreduce_cpu", "device", "local_allreduce_device"),
    *("nccl", "dist", "dist_sync", "dist_device_sync", "dist_sync_device"),
    *("dist_async", "dist_async_device", "teststore"),
)
_registered: dict[str, type[KVStoreBase]] = {}


class KVStoreBase(ABC):
    """A store by its two calls, `broadcast` and `pushpull`; base of all, as in MXNet.

    A class of yours that is derived from it and registered is made by `kvcoll.create`.
    """

    #: For `is_capable`: the store can update values by an optimizer of its own.
    OPTIMIZER = "optimizer"

    @abstractmethod
    def broadcast(self, key: Any, value: Any, out: Any, priority: int = 0) -> Any:
        """Copy rank 0's value of a new key into every array of `out`, on all ranks."""

    @abstractmethod
    def pushpull(self, key: Any, value: Any, out: Any = None, priority: int = 0) -> Any:
        """Sum values over a list and over all ranks into every array of `out`, or in place."""

    @abstractmethod
    def is_capable(self, capability: str) -> bool:
        """Say whether the store can do a thing: `OPTIMIZER`."""

    @property
    @abstractmethod
    def type(self) -> str:
        """The name under which `create` makes such a store."""

    @property
    @abstractmethod
    def rank(self) -> int:
        """The rank of this process, from 0."""

    @property
    @abstractmethod
    def num_workers(self) -> int:
        """How many ranks share the store."""

    @staticmethod
    def register(store: _Store) -> _Store:
        """Let `kvcoll.create` make a store of yours, by its class's name in lower case.

        Parameters
        ----------
        store : type
            Derived from `KVStoreBase`; made without arguments. As a decorator it stands
            over the class.

        Returns
        -------
        type
            The same class.

        Raises
        ------
        TypeError
            It is no such class.
        ArgumentError
            The name is one of kvcoll's own, or another class has it.
        """
        if not (isinstance(store, type) and issubclass(store, KVStoreBase)):
            raise TypeError(f"only a class derived from KVStoreBase is registered, got {store!r}")
        name = store.__name__.lower()
        known = _registered.get(name)
        # A module that is loaded anew brings the same class once more.
        same = known is not None and (known.__module__, known.__qualname__) == (
            store.__module__,
            store.__qualname__,
        )
        if name in OWN_NAMES or (known is not None and not same):
            raise ArgumentError(f"a store named {name!r} exists already: name the class otherwise")
        _registered[name] = store
        return store


def registered() -> dict[str, type[KVStoreBase]]:
    """Give the stores of others by name."""
    return _registered
