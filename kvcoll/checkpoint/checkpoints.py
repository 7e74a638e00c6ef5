"""Saving by all ranks of a store together, and finding what is to be loaded.

Rules of the file: a store is known by its `Contents`; every rank takes every step; nothing
of the store changes here.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, suppress
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple, final

import numpy as np

from ..agreement import Agreement, Call
from ..arrays import Array
from ..errors import CheckpointMismatchError, FileError, RankLeftError, RanksDisagreeError
from ..files import as_path, read_small, remove, write_small
from ..schema import digest
from ..transport.contract import Transport
from . import folder as folders
from . import memory
from .content import Content, Contents, as_json, as_keep, content_of, own_of
from .kept import Kept, dtype_named
from .layout import Layout
from .loading import Loading, check_keys, check_updater
from .manifest import Manifest, fingerprint_of, parse
from .reading import pointing_to_older, read_manifest
from .together import Together
from .writing import Writing

_PROBE = ".kvcoll-probe.tmp"
_LONGEST_SHOWN = 60
_CLOSE = Call("close()", digest("close, with a save under way"), is_of_files=True)
_WAIT_SAVED = Call("wait_saved()", digest("wait_saved"), is_of_files=True)


class _Place(NamedTuple):
    """Where to save, and what the ranks have said."""

    folder: str
    is_shared: bool
    rank_metadata: tuple[Any, ...]
    rank_arrays: tuple[tuple[Kept, ...], ...]


class _Said(NamedTuple):
    """What the manifest says beside what the ranks have."""

    metadata: object
    keep: int | None
    fingerprints: tuple[str, ...]


@final
class Checkpoints:
    """The checkpoints of one store; one save is under way at a time.

    Parameters
    ----------
    transport : Transport
    agreement : Agreement
    checked : callable
        Gives, for the name of a call, a context manager in which a mistake of this rank is
        told to the others, and before which all pushes are complete.
    """

    def __init__(
        self,
        transport: Transport,
        agreement: Agreement,
        checked: Callable[[str], AbstractContextManager[None]],
    ) -> None:
        self._together = Together(agreement)
        self._agreement = agreement
        self._transport = transport
        self._checked = checked
        self._rank, self._size = transport.topology.rank, transport.topology.size
        self._writing: Writing | None = None

    def save(
        self,
        path: object,
        contents: Callable[[], Contents],
        *,
        keep: object,
        metadata: object,
        rank_metadata: object,
        wait: object,
    ) -> str:
        """Save a store; see `KVStore.save`."""
        with self._checked("save()"):
            given, keep_last, own = as_path(path), as_keep(keep), contents()
            if not isinstance(wait, (bool, np.bool_)):
                raise TypeError(f"wait is a bool, got {wait!r}")
            text, rank_text = as_json(metadata, "metadata"), as_json(rank_metadata, "rank_metadata")
            content = content_of(own)
            for kept in (*content.arrays, *own_of(own)):
                kept.check()
        items = (f"path {given!r}", f"keep={keep_last}", f"wait={bool(wait)}", *_said(text))
        self._agreement.confirm(Call("save()", digest("save", *items), [*map(_short, items)]))
        self.finish()
        place = self._begin(given, content, own, rank_text)
        try:
            prints = self._fingerprints(content)
            said = _Said(json.loads(text), keep_last, prints)
            writing = self._take(place, content, own, said, copies=not wait)
        except Exception:
            self._discard(place.folder)
            raise
        self._writing = writing
        if wait:
            writing.write_parts()
            self.finish()
        else:
            writing.start()
        return place.folder

    def wait_saved(self) -> None:
        """Wait for the save that is under way; see `KVStore.wait_saved`."""
        with self._checked("wait_saved()"):
            pass
        self._agreement.confirm(_WAIT_SAVED)
        self.finish()

    def finish(self) -> None:
        """Bring the save that is under way to its end, on all ranks together.

        Raises
        ------
        KVCollError
            It came to nothing; once, on all ranks.
        """
        writing = self._writing
        if writing is None:
            return
        writing.wait_for_parts()
        error = self._together.error_of(writing.part_error)
        if error is not None:
            writing.give_up()
        writing.end()
        self._writing = None
        if error is None:
            error = self._together.error_of(writing.end_error)
        if error is not None:
            self._discard(writing.folder)
            raise error

    def close(self) -> Exception | None:
        """Bring it to its end as the store is closed; give what has gone wrong."""
        if self._writing is not None:
            self._agreement.confirm(_CLOSE)
            try:
                self.finish()
            except (RankLeftError, RanksDisagreeError):
                raise
            except Exception as error:  # of the disk: the store is closed all the same
                return error
        return None

    def move(self, transport: Transport, agreement: Agreement) -> None:
        """Go on with other ranks; what was being saved comes to nothing."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.give_up()
            writing.end()
            self._discard(writing.folder)
        self._together, self._agreement = Together(agreement), agreement
        self._transport = transport
        self._rank, self._size = transport.topology.rank, transport.topology.size

    def open(self, path: object, contents: Callable[[], Contents]) -> Loading:
        """Find a checkpoint and check it against the store; see `KVStore.load`."""
        with self._checked("load()"):
            given, own = as_path(path), contents()
        self._agreement.confirm(Call("load()", digest("load", given), (f"path {given!r}",)))
        self.finish()

        def find() -> str:
            if self._rank:
                return ""
            folder = folders.find(os.path.abspath(given))
            with pointing_to_older(folder):
                raw = read_manifest(folder)
                parse(folder, raw)
            return json.dumps([folder, raw.decode()])

        folder, text = json.loads(self._together.run(find)[0])

        def check() -> tuple[Manifest, bool]:
            manifest = parse(folder, text.encode())
            check_keys(folder, manifest, own)
            check_updater(folder, manifest, own.updater)
            with suppress(FileError):
                return manifest, read_manifest(folder) == text.encode()
            return manifest, False

        manifest, sees = self._together.do(check)
        is_shared = self._together.all_true(sees)
        return Loading(self._transport, self._together, folder, manifest, is_shared)

    def _begin(self, path: str, content: Content, own: Contents, rank_text: str) -> _Place:
        """Make the folder, see which ranks see it, and gather what each rank has to say."""
        token = secrets.token_hex()
        made = ""

        def make() -> str:
            nonlocal made
            if self._rank == 0:
                made = folders.begin(os.path.abspath(path))
                if self._size > 1:
                    write_small(os.path.join(made, _PROBE), token.encode())
            kept = [[one.name, one.dtype.name, one.shape] for one in own_of(own)]
            return json.dumps([made, token, json.loads(rank_text), kept])

        try:
            told = [json.loads(text) for text in self._together.run(make)]
            folder, token = told[0][:2]
            is_shared = self._probe(folder, token)
        except Exception:
            self._discard(made)
            raise
        listed = [
            tuple(Kept(name, _known(dtype), tuple(shape)) for name, dtype, shape in one[3])
            for one in told
        ]
        return _Place(
            folder, is_shared, tuple(one[2] for one in told), tuple(listed) if any(listed) else ()
        )

    def _probe(self, folder: str, token: str) -> bool:
        """Say whether all ranks see the folder that rank 0 has made."""
        if self._size == 1:
            return True
        probe, sees = os.path.join(folder, _PROBE), False
        with suppress(FileError):
            sees = read_small(probe, len(token)) == token.encode() and os.access(folder, os.W_OK)
        all_see = self._together.all_true(sees)

        def clear() -> None:
            if self._rank == 0:
                remove(probe)

        self._together.do(clear)
        return all_see

    def _take(
        self,
        place: _Place,
        content: Content,
        own: Contents,
        said: _Said,
        *,
        copies: bool,
    ) -> Writing:
        """Take what this rank writes, as it is or as copies."""
        everyones = self._own_arrays(place, own)
        layout = Layout(content, place.rank_arrays, self._size if place.is_shared else 1)
        draft = Manifest(
            version=own.version,
            num_workers=self._size,
            about=dict(own.about),
            compression=None if own.compression is None else dict(own.compression),
            keys=content.keys,
            row_sparse=content.row_sparse,
            arrays=content.arrays,
            fingerprints=said.fingerprints,
            optimizer=content.optimizer,
            metadata=said.metadata,
            rank_metadata=place.rank_metadata,
            rank_arrays=place.rank_arrays,
            parts=(),
            starts=layout.starts,
            rank_parts=(),
        )

        def take() -> Writing:
            files = layout.files_of(self._rank, everyones)
            if copies:
                files = memory.copied(files)
            expected = layout.part_files + layout.rank_files if self._rank == 0 else None
            complete = partial(layout.complete, place.folder, draft, said.keep)
            return Writing(place.folder, files, expected, complete)

        return self._together.do(take)

    def _fingerprints(self, content: Content) -> tuple[str, ...]:
        """Take the fingerprint of each array, each rank its share of them; give all.

        Not of the share that it writes: so replicas that differ do not make a checkpoint.
        """
        ends = list(accumulate(kept.n_bytes for kept in content.arrays))
        total = max(ends[-1] if ends else 0, 1)

        def take() -> str:
            mine = {
                number: fingerprint_of(kept, content.flat[kept.name])
                for number, (kept, end) in enumerate(zip(content.arrays, ends, strict=True))
                if (max(end - 1, 0) * self._size // total + 1) % self._size == self._rank
            }
            return json.dumps(list(mine.items()))

        told = [json.loads(text) for text in self._together.run(take)]
        by_number = {number: one for of_rank in told for number, one in of_rank}
        return tuple(by_number[number] for number in range(len(ends)))

    def _own_arrays(self, place: _Place, own: Contents) -> dict[int, Mapping[str, Array]]:
        """Give for each rank whose own arrays this rank writes these arrays."""
        if not place.rank_arrays:
            return {}
        if place.is_shared:
            return {self._rank: own.own}

        def room() -> dict[int, Mapping[str, Array]]:
            return {
                rank: own.own
                if rank == self._rank
                else {kept.name: np.empty(kept.n_elements, kept.dtype) for kept in listed}
                for rank, listed in enumerate(place.rank_arrays)
            }

        everyones = self._together.do(room)
        for rank, listed in enumerate(place.rank_arrays):
            for kept in listed:
                self._transport.broadcast(everyones[rank][kept.name], rank)
        return everyones if self._rank == 0 else {}

    def _discard(self, folder: str) -> None:
        """Give the space of a save back that came to nothing."""
        if self._rank == 0 and folder and not folders.is_complete(folder):
            with suppress(FileError):  # the next save tries again
                folders.discard(folder)


def _said(metadata: str) -> list[str]:
    """Write metadata in parts, so that the one is named in which ranks differ."""
    value = json.loads(metadata)
    if not isinstance(value, dict):
        return [f"metadata {metadata}"]
    parts = [f"metadata[{name!r}] {json.dumps(inner)}" for name, inner in value.items()]
    return [f"metadata of {list(value)}", *parts]


def _short(item: str) -> str:
    """Write what is long short, but what differs not alike."""
    if len(item) <= _LONGEST_SHOWN:
        return item
    return f"{item[:_LONGEST_SHOWN]}… (digest {digest(item):016x})"


def _known(name: str) -> np.dtype[Any]:
    dtype = dtype_named(name)
    if dtype is None:
        raise CheckpointMismatchError(f"another rank has arrays of dtype {name!r}")
    return dtype
