"""The key-value store: init, push, pull, and what sets and ends it.

Rules of the file: a call first checks everything on its own rank, then the ranks
agree, then the engine runs it; a mistake found in the check is told to the other
ranks in place of the agreement, and every rank raises it.
"""

from __future__ import annotations

import builtins
import json
import operator
import sys
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, final

import numpy as np

from . import by_rows, farewell, faults, states, verify
from . import optimizer as optimizers
from .agreement import Agreement, Call
from .arrays import Array, as_array, round_to, signature
from .base import KVStoreBase
from .bucket import BUCKET_BYTES
from .bucket import plan as plan_buckets
from .checkpoint import Checkpoint, Checkpoints, Contents, Loaded
from .checkpoint.memory import joined
from .compression import describe, parse
from .compressor import Compressor
from .engine import Engine, Push
from .errors import (
    ArgumentError,
    KeyExistsError,
    KeyNotFoundError,
    RanksDisagreeError,
    WaitEndedError,
    text_of,
)
from .files import as_path
from .guard import Guard, Reading
from .history import History
from .launch import InLine, Launch
from .outputs import checked_outputs, fill
from .place import HOST
from .recovery import Left, Recoverable, Standing
from .replica import Chunk, Entry, Replica
from .row_pull import row_sparse_pull
from .schema import (
    Key,
    Spec,
    as_keys,
    digest,
    one_per_key,
    require_one_kind,
    show_keys,
)
from .sparse import Rows, RowSparse
from .transport.alone import AloneTransport
from .transport.contract import Transport
from .updater import Assign, Custom, Optimize, UpdateFunction, Updater

if TYPE_CHECKING:
    from .gpu_border import GpuBorder  # loads what only GPUs need
    from .topology import Topology
    from .transport.losses import Losses

_NO_OUTPUT = object()
_NO_VALUE = object()
_RESIDUAL = "residual:"
_CAPABILITIES = (KVStoreBase.OPTIMIZER,)
_BARRIER = Call("barrier()", digest("barrier"))
_ANY_RANK = Call("any_rank()", digest("any_rank"))
_YES = 1
_MOST_PLANS = 4096
_MOST_VARIANTS = 64
_SET_UPDATER = Call("set_updater()", digest("set_updater"))
_LOAD_STATES = Call("load_optimizer_states()", digest("load_optimizer_states"))
_FILE_WRITTEN = Call("the end of save_optimizer_states()", digest("file written"), is_of_files=True)
_FILE_READ = Call("the file of load_optimizer_states()", digest("file read"), is_of_files=True)
_MEMORY_TAKEN = Call("the end of load_optimizer_states()", digest("memory taken"))


@dataclass
class _Plan:
    """A list of keys, checked and planned."""

    given: tuple[Entry, ...]  # in the order of the list; a key may stand twice
    is_list: bool
    push: Push
    places: tuple[int, ...]  # for each of the list its place in the push
    own: tuple[Array, ...]  # for each of the list what `empty` gave, if all have it
    own_values: list[list[Array]]  # the same in the order of the push

    def __post_init__(self) -> None:
        self.row_sparse = next((e.spec for e in self.given if e.spec.row_sparse), None)
        self._by_rows: dict[tuple[int, ...], Push] = {}
        self.is_in_order = self.places == tuple(range(len(self.given)))
        self._shapes = [entry.spec.shape for entry in self.given]
        self._dtypes = [entry.spec.dtype for entry in self.given]

    def fits(self, arrays: Any) -> bool:
        """Say whether these are NumPy's arrays just as the keys hold, one a key of a list.

        In few calls for all, so that many small keys cost little each.
        """
        return (
            self.is_list
            and builtins.type(arrays) in (list, tuple)
            and set(map(builtins.type, arrays)) == {np.ndarray}
            and [array.shape for array in arrays] == self._shapes
            and [array.dtype for array in arrays] == self._dtypes
        )

    def by_rows(self, places: tuple[int, ...]) -> Push:
        """Give the push in which the keys at these places come as rows."""
        if places not in self._by_rows:
            if len(self._by_rows) >= _MOST_VARIANTS:
                self._by_rows.clear()
            self._by_rows[places] = by_rows.variant(self.push, self.given, places)
        return self._by_rows[places]

    def is_own(self, value: Any) -> bool:
        """Say whether exactly the arrays that `empty` gave are pushed."""
        if not self.own:
            return False
        if not self.is_list:
            return value is self.own[0]
        same_length = isinstance(value, (list, tuple)) and len(value) == len(self.own)
        return same_length and all(map(operator.is_, value, self.own))


