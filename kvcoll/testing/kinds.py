"""The kinds of faults, and how each strikes.

Rules of the file: what a user gives is checked when a fault is made; arrays of the user's are never
changed.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, final

import numpy as np

from ..arrays import Array, DType
from ..errors import ArgumentError, KVCollError
from ..faults import Push
from ..schema import as_keys
from ..sparse import RowSparse

_FLIPPED: Final = ("gradient", "replica", "state")
_OF_BFLOAT16: Final = 6
_WAKING: Final = "sleep {seconds}; while kill -CONT {pid}; do sleep 0.2; done"


class InjectedError(Exception):
    """What `Raise` raises unless it is told otherwise."""


@dataclass(frozen=True, kw_only=True)
class Fault(ABC):
    """What goes wrong, and when.

    Attributes
    ----------
    rank : int
        On which rank of the store, as it was created: a recovery numbers ranks anew.
    push : int, optional
        At the how-many-th push: with a `key` of those of this key since the fault was set,
        else of the store, as `KVStore.version` counts them from 1 on. By default at the next.
    key : int or str, optional
        Only at pushes of this key.
    """

    rank: int
    push: int | None = None
    key: int | str | None = None

    def __post_init__(self) -> None:
        self._require("rank", self.rank, 0)
        if self.push is not None:
            self._require("push", self.push, 1)

    @abstractmethod
    def before(self, push: Push, value: Any) -> tuple[Any, bool]:
        """Strike before the push; give what is pushed, and whether it is."""

    def _require(self, name: str, number: object, least: float, *, whole: bool = True) -> None:
        kinds = (int, np.integer) if whole else (int, float, np.integer, np.floating)
        if isinstance(number, bool) or not isinstance(number, kinds) or not number >= least:
            what = "a whole number" if whole else "a number"
            raise ArgumentError(
                f"{name} of {type(self).__name__} is {what} from {least:g} on, got {number!r}"
            )


@final
@dataclass(frozen=True, kw_only=True)
class Delay(Fault):
    """Sleep before a push: the others wait, and the watchdog speaks if it is for long.

    Attributes
    ----------
    seconds : float
    """

    seconds: float

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("seconds", self.seconds, 0, whole=False)

    def before(self, push: Push, value: Any) -> tuple[Any, bool]:
        """Sleep."""
        time.sleep(self.seconds)
        return value, True


@final
@dataclass(frozen=True, kw_only=True)
class Stop(Fault):
    """Stop the process (SIGSTOP), all its threads, and let it go on after a time.

    Attributes
    ----------
    seconds : float
    """

    seconds: float

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("seconds", self.seconds, 0, whole=False)

    def before(self, push: Push, value: Any) -> tuple[Any, bool]:
        """Let another process wake this one, again and again until it has awoken; then stop."""
        waking = _WAKING.format(seconds=self.seconds, pid=os.getpid())
        with subprocess.Popen(["/bin/sh", "-c", waking], start_new_session=True) as waker:
            os.kill(os.getpid(), signal.SIGSTOP)
            os.killpg(waker.pid, signal.SIGKILL)
        return value, True


@final
@dataclass(frozen=True, kw_only=True)
class Kill(Fault):
    """End the process at once (SIGKILL), as the system does that is out of memory.

    With an MPI that survives it the others raise `RankLostError`, else the job ends.
    """

    def before(self, push: Push, value: Any) -> tuple[Any, bool]:
        """Die."""
        os.kill(os.getpid(), signal.SIGKILL)
        return value, True


@final
@dataclass(frozen=True, kw_only=True)
class Raise(Fault):
    """Raise in place of a push, as a program's own mistake would.

    The others raise `RankLeftError` once the rank leaves the store by it or ends.

    Attributes
    ----------
    error : BaseException, optional
        By default an `InjectedError`.
    """

    error: BaseException | None = None

    def before(self, push: Push, value: Any) -> tuple[Any, bool]:
        """Raise."""
        if self.error is not None:
            raise self.error
        raise InjectedError(f"rank {push.rank} raises at push {push.number}, as it was asked to")


@final
@dataclass(frozen=True, kw_only=True)
class Skip(Fault):
    """Leave a push out.

    The replicas stay the same: the rank's next push is added to this one of the others. When
    the ranks come to different calls, as to the end, that is a `RanksDisagreeError`, or a
    `RankLeftError`.
    """

    def before(self, push: Push, value: Any) -> tuple[Any, bool]:
        """Leave it out."""
        return value, False


@final
@dataclass(frozen=True, kw_only=True)
class Reshape(Fault):
    """Push an array of another shape, with one axis more: `ShapeMismatchError` on all ranks."""

    def before(self, push: Push, value: Any) -> tuple[Any, bool]:
        """Change the shape."""
        change = partial(_reshaped, push.at_host)
        return _with(push.key, value, self.key, change), True


@final
@dataclass(frozen=True, kw_only=True)
class Flip(Fault):
    """Flip a bit.

    Attributes
    ----------
    what : str, default 'replica'
        ``'replica'``: of the stored value, once the push is applied: `KVStore.verify` raises
        `ReplicasDifferError`. ``'state'``: the same of the optimizer's first state.
        ``'gradient'``: of what is pushed, in a copy. Its sum is wrong, but the same on all
        ranks: nothing can tell.
    element : int, default 0
        Of which element, in memory's order.
    bit : int, optional
        Which bit, from the lowest; by default a float's first behind the point, which makes it
        another number of a like size, and of others the lowest.
    """

    what: str = "replica"
    element: int = 0
    bit: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.what not in _FLIPPED:
            raise ArgumentError(f"what Flip flips is one of {listed(_FLIPPED)}, got {self.what!r}")
        self._require("element", self.element, 0)
        if self.bit is not None:
            self._require("bit", self.bit, 0)

    def before(self, push: Push, value: Any) -> tuple[Any, bool]:
        """Flip a bit of a copy of the gradient."""
        if self.what != "gradient":
            return value, True
        change = partial(self._flipped, push.at_host)
        return _with(push.key, value, self.key, change), True

    def after(
        self, push: Push, stored: Callable[[Any], AbstractContextManager[Sequence[Array]]]
    ) -> None:
        """Flip a bit of what is stored."""
        if self.what == "gradient":
            return
        key = as_keys(push.key)[0][place_of(push.key, self.key)]
        with stored(key) as (value, *states):
            if self.what == "state" and not states:
                raise ArgumentError(f"key {key!r} has no state whose bits could be flipped")
            self._flip(states[0] if self.what == "state" else value)

    def _flipped(self, at_host: Callable[[Any], Array], value: Any) -> Any:
        if isinstance(value, RowSparse):
            return RowSparse(self._flipped(at_host, value.data), value.indices, value.shape)
        changed: Array = np.array(at_host(value), order="C")
        self._flip(changed.reshape(-1))
        return changed

    def _flip(self, flat: Array) -> None:
        n_bits = 8 * flat.itemsize
        bit = _telling_bit(flat.dtype) if self.bit is None else self.bit
        if self.element >= flat.size or bit >= n_bits:
            raise ArgumentError(
                f"there is no bit {bit} of element {self.element} among {flat.size} of "
                f"{n_bits} bits each"
            )
        flat.view(np.uint8)[self.element * flat.itemsize + bit // 8] ^= np.uint8(1 << bit % 8)


@final
@dataclass(frozen=True, kw_only=True)
class FillDisk(Fault):
    """Let the rank's writes of checkpoints and states fail from a push on, as on a full disk.

    `save` raises `FileError` on all ranks, and what was saved before can be loaded.

    Attributes
    ----------
    seconds : float, optional
        For how long; by default to the end of the with-block, or of the process.
    """

    seconds: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.seconds is not None:
            self._require("seconds", self.seconds, 0, whole=False)

    def before(self, push: Push, value: Any) -> tuple[Any, bool]:
        """Begin: the rest is done where files are written."""
        return value, True


@final
@dataclass(frozen=True, kw_only=True)
class Cut(Fault):
    """Run a command before a push, to cut a link, or whatever else it does.

    Attributes
    ----------
    command : str
        Split as by a shell, but run without one. On a host of its own, as root, ``ip link set
        eth0 down`` takes it off the network. It has 60 s, and must succeed.
    """

    command: str

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.command, str) or not self.command.split():
            raise ArgumentError(f"command of Cut is a command, got {self.command!r}")

    def before(self, push: Push, value: Any) -> tuple[Any, bool]:
        """Run it."""
        subprocess.run(shlex.split(self.command), check=True, timeout=60)
        return value, True


def _telling_bit(dtype: DType) -> int:
    if np.issubdtype(dtype, np.inexact):
        return int(np.finfo(dtype).nmant) - 1
    return _OF_BFLOAT16 if dtype.name == "bfloat16" else 0


def place_of(given: Any, key: int | str | None) -> int:
    """Give the place of a key in what is pushed, the first if none is named; -1 if nowhere."""
    try:
        keys, _ = as_keys(given)
    except KVCollError:  # which the push itself raises, on all ranks
        return -1
    if key is None:
        return 0 if keys else -1
    # A store has keys of one kind, so what was read from a text can be told by its text.
    return next((place for place, one in enumerate(keys) if str(one) == str(key)), -1)


def _with(given: Any, value: Any, key: int | str | None, change: Callable[[Any], Any]) -> Any:
    """Give what is pushed with the first array of a key changed."""
    place = place_of(given, key)
    if place < 0:
        return value
    if not isinstance(given, (list, tuple)):
        return _with_first(value, change)
    return [
        _with_first(one, change) if number == place else one for number, one in enumerate(value)
    ]


def _with_first(value: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(value, (list, tuple)):
        return [change(value[0]), *value[1:]]
    return change(value)


def _reshaped(at_host: Callable[[Any], Array], value: Any) -> Any:
    if isinstance(value, RowSparse):
        return RowSparse(value.data, value.indices, (value.shape[0] + 1, *value.shape[1:]))
    array = at_host(value)
    return array.reshape(*array.shape, 1)


def listed(words: Sequence[str]) -> str:
    """Write words as messages do."""
    return ", ".join(map(repr, words))
