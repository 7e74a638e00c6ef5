"""A GPU as the place of a store: its memory, one stream, and the work that is put on it.

Rules of the file: all work is on one stream, so that it is in order; the host waits only for
what it must see, which is copied down. Memory on other GPUs of this
process is brought here, or filled from here, by copies that the stream waits for.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, final

import numpy as np

from .arrays import Array, DType, wide
from .errors import DTypeMismatchError
from .gpu.array import DeviceArray, as_any, as_device
from .gpu.at import ArraysAt
from .gpu.device import Device, Gpus, Stream
from .gpu.patience import Patience, Trusting
from .gpu.staging import Staging
from .kernels.fused import kernel_of
from .kernels.launcher import Launcher
from .kernels.measured import Measured
from .kernels.moves import ADDED, MOVED, added, code_of, moved
from .kernels.prelude import is_known
from .kernels.steps import trace_step
from .kernels.table import Chained, Piece, columns_of, joined, rows_of
from .kernels.trace import Program, UntraceableError
from .kernels.updates import (
    Rows,
    Whole,
    addresses_of,
    devices_of,
    extent_of,
    rows_of_parts,
    rows_of_whole,
)
from .optimizer.base import PIECE_ELEMENTS, Optimizer
from .optimizer.layerwise import LayerWise
from .place import Kept, Parts, Place, Update, UpdateEach
from .schema import Spec


class SumsOverGpus(Protocol):
    """What adds values that lie on several GPUs of this process, better than copies to one."""

    def suits(self, values: Sequence[DeviceArray]) -> bool:
        """Say whether it adds such values."""

    def prepare(self, values: Sequence[DeviceArray]) -> None:
        """Do before the first sum what may fail."""

    def add(self, values: Sequence[DeviceArray], out: DeviceArray) -> None:
        """Add flat values left to right."""


@final
class GpuPlace(Place):
    """One GPU.

    Parameters
    ----------
    gpus : Gpus
    device : Device
        Where the store's values lie.
    stream : Stream, optional
        That of the transport, where there is one; by default a new one.
    patience : Patience, optional
        How the host waits for the GPU.

    Attributes
    ----------
    sums : SumsOverGpus or None
        For lists of values on several GPUs; without it they are copied here to be added.
    """

    is_host = False

    def __init__(
        self,
        gpus: Gpus,
        device: Device,
        stream: Stream | None = None,
        patience: Patience | None = None,
    ) -> None:
        self.gpus, self.device = gpus, device
        self.patience: Patience = Trusting() if patience is None else patience
        self.stream: Stream = device.stream() if stream is None else stream
        self.launcher = Launcher(gpus, device, self.stream)
        self._staging = Staging(gpus, device, self.stream, patience=self.patience)
        self._side_streams: dict[int, Stream] = {}  # of other GPUs, to write to their memory
        self._measured = Measured(gpus, device, self.stream, self.launcher)
        self._is_joined = False
        self._moves: list[tuple[DeviceArray, DeviceArray]] = []
        self._copies: list[tuple[Sequence[Array], Parts]] = []
        self._updates: list[tuple[Optimizer, Update]] = []
        self._updates_each: list[tuple[Optimizer, UpdateEach]] = []
        self._told: set[type[Optimizer]] = set()
        self.sums: SumsOverGpus | None = None

    def follow(self, patience: Patience) -> None:
        """Wait in another way from now on, as other ranks are waited for."""
        self.patience = self._staging.patience = patience

    # Memory -----------------------------------------------------------------------

    def check(self, spec: Spec) -> None:
        """Raise for dtypes that kernels do not know: float8, long double."""
        if not is_known(spec.dtype):
            raise DTypeMismatchError(
                f"{spec}, a store on a GPU sums bool, integers, float16, bfloat16, float32, "
                "float64 and complex: take a store on the host ('local', 'dist_sync') for this key"
            )

    def empty_on_gpu(self, n_elements: int, dtype: DType) -> DeviceArray:
        """Take memory of any contents."""
        return self.device.empty(n_elements, dtype, self.stream)

    def empty(self, n_elements: int, dtype: DType) -> Array:
        """Take memory of any contents."""
        return as_any(self.empty_on_gpu(n_elements, dtype))

    def zeros(self, n_elements: int, dtype: DType) -> Array:
        """Take memory, and clear it."""
        made = self.empty_on_gpu(n_elements, dtype)
        self.device.zero(made, self.stream)
        return as_any(made)

    def is_flat(self, array: Array) -> bool:
        """Say so of every array in this GPU's memory: others are copied."""
        return as_device(array).device == self.device.index

    def share_memory(self, one: Array, other: Array) -> bool:
        """Compare addresses."""
        a, b = as_device(one), as_device(other)
        meet = a.address < b.address + b.nbytes and b.address < a.address + a.nbytes
        return a.device == b.device and meet

    def clone(self, array: Array) -> Array:
        """Copy here."""
        source = as_device(array)
        made = self.empty_on_gpu(source.size, source.dtype).reshape(source.shape)
        self.copy(array, as_any(made))
        return as_any(made)

    # Copies -----------------------------------------------------------------------

    def copy(self, source: Array, out: Array) -> None:
        """Copy from the host or a GPU to a GPU, casting if need be."""
        if isinstance(source, np.ndarray):
            self.upload(source, as_device(out))
            return
        self._moves.append((as_device(source), as_device(out)))
        if not self._is_joined:
            self._do_moves()

    def upload(self, source: Array, out: DeviceArray) -> None:
        """Copy from the host; returns once the source may be changed."""
        self._staging.upload(source, out)

    def download(self, source: DeviceArray, out: Array) -> None:
        """Copy to the host; returns once all is there."""
        self._staging.download(source, out)

    def at_host(self, array: Array) -> Array:
        """Copy down; waits for what is on the stream."""
        own = as_device(array)
        host = np.empty(own.shape, own.dtype)
        self.download(own, host)
        return host

    def keep(self, arrays: Sequence[Array]) -> Kept:
        """Copy within the GPU, in a launch a dtype; comes down when it is asked for."""
        by_dtype: dict[DType, list[int]] = {}
        for number, array in enumerate(arrays):
            if array.size:
                by_dtype.setdefault(array.dtype, []).append(number)
        copies: list[tuple[list[int], Parts]] = []
        with self.joined():
            for dtype, numbers in by_dtype.items():
                sizes = np.array([arrays[number].size for number in numbers], np.int64)
                flat = self.empty(int(sizes.sum()), dtype)
                parts = Parts(flat, np.cumsum(sizes) - sizes, sizes)
                self.copy_each([arrays[number] for number in numbers], parts)
                copies.append((numbers, parts))

        def told() -> list[bytes]:
            kept = [b""] * len(arrays)
            for numbers, parts in copies:
                host = Parts(self.at_host(parts.flat), parts.starts, parts.sizes)
                for number, part in zip(numbers, host, strict=True):
                    kept[number] = part.tobytes()
            return kept

        return told

    def bring(self, array: DeviceArray) -> DeviceArray:
        """Give an array of whichever GPU as one of this GPU."""
        if array.device == self.device.index:
            return array
        here = self.empty_on_gpu(array.size, array.dtype).reshape(array.shape)
        self.device.copy(array, here, self.stream)
        return here

    def add_lists(self, lists: Sequence[Sequence[Array]], outs: Sequence[Array]) -> None:
        """Add each list left to right into its array; arrays of other GPUs are brought here.

        Parameters
        ----------
        lists : sequence of sequence of DeviceArray
        outs : sequence of DeviceArray
            Of one dtype, in this GPU's memory.
        """
        values, to = [], []
        for listed, total in zip(lists, outs, strict=True):
            own, out = [as_device(value) for value in listed], as_device(total)
            if self.sums is not None and self._suit(own, out):
                self.sums.add([value.reshape(-1) for value in own], out.reshape(-1))
            else:
                values.append([self.bring(value) for value in own])
                to.append(out)
        if to:
            self._add(values, to)

    def prepare(self, values: Sequence[Array]) -> None:
        """Do what may fail before the ranks agree on a push of these values."""
        own = [as_device(value) for value in values]
        if self.sums is not None and self.sums.suits(own):
            self.sums.prepare(own)

    def _suit(self, values: Sequence[DeviceArray], out: DeviceArray) -> bool:
        dtype = values[0].dtype
        fits = out.dtype in (dtype, wide(dtype))
        return self.sums is not None and fits and self.sums.suits(values)

    def _add(self, values: list[list[DeviceArray]], to: list[DeviceArray]) -> None:
        dtype = to[0].dtype
        if all(len(listed) == 1 for listed in values):
            self._moves += [(listed[0], out) for listed, out in zip(values, to, strict=True)]
            self._do_moves()
            return
        n_rows, more, pieces = sum(out.size > 0 for out in to), list[int](), []
        for listed, out in zip(values, to, strict=True):
            first = n_rows * ADDED.n_words + len(more)
            pieces.append(Piece(out.size, (out.address, len(listed), first)))
            for value in listed:
                more += (value.address, code_of(value.dtype))
        sources = [value for listed in values for value in listed]
        kernel = added(dtype, mixed=any(value.dtype != dtype for value in sources))
        table = rows_of(ADDED, pieces)
        self.launcher.launch(kernel, table, reads=sources, writes=to, more=more)

    def _do_moves(self) -> None:
        moves, self._moves = self._moves, []
        here: dict[tuple[DType, DType], list[tuple[DeviceArray, DeviceArray]]] = {}
        for source, out in moves:
            if out.device != self.device.index:
                self._copy_away(source, out)
            else:
                own = here.setdefault((source.dtype, out.dtype), [])
                own.append((self.bring(source), out))
        for (dtype, other), pairs in here.items():
            if len(pairs) == 1 and dtype == other:
                if pairs[0][0].size:
                    self.device.copy(*pairs[0], self.stream)
                continue
            pieces = [Piece(out.size, (source.address, out.address)) for source, out in pairs]
            self.launcher.launch(
                moved(dtype, other),
                rows_of(MOVED, pieces),
                reads=[source for source, _ in pairs],
                writes=[out for _, out in pairs],
            )

    def _copy_away(self, source: DeviceArray, out: DeviceArray) -> None:
        """Copy to another GPU of this process; what follows on the stream comes after it."""
        if source.dtype != out.dtype:
            cast = self.empty_on_gpu(out.size, out.dtype)
            own = [Piece(out.size, (source.address, cast.address))]
            kernel, table = moved(source.dtype, out.dtype), rows_of(MOVED, own)
            self.launcher.launch(kernel, table, reads=[source], writes=[cast])
            source = cast
        device = self.gpus.devices[out.device]
        if out.device not in self._side_streams:
            self._side_streams[out.device] = device.stream()
        side = self._side_streams[out.device]
        side.wait(self.stream.record())
        if out.size:
            device.copy(source, out, side)
        self.stream.wait(side.record())

    # Updates ----------------------------------------------------------------------

    def update(self, optimizer: Optimizer, work: Sequence[Update]) -> None:
        """Apply steps in one kernel; op by op where a class of the user's is no kernel."""
        self._updates += [(optimizer, update) for update in work]
        if not self._is_joined:
            self._do_updates()

    def update_each(self, optimizer: Optimizer, work: Sequence[UpdateEach]) -> None:
        """Apply steps in one kernel, which takes each gradient where it lies."""
        self._updates_each += [(optimizer, update) for update in work]
        if not self._is_joined:
            self._do_updates()

    def _do_updates(self) -> None:
        """Put on the stream what waits, the steps of each optimizer and dtype together."""
        groups: dict[tuple[int, DType], tuple[Optimizer, list[Update], list[UpdateEach]]] = {}
        for optimizer, update in self._updates:
            if update.weight.size:
                own = (id(optimizer), update.weight.dtype)
                groups.setdefault(own, (optimizer, [], []))[1].append(update)
        for optimizer, each in self._updates_each:
            own = (id(optimizer), each.weight.flat.dtype)
            groups.setdefault(own, (optimizer, [], []))[2].append(each)
        self._updates, self._updates_each = [], []
        for (_, dtype), (optimizer, work, apart) in groups.items():
            try:
                trusts: Sequence[DeviceArray | None] = [None] * len(work)
                if isinstance(optimizer, LayerWise):  # whose keys never lie apart
                    trusts = self._measured.trusts(optimizer, dtype, work)
                self._update_fused(optimizer, dtype, work, apart, trusts)
            except UntraceableError as error:
                work += [update for each in apart for update in _singly(each)]
                self._update_by_operations(optimizer, dtype, work, error)

    def _update_fused(
        self,
        optimizer: Optimizer,
        dtype: DType,
        work: Sequence[Update],
        apart: Sequence[UpdateEach],
        trusts: Sequence[DeviceArray | None],
    ) -> None:
        steps = dict.fromkeys([*(update.step for update in work), *(each.step for each in apart)])
        traced = {step: trace_step(optimizer, dtype, step) for step in steps}
        programs = {step: own.program for step, own in traced.items()}
        whole: dict[Program, list[Whole]] = {program: [] for program in programs.values()}
        rows: dict[Program, list[Rows]] = {program: [] for program in whole}
        for update, trust in zip(work, trusts, strict=True):
            own = traced[update.step]
            whole[own.program].append(Whole(update, own, trust))
        for each in apart:
            own = traced[each.step]
            rows[own.program].append(rows_of_parts(own.program, each, own))
        for program, own_rows in rows.items():
            if whole[program]:
                own_rows.append(rows_of_whole(program, whole[program]))
            self.launcher.launch(
                kernel_of(program),
                joined([own.table for own in own_rows]),
                reads=Chained([part for own in own_rows for part in own.reads]),
                writes=[array for own in own_rows for array in own.writes],
            )

    def _update_by_operations(
        self, optimizer: Optimizer, dtype: DType, work: Sequence[Update], error: UntraceableError
    ) -> None:
        """Let the optimizer work on CuPy's arrays, an operation at a time."""
        if type(optimizer) not in self._told:
            self._told.add(type(optimizer))
            warnings.warn(
                f"{type(optimizer).__name__} updates one operation after another on the GPU, as it "
                f"is no single kernel: {error}. Ufuncs with out= make it one",
                RuntimeWarning,
                stacklevel=2,
            )

        def scratch(of: DType) -> Any:
            return self.lend(self.empty(PIECE_ELEMENTS, of))

        own = optimizer.with_scratch(dtype, scratch)
        with self.lending():
            for update in work:
                weight, grad, *states = (self.lend(array) for array in _arrays_of(update))
                own.update_flat(weight, grad, states, update.step)

    # What the user's code sees ------------------------------------------------------

    def lend(self, array: Array) -> Any:
        """Show memory as an array of CuPy."""
        return self.gpus.lend(as_device(array))

    @contextmanager
    def lending(self) -> Iterator[None]:
        """Let the user's current stream come after ours, and ours after what it gets meanwhile."""
        self.device.current_stream().wait(self.stream.record())
        try:
            yield
        finally:
            self.stream.wait(self.device.current_stream().record())

    def copy_each(self, sources: Sequence[Array], outs: Parts) -> None:
        """Copy in one kernel, from wherever each lies on this GPU."""
        self._copies.append((sources, outs))
        if not self._is_joined:
            self._do_copies()

    def copy_out(self, sources: Parts, outs: ArraysAt) -> None:
        """Copy parts of flat memory, each to where an array lies on this GPU, in one kernel."""
        flat = as_device(sources.flat)
        starts = flat.address + sources.starts * flat.itemsize
        table = columns_of(sources.sizes, [starts, outs.addresses])
        kernel = moved(flat.dtype, flat.dtype)
        self.launcher.launch(kernel, table, reads=[extent_of(flat, sources)], writes=outs)

    def _do_copies(self) -> None:
        copies, self._copies = self._copies, []
        groups: dict[tuple[DType, DType], list[tuple[Sequence[Array], Parts]]] = {}
        for sources, outs in copies:
            if len(sources):
                own = (sources[0].dtype, outs.flat.dtype)
                groups.setdefault(own, []).append((sources, outs))
        for (dtype, other), own_copies in groups.items():
            tables, reads, writes = [], list[Sequence[DeviceArray]](), list[DeviceArray]()
            for sources, outs in own_copies:
                flat = as_device(outs.flat)
                targets = flat.address + outs.starts * flat.itemsize
                tables.append(columns_of(outs.sizes, [addresses_of(sources), targets]))
                reads.append(devices_of(sources))
                writes.append(extent_of(flat, outs))
            kernel = moved(dtype, other)
            self.launcher.launch(kernel, joined(tables), reads=Chained(reads), writes=writes)

    @contextmanager
    def joined(self) -> Iterator[None]:
        """Put copies and updates on the stream at the end, in few launches."""
        self._is_joined = True
        try:
            yield
            self._do_moves()
            self._do_copies()
            self._do_updates()
        finally:
            self._is_joined = False
            for waiting in (self._moves, self._copies, self._updates, self._updates_each):
                waiting.clear()


def _arrays_of(update: Update) -> list[Array]:
    return [update.weight, update.grad, *update.states]


def _singly(each: UpdateEach) -> Iterator[Update]:
    states = [Parts(flat, each.weight.starts, each.weight.sizes) for flat in each.states]
    for weight, grad, *own in zip(each.weight, each.grads, *states, strict=True):
        yield Update(weight, grad.reshape(-1), own, each.step)
