"""An optimizer's states on disk: what is saved, and what a saved file changes.

A file is a safetensors one (`tensors`). Its arrays are ``state0:w``, ``state1:w``, ... and
``master:w`` for the key w, in the key's shape; its metadata, as JSON, the keys with their
signatures and counts of updates, the optimizer's name and its settings.

Rules of the file: one rank reads and writes, all ranks check what it has read and take
memory for it in a `Draft`; nothing of the store changes before `Draft.apply`, which
cannot fail. What a file says is used as numbers and names only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn, final

import numpy as np

from . import tensors
from .arrays import Array, DType, signature
from .errors import ArgumentError, FileFormatError, NoOptimizerError, StatesMismatchError
from .optimizer import Optimizer, recipe
from .replica import Entry
from .schema import Key
from .updater import Optimize, Updater

_FORMAT = "kvcoll.optimizer_states"
_VERSION = "1"
_MOST_UPDATES = 2**62


def require_optimizer(updater: Updater, done: str) -> Optimize:
    """Raise unless it is an optimizer whose states could be saved or loaded."""
    if not isinstance(updater, Optimize):
        raise NoOptimizerError(
            f"there are no optimizer states to be {done}: the store has {updater.describe()}; "
            "call set_optimizer first"
        )
    return updater


@final
class Saving:
    """What is to be saved, checked.

    Parameters
    ----------
    updater : Updater
    entries : mapping of key to Entry
        Of the store.
    dump_optimizer : bool
        Whether loading shall bring back the optimizer, too.

    Raises
    ------
    NoOptimizerError
        The store has no optimizer.
    ArgumentError, TypeError
        An optimizer that a file cannot hold shall be dumped.
    """

    def __init__(
        self, updater: Updater, entries: Mapping[Key, Entry], *, dump_optimizer: bool
    ) -> None:
        own = require_optimizer(updater, "saved")
        if not isinstance(dump_optimizer, (bool, np.bool_)):
            raise TypeError(f"dump_optimizer is a bool, got {dump_optimizer!r}")
        self._arrays: dict[str, Array] = {}
        kept = []
        for key, count in own.counts().items():
            spec, states = entries[key].spec, own.states_of(entries[key])
            names = names_of(own.optimizer, spec.dtype)
            for name, state in zip(names, states, strict=True):
                self._arrays[f"{name}:{key}"] = state.reshape(spec.shape)
            kept.append([key, signature(spec.shape, spec.dtype), count, names])
        self._metadata = {
            "format": _FORMAT,
            "version": _VERSION,
            "keys": json.dumps(kept),
            "num_update": str(int(own.optimizer.num_update)),
            "optimizer": type(own.optimizer).__name__,
            "dump_optimizer": json.dumps(bool(dump_optimizer)),
        }
        if recipe.is_own(own.optimizer):
            self._metadata["settings"] = json.dumps(recipe.recipe_of(own.optimizer))
        elif dump_optimizer:
            raise ArgumentError(
                f"{type(own.optimizer).__name__} is not one of kvcoll's optimizers, and a file "
                "holds no code: save with dump_optimizer=False, and set it before you load"
            )

    @property
    def arrays(self) -> dict[str, Array]:
        """The states by name, in their keys' shapes."""
        return self._arrays

    @property
    def metadata(self) -> dict[str, str]:
        """What a file says of them."""
        return self._metadata

    def write(self, path: str) -> None:
        """Write the file; see `tensors.write` for what it raises."""
        tensors.write(path, self._arrays, self._metadata)


@dataclass(frozen=True)
class _Kept:
    """What a file says of one key."""

    key: Key
    signature: str
    count: int
    names: tuple[str, ...]


