"""Having stores watched: what the watchdog sees of each, from when it is made until it ends.

Rule of the file: who makes no distributed store loads no watchdog.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary, ref

from . import on_gpus
from .agreement import AcrossRanks
from .recovery import Link
from .watchdog import Watchdog

if TYPE_CHECKING:
    from .store import KVStore
    from .watchdog.track import Track

_LIMIT_S = 300.0

_has_begun = False
_settings: WeakKeyDictionary[KVStore, Watchdog | None] = WeakKeyDictionary()


def begin(
    store: KVStore,
    link: Link,
    ranks: AcrossRanks,
    settings: Watchdog | None,
    *,
    number: int,
    lasts: bool,
) -> None:
    """Have a store's calls watched from now on; collective.

    Parameters
    ----------
    store : KVStore
    link : Link
    ranks : AcrossRanks
        By which it agrees: the link's, or those of a late store.
    settings : Watchdog or None
        None where nobody shall speak of its waits.
    number : int
        Among the stores of the link.
    lasts : bool
        Whether the link stays when its stores are closed.
    """
    from .watchdog import patrol
    from .watchdog.track import Track, Watched

    global _has_begun
    _has_begun = True
    _settings[store] = settings
    is_beside = ranks is not link.ranks
    track = patrol.track_of(ranks)
    if track is None:
        if settings is None or link.comm.size == 1:
            return
        track = Track(ranks, settings, is_beside=is_beside, is_lasting=lasts)
        _watch(link, track)
    guard, weak = store._guard, ref(store)

    def version() -> int:
        alive = weak()
        return 0 if alive is None else alive.version

    track.add(
        Watched(
            f"the {store.type!r} store" if is_beside else f"store {number}",
            settings,
            calls=lambda: guard.calls,
            version=version,
            thread=lambda: guard.thread,
            beside=lambda: guard.beside() if guard.beside else None,
            is_closed=lambda: bool(guard.closed),
        )
    )


def go_on(store: KVStore, link: Link, ranks: AcrossRanks, *, number: int, lasts: bool) -> None:
    """Have a store watched that has come to other ranks; collective."""
    begin(store, link, ranks, _settings.get(store), number=number, lasts=lasts)


def _watch(link: Link, track: Track) -> None:
    from .transport import mpi
    from .watchdog import patrol

    duplicate = partial(mpi.duplicate, link.comm, _LIMIT_S) if mpi.allows_threads() else None
    with link.losses:
        patrol.watch(
            link.comm, link.losses, track, duplicate, mpi.import_mpi(), on_gpus.ready_for_mpi
        )


def program_ends() -> None:
    """Tell those who ask that this rank's program has come to its end."""
    if _has_begun:
        from .watchdog import patrol

        patrol.program_ends()


def stop() -> None:
    """Look no more: MPI is about to end."""
    if _has_begun:
        from .watchdog import patrol

        patrol.stop()


def forget() -> None:
    """Have no watchdog: in a child made by fork it is its parent's."""
    if _has_begun:
        from .watchdog import patrol

        patrol.forget()
