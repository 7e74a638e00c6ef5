"""Making a store by its name, and leaving all stores when the process ends."""

from __future__ import annotations

import atexit
import os
import sys
import warnings
from collections.abc import Callable, Generator
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np

from . import exiting, farewell, mpi_takes, on_gpus, watching
from ._version import __version__
from .agreement import AcrossRanks, Agreement, Alone, Call
from .base import OWN_NAMES, KVStoreBase, registered
from .engine import Engine
from .errors import ArgumentError, LaunchError, NotSurvivableError, ThreadError, text_of
from .launch import InLine, Late, Launch, Overlap
from .recovery import Link, Recoverable, late_ranks, recover
from .reduction import NO_SHARED_MEMORY, lacks_shared_memory, transport_for
from .schema import digest
from .store import KVStore, Survivor
from .teststore import TestStore
from .topology import Topology
from .transport import ancestors
from .transport.alone import AloneTransport
from .transport.contract import Transport
from .transport.losses import Losses, uses_han
from .watchdog import Watchdog, settled

if TYPE_CHECKING:
    from mpi4py import MPI

    from .gpu_border import GpuBorder

_LOCAL = ("local", "local_update_cpu", "local_allreduce_cpu")
_ON_DEVICES = ("device", "local_allreduce_device")  # on a GPU, if the first value is there
_NCCL = "nccl"
_ON_GPUS = ("dist_device_sync", "dist_sync_device")
_ASYNC = "dist_async"
_ASYNCS = (_ASYNC, "dist_async_device")
_DISTRIBUTED = ("dist", "dist_sync", *_ON_GPUS, *_ASYNCS)
_CREATE_LIMIT_S = 300.0
_ALWAYS = "always"
_FAULTS = "KVCOLL_FAULTS"
_WAS_CALLED = "was called: leave it out, Python ends MPI when it ends"
_NEEDS_THREADS = (
    "overlap and 'dist_async' need an MPI that several threads may call (MPI_THREAD_MULTIPLE): "
    "leave mpi4py.rc.thread_level as it is before mpi4py.MPI is imported, or take 'dist_sync'"
)
# Replicas would differ by bits if the ranks ran other versions.
_VERSIONS = (__version__, np.__version__)
_HAN = (
    "under --with-ft ulfm coll/han of Open MPI 5.0 gives wrong sums across hosts when a rank is "
    "lost: set OMPI_MCA_coll=^han before mpi4py.MPI is imported, or let kvcoll import it"
)
_UNGUARDED = (
    "a host that goes down, or whose cable is cut, may leave the others waiting for ever, as its "
    "loss cannot be noticed: {}"
)
_CREATED = Call("the end of create()", digest("created"))


_Name = Literal[
    "local",
    "local_update_cpu",
    "local_allreduce_cpu",
    "device",
    "local_allreduce_device",
    "nccl",
    "dist",
    "dist_sync",
    "dist_device_sync",
    "dist_sync_device",
    "dist_async",
    "dist_async_device",
]


@overload
def create(
    name: _Name = "local",
    *,
    comm: Any = None,
    reproducible: bool = False,
    overlap: bool | str = False,
    staleness: int | None = None,
    verify_every: int | None = None,
    elastic: bool = False,
    watchdog: bool | Watchdog = True,
    create_limit_s: float = _CREATE_LIMIT_S,
) -> KVStore: ...


@overload
def create(
    name: str,
    *,
    comm: Any = None,
    reproducible: bool = False,
    overlap: bool | str = False,
    staleness: int | None = None,
    verify_every: int | None = None,
    elastic: bool = False,
    watchdog: bool | Watchdog = True,
    create_limit_s: float = _CREATE_LIMIT_S,
) -> Any: ...


