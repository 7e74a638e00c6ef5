"""Norms of keys on a GPU, and what they make of steps, for optimizers whose steps depend on them.

Rules of the file: the host waits for nothing and sees no norm; all that may be no kernel is
traced and compiled before anything is put on the stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, final

import numpy as np

from ..arrays import Array, DType, wide
from ..gpu.array import DeviceArray, as_device
from ..gpu.device import Device, Gpus, HostArray, Stream
from ..gpu.kernel import KernelSource
from ..optimizer.base import PIECE_ELEMENTS
from ..optimizer.layerwise import LayerWise
from ..optimizer.step import Step
from ..place import Update
from . import norms
from .fused import kernel_of
from .launcher import Launcher, Stage
from .steps import trace_measure, trace_step, trace_trust
from .trace import Program, Traced

_DOUBLE: DType = np.dtype(np.float64)


class _Layer(NamedTuple):
    """A step, written down."""

    measure: Traced
    trust: Traced


class _Pieces(NamedTuple):
    """How keys are cut, by piece."""

    key: Array  # which key it is of
    start: Array
    sizes: Array
    shapes: Array  # addresses
    n_blocks: Array
    n_branches: Array
    arrays: list[DeviceArray]  # at these addresses
    of_key: Array  # by key: how many


class _Sources(NamedTuple):
    """The kernels of steps that have the same programs, in the order in which they run."""

    summing: KernelSource
    folding: KernelSource
    walking: KernelSource
    trusting: KernelSource


class _Rooms(NamedTuple):
    """Memory that is for what kernels hand on, of the dtype of sums."""

    blocks: DeviceArray
    branches: DeviceArray
    sums: DeviceArray


@final
class Measured:
    """Finds the factors of steps.

    Parameters
    ----------
    gpus : Gpus
    device : Device
    stream : Stream
        Of that device, and of the launcher.
    launcher : Launcher
    """

    def __init__(self, gpus: Gpus, device: Device, stream: Stream, launcher: Launcher) -> None:
        self._gpus, self._device, self._stream = gpus, device, stream
        self._launcher = launcher
        # By size of a piece, with the pinned memory from which it goes up.
        self._shapes: dict[int, tuple[HostArray, DeviceArray]] = {}

    def trusts(
        self, optimizer: LayerWise, dtype: DType, work: Sequence[Update]
    ) -> list[DeviceArray | None]:
        """Work out the factor of each key.

        Parameters
        ----------
        optimizer : LayerWise
        dtype : numpy.dtype
            Of the values.
        work : sequence of Update
            Of whole keys. Their states may be brought forward.

        Returns
        -------
        list of (DeviceArray or None), of shape (1,)
            A float64 on the GPU for each key; None where norms do not set the step.

        Raises
        ------
        UntraceableError
            The optimizer does what is no kernel; nothing has been done then.
        """
        by_step: dict[Step, list[int]] = {}
        for number, update in enumerate(work):
            by_step.setdefault(update.step, []).append(number)
        groups: dict[tuple[Program, Program], list[tuple[_Layer, list[int]]]] = {}
        for step, numbers in by_step.items():
            # To raise before states are brought forward, and not after.
            self._device.compile(kernel_of(trace_step(optimizer, dtype, step).program))
            if not step.adapts:
                continue
            layer = _Layer(trace_measure(optimizer, dtype, step), trace_trust(optimizer, step))
            own = layer.measure.program, layer.trust.program
            groups.setdefault(own, []).append((layer, numbers))
        sources = {programs: _sources(layers[0][0], dtype) for programs, layers in groups.items()}
        for source in (one for own_sources in sources.values() for one in own_sources):
            self._device.compile(source)
        result: list[DeviceArray | None] = [None] * len(work)
        for programs, layers in groups.items():
            numbers = [number for _, of_step in layers for number in of_step]
            factors = self._device.empty(len(numbers), _DOUBLE, self._stream)
            keys = [work[number] for number in numbers]
            self._launch(sources[programs], layers, dtype, keys, factors)
            for place, number in enumerate(numbers):
                result[number] = factors[place : place + 1]
        return result

    def _launch(
        self,
        sources: _Sources,
        layers: Sequence[tuple[_Layer, list[int]]],
        dtype: DType,
        keys: Sequence[Update],
        factors: DeviceArray,
    ) -> None:
        """Put on the stream what brings the factors of keys that have the same programs."""
        measure, trust = layers[0][0].measure.program, layers[0][0].trust.program
        pieces, kind, n_sums = self._cut(keys), wide(dtype), len(measure.sums)
        sums = self._device.empty(pieces.key.size * n_sums, kind, self._stream)
        numbers = [layer.measure.numbers for layer, of_step in layers for _ in of_step]
        self._sum(sources, measure, keys, numbers, pieces, sums)
        layout = norms.key_layout_of(trust)
        table = np.empty((len(keys), layout.n_words), np.int64)
        places, before = np.arange(len(keys)), np.cumsum(pieces.of_key) - pieces.of_key
        table[:, 0], table[:, 1] = places, pieces.of_key
        at = sums.address + before * n_sums * kind.itemsize
        table[:, layout.address(norms.KEY_SUMS)] = at
        at = factors.address + places * factors.itemsize
        table[:, layout.address(norms.FACTOR)] = at
        of_keys = [layer.trust.numbers for layer, of_step in layers for _ in of_step]
        table[:, layout.number(0) :] = of_keys
        self._launcher.launch(sources.trusting, table, reads=[sums], writes=[factors], n=len(keys))

    def _sum(
        self,
        sources: _Sources,
        program: Program,
        keys: Sequence[Update],
        numbers: Sequence[tuple[int, ...]],
        pieces: _Pieces,
        sums: DeviceArray,
    ) -> None:
        """Sum over each piece what the program says, as it brings states forward."""
        kind, n_sums = sums.dtype, len(program.sums)
        n_blocks, n_branches = int(pieces.n_blocks.sum()), int(pieces.n_branches.sum())
        blocks = self._device.empty(n_blocks * n_sums * norms.SLOT, kind, self._stream)
        branches = self._device.empty(n_branches * n_sums, kind, self._stream)
        table = _table_of_pieces(program, keys, numbers, pieces, _Rooms(blocks, branches, sums))
        arrays = [array for key in keys for array in _arrays_of(key)]
        states = [as_device(state) for key in keys for state in key.states]
        lanes, shapes = norms.n_lanes(n_blocks), pieces.arrays
        stages = [
            Stage(sources.summing, lanes, [*arrays, *shapes], [*states, blocks]),
            Stage(sources.folding, n_branches, [blocks, *shapes], [branches]),
            Stage(sources.walking, pieces.key.size, [branches, *shapes], [sums]),
        ]
        self._launcher.launch_in_turn(stages, table)

    def _cut(self, keys: Sequence[Update]) -> _Pieces:
        """Cut keys into pieces as the host does."""
        sizes = np.array([key.weight.size for key in keys], np.int64)
        of_key = -(-sizes // PIECE_ELEMENTS)
        key = np.repeat(np.arange(len(keys)), of_key)
        number = np.arange(key.size) - np.repeat(np.cumsum(of_key) - of_key, of_key)
        start = number * PIECE_ELEMENTS
        own = np.minimum(PIECE_ELEMENTS, sizes[key] - start)
        distinct, which = np.unique(own, return_inverse=True)
        cut = [self._shape(n) for n in distinct.tolist()]
        words = np.array([[array.address, *host[:2]] for host, array in cut], np.int64)
        shapes, n_blocks, n_branches = words[which].T
        arrays = [array for _, array in cut]
        return _Pieces(key, start, own, shapes, n_blocks, n_branches, arrays, of_key)

    def _shape(self, n: int) -> tuple[HostArray, DeviceArray]:
        """Give how a piece of so many elements is cut, here and on the GPU."""
        if n not in self._shapes:
            shape = norms.shape_of(n)
            host = self._gpus.pinned(shape.nbytes).view(shape.dtype)
            host[:] = shape
            array = self._device.empty(shape.size, shape.dtype, self._stream)
            self._device.upload(host, array, self._stream)
            self._shapes[n] = host, array
        return self._shapes[n]


def _sources(layer: _Layer, dtype: DType) -> _Sources:
    program, (first, second) = layer.measure.program, layer.measure.result
    return _Sources(
        norms.summing(program),
        norms.folding(program),
        norms.walking(program),
        norms.trusting(layer.trust.program, wide(dtype), (first.place, second.place)),
    )


def _table_of_pieces(
    program: Program,
    keys: Sequence[Update],
    numbers: Sequence[tuple[int, ...]],
    pieces: _Pieces,
    rooms: _Rooms,
) -> Array:
    """Write a row a piece: where its arrays are, and where its sums go on their way."""
    layout, n_arrays, n_sums = norms.layout_of(program), len(program.dtypes), len(program.sums)
    sum_bytes = n_sums * rooms.sums.itemsize
    first_block = np.cumsum(pieces.n_blocks) - pieces.n_blocks
    first_branch = np.cumsum(pieces.n_branches) - pieces.n_branches
    places = np.arange(pieces.key.size)
    columns = {
        norms.SHAPE: pieces.shapes,
        norms.BLOCKS: rooms.blocks.address + first_block * sum_bytes * norms.SLOT,
        norms.BRANCHES: rooms.branches.address + first_branch * sum_bytes,
        norms.SUMS: rooms.sums.address + places * sum_bytes,
        norms.FIRST_BRANCH: first_branch,
    }
    bases = np.array([[a.address for a in _arrays_of(key)] for key in keys], np.int64)
    itemsizes = np.array([d.itemsize for d in program.dtypes], np.int64)
    table = np.empty((pieces.key.size, layout.n_words), np.int64)
    table[:, 0], table[:, 1] = first_block, pieces.sizes
    own = bases[pieces.key] + pieces.start[:, None] * itemsizes
    table[:, layout.address(0) : layout.address(n_arrays)] = own
    for which, column in columns.items():
        table[:, layout.address(n_arrays + which)] = column
    table[:, layout.number(0) :] = np.array(numbers, np.int64)[pieces.key]
    return table


def _arrays_of(update: Update) -> list[DeviceArray]:
    return [as_device(array) for array in (update.weight, update.grad, *update.states)]