@final
class KVStore(KVStoreBase):
    """A key-value store; made by `create`.

    Every rank holds a full replica. `push` sums values over a rank's list and over
    all ranks, then updates each replica; `pull` copies from the replica of this rank.
    A store is a context manager, and is closed at its end.

    Parameters
    ----------
    type_ : str
        What `type` gives.
    transport : Transport
    agreement : Agreement
    one_thread : bool
        Whether all calls must come from one thread, as collective calls must.
    launching : callable, optional
        Makes of the store's engine a `Launch`, which says when pushes run.
    tree : bool, default False
        Whether the transport adds in a binary tree over the ranks.
    verify_every : int, default 0
        After how many pushes the replicas are compared; 0 for never.
    apart : bool, default False
        Whether sums are complete before a stored value is touched.
    recovering : callable, optional
        Brings all stores that share the ranks, this one included, to those that are left.
    border : GpuBorder, optional
        Of a store whose values lie on a GPU: the transport is one for arrays there.
    borders : callable, optional
        Of a store in one process: gives for the first value of `init` the border of the GPU
        on which it lies, or None.
    """

    def __init__(
        self,
        type_: str,
        transport: Transport,
        agreement: Agreement,
        *,
        one_thread: bool,
        launching: Callable[[Engine], Launch] = InLine,
        tree: bool = False,
        verify_every: int = 0,
        apart: bool = False,
        recovering: Callable[[], None] | None = None,
        border: GpuBorder | None = None,
        borders: Callable[[object], GpuBorder | None] | None = None,
    ) -> None:
        self._type = type_
        self._transport = transport.for_host
        self._sums = transport
        self._topology = transport.topology
        self._created_rank = transport.topology.rank  # faults go by it, also once ranks were lost
        self._agreement = agreement
        self._engine = Engine(transport, agreement, tree=tree, apart=apart)
        self._recovering = recovering
        self._launch = launching(self._engine)
        self._updater: Updater = Assign()
        self._replica = Replica()
        self._kind: builtins.type | None = None
        self._plans: dict[Key | tuple[Key, ...], _Plan] = {}
        self._own: dict[Key, Array] = {}  # what `empty` gave
        self._has_lent = False  # whether the user may hold stored values themselves
        self._version = 0
        self._verify_every = verify_every
        if verify_every > 1:  # else a comparison itself says which push it was
            self._launch.history = History(lambda: self._version + 1)
        self._verifier = verify.Verifier(self._transport, agreement, self._launch.history)
        self._checkpoints = Checkpoints(self._transport, agreement, self._checked)
        self._guard = Guard(
            one_thread=one_thread,
            beside=(lambda: self._launch.ident) if self._launch.is_beside else None,
            ended=lambda: self._agreement.ended or self._launch.ended,
        )
        self._reading = Reading(self._guard)
        self._border: GpuBorder | None = None
        self._borders = borders
        if border is not None:
            self._settle(border)

    # What the store is ------------------------------------------------------------

    @property
    def type(self) -> str:
        """The name that was given to `create`, in lower case."""
        return self._type

    @property
    def rank(self) -> int:
        """The rank of this process among the ranks of the store, from 0."""
        return self._topology.rank

    @property
    def num_workers(self) -> int:
        """How many ranks share the store."""
        return self._topology.size

    @property
    def local_rank(self) -> int:
        """The rank of this process among those of its host, from 0."""
        return self._topology.local_rank

    @property
    def num_hosts(self) -> int:
        """On how many hosts the ranks are."""
        return self._topology.num_hosts

    @property
    def version(self) -> int:
        """How many pushes have been made, those before a `load` included."""
        return self._version

    def is_capable(self, capability: str) -> bool:
        """Say whether the store can do a thing.

        Parameters
        ----------
        capability : str
            ``'optimizer'``, of any case: whether `set_optimizer` works. It does.

        Raises
        ------
        ValueError
            Another word.
        """
        if not isinstance(capability, str) or capability.lower() not in _CAPABILITIES:
            raise ArgumentError(
                f"unknown capability {capability!r}: known are {', '.join(_CAPABILITIES)}"
            )
        return True

    def __repr__(self) -> str:
        state = ", closed" if self.closed else ""
        return (
            f"<KVStore {self._type!r}, rank {self.rank} of {self.num_workers}, "
            f"{len(self._replica.entries)} keys{state}>"
        )

    # Values -----------------------------------------------------------------------

    def init(self, key: Any, value: Any) -> None:
        """Store a first value under a key that is new; in ``dist_*`` rank 0's goes to all.

        Parameters
        ----------
        key : int, str, or list of them
        value : array or RowSparse, or list of them
            One a key; copied. Each may be a list of one. A `RowSparse` makes a row-sparse
            key: its value takes memory as an array does, and a `pull` of it must ask for
            the whole.

        Raises
        ------
        KeyExistsError
            A key exists, or stands twice: then none of the list is stored.
        KeyKindError, ArgumentError, ArrayError, DTypeMismatchError
            What was given is no key, list or array of the kind needed.
        RanksDisagreeError
            Keys, shapes or dtypes differ between ranks.

        Notes
        -----
        Cost: one agreement, and one MPI_Bcast a bucket.
        """
        with self._guard:
            self._init(key, value)

    def push(self, key: Any, value: Any, priority: int = 0) -> None:
        """Sum values over the list and over all ranks, then update the stored value.

        Parameters
        ----------
        key : int, str, or list of them
            A key may stand several times: its values are summed together.
        value : array or RowSparse, or list of them; for a list of keys a list of either
            Of the key's shape, and of a dtype that casts to the key's by NumPy's
            ``same_kind`` rule. Lists are one value a device, and may differ in length
            from push to push and from rank to rank. Of a `RowSparse` only its rows travel;
            each rank may push other rows, and other numbers of them, none included, but
            for one key all push rows or all push arrays. A list with both is summed as
            arrays.
        priority : int, default 0
            Of the pushes that wait those of higher priority are summed first; rank 0's
            counts. Only where pushes overlap with what their callers do (see `create`);
            else a push is complete when it returns.

        Raises
        ------
        KeyNotFoundError, ShapeMismatchError, DTypeMismatchError, ArgumentError, \
KeyKindError, ArrayError
            A mistake on any rank; the same error on every rank, and nothing is applied.
        RanksDisagreeError
            The ranks push different keys, or in different order, or call another thing.
        UpdaterError
            The updater raised on another rank. On that rank the push raises what the
            updater did.

        Notes
        -----
        The updater runs once a distinct key: int keys ascending, str keys in the order
        of `init`. Without an updater the sum replaces the value. Cost: one agreement,
        and ``2 (n - 1) / n`` of the bytes each way between n ranks; of rows, all
        bytes to each of the other ranks, and never compressed.

        A sum of rows is in an updater of the user's a `RowSparse`, ascending and each row
        once. Optimizers with `lazy_update` change only these rows and their states; others
        see an array that is 0 elsewhere. Without an updater the other rows become 0.
        """
        with self._guard:
            self._push(key, value, priority)

    def pull(self, key: Any, out: Any = None, priority: int = 0, ignore_sparse: bool = True) -> Any:
        """Wait for the pushes of these keys, and copy from this rank's replica; nothing is sent.

        Parameters
        ----------
        key : int, str, or list of them
        out : array, or list of arrays; for a list of keys a list of either, optional
            Of the key's shape and of a dtype to which the key's casts by NumPy's
            ``same_kind`` rule; every array is filled.
        priority : int, default 0
            Taken for MXNet's sake.
        ignore_sparse : bool, default True
            Of a row-sparse key the whole is copied only if this is False: else call
            `row_sparse_pull`.

        Returns
        -------
        array, or list
            `out`; where that is not given, a new array, or a list of new arrays.

        Raises
        ------
        KeyNotFoundError, ShapeMismatchError, DTypeMismatchError, ArgumentError, \
KeyKindError, ArrayError
            A mistake of this rank; raised here only, as nothing is sent.

        Notes
        -----
        Of values on a GPU new arrays are CuPy's. Outputs may lie on the host too, which waits for
        the GPU; those on a GPU are filled in the order of its current stream.
        """
        with self._reading:
            plan = self._plan(key)
            if plan.row_sparse is not None and ignore_sparse:
                raise ArgumentError(
                    f"{plan.row_sparse}: pull all of it with ignore_sparse=False, "
                    "or some rows with row_sparse_pull"
                )
            if self._border is not None:
                return self._border.pull(plan.given, plan.is_list, out)
            if self._launch.is_in_line:
                return _pull(plan, out)
            self._launch.wait(plan.given, to_read=True)
            with self._launch.reading:
                return _pull(plan, out)

    def row_sparse_pull(
        self, key: Any, out: Any = None, priority: int = 0, row_ids: Any = None
    ) -> Any:
        """Copy rows of stored values into row-sparse ones; no communication.

        Parameters
        ----------
        key : int, str, or list of them
            Row-sparse or not.
        out : RowSparse, or list of them; for a list of keys a list of either, optional
            Of the key's shape and of a dtype to which the key's casts by NumPy's
            ``same_kind`` rule. Each gets memory of its own for its rows.
        priority : int, default 0
            Taken for MXNet's sake.
        row_ids : array of int, or list of them; for a list of keys a list of either
            Which rows, in any order and any number of times; `out` holds them ascending
            and each once. One array is for all outputs, a list has one for each.

        Returns
        -------
        RowSparse, or list
            `out`; where that is not given, a new one, or a list of new ones.

        Raises
        ------
        IndexError
            A row is not in the key's value.
        KeyNotFoundError, ShapeMismatchError, DTypeMismatchError, ArgumentError, \
KeyKindError, ArrayError
            A mistake of this rank; raised here only, and nothing is filled.

        Notes
        -----
        Cost: in proportion to the rows.
        """
        with self._reading:
            if self._border is not None:
                self._border.refuse_rows()
            plan = self._plan(key)
            self._launch.wait(plan.given, to_read=True)
            with self._launch.reading:
                return row_sparse_pull(plan.given, plan.is_list, out, row_ids)

    def empty(self, key: Any) -> Any:
        """Give arrays for gradients that a push need not copy; called by all ranks.

        Fill them in place (``numpy.multiply(a, b, out=grad)``, ``grad[...] = x``) and
        push these very arrays, all keys of a push from here. On one host they lie in
        memory that its ranks share, and are summed from there. Any other array, a view
        of these included, may be pushed as ever, at the cost of its copy.

        Parameters
        ----------
        key : int, str, or list of them
            Initialised keys.

        Returns
        -------
        numpy.ndarray, or list of numpy.ndarray
            Of each key's shape and dtype, with any contents; the same arrays at every
            call. They may be written to whenever no push of them is running, and hold
            until the store is closed.

        Raises
        ------
        KeyNotFoundError, KeyKindError
            As in `push`.
        RanksDisagreeError
            The ranks ask for different keys.

        Notes
        -----
        Cost: one agreement; memory of the keys' size, shared on a host as far as it
        allows. All ranks must push such arrays for the push to profit.
        """
        with self._guard:
            plan, own = self._own_arrays("empty", key, [])
            return own if plan.is_list else own[0]

    def adopt(self, key: Any, value: Any) -> Any:
        """Give arrays as `empty` does, filled from arrays that they are to replace.

        Called by all ranks. What else refers to the arrays given must be told of the new
        ones; with torch, whose gradients then lie where a push sums them::

            keys, params = zip(*model.named_parameters())
            grads = kv.adopt(keys, [param.grad for param in params])
            for param, grad in zip(params, grads):
                param.grad = torch.from_numpy(grad)

            optimizer.zero_grad(set_to_none=False)  # from now on: None would let go of them
            loss.backward()
            kv.push(keys, grads)

        Parameters
        ----------
        key : int, str, or list of them
            Initialised keys, each once.
        value : array, or list of arrays
            One a key, of its shape, and of a dtype that casts to the key's by NumPy's
            ``same_kind`` rule; copied. Each may be a list of one.

        Returns
        -------
        numpy.ndarray, or list of numpy.ndarray
            The arrays that `empty` gives for these keys.

        Raises
        ------
        KeyNotFoundError, ShapeMismatchError, DTypeMismatchError, ArgumentError, \
KeyKindError, ArrayError
            A mistake on any rank; the same error on every rank, and no array is changed.
        RanksDisagreeError
            The ranks give arrays for different keys.

        Notes
        -----
        Cost: that of `empty`, and one copy.
        """
        with self._guard:
            adopted: list[Array] = []
            plan, own = self._own_arrays("adopt", key, adopted, value)
            if self._border is not None:
                self._border.copy(adopted, own)
                return own if plan.is_list else own[0]
            for array, given in zip(own, adopted, strict=True):
                if given is not array:
                    round_to(given, array)
            return own if plan.is_list else own[0]

    def view(self, key: Any) -> Any:
        """Show stored values without a copy; no communication.

        Parameters
        ----------
        key : int, str, or list of them

        Returns
        -------
        numpy.ndarray, or list of numpy.ndarray
            Read-only, of each key's shape and dtype. They show the replica itself: each
            push of the key changes what they hold, so that a pull can be left out
            altogether. While a push runs, what they hold is undefined. They stay valid
            until the store is closed.

        Raises
        ------
        KeyNotFoundError, KeyKindError
            As in `pull`.
        """
        with self._reading:
            plan = self._plan(key)
            self._has_lent = True
            if self._border is not None:
                lent = self._border.shown([entry.value for entry in plan.given])
                return lent if plan.is_list else lent[0]
            views = [entry.value.view() for entry in plan.given]
            for shown in views:
                shown.flags.writeable = False
            return views if plan.is_list else views[0]

    def wait(self, key: Any = None) -> None:
        """Wait until all pushes of keys are applied to this rank's replica; nothing is sent.

        Needed only where pushes overlap with what their callers do (see `create`), and
        values are read from `view`: a pull waits by itself. On a GPU it waits for the GPU.

        Parameters
        ----------
        key : int, str, or list of them, optional
            By default all keys.

        Raises
        ------
        KeyNotFoundError, KeyKindError
            As in `pull`.
        """
        with self._reading:
            if self._guard.is_beside:
                raise self._guard.nested()
            if key is None:
                self._launch.drain()
            else:
                self._launch.wait(self._plan(key).given)
            if self._border is not None:
                self._border.finish()

    def pushpull(self, key: Any, value: Any, out: Any = None, priority: int = 0) -> Any:
        """Push, then pull.

        Parameters
        ----------
        key, value, priority
            As for `push`.
        out : array or list, optional
            As for `pull`; by default `value`, which is then changed in place. A
            `RowSparse` gets the rows that it names; an array gets all, of row-sparse keys,
            too.

        Returns
        -------
        array, or list
            What was filled.

        Raises
        ------
        KVCollError
            As `push` and `pull` do; a mistake in `out`, too, is raised on every rank,
            before anything is sent.
        """
        out = value if out is None else out
        with self._guard:
            outputs = self._push(key, value, priority, out)
            self._launch.wait(self._plan(key).given, to_read=True)
            with self._launch.reading:
                self._fill(outputs)
        return out

    def broadcast(self, key: Any, value: Any, out: Any, priority: int = 0) -> Any:
        """Initialise keys, then pull them: every rank gets rank 0's values.

        Parameters
        ----------
        key, value
            As for `init`.
        out
            As for `pull`.
        priority : int, default 0
            Taken for MXNet's sake.

        Returns
        -------
        array, or list
            `out`.

        Raises
        ------
        KVCollError
            As `init` and `pull` do.
        """
        with self._guard:
            self._fill(self._init(key, value, out))
        return out

    # Updates ----------------------------------------------------------------------

    def set_updater(self, updater: UpdateFunction) -> None:
        """Set what a push does with the sum; called by all ranks.

        Parameters
        ----------
        updater : callable
            ``updater(key, input, stored)`` changes the array `stored` in place, given
            the sum in `input`, which it may overwrite; a `RowSparse` where only rows were
            pushed, while `stored` is an array even so. On a GPU both are CuPy's. It must do
            the same on every rank. If it raises, the push raises, and all replicas are set to
            the values of the lowest rank on which it did not.

        Raises
        ------
        TypeError
            It is not callable.
        """
        with self._guard:
            with self._agreement.atomic():
                with self._checked("set_updater()"):
                    if not callable(updater):
                        kind = builtins.type(updater).__name__
                        raise TypeError(f"an updater must be callable, got {kind}")
                self._agreement.confirm(_SET_UPDATER)
            self._updater = self._here(Custom(updater))
            self._has_lent = True

    def _set_updater(self, updater: UpdateFunction) -> None:
        """Do as `set_updater`: MXNet's name for it."""
        self.set_updater(updater)

    def set_optimizer(self, optimizer: optimizers.Optimizer | str, **arguments: Any) -> None:
        """Let an optimizer of kvcoll update the values; called by all ranks.

        Parameters
        ----------
        optimizer : kvcoll.optimizer.Optimizer or str
            An optimizer, or the name of one.
        **arguments
            With a name: the optimizer's settings.

        Raises
        ------
        TypeError
            Neither an optimizer nor a name, or settings without a name.
        RanksDisagreeError
            The ranks gave different optimizers or settings.
        """
        with self._guard:
            with self._agreement.atomic():
                with self._checked("set_optimizer()"):
                    updater = Optimize(_as_optimizer(optimizer, arguments))
                    name = f"set_optimizer({updater.describe()})"
                    call = Call(name, digest("set_optimizer", updater.digest(())))
                self._agreement.confirm(call)
            self._updater = self._here(updater)

    def save_optimizer_states(self, fname: Any, dump_optimizer: bool = False) -> None:
        """Write the optimizer's states to a file; called by all ranks, written by rank 0.

        Parameters
        ----------
        fname : str or os.PathLike
            Rank 0's counts. The file is replaced as a whole, or stays as it was.
        dump_optimizer : bool, default False
            Whether loading shall bring back the optimizer's settings, too. They stand in
            the file in any case, for people to read.

        Raises
        ------
        NoOptimizerError
            `set_optimizer` has not been called.
        FileError
            Rank 0 cannot write the file; the same error on every rank.
        DTypeMismatchError
            The format lacks a state's dtype: keys of long double.
        ArgumentError
            An optimizer of the user's own class shall be dumped.
        TypeError
            `fname` is no path, or `dump_optimizer` no bool.

        Notes
        -----
        The file is in the safetensors format and has a checksum of every byte. It holds
        all states, the master copies of 16-bit keys, and how often each key was updated
        (which MXNet's files do not), but neither the values nor code: a file from a
        stranger runs nothing. So an lr_scheduler, a function, is not in it. Cost: two
        agreements, one pass over the states, and the disk; no copy is made.
        """
        with self._guard:
            name = "save_optimizer_states()"
            with self._checked(name):
                path, (entries, updater) = as_path(fname), self._at_host()
                saving = states.Saving(updater, entries, dump_optimizer=dump_optimizer)
            self._agreement.confirm(Call(name, digest(name, bool(dump_optimizer))))
            with self._checked(name):
                if self.rank == 0:
                    saving.write(path)
            self._agreement.confirm(_FILE_WRITTEN)

    def load_optimizer_states(self, fname: Any) -> None:
        """Take the optimizer's states from a file; called by all ranks, read by rank 0.

        Parameters
        ----------
        fname : str or os.PathLike
            What `save_optimizer_states` has written, with any number of ranks. Rank 0's
            counts: the other ranks need not see the file.

        Raises
        ------
        FileError
            Rank 0 cannot read the file.
        FileFormatError
            It is truncated, altered, or no file of states.
        StatesMismatchError
            It is of another optimizer, or of a key that the store does not have or that
            is of another shape, dtype or number of states; the error names it.
        NoOptimizerError
            `set_optimizer` has not been called, and the file holds no optimizer.
        TypeError
            `fname` is no path.

        Notes
        -----
        Every error is raised on every rank, and changes nothing. The file's states
        replace all that are there: keys of the store that are not in it begin anew, as
        with MXNet. If it was saved with `dump_optimizer`, an optimizer of the same class
        that is set takes the file's settings and keeps its lr_scheduler; any other is
        replaced by a new one of the file's. (MXNet replaces it always, so that the
        caller's own object changes nothing any more.) Cost: four agreements, and one
        MPI_Bcast of the states, which take their memory twice while they are loaded.
        """
        with self._guard:
            name = "load_optimizer_states()"
            draft = None
            with self._agreement.atomic():
                with self._checked(name):
                    path = as_path(fname)
                self._agreement.confirm(_LOAD_STATES)
                with self._checked(name):
                    entries, updater = self._at_host()
                    if self.rank == 0:
                        draft = states.read(path, updater, entries)
                self._agreement.confirm(_FILE_READ)
                text = self._agreement.tell(draft.text if draft else "")[0]
                with self._checked(name):
                    if draft is None:
                        draft = states.Draft(path, text, updater, entries)
                self._agreement.confirm(_MEMORY_TAKEN)
                for array in draft.arrays:
                    self._transport.broadcast(array)
            self._updater = draft.apply()
            if self._border is not None:
                known = self._replica.entries
                self._updater = self._border.take_updater(entries, known, self._updater)
            self._plans.clear()  # they hold the states of before

    def set_gradient_compression(self, compression_params: Mapping[str, Any]) -> None:
        """Let gradients travel as codes of a few bits; called by all ranks.

        What is stored, pulled and initialised is never compressed. `push` and `pushpull`
        sum what the codes stand for.

        Parameters
        ----------
        compression_params : mapping
            ``{'type': '2bit', 'threshold': 0.5}``: each element is -threshold, 0 or
            threshold. ``{'type': '1bit', 'threshold': 0.5}``: -1 or 1. Of both, what a
            code leaves of a gradient is added to the next one of the same key and rank.
            ``{'type': 'fp16'}``, ``{'type': 'bf16'}``: 16 bits travel, sums are taken in
            float32; with ``'error_feedback': True`` what is left goes on as above.
            ``{'type': 'none'}`` ends it. What was left by then stays, as it does when
            a threshold is changed.

        Raises
        ------
        ArgumentError
            The type or a setting is not known, or a key does not hold real floats. A push
            raises it for a gradient that has a NaN or, where something is left for the
            next one, an infinity.
        RanksDisagreeError
            The ranks gave different settings.

        Notes
        -----
        Cost of a push: 1/16 of float32's bytes between two ranks with 2 bits, 1/32 with 1
        bit, 1/2 with 16 bits; more ranks need more bits for their sums. Sources: MXNet's
        2-bit compression; Seide et al. 2014 (1 bit); Strom 2015 (2 bits).
        """
        with self._guard:
            with self._agreement.atomic():
                with self._checked("set_gradient_compression()"):
                    compression = parse(compression_params)
                    if self._border is not None and compression is not None:
                        raise ArgumentError(
                            "gradients on a GPU travel as they are: compress those of a store on "
                            "the host ('dist_sync')"
                        )
                    drafted = None
                    if compression is not None:
                        specs = [entry.spec for entry in self._replica.entries.values()]
                        drafted = self._engine.draft_compressor(compression, specs)
                    said = describe(compression)
                    call = Call(f"set_gradient_compression({said})", digest("compression", said))
                self._agreement.confirm(call)
            self._engine.compress(drafted)

    # Replicas ---------------------------------------------------------------------

    def verify(self, repair: str | None = None) -> str:
        """Compare the replicas of all ranks, once all pushes are complete; called by all ranks.

        They hold the same bits, always, unless memory or a program is at fault: this finds
        out. `create` with `verify_every` does it by itself.

        Parameters
        ----------
        repair : 'vote' or None, default None
            If ``'vote'``, give all ranks the bits of most of them, of each value and state
            for itself; on a tie those of rank 0, which may be the wrong ones. A
            RuntimeWarning on rank 0 says what was repaired. Then they are compared again.

        Returns
        -------
        str
            The fingerprint of all that was compared, 32 hexadecimal digits: the same for the
            same bits, in another job, too, and in `Checkpoint.fingerprint`.

        Raises
        ------
        ReplicasDifferError
            They differ; the same error on every rank, with the ranks, the key, and the push
            since when. The store can be used on, and repaired.
        ArgumentError
            `repair` is something else.
        RanksDisagreeError
            The ranks call something else, or repair on some only.

        Notes
        -----
        What is found: every bit of all values, and of the optimizer's states and master
        copies, is looked at, so a flipped bit is found for certain (see `fingerprint`). What
        is named: the key that differs; of several the one that did so first, as far as that
        is known. The replicas were the same at the last comparison: where one is made after
        each push, that push is the one. Else ``verify_every=n`` takes samples at each push, of
        16 elements of each key that was pushed, others each time: an error that spreads over a key,
        as one in a sum, is dated to its push, a lone bit to the push whose sample came to it,
        or to between the last comparison and this one. Not compared are what compression has
        left over, which is each rank's own, and what an updater of the user's keeps.

        Cost: two agreements, and a pass over values and states at some 10 GB/s; ``repair``
        broadcasts what differs (MPI_Bcast).
        """
        with self._guard:
            return self._verify(repair)

    # Checkpoints ------------------------------------------------------------------

    def save(
        self,
        path: Any,
        *,
        keep: int | None = None,
        metadata: Any = None,
        rank_metadata: Any = None,
        wait: bool = True,
    ) -> str:
        """Save a checkpoint: all that is needed to go on from here; called by all ranks.

        Parameters
        ----------
        path : str or os.PathLike
            A folder for the checkpoints of this store, each of which gets a folder in it,
            ``00000001``, ``00000002``, ...; it is made if it is not there. The same on all
            ranks. One store at a time may save to it.
        keep : int, optional
            How many of the newest complete checkpoints stay, this one included; older ones
            are removed once this one is complete. By default all stay.
        metadata : optional
            What JSON holds: numbers, texts, lists, dicts. The same on all ranks; for what is
            not the store's, as the epoch.
        rank_metadata : optional
            The same of this rank alone, as the state of its random numbers.
        wait : bool, default True
            If False, return once what is to be saved is copied, and write beside the
            training. Until the next `save`, `load`, `wait_saved` or `close`, which waits
            for it, it takes memory of the size of what this rank writes. If the process
            ends before, it ends when the checkpoint is complete.

        Returns
        -------
        str
            The checkpoint's own folder.

        Raises
        ------
        FileError
            It cannot be written: no space, no right. What was there stays, and can be
            loaded. With `wait=False` the next of the calls above raises what has happened
            after this one returned.
        DTypeMismatchError
            A key of a dtype that files do not hold: long double.
        ArgumentError, TypeError
            What was given is no path, number or JSON.
        RanksDisagreeError
            The ranks give other paths, metadata or options.

        Notes
        -----
        Every error is raised on every rank. Saved are values, the optimizer with its
        settings and states, compression and what it has left over, `version`, fingerprints, and
        metadata; but no code: neither an lr_scheduler, nor the updater that `set_updater` was
        given. Files are in the safetensors
        format and JSON, with a checksum of every byte; nothing in them can run. Each is
        written under another name that only this user may read, synced, and renamed; the
        manifest, without which a checkpoint does not count, comes last. So whenever a process
        is killed, the newest complete checkpoint can be loaded. Where all ranks see the
        folder, each writes its share of what is large (32 MB or more a rank); else rank 0
        writes all. Cost: some ten agreements, a pass over 1/n of all for fingerprints, one over
        the share, and the disk.
        """
        with self._guard:
            return self._checkpoints.save(
                path,
                self._contents,
                keep=keep,
                metadata=metadata,
                rank_metadata=rank_metadata,
                wait=wait,
            )

    def wait_saved(self) -> None:
        """Wait until the checkpoint of ``save(wait=False)`` is complete; called by all ranks.

        Raises
        ------
        FileError
            It could not be written; the same error on every rank, once.
        """
        with self._guard:
            self._checkpoints.wait_saved()

    def load(self, path: Any) -> Checkpoint:
        """Go on from a checkpoint, with any number of ranks; called by all ranks.

        Parameters
        ----------
        path : str or os.PathLike
            What `save` was given: the newest complete checkpoint in it counts. Or the
            folder of one checkpoint. Rank 0 must see it.

        Returns
        -------
        Checkpoint
            With `metadata`, and the `rank_metadata` of all ranks that saved.

        Raises
        ------
        NoCheckpointError
            There is no complete checkpoint.
        FileError
            A file cannot be read.
        FileFormatError
            A file is truncated or altered, or what a rank has loaded is not what was saved
            (by its fingerprint). The message names the checkpoint before, if there is one; it
            is not taken without a word.
        CheckpointMismatchError
            The store has keys, and they are not those of the checkpoint, with their shapes
            and dtypes, row-sparse or dense; or its updater is of another kind.
        StatesMismatchError
            As for `load_optimizer_states`.

        Notes
        -----
        Every error is raised on every rank, and changes nothing. An empty store gets the
        checkpoint's keys, as by `init`; in one that has keys they must be the same, and the
        values are replaced in place. A store without an updater gets the checkpoint's
        optimizer; one of the same class that is set takes its settings and states, and
        keeps its lr_scheduler; another own one is replaced. So is the compression of
        gradients, if the checkpoint has one. What compression has left over is a rank's own:
        it comes back to the rank or, with another number n of ranks, rank r gets the sum of
        what ranks r, r + n, r + 2 n, ... had, so that nothing is lost. Settings that depend on the
        number of ranks, as `rescale_grad` may, are to be set after the load. Pushes that
        follow give the bits of a run that was not interrupted. Cost: each rank reads its
        share where all see the folder, and broadcasts it (MPI_Bcast); then each takes all
        fingerprints, so that the ranks are compared, too. A store that has keys takes memory of
        its values' size meanwhile.
        """
        with self._guard:
            is_new = not self._replica.entries
            try:
                with self._agreement.atomic():
                    loading = self._checkpoints.open(path, self._contents)
                    if is_new:
                        self._init(list(loading.manifest.keys), loading.first_values)
                    contents = self._contents()
                    loaded = loading.read(contents, in_place=is_new)
                    compressor = loading.together.do(lambda: self._restored_compressor(loaded))
            except BaseException:
                if is_new:
                    self._replica.clear()
                    self._engine.forget_values()
                    self._kind = None
                raise
            with self._launch.reading:
                self._updater, self._version, checkpoint = loaded.apply()
                self._engine.version = self._version
                if self._border is not None:
                    known = self._replica.entries
                    self._updater = self._border.take_back(contents.entries, known, self._updater)
            self._engine.restore(compressor, is_on=loaded.is_compressed)
            self._verifier.trust(self._version)
            self._plans.clear()  # they hold the states of before
            return checkpoint

    # Together ---------------------------------------------------------------------

    def barrier(self) -> None:
        """Wait until all ranks have called it; all pushes are complete then.

        Notes
        -----
        Cost: one agreement.
        """
        with self._guard:
            with self._checked("barrier()"):
                if self._border is not None:
                    self._border.finish()
            self._agreement.confirm(_BARRIER)

    def _barrier(self) -> None:
        """Do as `barrier`: MXNet's name for it."""
        self.barrier()

    def any_rank(self, condition: bool) -> bool:
        """Say whether a condition holds on any rank: the same answer on all of them.

        For decisions that all ranks must take alike: whether to stop (see `StopSignals`), to
        save, to leave out a batch.

        Parameters
        ----------
        condition : bool
            What holds on this rank; anything that has a truth value. A rank at the end of
            `join` has none, and counts as false.

        Raises
        ------
        RanksDisagreeError
            Another rank calls something else.

        Notes
        -----
        Cost: one agreement, as of `barrier`. As there, all pushes are complete then.
        """
        with self._guard:
            with self._checked("any_rank()"):
                flag = _YES if condition else 0
            return bool(self._agreement.confirm(_ANY_RANK, flag) & _YES)

    @contextmanager
    def join(self) -> Iterator[None]:
        """Let the others go on when this rank has no more batches; called by all ranks.

        At the end of the with-block a rank waits until the others have come to the end of
        theirs. Meanwhile it takes part in what they do: it pushes zeros where they push,
        updates its replica as they do, and waits at their barriers. So ranks may make
        different numbers of pushes in the block, and all leave it together, with replicas
        that are the same bits. `num_active` says over how many ranks a sum was taken.

        Raises
        ------
        RanksDisagreeError
            At the end of the block, and in the other ranks' call: they call something
            else than `push`, `pushpull`, `barrier`, `any_rank`, `verify` and what is local, or
            of another store, or have changed a setting of the optimizer that this rank does
            not know of.
        KVCollError
            What a push of the others has raised on all ranks.

        Notes
        -----
        Cost: once a rank has come to the end, two agreements a call in place of one, and
        the names of the keys. Sums take all ranks, as ever.
        """
        yield
        with self._guard:
            with self._checked("the end of join()"):
                pass
            while (call := self._agreement.serve()) is not None:
                self._take_part(call)
                self._launch.drain()

    @property
    def num_active(self) -> int:
        """Over how many ranks the last push was summed: all but those at the end of `join`."""
        return self._agreement.num_active

    def recover(self) -> int:
        """Go on without the ranks that were lost; called by all that are left.

        To be called once a call has raised `RankLostError` (or `LateRankError`, when the late
        ranks come to it, too). All stores of the same communicator go on together, each with
        all of its keys, values, optimizer states and settings, and views and arrays
        that `view` and `empty` gave stay what they are; `rank`, `num_workers`, `local_rank` and
        `num_hosts` change. What depends on the number of ranks is to be set anew::

            while kv.version < n_batches:
                try:
                    share = batches[kv.version][kv.rank :: kv.num_workers]
                    kv.push(names, gradients(params, share))
                    kv.pull(names, out=params)
                except kvcoll.errors.RankLostError:
                    kv.recover()
                    kv.pull(names, out=params)

        Returns
        -------
        int
            `version`: how many pushes are in the values, the same on all ranks now; the program
            goes on from there. It may be one less, or one more, than on some rank before.

        Raises
        ------
        NoWholeReplicaError
            The loss has interrupted a push halfway on all ranks: load a checkpoint. Stores that
            were created with ``elastic=True`` are never in that state.
        BrokenMPIError
            MPI gives wrong sums since the loss.
        NotSurvivableError
            This MPI cannot go on after a loss: it needs Open MPI 5 and
            ``mpirun --with-ft ulfm``.
        ThreadError
            The wrong thread calls it, or an updater.

        Notes
        -----
        Pushes under way are dropped on all ranks alike. Where they ran behind their callers
        (see `create`), all that were not complete: with `overlap` of a push that was
        summed in part the keys that had been updated keep it, and it does not count; with
        ``'dist_async'`` a push is applied wholly or not at all. Replicas that are ahead of the
        earliest whole one, or not whole, are copied from it, with the optimizer's states; the
        states of a user's own updater are the user's. What gradient compression has left over
        stays each rank's own, codes of the interrupted push being taken as sent; that of lost
        ranks is lost. `init`, `load` and what sets an
        updater, an optimizer or a compression are done on all ranks that are left, or have
        raised and are done on none, and may be called again. A checkpoint under way comes to
        nothing.
        A further loss meanwhile is survived, too. Stores on GPUs stay on theirs: NCCL is aborted
        and its communicators are made anew; until then `pull` raises, too. A push there returns
        before its sum is complete, so that, without `elastic`, a loss may interrupt one on all
        ranks though it has returned. Cost: some 10 ms and, where a replica must be
        copied, MPI_Bcast of values and states. MPI_Comm_revoke, _shrink, _agree (ULFM).
        Do not call MPI.Finalize() afterwards: now and then it hangs after a loss, which only the
        end of the process sees to.
        """
        if self._guard.is_busy or self._guard.is_beside:
            raise self._guard.nested()
        self._guard.check_thread()
        if self._recovering is not None:
            self._recovering()
        return self._version

    def close(self) -> None:
        """Give back communicators and memory; called by all ranks. Twice does nothing.

        Raises
        ------
        RanksDisagreeError, RankLeftError
            Other ranks still work with the store, or with another.
        FileError
            A checkpoint could not be written that was under way; the store is closed.
        """
        if self.closed:
            try:
                self._launch.raise_untold()
            finally:
                self._guard.closed = self._guard.closed or "close() was called"
                self._give_back()
            return
        with self._guard:
            with self._checked("close()"):
                pass
            failure = self._checkpoints.close()
            self._agreement.close()
            self._guard.closed = "close() was called"
            self._give_back()
            if not self._agreement.ended:
                self._sums.close()
            if failure is not None:
                raise failure

    def __enter__(self) -> KVStore:
        return self

    def __exit__(
        self,
        kind: builtins.type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self.close()
        elif not self.closed:
            # The other ranks may be in a call of another store, which is left after this one.
            self._guard.closed = "it was left by an exception"
            why = f"{builtins.type(error).__name__}: {text_of(error)}"
            if not self._launch.is_busy:
                self._give_back()  # else memory is in use until the end of the process
            farewell.begin(self._leave(why))

    @property
    def closed(self) -> bool:
        """Whether the store was closed, or a rank has left it."""
        return bool(self._guard.closed or self._agreement.ended or self._launch.ended)

    # Inside -----------------------------------------------------------------------

    def _end(self, why: str) -> None:
        """Be closed from now on, with no word to other ranks: they know."""
        self._guard.closed = self._guard.closed or why

    @contextmanager
    def _checked(self, name: str) -> Iterator[None]:
        """Tell the other ranks of a mistake that is found in the block."""
        if self._guard.inside:
            raise self._guard.nested()
        try:
            self._guard.check_collective()
            self._launch.drain()
            yield
        except Exception as error:  # whatever it is: the others must not wait for this rank
            self._refuse(name, error)

    def _take_part(self, call: Call) -> None:
        """Do what the other ranks do, with nothing of this rank's own."""
        if call.name in (_BARRIER.name, _ANY_RANK.name):
            self._agreement.confirm(_BARRIER if call.name == _BARRIER.name else _ANY_RANK)
        elif call.name in (verify.NAME, verify.REPAIR_NAME):
            self._verify(verify.VOTE if call.name == verify.REPAIR_NAME else None)
        elif call.keys is None:
            error = RanksDisagreeError(
                f"rank {self.rank} is at the end of join(), others called {call.name}: only push, "
                "pushpull, barrier, any_rank and verify can be called once a rank has come to the "
                "end"
            )
            self._agreement.refuse("the end of join()", error)
        else:
            keys, sparse = call.keys
            zeros: list[Array | RowSparse] = []
            for entry in self._plan(keys).given:
                shape, dtype = entry.spec.shape, entry.spec.dtype
                is_sparse = entry.spec.key in sparse
                zeros.append(RowSparse.empty(shape, dtype) if is_sparse else np.zeros(shape, dtype))
            self._push(keys, zeros if isinstance(keys, list) else zeros[0], 0)

    def _refuse(self, name: str, error: Exception) -> NoReturn:
        """Tell the other ranks of a mistake, once they have come to it."""
        if self._launch.ended:  # they have raised what this is, and ask nobody any more
            raise error
        self._launch.drain()
        self._agreement.refuse(name, error)

    def _leave(self, why: str) -> Generator[None, None, Exception | None]:
        """Let pushes end in which the others wait for this rank, then take leave, in steps."""
        return self._after_pushes(self._agreement.leave(why))

    def _after_pushes(
        self, leaving: Generator[None, None, Exception | None]
    ) -> Generator[None, None, Exception | None]:
        yield from self._pushes_end()
        return (yield from leaving)

    def _pushes_end(self) -> Generator[None, None, None]:
        """Wait for pushes that are not complete, in steps; say what became of them."""
        while self._launch.is_busy:
            yield
        try:
            self._launch.raise_untold()
        except BaseException as error:  # nobody is there any more to raise it for
            print(f"kvcoll: pushes were not completed: {text_of(error)}", file=sys.stderr)

    def _settle(self, border: GpuBorder | None) -> None:
        """Let values lie on a GPU, or on the host, from now on; there are none yet."""
        self._border = border
        place = HOST if border is None else border.place
        self._engine.home = self._replica.place = place
        if isinstance(self._sums, AloneTransport):
            self._sums.place = place
        self._here(self._updater)
        self._plans.clear()

    def _here(self, updater: Updater) -> Updater:
        """Let an updater work where the values lie."""
        updater.place = self._engine.home
        return updater

    def _at_host(self) -> tuple[Mapping[Key, Entry], Updater]:
        """Give keys and updater for files: copies, if they lie on a GPU."""
        entries, updater = self._replica.entries, self._updater
        return (
            (entries, updater) if self._border is None else self._border.at_host(entries, updater)
        )

    def _fill(self, outputs: list[Any]) -> None:
        if self._border is None:
            fill(outputs)
        else:
            self._border.fill(outputs)

    def _checked_outputs(self, given: Sequence[Entry], is_list: bool, out: Any) -> list[Any]:
        if self._border is not None:
            return self._border.outputs(given, is_list, out)
        return checked_outputs(given, is_list, out)

    def _contents(self) -> Contents:
        """Show what a checkpoint holds; residuals are this rank's own."""
        entries, updater = self._at_host()
        about = {"type": self._type, "num_hosts": str(self.num_hosts), "numpy": np.__version__}
        about["updater"] = updater.describe()
        compressor, is_on = self._engine.compressor
        if compressor is None:
            return Contents(entries, updater, self._version, {}, None, about)
        residuals = compressor.residuals
        own = {_RESIDUAL + str(k): residuals.of(e) for k, e in entries.items() if residuals.has(e)}
        compression = {"params": compressor.compression.params(), "is_on": is_on}
        return Contents(entries, updater, self._version, own, compression, about)

    def _restored_compressor(self, loaded: Loaded) -> Compressor | None:
        """Take what a checkpoint's compression needs, and its residuals."""
        own = loaded.own
        named = {_RESIDUAL + str(key): entry for key, entry in self._replica.entries.items()}
        residuals = [(named[name], own[name]) for name in named if name in own]
        return self._engine.draft_restored(loaded.compression, residuals)

    def _give_back(self) -> None:
        self._plans.clear()
        self._own.clear()
        self._updater = Assign()
        self._replica.clear()
        self._launch.stop()
        self._engine.close()
        if self._border is not None:
            self._border.close()

    def _init(self, key: Any, value: Any, out: Any = _NO_OUTPUT) -> list[Any]:
        drafted: list[Entry] = []
        try:
            with self._agreement.atomic():
                with self._checked("init()"):
                    if self._borders is not None and not self._replica.entries:
                        self._settle(self._borders(value))
                    specs, values, is_list = self._new_values(key, value)
                    drafted = self._replica.draft(specs)
                    items = [str(spec) for spec in specs]
                    call = Call(f"init({_shown(specs)})", digest("init", *items), items)
                    by_key = {entry.spec.key: entry for entry in drafted}
                    given = [by_key[k] for k in (as_keys(key)[0])]
                    outputs: list[Any] = []
                    if out is not _NO_OUTPUT:
                        outputs = self._checked_outputs(given, is_list, out)
                self._agreement.confirm(call)
                self._engine.place(drafted)
                self._replica.keep(drafted, values)
                self._engine.broadcast(drafted)
        except WaitEndedError:  # as if it had not begun: values of this rank are not rank 0's
            kept = self._replica.entries
            self._replica.drop([entry.spec.key for entry in drafted if entry.spec.key in kept])
            raise
        if self._border is not None and not outputs:  # else what fills them ends it
            self._border.end()
        if drafted:
            self._kind = builtins.type(drafted[0].spec.key)
        return outputs

    def _own_arrays(
        self, name: str, key: Any, adopted: list[Array], value: Any = _NO_VALUE
    ) -> tuple[_Plan, list[Array]]:
        """Give the keys' own arrays; `adopted` gets what is to be copied into them."""
        drafted: dict[Chunk, Array] = {}
        try:
            with self._agreement.atomic():
                with self._checked(f"{name}()"):
                    plan = self._plan(key)
                    if value is not _NO_VALUE:
                        adopted += self._adoptable(plan, value)
                    told = digest(name, plan.push.call.digest)
                    call = Call(f"{name}{plan.push.call.name[4:]}", told)
                    drafted = self._engine.draft_windows(plan.given)
                self._agreement.confirm(call)
                arrays: list[Any] = self._engine.open_windows(plan.given, drafted)
        except WaitEndedError:
            self._engine.forget_windows(drafted)
            raise
        if self._border is not None:
            arrays = self._border.shown(arrays)
        for entry, array in zip(plan.given, arrays, strict=True):
            self._own.setdefault(entry.spec.key, array)
        self._plans.clear()
        return plan, [self._own[entry.spec.key] for entry in plan.given]

    def _adoptable(self, plan: _Plan, value: Any) -> list[Array]:
        """Check what is to be copied; what lies in the own arrays already, as another key's."""
        keys = [entry.spec.key for entry in plan.given]
        if len(plan.push.entries) < len(keys):
            twice = next(k for number, k in enumerate(keys) if k in keys[:number])
            raise ArgumentError(f"key {twice!r} stands twice in the list: give one array a key")
        lists = one_per_key(keys, plan.is_list, value, "arrays")
        adoptable: list[Array] = []
        for entry, given in zip(plan.given, lists, strict=True):
            key = entry.spec.key
            if len(given) > 1:
                raise ArgumentError(
                    f"key {key!r}: adopt takes one array, or a list of one, got {len(given)}"
                )
            own = self._own.get(key)
            if own is not None and given[0] is own and self._border is None:
                adoptable.append(own)
                continue
            array = as_array(given[0]) if self._border is None else self._border.read(given[0])
            entry.spec.check_pushed(array, "adopted")
            adoptable.append(self._engine.without_a_share(array))
        return adoptable

    def _new_values(self, key: Any, value: Any) -> tuple[list[Spec], list[Array | Rows], bool]:
        """Check what is to be initialised; in update order, so that neighbours stay so."""
        keys, is_list = as_keys(key)
        require_one_kind(keys, self._kind)
        known = self._replica.entries
        border = self._border
        first_value = by_rows.first_value if border is None else border.first_value
        seen: set[Key] = set()
        for k in keys:
            if k in known:
                raise KeyExistsError(f"{known[k].spec} already: a key is initialised once")
            if k in seen:
                raise KeyExistsError(f"key {k!r} stands twice in the list")
            seen.add(k)
        new: list[tuple[Spec, Array | Rows]] = []
        lists = one_per_key(keys, is_list, value, "values")
        for order, (k, entries) in enumerate(zip(keys, lists, strict=True), len(known)):
            if len(entries) > 1:
                raise ArgumentError(
                    f"key {k!r}: init takes one value, or a list of one, got {len(entries)}"
                )
            new.append(first_value(k, entries[0], order))
        new.sort(key=lambda pair: pair[0].update_rank)
        return [spec for spec, _ in new], [array for _, array in new], is_list

    def _push(
        self, key: Any, value: Any, priority: int, out: Any = _NO_OUTPUT, *, spared: bool = False
    ) -> list[Any]:
        if self._guard.inside:
            raise self._guard.nested()
        if faults.armed is not None and not spared:
            return self._push_with(faults.armed, key, value, priority, out)
        updater = self._updater
        try:
            self._guard.check_collective()
            plan = self._plan(key)
            if builtins.type(priority) is not int:
                priority = _as_priority(priority)
            is_own = plan.is_own(value)
            outputs: list[Any] = []
            rows: dict[int, list[RowSparse]] = {}
            if self._border is not None:
                may_lie = plan.is_in_order and not self._has_lent
                values = self._border.pushed(
                    plan.given, plan.is_list, plan.places, value, may_lie=may_lie
                )
                is_own = False
                if out is not _NO_OUTPUT:
                    outputs = self._border.outputs(plan.given, plan.is_list, out)
            else:
                values, rows = (plan.own_values, rows) if is_own else _pushed_values(plan, value)
                if out is not _NO_OUTPUT:
                    outputs = checked_outputs(plan.given, plan.is_list, out, takes_rows=True)
            push = plan.push
            ready: list[Rows] = []
            if rows:
                push = plan.by_rows(tuple(rows))
                ready = by_rows.ready(push, rows)
            if self._has_lent and not is_own:
                self._engine.copy_lent(push, values)
            call = self._launch.reserve(push, updater, values)
        except Exception as error:  # whatever it is: the others must not wait for this rank
            self._refuse("push()", error)
        is_complete = False
        try:
            self._launch.push(
                push, values, updater, call, plain=not is_own, priority=priority, rows=ready
            )
            is_complete = True
        finally:  # the user may let go of what a push that has failed still reads, too
            if self._border is not None and not (is_complete and outputs):
                self._border.end()
        self._version += 1
        if self._verify_every and self._version % self._verify_every == 0:
            self._verify(None)
        return outputs

    def _push_with(
        self, armed: faults.Armed, key: Any, value: Any, priority: int, out: Any
    ) -> list[Any]:
        """Push where faults wait, which may change it."""
        at_host = as_array if self._border is None else self._border.user_at_host
        push = faults.Push(self._created_rank, self._version + 1, key, at_host)
        value, is_made = armed.before_push(push, value)
        outputs = self._push(key, value, priority, out, spared=True) if is_made else []
        armed.after_push(push, self._stored)
        return outputs

    @contextmanager
    def _stored(self, key: Key) -> Iterator[list[Array]]:
        """Show a key's value and states on the host, to be changed, once no push waits: faults."""
        self._launch.drain()
        entry, updater, home = self._replica.entries[key], self._updater, self._engine.home
        own = [entry.flat]
        if isinstance(updater, Optimize) and key in updater.counts():
            own += updater.states_of(entry)
        shown = [home.at_host(array) for array in own]
        yield shown
        for array, changed in zip(own, shown, strict=True):
            if changed is not array:
                home.copy(changed, array)

    def _verify(self, repair: str | None) -> str:
        with self._checked(verify.NAME):
            repairs = verify.check_repair(repair)
            if self._border is not None:
                self._border.begin()
            updater, version = self._updater, self._version
            parts = verify.parts_of(self._replica.entries.values(), updater)
            prints = {part.name: part.fingerprint() for part in parts}
        with self._launch.reading:
            whole = self._verifier.compare(parts, prints, updater, version, repair=repairs)
        if self._border is not None:
            self._border.end()
        return whole

    def _plan(self, key: Any) -> _Plan:
        """Check and plan a key or a list of keys, once for each list."""
        kind = builtins.type(key)
        known: _Plan | None = None
        if kind is str or kind is int:
            known = self._plans.get(key)
        elif kind is list or kind is tuple:
            key = tuple(key)
            kinds = set(map(builtins.type, key))
            if kinds == {str} or kinds == {int}:  # True is no 1 here
                known = self._plans.get(key)
        return self._new_plan(key) if known is None else known

    def _new_plan(self, key: Any) -> _Plan:
        keys, is_list = as_keys(key)
        require_one_kind(keys, self._kind)
        entries = self._replica.entries
        for k in keys:
            if k not in entries:
                raise KeyNotFoundError(f"key {k!r} is not in the store: init it first")
        given = tuple(entries[k] for k in keys)
        ordered = sorted(
            (entries[k] for k in dict.fromkeys(keys)), key=lambda entry: entry.spec.update_rank
        )
        place = {entry.spec.key: number for number, entry in enumerate(ordered)}
        specs = [entry.spec for entry in given]
        items = [str(spec) for spec in specs]
        told = keys if is_list else keys[0]
        call = Call(f"push({_shown(specs)})", digest("push", *items), items, (told, ()))
        push = Push(call, tuple(ordered), tuple(plan_buckets(ordered)))
        own: tuple[Array, ...] = ()
        if len(ordered) == len(keys) and all(k in self._own for k in keys):
            own = tuple(self._own[k] for k in keys)
            push.windowed = tuple(plan_buckets(ordered, own_bucket_bytes=BUCKET_BYTES))
        own_values = [[self._own[entry.spec.key]] for entry in ordered] if own else []
        plan = _Plan(given, is_list, push, tuple(place[k] for k in keys), own, own_values)
        if len(self._plans) >= _MOST_PLANS:
            self._plans.clear()
        self._plans[tuple(keys) if is_list else keys[0]] = plan
        return plan


@final
class Survivor(Recoverable):
    """A store, as recovery sees it.

    Parameters
    ----------
    store : KVStore
    number : int
    joining : callable
        See `Recoverable.join`.
    is_late : bool
        See `Recoverable`.
    """

    def __init__(
        self,
        store: KVStore,
        number: int,
        joining: Callable[[Any, Topology, Losses], tuple[Transport, Callable[[], None]]],
        *,
        is_late: bool,
    ) -> None:
        self.store, self._joining = store, joining
        self.number, self.is_late = number, is_late

    def interrupt(self) -> None:
        """End what runs behind its caller; on a GPU a push that has returned may be cut short."""
        store, engine = self.store, self.store._engine
        store._launch.interrupt()
        if store._sums.was_cut() and not engine.apart:  # where sums are complete before updates
            engine.is_whole = False

    def join(
        self, comm: Any, topology: Topology, losses: Losses
    ) -> tuple[Transport, Callable[[], None]]:
        """Leave it to who has made the store."""
        return self._joining(comm, topology, losses)

    def standing(self) -> Standing:
        """Ask the engine."""
        store, engine = self.store, self.store._engine
        kind = store._updater.describe().split("(")[0]
        keys, n_changes = list(store._replica.entries), store._agreement.n_settled
        return Standing(engine.steps, engine.version, engine.is_whole, keys, kind, n_changes)

    def told(self) -> str:
        """Ask the updater."""
        return json.dumps(self.store._updater.told())

    def level(self, told: str, keys: Sequence[Key], *, is_source: bool) -> list[Array]:
        """Give values and states; neighbours as one."""
        store = self.store
        entries, kept = store._replica.entries, set(keys)
        store._replica.drop([key for key in entries if key not in kept])
        store._plans.clear()
        store._engine.is_whole = is_source
        states = store._updater.level(json.loads(told), entries)
        arrays = [*(entry.flat for entry in entries.values()), *states]
        return joined(arrays) if store._border is None else arrays

    def levelled(self, standing: Standing) -> None:
        """Count as the source does."""
        engine = self.store._engine
        engine.steps, engine.version, engine.is_whole = standing.steps, standing.version, True

    def prepare(self, transport: Transport, agreement: Agreement, left: Left) -> Callable[[], None]:
        """Draft what the engine needs."""
        store, topology = self.store, left.topology
        place = topology.ranks_on(topology.host).index(topology.rank)
        move = store._engine.draft_move(transport, agreement, left.places, place)

        def commit() -> None:
            move()
            store._sums, store._transport = transport, transport.for_host
            store._topology, store._agreement = topology, agreement
            store._launch.move(topology, agreement)
            store._checkpoints.move(transport.for_host, agreement)
            store._verifier.move(transport.for_host, agreement)
            store._version = store._engine.version
            store._replica.close_chunks()

        return commit

    def lose(self, why: str) -> None:
        """Close the store."""
        self.store._guard.closed = why


def _pushed_values(plan: _Plan, value: Any) -> tuple[list[list[Array]], dict[int, list[RowSparse]]]:
    """Check what is pushed, and sort it by place in the plan: arrays, and what is rows only."""
    if not plan.is_list and builtins.type(value) is np.ndarray:
        plan.given[0].spec.check_pushed(value)
        return [[value]], {}
    if plan.is_in_order and plan.fits(value):
        return [[array] for array in value], {}
    lists = one_per_key([entry.spec.key for entry in plan.given], plan.is_list, value, "values")
    values: list[list[Any]] = [[] for _ in plan.push.entries]
    has_rows = False
    for entry, place, arrays in zip(plan.given, plan.places, lists, strict=True):
        spec = entry.spec
        for given in arrays:
            array: Array | RowSparse
            if builtins.type(given) is np.ndarray:
                array = given
            elif isinstance(given, RowSparse):
                array, has_rows = given, True
            else:
                array = as_array(given)
            if array.shape != spec.shape or array.dtype is not spec.dtype:
                spec.check_pushed(array)
            values[place].append(array)
    return by_rows.separate(values) if has_rows else (values, {})


def _pull(plan: _Plan, out: Any) -> Any:
    """Copy stored values into outputs that are yet to be checked, or into new arrays."""
    if out is None:
        new = [entry.value.copy() for entry in plan.given]
        return new if plan.is_list else new[0]
    if plan.fits(out) and all(array.flags.writeable for array in out):
        for entry, array in zip(plan.given, out, strict=True):
            np.copyto(array, entry.value)
    else:
        fill(checked_outputs(plan.given, plan.is_list, out))
    return out


def _as_priority(priority: object) -> int:
    if not isinstance(priority, (int, np.integer)):
        raise TypeError(f"a priority is an int, got {priority!r}")
    return int(priority)


def _shown(specs: Sequence[Spec]) -> str:
    if len(specs) == 1:
        return f"{specs[0].key!r} {signature(specs[0].shape, specs[0].dtype)}"
    return show_keys([spec.key for spec in specs])


def _as_optimizer(given: object, arguments: dict[str, Any]) -> optimizers.Optimizer:
    if isinstance(given, str):
        return optimizers.create(given, **arguments)
    if not isinstance(given, optimizers.Optimizer):
        raise TypeError(
            f"expected a kvcoll.optimizer.Optimizer or a name, got {type(given).__name__}"
        )
    if arguments:
        raise TypeError(
            f"settings ({', '.join(arguments)}) go with an optimizer's name, not with an optimizer"
        )
    return given