def create(
    name: str = "local",
    *,
    comm: Any = None,
    reproducible: bool = False,
    overlap: bool | str = False,
    staleness: int | None = None,
    verify_every: int | None = None,
    elastic: bool = False,
    watchdog: bool | Watchdog = True,
    create_limit_s: float = _CREATE_LIMIT_S,
) -> KVStoreBase:
    """Make a key-value store.

    Parameters
    ----------
    name : str, default 'local'
        Of any case. ``'local'``, ``'local_update_cpu'``, ``'local_allreduce_cpu'``: one
        process, no MPI needed. ``'device'``, ``'local_allreduce_device'``: the same, but if the
        first value that is initialised lies on a GPU, all values do, and sums and updates are
        done there. ``'nccl'``: the same, on a GPU in any case.
        ``'dist'``, ``'dist_sync'``: all ranks of `comm`, which all must call this.
        ``'dist_device_sync'``, ``'dist_sync_device'``: the same, with a GPU a rank, on which
        its values lie; sums go by NCCL within a host, and by MPI between hosts.
        ``'dist_async'``, ``'dist_async_device'``: the same, but a push does not wait for
        other ranks. It is applied when all have come to it, in the order of the pushes, so
        that all replicas pass through the same versions; a pull gives the version that is
        there. It needs an updater. A mistake is raised by the next call after the ranks have
        come to it, and ends the store. Its calls have an order of their own: that of one late
        store beside other stores must be the same on all ranks, and is not compared.
    comm : mpi4py.MPI.Intracomm, optional
        Whose ranks share the store; it is duplicated. By default ``MPI.COMM_WORLD``.
    reproducible : bool, default False
        Take sums over ranks by a fixed binary tree on the ranks, so that they are the
        same bits whatever the placement of ranks on hosts.
    overlap : bool or 'always', default False
        Let a push return as soon as its values are packed; sums and updates run behind it,
        in one order on all ranks, and a pull waits for its keys only. On one host, where
        there is no wire to wait for and a thread would take the core that the sums need,
        a push is complete when it returns, unless this is ``'always'``. So it is with an
        updater of the user's own, and with a push of rows. What it takes: memory of the
        size of the gradients, and an MPI that allows several threads (MPI_THREAD_MULTIPLE).
    staleness : int, default 1
        Of ``'dist_async'``: how many pushes of a key may not be applied yet when a push of it
        returns; 0 waits for each.
    verify_every : int, optional
        Of ``'dist_*'``: compare the replicas after every so many pushes, see
        `KVStore.verify`; a push then raises ReplicasDifferError, and where pushes overlap or
        are late it waits for all. Every 1: the push after which they differ is named, at the
        cost of a pass over values and states a push, some 10 GB/s. More than 1: samples of
        each push narrow it down; they cost some microseconds a key.
    elastic : bool, default False
        Keep each rank's values whole also while a push runs, so that `KVStore.recover` goes on
        from there wherever a rank is lost: sums are complete, in memory of their own, before a
        stored value is touched. Without, a loss in the midst of a sum needs a checkpoint. On
        GPUs each push waits for its sum then. Cost: a copy of the sum, and its memory. Two
        ranks of a host pushed ResNet-50 with SGD and momentum in 50 instead of 38 ms, 10 M
        elements without an optimizer in 13.0 instead of 7.1 ms.
    watchdog : bool or Watchdog, default True
        Of a distributed store: say on rank 0 who is late, and where its Python code is, when a
        call waits for other ranks for very long; raise `LateRankError`, or end the job, after
        a hard limit. A `Watchdog` says how long that is, and the environment may say otherwise.
    create_limit_s : float, default 300
        How many seconds to wait for the other ranks to create theirs.

    Returns
    -------
    KVStore
        Or the store of others that was registered by this name (`KVStoreBase.register`),
        which takes no options; or ``'teststore'``, which has `broadcast` and `pushpull` only.

    Raises
    ------
    ArgumentError
        The name is not known, or `comm` is no communicator for this.
    MissingDependencyError
        A distributed store, and mpi4py or an MPI library is not installed; a store on GPUs, and
        CuPy or NCCL is not.
    DeviceError, CollectiveError
        A store on GPUs: there is no GPU, the driver or NCCL is too old, two ranks would share a
        GPU, or NCCL does not bring the ranks' GPUs together; the same error on all ranks.
    LaunchError
        The job was started by the launcher of another MPI; or MPI.Finalize() was called.
    ThreadError
        `overlap` or ``'dist_async'``, and MPI was not started for several threads.
    RanksDisagreeError
        The ranks create different stores, or not all of them come in time.
    LateRankError
        By the watchdog, as by every call of the store that waits for other ranks.

    Notes
    -----
    A distributed store costs two agreements and two or three communicators, one or two more
    where losses are survived (`mpirun --with-ft ulfm`); there calls that change it are settled
    by MPI_Comm_iagree, some 0.2 ms. One that is
    not closed is kept until the process ends.
    """
    if not isinstance(name, str):
        raise TypeError(f"the type of a store is a str, got {type(name).__name__}")
    kind = name.lower()
    if kind == "teststore" or kind in registered():
        given = (comm, staleness, verify_every)
        others = (reproducible, overlap, elastic, watchdog is not True)
        if any(others) or any(option is not None for option in given):
            raise ArgumentError(f"a {kind!r} store takes no options")
        return TestStore() if kind == "teststore" else registered()[kind]()
    if kind not in (*_LOCAL, *_ON_DEVICES, _NCCL, *_DISTRIBUTED):
        known = ", ".join([*OWN_NAMES, *registered()])
        raise ArgumentError(f"unknown type of store {name!r}: known are {known}")
    if not isinstance(reproducible, (bool, np.bool_)):
        raise TypeError(f"reproducible is a bool, got {reproducible!r}")
    if overlap != _ALWAYS and not isinstance(overlap, (bool, np.bool_)):
        raise TypeError(f"overlap is a bool or {_ALWAYS!r}, got {overlap!r}")
    if not isinstance(elastic, (bool, np.bool_)):
        raise TypeError(f"elastic is a bool, got {elastic!r}")
    if not isinstance(watchdog, (bool, Watchdog)):
        raise TypeError(f"watchdog is a bool or a kvcoll.Watchdog, got {watchdog!r}")
    if staleness is not None:
        staleness = _as_staleness(kind, staleness)
    if verify_every is not None:
        verify_every = _as_verify_every(kind, verify_every)
    if not isinstance(create_limit_s, (int, float)) or not create_limit_s > 0:
        raise ArgumentError(
            f"create_limit_s is a number of seconds above 0, got {create_limit_s!r}"
        )
    if kind in _DISTRIBUTED:
        late = (1 if staleness is None else staleness) if kind in _ASYNCS else None
        overlap = overlap if overlap == _ALWAYS else bool(overlap)
        if kind in _ON_GPUS and overlap:
            raise ArgumentError(
                f"overlap goes with stores on the host: a push of {kind!r} returns while the GPU "
                "works in any case"
            )
        options = _Options(
            bool(reproducible),
            overlap,
            late,
            bool(elastic),
            verify_every or 0,
            watchdog,
            kind in _ON_GPUS,
        )
        return _distributed(kind, comm, options, create_limit_s)
    if comm is not None:
        raise ArgumentError(f"a {kind!r} store is one process: comm goes with 'dist_sync'")
    _set_faults()
    borders: Callable[[object], GpuBorder | None] | None = None
    if kind == _NCCL:
        on_gpus.find()  # what is missing is said here, not at the first init
        borders = on_gpus.border_with_nccl
    elif kind in _ON_DEVICES:
        borders = on_gpus.border_of
    return KVStore(kind, AloneTransport(), Alone(), one_thread=False, borders=borders)


