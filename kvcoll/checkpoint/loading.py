"""Loading by all ranks of a store together.

Rules of the file: nothing of a store that has keys changes before `Loaded.apply`, which
cannot fail; what can fail on one rank comes before the first broadcast.
"""

from __future__ import annotations

import json
from typing import final

import numpy as np

from .. import states
from ..arrays import Array
from ..compression import Compression, parse
from ..errors import CheckpointMismatchError
from ..schema import Spec
from ..sparse import RowSparse
from ..transport.contract import Transport
from ..updater import Assign, Optimize, Updater
from . import memory
from .content import Contents
from .manifest import Manifest
from .reading import (
    Checkpoint,
    Wanted,
    about,
    check_fingerprints,
    pointing_to_older,
    read_part,
    wanted_of,
    whole,
)
from .shares import worker_of
from .together import Together


@final
class Loading:
    """A checkpoint that is being loaded; made by `Checkpoints.open`.

    Attributes
    ----------
    manifest : Manifest
    is_shared : bool
        Whether all ranks see the folder, so that each reads its share.
    together : Together
        For steps between `read` and `Loaded.apply`.
    """

    def __init__(
        self,
        transport: Transport,
        together: Together,
        folder: str,
        manifest: Manifest,
        is_shared: bool,
    ) -> None:
        self.manifest = manifest
        self.is_shared = is_shared
        self.together = together
        self._transport = transport
        self._folder = folder
        self._rank, self._size = transport.topology.rank, transport.topology.size

    @property
    def first_values(self) -> list[Array | RowSparse]:
        """Zeros of the values' kinds, shapes and dtypes, for `init`; they take no memory."""
        return [
            RowSparse.empty(kept.shape, kept.dtype)
            if row_sparse
            else np.broadcast_to(np.zeros((), kept.dtype), kept.shape)
            for kept, row_sparse in zip(
                self.manifest.arrays, self.manifest.row_sparse, strict=False
            )
        ]

    def read(self, contents: Contents, *, in_place: bool) -> Loaded:
        """Read all of it, on all ranks; the store's values change only if `in_place`.

        Parameters
        ----------
        contents : Contents
            Of the store, which has the checkpoint's keys.
        in_place : bool
            Whether the values may be lost if something goes wrong.
        """
        manifest, readers = self.manifest, self._size if self.is_shared else 1

        def read() -> tuple[Loaded, list[list[Wanted]], dict[int, dict[str, Array]]]:
            loaded = Loaded(self._folder, manifest, contents, in_place=in_place)
            shares = wanted_of(manifest, loaded.flat)
            own = self._room_for_own()
            with pointing_to_older(self._folder):
                for k, (part, share) in enumerate(zip(manifest.parts, shares, strict=True)):
                    if worker_of(k, len(shares), readers) == self._rank:
                        read_part(self._folder, part, share)
                for rank, arrays in own.items():
                    if self.is_shared or self._rank == 0:
                        kept = manifest.rank_arrays[rank]
                        read_part(self._folder, manifest.rank_parts[rank], whole(kept, arrays))
            return loaded, shares, own

        loaded, shares, own = self.together.do(read)
        for k, share in enumerate(shares):
            root = worker_of(k, len(shares), readers)
            for array in memory.joined([one.out for one in share]):
                self._transport.broadcast(array, root)
        if not self.is_shared:
            for arrays in own.values():
                for array in arrays.values():
                    self._transport.broadcast(array, 0)

        def check() -> None:
            with pointing_to_older(self._folder):
                check_fingerprints(self._folder, manifest, loaded.flat)

        self.together.do(check)
        mine = [own[rank] for rank in sorted(own) if rank % self._size == self._rank]
        loaded.own = _summed(mine)
        return loaded

    def _room_for_own(self) -> dict[int, dict[str, Array]]:
        """Take memory for what was the own of those ranks whose files this rank reads or hears."""
        return {
            rank: {kept.name: np.empty(kept.n_elements, kept.dtype) for kept in listed}
            for rank, listed in enumerate(self.manifest.rank_arrays)
            if not self.is_shared or rank % self._size == self._rank
        }