@final
class Draft:
    """What a file will change of a store, checked against it.

    Parameters
    ----------
    path : str
        For messages.
    text : str
        What the file says of itself, as `read` gives it.
    updater : Updater
    entries : mapping of key to Entry
        Of the store.

    Raises
    ------
    FileFormatError
        The file is no file of states, or says what cannot be.
    NoOptimizerError
        The store has no optimizer, and the file holds none.
    StatesMismatchError
        The file is of another optimizer, of other keys, shapes, dtypes or states.
    """

    def __init__(
        self, path: str, text: str, updater: Updater, entries: Mapping[Key, Entry]
    ) -> None:
        self.text = text
        self._path = path
        self._metadata: dict[str, str] = json.loads(text)
        if self._metadata.get("format") != _FORMAT:
            self._refuse("it is a safetensors file, but not one of optimizer states")
        if self._metadata.get("version") != _VERSION:
            self._refuse(
                f"it is of version {self._metadata.get('version')!r}, known is {_VERSION}: "
                "read it with the kvcoll that wrote it"
            )
        self._old, self._new_optimizer = self._optimizers(updater)
        self._num_update = self._whole(self._json("num_update"))
        self._states = Optimize(self._new_optimizer)
        self._names: dict[str, tuple[Entry, int]] = {}
        for kept in self._kept():
            self._adopt(kept, entries)

    @property
    def arrays(self) -> list[Array]:
        """The memory of all states, the same on all ranks: for broadcasts from the reader."""
        return self._states.all_states()

    @property
    def places(self) -> dict[str, Array]:
        """Where each of the file's arrays goes, as flat arrays."""
        states = self._states
        return {name: states.states_of(entry)[k] for name, (entry, k) in self._names.items()}

    def fill(self, file: tensors.TensorFile) -> None:
        """Read the states from the file that the text is of."""
        if set(file.arrays) != set(self._names):
            odd = min(set(file.arrays) ^ set(self._names))
            self._refuse(f"array {odd!r} stands only in its list of keys, or only in its bytes")
        for name, (entry, number) in self._names.items():
            state = self._states.states_of(entry)[number]
            stored = file.arrays[name]
            if (stored.shape, stored.dtype) != (entry.spec.shape, state.dtype):
                self._refuse(
                    f"array {name!r} is {signature(stored.shape, stored.dtype)}, expected "
                    f"{signature(entry.spec.shape, state.dtype)}"
                )
            file.read_into(name, state)

    def apply(self) -> Updater:
        """Bring the optimizer to the file's settings and counts; give the updater to be set."""
        if self._old is None:
            self._new_optimizer.num_update = self._num_update
            return self._states
        if self._old is not self._new_optimizer:
            recipe.take_settings(self._old, self._new_optimizer)
        self._old.num_update = self._num_update
        return self._states.with_optimizer(self._old)

    def _optimizers(self, updater: Updater) -> tuple[Optimizer | None, Optimizer]:
        """Give the optimizer that stays in the store, if one does, and one with the settings."""
        name = self._metadata.get("optimizer", "")
        is_dumped = self._json("dump_optimizer")
        if type(is_dumped) is not bool:
            self._refuse("whether it holds an optimizer is not said")
        if not is_dumped:
            old = require_optimizer(updater, "loaded").optimizer
            if type(old).__name__ != name:
                raise StatesMismatchError(
                    f"{self._path!r} holds states of {name}, the store's optimizer is "
                    f"{type(old).__name__}: call set_optimizer with {name} before you load"
                )
            return old, old
        made, had_schedule = self._made(name)
        if isinstance(updater, Optimize) and type(updater.optimizer) is type(made):
            old = updater.optimizer
            if had_schedule and old.lr_scheduler is None:
                self._lacks_schedule(name)
            return old, made
        if had_schedule:
            self._lacks_schedule(name)
        return None, made

    def _made(self, name: str) -> tuple[Optimizer, bool]:
        """Make the optimizer that the file describes."""
        settings = self._json("settings")
        try:
            return recipe.make(name, settings), recipe.had_schedule(settings)
        except ArgumentError as error:
            self._refuse(str(error))

    def _lacks_schedule(self, name: str) -> NoReturn:
        raise StatesMismatchError(
            f"{self._path!r} was saved with an lr_scheduler, which a file does not hold: "
            f"call set_optimizer with a {name} that has it before you load"
        )

    def _kept(self) -> list[_Kept]:
        listed = self._json("keys")
        if type(listed) is not list:
            self._refuse("its list of keys is none")
        all_kept = []
        for item in listed:
            if type(item) is not list or len(item) != 4 or type(item[3]) is not list:
                self._refuse("its list of keys is none")
            key, text, count, names = item
            if type(key) not in (int, str) or not all(type(n) is str for n in (text, *names)):
                self._refuse("its list of keys is none")
            all_kept.append(_Kept(key, text, self._whole(count), tuple(names)))
        if len({kept.key for kept in all_kept}) != len(all_kept):
            self._refuse("a key stands twice in its list of keys")
        return all_kept

    def _adopt(self, kept: _Kept, entries: Mapping[Key, Entry]) -> None:
        """Take memory for one key, once it is known that it fits."""
        key, optimizer = kept.key, self._new_optimizer
        if key not in entries:
            raise StatesMismatchError(
                f"{self._path!r} holds states of key {key!r}, which is not in the store: "
                "init the keys before you load"
            )
        spec = entries[key].spec
        if signature(spec.shape, spec.dtype) != kept.signature:
            raise StatesMismatchError(
                f"{spec}, in {self._path!r} it held {kept.signature}: "
                "load the states into a store of the same keys"
            )
        names = names_of(optimizer, spec.dtype)
        if names != list(kept.names):
            raise StatesMismatchError(
                f"{spec}, and {type(optimizer).__name__} keeps {_count(names)} of it, "
                f"{self._path!r} has {_count(kept.names)}: set the same momentum and "
                "multi_precision as when it was saved"
            )
        optimizer.check(spec)
        self._states.adopt(entries[key], kept.count)
        for number, name in enumerate(names):
            self._names[f"{name}:{key}"] = entries[key], number

    def _json(self, name: str) -> Any:
        try:
            return json.loads(self._metadata[name])
        except (KeyError, ValueError, RecursionError):
            self._refuse(f"what it says of {name!r} is missing or cannot be read")

    def _whole(self, number: Any) -> int:
        if type(number) is not int or not 0 <= number <= _MOST_UPDATES:
            self._refuse("a number of updates is none")
        return number

    def _refuse(self, what: str) -> NoReturn:
        raise FileFormatError(
            f"{self._path!r} is not a sound file of optimizer states: {what}; "
            "give one that save_optimizer_states has written"
        )


def read(path: str, updater: Updater, entries: Mapping[Key, Entry]) -> Draft:
    """Read a file of states, every byte of it, and check it against a store.

    Raises
    ------
    FileError, FileFormatError, StatesMismatchError, NoOptimizerError
        See `tensors.opened` and `Draft`.
    """
    with tensors.opened(path) as file:
        draft = Draft(path, json.dumps(file.metadata), updater, entries)
        if not file.has_checksums:
            file.refuse("its checksums are missing: another program rewrote it")
        draft.fill(file)
        return draft


def names_of(optimizer: Optimizer, dtype: DType) -> list[str]:
    """Name the states of a key as `Optimize.states_of` gives them; the last may be its master."""
    n, has_master = optimizer.n_states(dtype), optimizer.keeps_master(dtype)
    return [f"state{k}" for k in range(n - has_master)] + ["master"] * has_master


def _count(names: object) -> str:
    return f"[{', '.join(map(str, names))}]" if isinstance(names, (list, tuple)) else str(names)