_links: list[Link] = []
_world: list[Link] = []  # that of COMM_WORLD, once it is there
# Held until they are closed, since others wait for them; each with by which link it agrees.
_open_stores: list[tuple[Survivor, Link]] = []
_have_left = False


def _as_staleness(kind: str, staleness: object) -> int:
    if kind not in _ASYNCS:
        raise ArgumentError(f"staleness goes with {_ASYNC!r}, not with {kind!r}")
    if isinstance(staleness, bool) or not isinstance(staleness, (int, np.integer)):
        raise TypeError(f"staleness is an int, got {staleness!r}")
    if staleness < 0:
        raise ArgumentError(f"staleness must not be below 0, got {staleness}")
    return int(staleness)


def _as_verify_every(kind: str, n: object) -> int:
    if kind not in _DISTRIBUTED:
        raise ArgumentError(f"verify_every goes with 'dist_sync', not with {kind!r}")
    if isinstance(n, bool) or not isinstance(n, (int, np.integer)):
        raise TypeError(f"verify_every is an int, got {n!r}")
    if n < 1:
        raise ArgumentError(f"verify_every is a number of pushes, at least 1, got {n}")
    return int(n)


@dataclass(frozen=True)
class _Options:
    """What must be the same on all ranks."""

    reproducible: bool
    overlap: bool | str
    staleness: int | None
    elastic: bool
    verify_every: int
    watchdog: bool | Watchdog
    is_on_gpus: bool = False

    def settled(self, ranks: AcrossRanks) -> tuple[Call, Watchdog | None]:
        """Say what to agree on, and how the store is watched; the environment may say otherwise."""
        try:
            settings = settled(self.watchdog, os.environ)
        except ArgumentError as error:
            ranks.refuse(f"create({self})", error)
        words = str(self) if settings == Watchdog() else f"{self}, watchdog={settings or False}"
        return Call(f"create({words})", digest("create", words, *_VERSIONS)), settings

    def __str__(self) -> str:
        kind = _ON_GPUS[0] if self.is_on_gpus else "dist_sync"
        kind = kind if self.staleness is None else _ASYNC
        overlap = f", overlap={self.overlap!r}" if self.overlap else ""
        late = "" if self.staleness is None else f", staleness={self.staleness}"
        elastic = ", elastic=True" if self.elastic else ""
        verify = f", verify_every={self.verify_every}" if self.verify_every else ""
        return f"{kind!r}, reproducible={self.reproducible}{overlap}{late}{elastic}{verify}"

    def launching(self, topology: Topology, agreement: Agreement) -> Callable[[Engine], Launch]:
        """Say when the store's pushes run."""
        if self.staleness is not None:
            return partial(Late, agreement=agreement, staleness=self.staleness)
        if self.overlaps_on(topology):
            return partial(Overlap, leads=topology.rank == 0)
        return InLine

    def overlaps_on(self, topology: Topology) -> bool:
        """Say whether pushes run behind their callers."""
        return self.overlap == _ALWAYS or (bool(self.overlap) and topology.num_hosts > 1)