@final
class Loaded:
    """What a checkpoint changes of a store, in memory.

    Attributes
    ----------
    flat : dict of str to numpy.ndarray
        Where each of the checkpoint's arrays goes.
    own : dict of str to numpy.ndarray
        What is this rank's own, see `Contents`.
    """

    def __init__(
        self, folder: str, manifest: Manifest, contents: Contents, *, in_place: bool
    ) -> None:
        self.own: dict[str, Array] = {}
        self._folder = folder
        self._manifest = manifest
        self._updater = contents.updater
        self._entries = [contents.entries[key] for key in manifest.keys]
        if in_place:
            self._values = []
            values = [entry.flat for entry in self._entries]
        else:
            sizes = [(entry.spec.dtype, entry.spec.n_elements) for entry in self._entries]
            values = self._values = memory.take(sizes)
        self.flat = {f"value:{k}": v for k, v in zip(manifest.keys, values, strict=True)}
        self._draft: states.Draft | None = None
        if manifest.optimizer is not None:
            text = json.dumps(manifest.optimizer)
            self._draft = states.Draft(folder, text, contents.updater, contents.entries)
            self.flat.update(self._draft.places)
        expected = {kept.name: (kept.dtype, kept.n_elements) for kept in manifest.arrays}
        if expected != {name: (array.dtype, array.size) for name, array in self.flat.items()}:
            raise CheckpointMismatchError(
                f"{folder!r} holds other arrays than the store's optimizer keeps: load it with "
                "the kvcoll that wrote it"
            )

    @property
    def compression(self) -> Compression | None:
        """What compressed gradients, if anything has."""
        said = self._manifest.compression
        return None if said is None else parse(said["params"])

    @property
    def is_compressed(self) -> bool:
        """Whether pushes are compressed from now on, if there is a compressor at all."""
        said = self._manifest.compression
        return said is None or bool(said["is_on"])

    def apply(self) -> tuple[Updater, int, Checkpoint]:
        """Change the values; give the updater and the version that the store has from now on."""
        for entry, value in zip(self._entries, self._values, strict=False):
            np.copyto(entry.flat, value)
        updater = self._updater if self._draft is None else self._draft.apply()
        return updater, self._manifest.version, about(self._folder, self._manifest)


def check_keys(folder: str, manifest: Manifest, contents: Contents) -> None:
    """Raise unless the store is empty, or has just these keys."""
    entries = contents.entries
    if not entries:
        return
    cure = "load it into an empty store, or take single values from kvcoll.load"
    for key, row_sparse, kept in zip(
        manifest.keys, manifest.row_sparse, manifest.arrays, strict=False
    ):
        if key not in entries:
            raise CheckpointMismatchError(
                f"{folder!r} holds key {key!r}, which is not in the store: {cure}"
            )
        spec = entries[key].spec
        saved = Spec(key, kept.shape, kept.dtype, spec.order, row_sparse)
        if spec != saved:
            raise CheckpointMismatchError(f"{spec}, in {folder!r} it held {saved.held}: {cure}")
    for key in entries:
        if key not in set(manifest.keys):
            raise CheckpointMismatchError(f"key {key!r} of the store is not in {folder!r}: {cure}")


def check_updater(folder: str, manifest: Manifest, updater: Updater) -> None:
    """Raise unless the store's updater can go on where that of the checkpoint was."""
    if manifest.optimizer is None and isinstance(updater, Optimize):
        raise CheckpointMismatchError(
            f"{folder!r} holds no optimizer, the store has {updater.describe()}: call "
            "set_optimizer after load"
        )
    if manifest.optimizer is not None and not isinstance(updater, (Optimize, Assign)):
        name = manifest.optimizer.get("optimizer")
        raise CheckpointMismatchError(
            f"{folder!r} holds states of {name}, the store has {updater.describe()}: call "
            "set_updater after load, if it shall replace the optimizer"
        )


def _summed(owns: list[dict[str, Array]]) -> dict[str, Array]:
    """Sum what ranks had of their own that are one rank now."""
    total: dict[str, Array] = {}
    for own in owns:
        for name, array in own.items():
            if name in total:
                np.add(total[name], array, out=total[name])
            else:
                total[name] = array
    return total
