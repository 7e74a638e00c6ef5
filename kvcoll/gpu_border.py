"""What goes into a store on a GPU and comes out of it, from and to wherever its user has it.

Arrays on a GPU (CuPy, torch, any library of DLPack) are read and filled where they are; those
of the host are copied up and down. Rules of the file: what is copied up is put on the store's
stream, and the user may change it at once; what is copied down is waited for; the user's
current stream comes after what a call has done with its arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn, TypeAlias, cast, final

import numpy as np

from .arrays import Array, as_array, as_output, native
from .errors import ArgumentError
from .gpu.array import DeviceArray, as_any, as_device
from .gpu.at import ArraysAt, ListsAt
from .gpu_place import GpuPlace
from .place import HOST, Parts
from .replica import Chunk, Entry
from .schema import Key, Spec, one_per_key
from .sparse import RowSparse
from .updater import Optimize, Updater

_MOST_LAYOUTS = 4096
_ROWS = "row-sparse values lie on the host: take a store there ('local', 'dist_sync')"


class GpuOutput(NamedTuple):
    """What is to be filled, on a GPU or on the host."""

    entry: Entry
    target: DeviceArray | Array


Outputs: TypeAlias = "list[GpuOutput]"


@final
class _Layout:
    """What a list of keys holds, and where."""

    def __init__(self, given: tuple[Entry, ...]) -> None:
        self.given = given
        self.shapes = [entry.spec.shape for entry in given]
        self.dtypes = [entry.spec.dtype for entry in given]
        starts = np.array([entry.start for entry in given], np.int64)
        sizes = np.array([entry.spec.n_elements for entry in given], np.int64)
        self._chunks: list[tuple[Chunk, Array, Array, Array | None]] = []
        for chunk in dict.fromkeys(entry.chunk for entry in given):
            own = np.array([k for k, e in enumerate(given) if e.chunk is chunk], np.int64)
            whole = own.size == len(given)
            self._chunks.append((chunk, starts[own], sizes[own], None if whole else own))

    def parts(self) -> Iterator[tuple[Parts, Array | None]]:
        """Give for each chunk where its keys are, and their places in the list; None for all."""
        for chunk, starts, sizes, places in self._chunks:
            yield Parts(chunk.flat, starts, sizes), places


@final
class GpuBorder:
    """The border of one store.

    Parameters
    ----------
    place : GpuPlace
    """

    def __init__(self, place: GpuPlace) -> None:
        self.place = place
        #: Gives back what else than memory the store has taken.
        self.let_go: Callable[[], None] = _nothing
        self._layouts: dict[int, _Layout] = {}  # by the id of the keys, which they keep
        self._taken: list[object] = []  # what of the user's the stream may still use

    def finish(self) -> None:
        """Wait for all that was put on the store's stream; raise what has failed there."""
        self.place.patience.wait(self.place.stream.record())

    def close(self) -> None:
        """Let go of all; the store is of no use any more."""
        self._layouts.clear()
        self._taken.clear()
        self.let_go()

    # In ---------------------------------------------------------------------------

    def begin(self) -> None:
        """Let what follows come after what the user has put on the current stream.

        Raises
        ------
        CollectiveError
            What a push has left is not to be relied on: a sum has failed since.
        """
        self.place.patience.check()
        self.place.stream.wait(self.place.device.current_stream().record())

    def end(self) -> None:
        """Let what the user does next come after what was put on the store's stream."""
        place = self.place
        place.device.current_stream().wait(place.stream.record())
        taken, self._taken = self._taken, []
        for value in taken:
            place.gpus.give_back(value, place.stream)

    def read(self, value: object) -> Array:
        """Take a value of the user's; of the host's a copy on the GPU.

        Raises
        ------
        ArrayError, ArgumentError, DTypeMismatchError
            It is no array, or one that no GPU sums.
        """
        if isinstance(value, RowSparse):
            raise ArgumentError(f"expected an array, got a RowSparse: {_ROWS}")
        place = self.place
        if place.gpus.is_on_gpu(value):
            taken = place.gpus.adopt(value, place.stream)
            self._taken.append(value)
            return as_any(taken)
        host = as_array(value)
        spec = Spec("", host.shape, native(host.dtype), 0)
        place.check(spec)
        made = place.empty(host.size, spec.dtype).reshape(host.shape)
        place.copy(host, made)
        return made

    def first_value(self, key: Key, value: object, order: int) -> tuple[Spec, Array]:
        """Check the value with which a key begins, and say what the key will hold.

        Raises
        ------
        ArrayError, ArgumentError, DTypeMismatchError
            As for `read`.
        """
        if not isinstance(value, RowSparse) and not self.place.gpus.is_on_gpu(value):
            array = as_array(value)  # goes up straight into the store
        else:
            array = self.read(value)
        spec = Spec(key, array.shape, native(array.dtype), order)
        self.place.check(spec)
        return spec, array

    def pushed(
        self,
        given: tuple[Entry, ...],
        is_list: bool,
        places: Sequence[int],
        value: object,
        *,
        may_lie: bool,
    ) -> list[list[Array]]:
        """Check what is pushed, and sort it by place in the plan.

        Parameters
        ----------
        given : sequence of Entry
            In the order of the user's list.
        is_list : bool
            Whether there is one.
        places : sequence of int
            For each of the list its place in the plan.
        value : object
            As the user gave it.
        may_lie : bool
            Whether arrays may stay where they are, all known by their addresses.
        """
        self.place.patience.check()
        if may_lie and is_list and (lying := self._lying(given, value)) is not None:
            return cast("list[list[Array]]", ListsAt(lying))
        lists = one_per_key([entry.spec.key for entry in given], is_list, value, "values")
        values: list[list[Array]] = [[] for _ in range(max(places, default=-1) + 1)]
        self.begin()
        for entry, place, arrays in zip(given, places, lists, strict=True):
            spec = entry.spec
            for one in arrays:
                array = self.read(one)
                if array.shape != spec.shape or array.dtype is not spec.dtype:
                    spec.check_pushed(array)
                values[place].append(array)
        for listed in values:
            if len(listed) > 1:
                self.place.prepare(listed)
        return values

    # Out --------------------------------------------------------------------------

    def outputs(self, entries: Sequence[Entry], is_list: bool, out: object) -> Outputs:
        """Check outputs, and put beside each the key that fills it.

        Raises
        ------
        ArgumentError, ArrayError, ShapeMismatchError, DTypeMismatchError
            An output that cannot be filled.
        """
        lists = one_per_key([entry.spec.key for entry in entries], is_list, out, "outputs")
        place = self.place
        outputs = []
        for entry, outs in zip(entries, lists, strict=True):
            for one in outs:
                target: DeviceArray | Array
                if isinstance(one, RowSparse):
                    raise ArgumentError(f"{entry.spec}, the output is a RowSparse: {_ROWS}")
                if place.gpus.is_on_gpu(one):
                    target = place.gpus.adopt(one, place.stream, to_write=True)
                    self._taken.append(one)
                    self._check_filled(entry.spec, as_any(target))
                else:
                    target = as_output(one)[0]
                    entry.spec.check_output(target)
                outputs.append(GpuOutput(entry, target))
        return outputs

    def fill(self, outputs: Outputs) -> None:
        """Copy stored values into outputs that were checked."""
        place = self.place
        with place.joined():
            for entry, target in outputs:
                if isinstance(target, DeviceArray):
                    place.copy(entry.value, as_any(target))
        for entry, target in outputs:
            if not isinstance(target, DeviceArray):
                place.download(as_device(entry.value), target)
        self.end()

    def pull(self, entries: tuple[Entry, ...], is_list: bool, out: object) -> Any:
        """Fill outputs that are yet to be checked, or new arrays of the GPU."""
        self.place.patience.check()
        if is_list and (lying := self._lying(entries, out)) is not None:
            for parts, places in self._layout(entries).parts():
                self.place.copy_out(parts, lying if places is None else lying.some(places))
            self.end()
            return out
        self.begin()
        if out is not None:
            self.fill(self.outputs(entries, is_list, out))
            return out
        place = self.place
        current = place.device.current_stream()  # where the user will let go of them
        new = [place.device.empty(e.spec.shape, e.spec.dtype, current) for e in entries]
        self.begin()
        self.fill([GpuOutput(entry, array) for entry, array in zip(entries, new, strict=True)])
        lent = [place.lend(as_any(array)) for array in new]
        return lent if is_list else lent[0]

    def shown(self, arrays: Sequence[Array]) -> list[Any]:
        """Show memory of the store, once the user's current stream comes after its work."""
        lent = [self.place.lend(array) for array in arrays]
        self.end()
        return lent

    def copy(self, sources: Sequence[Array], lent: Sequence[Any]) -> None:
        """Copy what was read into arrays that `shown` gave."""
        for source, shown in zip(sources, lent, strict=True):
            target = self.place.gpus.adopt(shown, self.place.stream, to_write=True)
            if as_device(source).address != target.address:
                self.place.copy(source, as_any(target))
        self.end()

    def _check_filled(self, spec: Spec, target: Array) -> None:
        spec.check_output(target)
        self.place.check(Spec(spec.key, target.shape, target.dtype, 0))

    def refuse_rows(self) -> NoReturn:
        """Raise for a call that is about rows.

        Raises
        ------
        ArgumentError
            Always.
        """
        raise ArgumentError(_ROWS)

    def _lying(self, given: tuple[Entry, ...], value: object) -> ArraysAt | None:
        """Take a list of arrays by their addresses, if they are just as the keys hold."""
        if type(value) not in (list, tuple):
            return None
        values = cast("Sequence[object]", value)
        layout, place = self._layout(given), self.place
        if len(values) != len(given) or not given:
            return None
        device, stream = place.device.index, place.stream
        found = place.gpus.addresses(values, device, layout.shapes, layout.dtypes, stream)
        if found is None:
            return None
        addresses = np.array(found, np.int64)
        return ArraysAt(addresses, layout.dtypes, layout.shapes, device, values)

    def _layout(self, given: tuple[Entry, ...]) -> _Layout:
        layout = self._layouts.get(id(given))
        if layout is None:
            if len(self._layouts) >= _MOST_LAYOUTS:
                self._layouts.clear()
            layout = self._layouts[id(given)] = _Layout(given)
        return layout

    # To the host and back -----------------------------------------------------------

    def user_at_host(self, value: object) -> Array:
        """Give an array of the user's, wherever it lies, as one of the host."""
        if not self.place.gpus.is_on_gpu(value):
            return as_array(value)
        self.begin()
        host = self.place.at_host(self.read(value))
        self.end()
        return host

    def at_host(
        self, entries: Mapping[Key, Entry], updater: Updater
    ) -> tuple[dict[Key, Entry], Updater]:
        """Copy values, and the optimizer's states, to the host: for files.

        Returns
        -------
        entries : dict of Key to Entry
        updater : Updater
            The same kind; of an optimizer with copied states.
        """
        chunks: dict[Chunk, Chunk] = {}
        for entry in entries.values():
            chunk = entry.chunk
            if chunk not in chunks:
                chunks[chunk] = Chunk(chunk.flat.dtype, chunk.flat.size, HOST)
                chunks[chunk].used = chunk.used
                self._down(chunk.flat[: chunk.used], chunks[chunk].flat[: chunk.used])
        copies = {
            key: Entry(entry.spec, chunks[entry.chunk], entry.start, entry.stop)
            for key, entry in entries.items()
        }
        if isinstance(updater, Optimize):
            updater = updater.at(HOST, chunks, self._down)
        return copies, updater

    def take_back(
        self, copies: Mapping[Key, Entry], entries: Mapping[Key, Entry], updater: Updater
    ) -> Updater:
        """Copy to the GPU what `at_host` gave and a file has changed; give the store's updater."""
        chunks = {copies[key].chunk: entry.chunk for key, entry in entries.items()}
        for chunk, own in chunks.items():
            self.place.upload(chunk.flat[: own.used], as_device(own.flat[: own.used]))
        return self.take_updater(copies, entries, updater)

    def take_updater(
        self, copies: Mapping[Key, Entry], entries: Mapping[Key, Entry], updater: Updater
    ) -> Updater:
        """Copy to the GPU the states of an optimizer; give the store's updater."""
        if not isinstance(updater, Optimize):
            return updater
        chunks = {copies[key].chunk: entry.chunk for key, entry in entries.items()}
        return updater.at(self.place, chunks, self.place.copy)

    def _down(self, source: Array, out: Array) -> None:
        self.place.download(as_device(source), out)


def _nothing() -> None:
    pass