def _set_faults() -> None:
    """Set the faults that the environment asks for; see `testing`."""
    if _FAULTS in os.environ:
        from . import testing  # which few need, and `import kvcoll` shall not take its time

        testing.arm(os.environ)


def _distributed(kind: str, comm: Any, options: _Options, limit_s: float) -> KVStore:
    from .transport import mpi

    if mpi.was_finalized():
        raise LaunchError(f"a distributed store needs MPI, but MPI.Finalize() {_WAS_CALLED}")
    world = mpi.default_communicator() if comm is None or mpi.is_world(comm) else None
    link = _new_link(comm, limit_s) if world is None else _world_link(world, limit_s)
    call, settings = options.settled(link.ranks)
    try:
        _set_faults()
        stall_s = on_gpus.stall_limit_s(os.environ, settings)
        mpi_gets = mpi_takes.wanted(os.environ)
    except ArgumentError as error:
        link.ranks.refuse(call.name, error)
    is_async, overlaps = options.staleness is not None, options.overlaps_on(link.topology)
    if (is_async or overlaps) and not mpi.allows_threads():
        link.ranks.refuse(call.name, ThreadError(_NEEDS_THREADS))
    link.ranks.confirm(call)
    link.n_made += 1
    try:
        own = link.comm if world is None else mpi.duplicate(link.comm, limit_s, link.losses)
        patient = is_async or overlaps  # the core is the caller's while a sum waits
        transport: Transport
        border, joining = None, _joining_hosts(tree=options.reproducible, patient=patient)
        warning = ""
        if options.is_on_gpus:
            joining_gpus = on_gpus.Joining(
                tree=options.reproducible, limit_s=stall_s, mpi_gets=mpi_gets
            )
            joining_gpus.join(own, link.topology, link.losses)
            transport, border = joining_gpus.transport, joining_gpus.border
            warning = joining_gpus.warning
            joining = joining_gpus.again
        else:
            transport, _ = joining(own, link.topology, link.losses)
        its_link = _async_link(own, link, limit_s) if is_async else link
        agreement = its_link.ranks.of_store()
        launching = options.launching(link.topology, agreement)
        store = KVStore(
            kind,
            transport,
            agreement,
            one_thread=True,
            launching=launching,
            tree=options.reproducible,
            verify_every=options.verify_every,
            apart=options.elastic,
            recovering=partial(_recover, link, limit_s),
            border=border,
        )
    except Exception as error:  # as of too little memory: the other ranks wait
        link.ranks.refuse(call.name, error)
    link.ranks.confirm(_CREATED)
    watching.begin(store, link, its_link.ranks, settings, number=link.n_made, lasts=link in _world)
    if its_link is not link:
        _links.append(its_link)
    _open_stores[:] = [other for other in _open_stores if not other[0].store.closed]
    survivor = Survivor(store, link.n_made, joining, is_late=is_async)
    _open_stores.append((survivor, its_link))
    is_told = transport.topology.rank == 0 and border is None and not options.reproducible
    if is_told and lacks_shared_memory(transport):
        warnings.warn(NO_SHARED_MEMORY, RuntimeWarning, stacklevel=3)
    if warning:
        warnings.warn(warning, RuntimeWarning, stacklevel=3)
    return store


