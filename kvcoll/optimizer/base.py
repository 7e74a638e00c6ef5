"""What all optimizers share: counts, states, and the walk in pieces.

Rules of the file: a state belongs to one key and lives here, not in the store; the
arithmetic of one optimizer is its `_step`, on flat pieces that fit into a core's
cache, with scratch arrays given to it, so that no update allocates. It is ufuncs with
`out` and nothing else: they take arrays of other libraries, too, and those used here
(no ``exp``, no ``power``) give the same bits on every machine.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from threading import get_ident
from typing import ClassVar, TypeVar

import numpy as np

from ..arrays import Array, DType, is_small_float, wide
from ..errors import DTypeMismatchError
from ..schema import Key, Spec
from .settings import Scheduler, Settings
from .step import Step as Step  # subclasses of others look for it here
from .step import is_one

# Measured for SGD with momentum: 64 k elements are 2.5 times as fast as the whole
# of a large key at once; below 8 k the calls into NumPy cost more than they save.
PIECE_ELEMENTS = 1 << 16
_N_SCRATCH = 3

_Own = TypeVar("_Own", bound="Optimizer")


class Optimizer(Settings):
    """Base of all optimizers; names and defaults are MXNet's.

    Parameters
    ----------
    learning_rate : float, optional
        Default 0.01, unless the optimizer says otherwise; with a scheduler of
        `kvcoll.lr_scheduler` its ``base_lr``, which a rate that is given replaces.
    wd : float, default 0
        Weight decay: ``wd * weight`` is added to the gradient after clipping, unless
        the optimizer says otherwise.
    rescale_grad : float, default 1
        The gradient is multiplied by it first. A distributed store hands over the
        sum over ranks, so a mean is ``1 / (batch_size * kv.num_workers)``.
    clip_gradient : float, optional
        The rescaled gradient is limited to ``[-clip_gradient, clip_gradient]``.
    lr_scheduler : callable, optional
        Takes the number of updates so far, gives the learning rate: one of
        `kvcoll.lr_scheduler`, or a function, which must give the same on all ranks
        and beside which `learning_rate` is not used.
    multi_precision : bool, default False
        Keep a float32 master copy of the value of a 16-bit key.
    param_idx2name : mapping of key to str, optional
        Names for `set_lr_mult` and `set_wd_mult`; with it, weight decay is off for
        keys whose name ends in neither ``_weight`` nor ``_gamma``.
    begin_num_update : int, default 0
        Where the count of updates starts.

    Raises
    ------
    ArgumentError
        A setting is not in its range.
    TypeError
        `lr_scheduler` cannot be called.
    """

    #: Whether a push of rows updates these rows only, their states included.
    lazy_update: bool = False
    #: Whether the step of a key depends on all of its elements, so that a piece is not enough.
    needs_whole_keys: ClassVar[bool] = False

    def __init__(
        self,
        *,
        learning_rate: float | None = None,
        wd: float = 0.0,
        rescale_grad: float = 1.0,
        clip_gradient: float | None = None,
        lr_scheduler: Scheduler | None = None,
        multi_precision: bool = False,
        param_idx2name: Mapping[Key, str] | None = None,
        begin_num_update: int = 0,
    ) -> None:
        super().__init__(
            learning_rate=learning_rate,
            wd=wd,
            rescale_grad=rescale_grad,
            clip_gradient=clip_gradient,
            lr_scheduler=lr_scheduler,
            multi_precision=multi_precision,
            param_idx2name=param_idx2name,
            begin_num_update=begin_num_update,
        )
        self._counts: dict[Key, int] = {}
        self._scratch: dict[tuple[DType, int], list[Array]] = {}  # by thread

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
        factors = self.multipliers(key)
        lr, wd = self.learning_rate * factors.lr, float(self.wd) * factors.wd
        step = Step(lr, wd, count, factors.adapts)
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
        with np.errstate(all="ignore"):  # nothing may raise on one rank alone
            for start in range(0, weight.size, PIECE_ELEMENTS):
                piece = slice(start, start + PIECE_ELEMENTS)
                self._update_piece(weight[piece], grad[piece], [s[piece] for s in state], step)

    def reserve(self, dtype: DType) -> None:
        """Take the scratch memory that updates of keys of a dtype need."""
        own = wide(dtype), get_ident()
        if own not in self._scratch:
            self._scratch[own] = [np.empty(PIECE_ELEMENTS, own[0]) for _ in range(_N_SCRATCH + 2)]

    def with_scratch(self: _Own, dtype: DType, empty: Callable[[DType], Array]) -> _Own:
        """Give a copy for updates of arrays that are not NumPy's, with their scratch memory.

        Parameters
        ----------
        dtype : numpy.dtype
            Of the keys that it will update, all in this thread.
        empty : callable
            Gives an array of a dtype, as long as a piece is.
        """
        own = copy(self)
        own._scratch = {
            (wide(dtype), get_ident()): [empty(wide(dtype)) for _ in range(_N_SCRATCH + 2)]
        }
        return own

    def keeps_master(self, dtype: DType) -> bool:
        """Say whether keys of a dtype have a float32 master copy, the last of their states."""
        return self.multi_precision and is_small_float(dtype)

    def n_states(self, dtype: DType) -> int:
        """How many arrays of a key's size its state has."""
        return self._n_states() + self.keeps_master(dtype)

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
        own, wide_grad, state, scratch = self._widened(weight, grad, state)
        self._step(own, wide_grad, state, scratch, step)
        if own is not weight:
            np.copyto(weight, own, casting="unsafe")

    def _widened(
        self, weight: Array, grad: Array, state: list[Array]
    ) -> tuple[Array, Array, list[Array], list[Array]]:
        """Give a piece in the dtype of the arithmetic, without the master copy, and scratch."""
        dtype = wide(weight.dtype)
        all_scratch, size = self._scratch[dtype, get_ident()], weight.size
        scratch = [array[:size] for array in all_scratch[:_N_SCRATCH]]
        if weight.dtype == dtype:
            return weight, grad, state, scratch
        master, wide_grad = (array[:size] for array in all_scratch[_N_SCRATCH:])
        if self.multi_precision:
            *state, master = state
        else:
            np.copyto(master, weight)
        np.copyto(wide_grad, grad)
        return master, wide_grad, state, scratch

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
            if is_one(rescale) and not wd:
                return grad
            np.multiply(grad, rescale, out=own)
        else:
            np.multiply(grad, rescale, out=own)
            clip = float(self.clip_gradient)
            np.clip(own, -clip, clip, out=own)
            if not is_one(factor):
                np.multiply(own, factor, out=own)
        if wd:
            np.multiply(weight, wd * factor, out=scratch[1])
            np.add(own, scratch[1], out=own)
        return own

    @abstractmethod
    def _step(
        self, weight: Array, grad: Array, state: list[Array], scratch: list[Array], step: Step
    ) -> None:
        """Change a flat piece of a value and of its state, in place.

        `scratch` has at least three arrays of the piece's size and dtype.
        """
