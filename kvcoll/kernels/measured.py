"""Norms of keys on a GPU, for optimizers whose step depends on them.

The host waits for them, once a bucket: what a norm makes of a step is the optimizer's Python.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import final

import numpy as np

from ..arrays import Array, DType, wide
from ..gpu.array import DeviceArray, as_device
from ..optimizer.base import PIECE_ELEMENTS
from ..optimizer.layerwise import LayerWise
from ..place import Update
from . import norms
from .launcher import Launcher
from .steps import trace_measure
from .trace import Program, Traced


@final
class Measured:
    """Finds the factors of steps.

    Parameters
    ----------
    empty : callable
        Takes memory on the GPU.
    upload, download : callable
        Copy to and from it.
    launcher : Launcher
    """

    def __init__(
        self,
        empty: Callable[[int, DType], DeviceArray],
        upload: Callable[[Array, DeviceArray], None],
        download: Callable[[DeviceArray, Array], None],
        launcher: Launcher,
    ) -> None:
        self._empty, self._upload, self._download = empty, upload, download
        self._launcher = launcher
        self._shapes: dict[int, DeviceArray] = {}

    def with_trust(
        self, optimizer: LayerWise, dtype: DType, work: Sequence[Update]
    ) -> list[Update]:
        """Give the same work with the factor of each key in its step.

        Parameters
        ----------
        optimizer : LayerWise
        dtype : numpy.dtype
            Of the values.
        work : sequence of Update
            Of whole keys. Their states may be brought forward.
        """
        groups: dict[Program, list[tuple[int, Traced]]] = {}
        for number, update in enumerate(work):
            if update.step.adapts:
                traced = trace_measure(optimizer, dtype, update.step)
                groups.setdefault(traced.program, []).append((number, traced))
        result = list(work)
        for program, keys in groups.items():
            squares = self._squares(program, dtype, [(work[k], traced) for k, traced in keys])
            for (k, traced), sums in zip(keys, squares, strict=True):
                own = [sums[sum_of.place] for sum_of in traced.result]
                trust = optimizer.trust(own[0], own[1], work[k].step)
                result[k] = work[k]._replace(step=replace(work[k].step, trust=trust))
        return result

    def _squares(
        self, program: Program, dtype: DType, keys: Sequence[tuple[Update, Traced]]
    ) -> list[list[float]]:
        """Sum over each key: on the GPU over pieces, here over the pieces' sums."""
        kind, n_sums = wide(dtype), len(program.sums)
        pieces = [
            (number, start, min(PIECE_ELEMENTS, update.weight.size - start))
            for number, (update, _) in enumerate(keys)
            for start in range(0, update.weight.size, PIECE_ELEMENTS)
        ]
        room = self._empty(sum(norms.room_elements(program, n) for _, _, n in pieces), kind)
        results = self._empty(len(pieces) * n_sums, kind)
        layout = norms.layout_of(program)
        table = np.empty((len(pieces), layout.n_words), np.int64)
        n_blocks, room_at, result_at = 0, room.address, results.address
        for row, (number, start, n) in zip(table, pieces, strict=True):
            update, traced = keys[number]
            where = [a.address + start * a.itemsize for a in _arrays_of(update)]
            row[:2] = n_blocks, n
            row[2:] = [*where, self._shape(n).address, room_at, result_at, *traced.numbers]
            n_blocks += norms.n_blocks(n)
            room_at += norms.room_elements(program, n) * kind.itemsize
            result_at += n_sums * kind.itemsize
        arrays = [array for update, _ in keys for array in _arrays_of(update)]
        shapes = [self._shape(n) for n in {n for _, _, n in pieces}]
        states = [as_device(state) for update, _ in keys for state in update.states]
        self._launcher.launch(
            norms.summing(program),
            table,
            reads=[*arrays, *shapes],
            writes=[*states, room],
            n=norms.n_lanes(n_blocks),
        )
        walking = norms.walking(program)
        reads = [room, *shapes]
        self._launcher.launch(walking, table, reads=reads, writes=[results], n=len(pieces))
        told = np.empty(results.size, kind)
        self._download(results, told)
        squares = [[0.0] * n_sums for _ in keys]
        for (number, _, _), sums in zip(pieces, told.reshape(-1, n_sums), strict=True):
            squares[number] = [a + float(b) for a, b in zip(squares[number], sums, strict=True)]
        return squares

    def _shape(self, n: int) -> DeviceArray:
        """Give on the GPU how a piece of so many elements is cut."""
        if n not in self._shapes:
            shape = norms.shape_of(n)
            self._shapes[n] = self._empty(shape.size, shape.dtype)
            self._upload(shape, self._shapes[n])
        return self._shapes[n]


def _arrays_of(update: Update) -> list[DeviceArray]:
    return [as_device(array) for array in (update.weight, update.grad, *update.states)]