def _joining_hosts(
    *, tree: bool, patient: bool
) -> Callable[[Any, Topology, Losses], tuple[Transport, Callable[[], None]]]:
    """Say how a store of the host is joined with other ranks: nothing of the old way is left."""

    def join(comm: Any, topology: Topology, losses: Losses) -> tuple[Transport, Callable[[], None]]:
        return transport_for(comm, topology, losses, tree=tree, patient=patient), _nothing

    return join


def _nothing() -> None:
    pass


def _async_link(own: MPI.Intracomm, link: Link, limit_s: float) -> Link:
    """Make the link of one late store."""
    topology, losses = link.topology, link.losses
    ranks = late_ranks(own, topology, losses, farewell.advance, limit_s)
    return Link(own, topology, ranks, losses, farewell.advance)


def _recover(link: Link, limit_s: float) -> None:
    """Bring all stores of a link to the ranks that are left; see `KVStore.recover`."""
    if link.topology.size == 1:
        return
    if not link.losses.survives:
        raise NotSurvivableError(
            "this MPI does not go on when a rank is lost: start the job with Open MPI 5 and "
            "mpirun --with-ft ulfm, or load a checkpoint in a new job"
        )
    stores: dict[Recoverable, Link] = {
        survivor: its_link
        for survivor, its_link in _open_stores
        if its_link.losses is link.losses and not survivor.store.closed
    }
    exiting.arm()
    recover(link, stores, limit_s)
    for survivor, its_link in _open_stores:  # in the order of their making
        if survivor in stores and not survivor.store.closed:
            ranks, number = its_link.ranks, survivor.number
            watching.go_on(survivor.store, link, ranks, number=number, lasts=link in _world)


def _forget_unused() -> None:
    """Let go of links whose stores are all closed, but not of lost ranks: the exit minds those."""
    used = {
        link.losses
        for link in _links
        if link in _world or link.ranks.has_open_store or link.losses.alarm.error is not None
    }
    for link in _links:
        if link.losses not in used and link.lifeline is not None:
            link.lifeline.close()
    _links[:] = [link for link in _links if link.losses in used]


