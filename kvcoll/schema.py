"""Keys, and what each one holds: checked, written in one notation, digested.

Rules of the file: no array's contents are looked at and nothing is sent; a digest
is the same number on every rank and every machine for the same words.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import TypeAlias

import numpy as np

from .arrays import DType, Shaped, can_cast, describe, signature
from .errors import (
    ArgumentError,
    DTypeMismatchError,
    KeyKindError,
    ShapeMismatchError,
)

Key: TypeAlias = "int | str"
KeyLike: TypeAlias = "int | str | np.integer"

_KEY_MIN, _KEY_MAX = -(2**63), 2**63 - 1
_SHOWN_KEYS = 4


@dataclass(frozen=True)
class Spec:
    """What one key holds: fixed by `init`, the same on every rank.

    Attributes
    ----------
    key : int or str
        As the user gave it.
    shape : tuple of int
    dtype : numpy.dtype
        In native byte order.
    order : int
        The how-many-th key of the store this is, from 0, in the order of `init`.
    row_sparse : bool
        Whether it was initialised by a row-sparse value.
    """

    key: Key
    shape: tuple[int, ...]
    dtype: DType
    order: int
    row_sparse: bool = False

    @property
    def update_rank(self) -> int:
        """Sort keys by this for the order of updates: ints ascending, strs as initialised."""
        return self.key if isinstance(self.key, int) else self.order

    @property
    def n_elements(self) -> int:
        """How many elements the value has."""
        return math.prod(self.shape)

    @property
    def held(self) -> str:
        """What the value is, for messages."""
        kind = "row-sparse " if self.row_sparse else ""
        return f"{kind}{signature(self.shape, self.dtype)}"

    def __str__(self) -> str:
        return f"key {self.key!r} holds {self.held}"

    def check_pushed(self, array: Shaped, verb: str = "pushed") -> None:
        """Raise unless `array` may be summed into this key's value."""
        if array.shape != self.shape:
            raise ShapeMismatchError(
                f"{self}, {verb} {describe(array)}: reshape it, or init the key with that shape"
            )
        if array.dtype != self.dtype and not can_cast(array.dtype, self.dtype):
            raise DTypeMismatchError(
                f"{self}, {verb} {describe(array)}: {array.dtype.name} does not cast to "
                f"{self.dtype.name} by NumPy's same_kind rule; convert it with astype"
            )

    def check_output(self, array: Shaped) -> None:
        """Raise unless this key's value may be copied into `array`."""
        if array.shape != self.shape:
            raise ShapeMismatchError(f"{self}, the output is {describe(array)}: reshape it")
        if array.dtype != self.dtype and not can_cast(self.dtype, array.dtype):
            raise DTypeMismatchError(
                f"{self}, the output is {describe(array)}: {self.dtype.name} does not cast to "
                f"{array.dtype.name} by NumPy's same_kind rule; give an array of another dtype"
            )


def as_key(key: object) -> Key:
    """Check one key and take NumPy's integers as int.

    Raises
    ------
    KeyKindError
        It is neither an int nor a str, or is a bool.
    ArgumentError
        It is an int of more than 64 bits, or a str that is not valid unicode.
    """
    if isinstance(key, str):
        try:
            key.encode()
        except UnicodeEncodeError as error:
            raise ArgumentError(f"key {key!r} is not valid unicode: {error.reason}") from None
        return str.__str__(key)  # of an Enum's member the value, which equals it
    if isinstance(key, (bool, np.bool_, np.timedelta64)) or not isinstance(key, (int, np.integer)):
        raise KeyKindError(f"a key is an int or a str, got {key!r} of type {type(key).__name__}")
    number = operator.index(key)
    if not _KEY_MIN <= number <= _KEY_MAX:
        raise ArgumentError(f"key {number} does not fit into 64 bits")
    return number


def as_keys(key: object) -> tuple[list[Key], bool]:
    """Check a key or a list of keys.

    Returns
    -------
    keys : list of int or list of str
    is_list : bool
        Whether the caller gave a list or a tuple, so that values are one per key.
    """
    if not isinstance(key, (list, tuple)):
        return [as_key(key)], False
    keys = [as_key(k) for k in key]
    require_one_kind(keys)
    return keys, True


def require_one_kind(keys: Iterable[Key], kind: type | None = None) -> type | None:
    """Raise unless all keys are of one kind, and of `kind` where that is given."""
    for key in keys:
        if kind is None:
            kind = type(key)
        elif type(key) is not kind:
            raise KeyKindError(
                f"key {key!r} is of type {type(key).__name__}, the others are {kind.__name__}: "
                "a store has keys of one kind, all int or all str"
            )
    return kind


def one_per_key(
    keys: Sequence[Key], is_list: bool, values: object, what: str
) -> list[list[object]]:
    """Sort values into one list a key, each one entry a device.

    Parameters
    ----------
    keys : list of int or str
    is_list : bool
        As `as_keys` gave it: one value or list of values per key, or for one key.
    values : object or list
        What the caller gave.
    what : str
        ``'values'`` or ``'outputs'``, for the message.

    Raises
    ------
    ArgumentError
        The lengths differ, or a key's list is empty.
    """
    if not is_list:
        values = [values]
    elif not isinstance(values, (list, tuple)):
        raise ArgumentError(
            f"{len(keys)} keys were given as a list, but {what} as {type(values).__name__}: "
            "give a list of the same length"
        )
    if len(values) != len(keys):
        raise ArgumentError(f"{len(keys)} keys but {len(values)} {what}: give one for each key")
    lists = [list(v) if isinstance(v, (list, tuple)) else [v] for v in values]
    for key, entries in zip(keys, lists, strict=True):
        if not entries:
            raise ArgumentError(f"key {key!r}: the list of {what} is empty")
    return lists


def show_keys(keys: Sequence[Key]) -> str:
    """Write a list of keys short enough for a message."""
    if len(keys) == 1:
        return f"key {keys[0]!r}"
    shown = ", ".join(repr(k) for k in keys[:_SHOWN_KEYS])
    more = f", … {len(keys)} in all" if len(keys) > _SHOWN_KEYS else ""
    return f"keys [{shown}{more}]"


def digest(*words: object) -> int:
    """Digest words into 64 bits, the same on every rank (blake2b of their texts)."""
    text = "\x1f".join(repr(w) for w in words)
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")
