"""What of a store is saved, and what a user may say beside it: checked.

Rules of the file: nothing is copied, sent or written.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from .. import states
from ..arrays import Array
from ..errors import ArgumentError
from ..optimizer import recipe
from ..replica import Entry
from ..schema import Key
from ..updater import Optimize, Updater
from .kept import Kept


@dataclass(frozen=True)
class Contents:
    """What of a store is saved.

    Attributes
    ----------
    entries : mapping of key to Entry
    updater : Updater
    version : int
    own : mapping of str to numpy.ndarray
        What is this rank's own, by name: flat arrays, which on other ranks may be others.
        With as many ranks each gets back its own. With another number rank r gets the sum
        of those of ranks r, r + n, r + 2 n, ..., n being the number of ranks now, and a
        rank that had none gets none: so their sum over all ranks stays, which is what
        counts of what gradients have left over.
    compression : mapping or None
        ``{'params': ..., 'is_on': ...}``: what `compression.parse` takes.
    about : mapping of str to str
        Settings, for people to read.
    """

    entries: Mapping[Key, Entry]
    updater: Updater
    version: int
    own: Mapping[str, Array]
    compression: Mapping[str, Any] | None
    about: Mapping[str, str]


class Content(NamedTuple):
    """Arrays to be saved, the same on all ranks, and what the manifest says of them."""

    keys: tuple[Key, ...]
    row_sparse: tuple[bool, ...]  # by key
    arrays: tuple[Kept, ...]
    flat: dict[str, Array]
    optimizer: dict[str, str] | None


def content_of(contents: Contents) -> Content:
    """List what is to be saved: values first, then one kind of states after the other."""
    entries = sorted(contents.entries.values(), key=lambda entry: entry.spec.order)
    arrays, flat = [], {}
    for entry in entries:
        kept = Kept(f"value:{entry.spec.key}", entry.spec.dtype, entry.spec.shape)
        arrays.append(kept)
        flat[kept.name] = entry.flat
    optimizer = None
    if isinstance(contents.updater, Optimize):
        dump = recipe.is_own(contents.updater.optimizer)
        saving = states.Saving(contents.updater, contents.entries, dump_optimizer=dump)
        optimizer = saving.metadata
        for name, state in sorted(saving.arrays.items(), key=lambda pair: _kind(pair[0])):
            arrays.append(Kept(name, state.dtype, state.shape))
            flat[name] = state.reshape(-1)
    keys = tuple(entry.spec.key for entry in entries)
    row_sparse = tuple(entry.spec.row_sparse for entry in entries)
    return Content(keys, row_sparse, tuple(arrays), flat, optimizer)


def own_of(contents: Contents) -> list[Kept]:
    """List what is this rank's own."""
    return [Kept(name, array.dtype, array.shape) for name, array in contents.own.items()]


def as_json(value: object, what: str) -> str:
    """Write a user's data as JSON, if that holds them.

    Raises
    ------
    ArgumentError
        They are no JSON, or would come back as something else.
    """
    try:
        _check_names(value)
        return json.dumps(value, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ArgumentError(
            f"{what} is not what JSON holds ({error}): give None, bools, finite numbers and texts "
            "of Python, and lists and dicts of them with texts for keys"
        ) from None


def _check_names(value: object) -> None:
    if isinstance(value, dict):
        for name, inner in value.items():
            if not isinstance(name, str):
                raise TypeError(f"the key {name!r} of a dict is no str")
            name.encode()
            _check_names(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            _check_names(inner)
    elif isinstance(value, str):
        value.encode()


def as_keep(keep: object) -> int | None:
    """Check how many checkpoints shall stay.

    Raises
    ------
    ArgumentError, TypeError
        It is no number above 0.
    """
    if keep is None:
        return None
    if isinstance(keep, bool) or not isinstance(keep, (int, np.integer)):
        raise TypeError(f"keep is an int or None, got {keep!r}")
    if keep < 1:
        raise ArgumentError(f"keep must be at least 1, for the checkpoint itself, got {keep}")
    return operator.index(keep)


def _kind(name: str) -> str:
    return name.partition(":")[0]