def _new_link(comm: Any, limit_s: float) -> Link:
    from .transport import mpi

    _mind_mpi_end()
    _forget_unused()
    own = mpi.duplicate(comm, limit_s)
    losses = mpi.losses_of(own)
    topology = mpi.topology_of(own, losses)
    farewell.may_use_threads = mpi.allows_threads()
    messenger = mpi.messenger_of(own, topology, losses, limit_s)
    ranks = AcrossRanks(messenger, losses.alarm, farewell.advance)
    link = Link(own, topology, ranks, losses, farewell.advance)
    if losses.survives and topology.num_hosts > 1 and uses_han():
        ranks.refuse("create()", LaunchError(_HAN))
    why_not = link.guard_hosts()
    if why_not and topology.rank == 0:
        warnings.warn(_UNGUARDED.format(why_not), RuntimeWarning, stacklevel=4)
    _links.append(link)
    return link


def _world_link(world: MPI.Intracomm, limit_s: float) -> Link:
    if _world:
        _world[0].ranks.settle()
    if _world and _world[0].ranks.ended and not _world[0].ranks.is_final:
        _world.clear()  # a rank has left its stores, but may make new ones with the others
    if not _world:
        _world.append(_new_link(world, limit_s))
    return _world[0]


def _leave_all() -> None:
    """Leave the stores that are open, all at once, so that no rank waits for this one."""
    global _have_left
    if _have_left:
        return
    _have_left = True
    error = vars(sys).get("last_value")  # what ended the program, if an exception did
    why = "" if error is None else f"{type(error).__name__}: {text_of(error)}"
    # The link of the world, even with no store open: others may be about to make one.
    in_use = [link for link in _links if link in _world or link.ranks.has_open_store]
    watching.program_ends()
    try:
        farewell.finish([_leave(link.ranks, why) for link in in_use])
        on_gpus.end_joined()
    finally:  # their threads call MPI, which ends
        watching.stop()
        for link in _links:
            if link.lifeline is not None:
                link.lifeline.close()
    if error is None:
        ancestors.leave()
    if not _links:
        return
    from .transport import mpi

    # A late store's link has the losses, and the ranks, of one that comes before.
    for link in {link.losses: link for link in reversed(_links)}.values():
        if link.losses.survives and link.losses.alarm.error is not None:
            exiting.arm()
            # The others may go on without the lost ranks, and then without this one.
            exiting.within_limit(partial(mpi.regroup, link.comm, stays=False))


@cache
def _mind_mpi_end() -> None:
    from .transport import mpi

    mpi.at_finalize(_before_mpi_ends)


def _before_mpi_ends() -> None:
    """Leave all stores: the program calls MPI_Finalize itself, and may do other work after it."""
    try:
        _leave_all()
    finally:
        for survivor, _ in _open_stores:
            survivor.store._end(f"MPI.Finalize() {_WAS_CALLED}")


@atexit.register
def _at_exit() -> None:
    try:
        _leave_all()
    finally:
        on_gpus.end_own()
    if not _links:
        return
    from .transport import mpi

    exiting.finish(mpi.finalize, mpi.is_finalized)
    if _links[0].topology.rank == 0:
        exiting.say_ended()


def _leave(ranks: AcrossRanks, why: str) -> Generator[None, None, Exception | None]:
    """Let the pushes of its stores end, then leave; all links at once, as one may wait for another.

    A push that the ranks have not agreed on yet ends when the others leave.
    """
    for survivor, its_link in _open_stores:
        if its_link.ranks is ranks:
            yield from survivor.store._pushes_end()
    return (yield from ranks.leave(why))


def _forget_all() -> None:
    global _have_left
    _links.clear()
    _world.clear()
    _open_stores.clear()
    _have_left = False
    farewell.forget()
    watching.forget()
    on_gpus.forget()
    exiting.forget()


# A child made by fork must not speak for its parent.
os.register_at_fork(after_in_child=_forget_all)
