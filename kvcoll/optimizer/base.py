"""What all optimizers share: settings, counts, states, and the walk in pieces.

Rules of the file: a state belongs to one key and lives here, not in the store; the
arithmetic of one optimizer is its `_step`, on flat pieces that fit into a core's
cache, with scratch arrays given to it, so that no update allocates.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from threading import get_ident

import numpy as np

from ..arrays import Array, DType, is_small_float, wide
from ..errors import ArgumentError, DTypeMismatchError
from ..schema import Key, Spec

# Measured for SGD with momentum: 64 k elements are 2.5 times as fast as the whole
# of a large key at once; below 8 k the calls into NumPy cost more than they save.
PIECE_ELEMENTS = 1 << 16
_N_SCRATCH = 3

Scheduler = Callable[[int], float]


@dataclass(frozen=True)
class Step:
    """The numbers of one update of one key, or of several that share them."""

    lr: float
    wd: float
    count: int  # updates of this key so far, this one included


class Optimizer(ABC):
    """Base of all optimizers; names and defaults are MXNet's.

    Parameters
    ----------
    learning_rate : float, default 0.01
    wd : float, default 0
        Weight decay: ``wd * weight`` is added to the gradient.
    rescale_grad : float, default 1
        The gradient is multiplied by it first. A distributed store hands over the
        sum over ranks, so a mean is ``1 / (batch_size * kv.num_workers)``.
    clip_gradient : float, optional
        The rescaled gradient is limited to ``[-clip_gradient, clip_gradient]``.
    lr_scheduler : callable, optional
        Takes the number of updates so far, gives the learning rate.
    multi_precision : bool, default False
        Keep a float32 master copy of the value of a 16-bit key.
    param_idx2name : mapping of key to str, optional
        Names for `set_lr_mult` and `set_wd_mult`; with it, weight decay is off for
        keys whose name ends in neither ``_weight`` nor ``_gamma``.
    begin_num_update : int, default 0
        Where the count of updates starts.
    """

    def __init__(
        self,
        *,
        learning_rate: float = 0.01,
        wd: float = 0.0,
        rescale_grad: float = 1.0,
        clip_gradient: float | None = None,
        lr_scheduler: Scheduler | None = None,
        multi_precision: bool = False,
        param_idx2name: Mapping[Key, str] | None = None,
        begin_num_update: int = 0,
    ) -> None:
        if lr_scheduler is not None and not callable(lr_scheduler):
            raise TypeError(f"lr_scheduler must be callable, got {type(lr_scheduler).__name__}")
        if clip_gradient is not None and clip_gradient <= 0:
            raise ArgumentError(f"clip_gradient must be above 0 or None, got {clip_gradient}")
        self.lr = learning_rate
        self.wd = wd
        self.rescale_grad = rescale_grad
        self.clip_gradient = clip_gradient
        self.lr_scheduler = lr_scheduler
        self.multi_precision = multi_precision
        self.num_update = begin_num_update
        self.begin_num_update = begin_num_update
        self.version = 0  # goes up with every change of multipliers
        self._counts: dict[Key, int] = {}
        self._names = dict(param_idx2name or {})
        self._lr_mult: dict[Key, float] = {}
        self._wd_mult: dict[Key, float] = {}
        self._scratch: dict[tuple[DType, int], list[Array]] = {}  # by thread
        self.set_wd_mult({})

    @property
    def learning_rate(self) -> float:
        """The learning rate of the next update, before a key's own multiplier."""
        return self.rate_at(self.num_update)

    def rate_at(self, num_update: int) -> float:
        """Give the learning rate after so many updates."""
        return float(self.lr if self.lr_scheduler is None else self.lr_scheduler(num_update))

    def set_learning_rate(self, lr: float) -> None:
        """Set the learning rate from the next push on; all ranks must set the same.

        Raises
        ------
        ArgumentError
            A scheduler sets it.
        """
        if self.lr_scheduler is not None:
            raise ArgumentError("the learning rate is set by lr_scheduler: change that instead")
        self.lr = lr

    def set_lr_mult(self, lr_mult: Mapping[Key, float]) -> None:
        """Multiply the learning rate of single keys, given by key or by name."""
        self._lr_mult = dict(lr_mult)
        self.version += 1

    def set_wd_mult(self, wd_mult: Mapping[Key, float]) -> None:
        """Multiply the weight decay of single keys, given by key or by name."""
        self._wd_mult = {
            name: 0.0 for name in self._names.values() if not name.endswith(("_weight", "_gamma"))
        }
        self._wd_mult.update(wd_mult)
        self.version += 1

    def settings(self) -> tuple[float, ...]:
        """Give the numbers that must be equal on all ranks; compared at every push."""
        clip = -1.0 if self.clip_gradient is None else self.clip_gradient
        return (self.learning_rate, self.wd, self.rescale_grad, clip, *self._own_settings())

    def names_and_factors(self) -> tuple[str, ...]:
        """Write down what else must be equal on all ranks; compared like `settings`."""
        words = ["multi_precision"] if self.multi_precision else []
        if self.begin_num_update:
            words.append(f"begin_num_update={self.begin_num_update}")
        for what, table in (
            ("names", self._names),
            ("lr_mult", self._lr_mult),
            ("wd_mult", self._wd_mult),
        ):
            words += [f"{what}[{key!r}]={table[key]!r}" for key in sorted(table, key=repr)]
        return tuple(words)

    def describe(self) -> str:
        """Write name and settings as messages do."""
        # All digits: settings that differ must not read alike.
        numbers = ", ".join(repr(float(n)).removesuffix(".0") for n in self.settings())
        others = self.names_and_factors()
        return f"{type(self).__name__}({numbers})" + (
            f" with {', '.join(others)}" if others else ""
        )

    def create_state(self, spec: Spec, weight: Array) -> tuple[Array, ...]:
        """Make the state of one key.

        Parameters
        ----------
        spec : Spec
        weight : numpy.ndarray
            The stored value.

        Returns
        -------
        tuple of numpy.ndarray
            Of the value's shape, in float32 for 16-bit keys; with `multi_precision`
            their master copy is the last.

        Raises
        ------
        DTypeMismatchError
            The key does not hold real floats.
        """
        self.check(spec)
        self.reserve(spec.dtype)
        dtype = wide(weight.dtype)
        state = tuple(np.zeros(weight.shape, dtype) for _ in range(self._n_states()))
        if self.keeps_master(spec.dtype):
            state += (weight.astype(dtype),)
        return state

    def update(self, key: Key, weight: Array, grad: Array, state: Sequence[Array]) -> None:
        """Apply one gradient to one key, in place.

        Parameters
        ----------
        key : int or str
        weight, grad : numpy.ndarray
            Contiguous, of one shape and dtype.
        state : sequence of numpy.ndarray
            What `create_state` gave.
        """
        count = self._counts.get(key, self.begin_num_update) + 1
        self._counts[key] = count
        self.num_update = max(self.num_update, count)
        lr_mult, wd_mult = self.multipliers(key)
        step = Step(self.learning_rate * lr_mult, float(self.wd) * wd_mult, count)
        flat = [array.reshape(-1) for array in state]
        self.update_flat(weight.reshape(-1), grad.reshape(-1), flat, step)

    def update_flat(self, weight: Array, grad: Array, state: Sequence[Array], step: Step) -> None:
        """Apply one step to flat arrays, a cache-sized piece at a time.

        Parameters
        ----------
        weight, grad : numpy.ndarray, shape (n,)
        state : sequence of numpy.ndarray, shape (n,)
            As many as `state_dtypes` says.
        step : Step
        """
        self.reserve(weight.dtype)
        for start in range(0, weight.size, PIECE_ELEMENTS):
            piece = slice(start, start + PIECE_ELEMENTS)
            states = [array[piece] for array in state]
            with np.errstate(all="ignore"):  # nothing may raise on one rank alone
                self._update_piece(weight[piece], grad[piece], states, step)

    def reserve(self, dtype: DType) -> None:
        """Take the scratch memory that updates of keys of a dtype need."""
        own = wide(dtype), get_ident()
        if own not in self._scratch:
            self._scratch[own] = [np.empty(PIECE_ELEMENTS, own[0]) for _ in range(_N_SCRATCH + 2)]

    def keeps_master(self, dtype: DType) -> bool:
        """Say whether keys of a dtype have a float32 master copy, the last of their states."""
        return self.multi_precision and is_small_float(dtype)

    def n_states(self, dtype: DType) -> int:
        """How many arrays of a key's size its state has."""
        return self._n_states() + self.keeps_master(dtype)

    def multipliers(self, key: Key) -> tuple[float, float]:
        """Give the factors of a key for the learning rate and for the weight decay."""
        name = self._names.get(key, key)
        lr_mult = self._lr_mult.get(key, self._lr_mult.get(name, 1.0))
        wd_mult = self._wd_mult.get(key, self._wd_mult.get(name, 1.0))
        # Python's own floats: NumPy's would widen the arithmetic of float32 keys.
        return float(lr_mult), float(wd_mult)

    def check(self, spec: Spec) -> None:
        """Raise unless keys like this can be updated.

        Raises
        ------
        DTypeMismatchError
            The key does not hold real floats.
        """
        if not (spec.dtype.kind == "f" or is_small_float(spec.dtype)):
            raise DTypeMismatchError(
                f"{spec}, {type(self).__name__} updates keys of real floats only: "
                "use an updater of your own (set_updater) for this key"
            )

    def _update_piece(self, weight: Array, grad: Array, state: list[Array], step: Step) -> None:
        dtype = wide(weight.dtype)
        scratch = [array[: weight.size] for array in self._scratch[dtype, get_ident()]]
        if weight.dtype == dtype:
            self._step(weight, grad, state, scratch, step)
            return
        master, wide_grad = scratch[_N_SCRATCH:]
        if self.multi_precision:
            master = state.pop()
        else:
            np.copyto(master, weight)
        np.copyto(wide_grad, grad)
        self._step(master, wide_grad, state, scratch, step)
        np.copyto(weight, master, casting="unsafe")

    def _gradient(
        self, weight: Array, grad: Array, scratch: list[Array], wd: float, factor: float = 1.0
    ) -> Array:
        """Rescale, clip and decay a gradient, times a factor, into the first scratch array.

        Not a pass over memory more than the settings ask for.
        """
        own = scratch[0]
        rescale = float(self.rescale_grad)
        if self.clip_gradient is None:
            rescale *= factor
            if rescale == 1.0 and not wd:
                return grad
            np.multiply(grad, rescale, out=own)
        else:
            np.multiply(grad, rescale, out=own)
            clip = float(self.clip_gradient)
            np.clip(own, -clip, clip, out=own)
            if factor != 1.0:
                np.multiply(own, factor, out=own)
        if wd:
            np.multiply(weight, wd * factor, out=scratch[1])
            np.add(own, scratch[1], out=own)
        return own

    def _own_settings(self) -> tuple[float, ...]:
        return ()

    @abstractmethod
    def _n_states(self) -> int:
        """How many arrays of the value's shape a key's state has."""

    @abstractmethod
    def _step(
        self, weight: Array, grad: Array, state: list[Array], scratch: list[Array], step: Step
    ) -> None:
        """Change a flat piece of a value and of its state, in place.

        `scratch` has at least three arrays of the piece's size and dtype.
        """
