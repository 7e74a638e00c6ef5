"""Making the transport over GPUs: whose GPU is whose, who is in whose clique, all or nobody.

Rules of the file: what can fail on one rank alone is told to all before the next step that
they take together, and all raise the same; what waits for others has a limit.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn, TypeAlias, TypeVar

from .. import mpi_takes
from ..errors import ArgumentError, CollectiveError, WaitEndedError, name_of, rebuild, text_of
from ..gpu.device import Device, Gpus, Stream
from ..gpu.nccl import UNIQUE_ID_BYTES, Communicator, Nccl
from ..gpu.places import Sight, places_of
from ..kernels.adding import MOST_ROWS
from ..sums import Adder, order_of
from ..topology import Topology
from ..transport import mpi
from ..transport.alarm import Alarm
from ..transport.contract import Messenger
from ..transport.leg import DirectLeg, Leg, LegSizes
from ..transport.losses import Losses
from ..transport.waiting import Waiting
from .crossing import Crossing
from .exchange import SCRATCH_BYTES, Clique, Member
from .gpu_leg import GpuLeg
from .transport import SMALL_BYTES, GpuTransport
from .watch import Watch

if TYPE_CHECKING:
    from mpi4py import MPI

T = TypeVar("T")
#: Gives what this process can do with GPUs, or raises why it can do nothing.
Find: TypeAlias = Callable[[], tuple[Gpus, Nccl]]

#: How long a transfer may make no way, unless told otherwise.
LIMIT_S = 300.0
_NAP_S = 1e-4
_LOOK_EVERY_S = 0.05


def transport_for(
    comm: MPI.Intracomm,
    topology: Topology,
    find: Find,
    losses: Losses | None = None,
    *,
    tree: bool = False,
    patient: bool = False,
    home: tuple[Device, Stream] | None = None,
    limit_s: float = LIMIT_S,
    mpi_gets: str = mpi_takes.STAGED,
    scratch_bytes: int = SCRATCH_BYTES,
    small_bytes: int = SMALL_BYTES,
) -> GpuTransport:
    """Make the transport over the GPUs of all ranks; collective.

    Parameters
    ----------
    comm : mpi4py.MPI.Intracomm
        The transport's own: nobody else sends on it but with tags of their own.
    topology : Topology
        Of the ranks of `comm`.
    find : callable
        Gives this process's GPUs and NCCL, or raises.
    losses : Losses or None, default None
        Of ranks of `comm`, or of the communicator of which it is a duplicate.
    tree : bool, default False
        Add in a binary tree over the ranks, wherever they are.
    patient : bool, default False
        Leave the core to the caller's other threads while a sum waits for other hosts.
    home : (Device, Stream), optional
        The GPU and the stream of a store that is there already; by default those of the rank.
    limit_s : float, optional
        How long a transfer among GPUs may make no way.
    mpi_gets : str, optional
        How what crosses between hosts comes to MPI: one of the words of `mpi_takes.wanted`. It
        gets addresses of GPUs where all ranks want it, where it was seen to take them unless a
        rank knows that it does, and on up to `MOST_ROWS` hosts.
    scratch_bytes, small_bytes : int, optional
        As for `Clique` and `GpuTransport`.

    Returns
    -------
    GpuTransport
        It closes `comm`.

    Raises
    ------
    DeviceError, MissingDependencyError, CollectiveError
        On all ranks, what one of them has found, or what they cannot do together.
    ArgumentError
        `tree`, and the ranks of a host are no whole branch of it.
    """
    if tree and not topology.is_level:
        raise ArgumentError(
            "reproducible sums on GPUs need as many ranks on each host, a power of two, and "
            f"ranks that follow one another there: these are on hosts {topology.host_of}"
        )
    losses = losses or mpi.losses_of(comm)
    messenger = mpi.MpiMessenger(comm, topology, losses=losses)
    (gpus, nccl), sights = _look(messenger, find)
    if home is None:
        device = gpus.devices[places_of(topology, sights)[topology.rank]]
        stream = device.stream()
    else:  # some of the ranks of before, each where it was: what was checked then still holds
        device, stream = home
    here = mpi.split(comm, topology.host, topology.rank, losses)
    lane = mpi.split(comm, topology.local_rank, topology.host, losses)
    waiting = Waiting.patient(losses.alarm) if patient else None
    flat = mpi.MpiTransport(comm, topology, waiting=waiting, losses=losses, tree=tree)
    flat.keep(here)
    flat.keep(lane)
    nccl_comm = _join(messenger, here, nccl, device, limit_s, losses)
    member = Member(here.rank, device, stream, nccl_comm)
    who = f"rank {topology.rank} of {topology.size}"
    comms = [nccl_comm] if nccl_comm else []
    watch = Watch(comms, limit_s, who, losses.alarm, survives=losses.survives)
    lanes = min(len(ranks) for ranks in topology.hosts)
    way = mpi_takes.Way(direct=False)
    if topology.num_hosts > 1:
        way = _agree_on_way(messenger, topology, device, mpi_gets)

    def make() -> GpuTransport:
        clique = Clique(nccl, [member], here.size, lanes=lanes, scratch_bytes=scratch_bytes)
        crossing = None
        if topology.num_hosts > 1 and topology.local_rank < lanes:
            leg = _leg(lane, device, lanes, losses, tree=tree, direct=way.direct)
            how = waiting or Waiting(alarm=losses.alarm)
            crossing = Crossing(leg, gpus, device, how, watch, direct=way.direct)
        order = order_of([range(here.size)], tree=tree)
        return GpuTransport(
            flat, gpus, member, clique, order, crossing, watch, way=way, small_bytes=small_bytes
        )

    try:
        return _on_all(messenger, make)
    except Exception:  # of this rank or of another: nobody will use NCCL
        if nccl_comm is not None:
            nccl_comm.abort()
        raise


def _leg(
    lane: MPI.Intracomm, device: Device, lanes: int, losses: Losses, *, tree: bool, direct: bool
) -> Leg:
    size, library = lane.size, mpi.import_mpi()
    if direct:
        return GpuLeg(lane, library, device, LegSizes.on_gpus(size), losses, tree=tree)
    sizes = LegSizes.between_hosts(size, lanes)
    adder = Adder([[host] for host in range(size)], sizes.row_bytes(size), tree=tree)
    return DirectLeg(lane, library, adder, sizes, losses)


def _agree_on_way(
    messenger: Messenger, topology: Topology, device: Device, wanted: str
) -> mpi_takes.Way:
    """Say whether MPI gets addresses of GPUs' memory, on all ranks alike; collective.

    The first rank of each host tries it for all of them: one more process a GPU is enough.
    """
    is_staged = wanted == mpi_takes.STAGED or topology.num_hosts > MOST_ROWS
    why_not, contradicted = "it shall not" if is_staged else "", ""
    if wanted == mpi_takes.AUTO and not is_staged and topology.local_rank == 0:
        why_not = mpi_takes.why_not(device.index)
        if why_not and mpi_takes.says():
            contradicted = f"on {socket.gethostname()}: {' '.join(why_not.split())}"
    texts = _texts_of_all(messenger, json.dumps([why_not, contradicted]))
    found = [json.loads(text) for text in texts]
    contradictions = [told for _, told in found if told]
    return mpi_takes.Way(not any(why for why, _ in found), next(iter(contradictions), ""))


def _look(messenger: Messenger, find: Find) -> tuple[tuple[Gpus, Nccl], list[Sight]]:
    """Find what each rank sees, on all ranks."""

    def look() -> tuple[tuple[Gpus, Nccl], str]:
        gpus, nccl = find()
        uuids = [device.uuid for device in gpus.devices]
        return (gpus, nccl), Sight.of(uuids, nccl.version, os.environ).written()

    found, own = _on_all(messenger, look)
    return found, [Sight.read(text) for text in _texts_of_all(messenger, own)]


def _join(
    messenger: Messenger,
    here: MPI.Intracomm,
    nccl: Nccl,
    device: Device,
    limit_s: float,
    losses: Losses,
) -> Communicator | None:
    """Make the communicator of this host's GPUs, by an id that its first rank gives the others."""
    if here.size == 1:
        _on_all(messenger, lambda: None)
        _on_all(messenger, lambda: None)
        return None
    own_id = _on_all(messenger, lambda: nccl.unique_id() if here.rank == 0 else b"")
    unique_id = bytearray(own_id.ljust(UNIQUE_ID_BYTES, b"\0"))
    with losses:
        here.Bcast(unique_id)
    size, rank = here.size, here.rank

    def init() -> Communicator:
        return _within(
            limit_s, losses.alarm, lambda: nccl.init_rank(size, bytes(unique_id), rank, device)
        )

    return _on_all(messenger, init, undo=lambda made: made.abort())


def _within(limit_s: float, alarm: Alarm, make: Callable[[], Communicator]) -> Communicator:
    """Wait for a call that waits for others, but not for ever.

    Raises
    ------
    WaitEndedError
        One of the others is lost.
    CollectiveError
        It has not come back in time; the thread that waits in it stays behind, and aborts what
        it may still get.
    """
    made: list[Communicator] = []
    errors: list[Exception] = []
    lock, is_awaited = threading.Lock(), [True]

    def run() -> None:
        try:
            one = make()
        except Exception as error:  # told by the thread that waits for this one
            errors.append(error)
            return
        with lock:
            made.extend([one] if is_awaited else [])
        if not made:
            one.abort()

    thread = threading.Thread(target=run, name="kvcoll-nccl-init", daemon=True)
    thread.start()
    end = time.monotonic() + limit_s
    try:
        while thread.is_alive() and time.monotonic() < end:
            thread.join(_LOOK_EVERY_S)
            if thread.is_alive():
                alarm.check()
    finally:
        with lock:
            is_awaited.clear()
    if errors:
        raise errors[0]
    if not made:
        raise CollectiveError(
            f"NCCL has not brought the GPUs of this host together within {limit_s:g} s: "
            "NCCL_DEBUG=INFO shows what it tries"
        )
    return made[0]


def _on_all(
    messenger: Messenger, make: Callable[[], T], *, undo: Callable[[T], object] | None = None
) -> T:
    """Do on all ranks what may fail on some; all raise the error of the lowest that failed.

    Where another rank has failed, `undo` gets what was made here.
    """
    made: list[T] = []
    told = ""
    try:
        made.append(make())
    except Exception as error:  # whatever it is, the other ranks wait to be told
        told = json.dumps([name_of(error), text_of(error)])
    try:
        all_told = _texts_of_all(messenger, told)
    except WaitEndedError:
        if made and undo is not None:
            undo(made[0])
        raise
    errors = [(rank, json.loads(text)) for rank, text in enumerate(all_told) if text]
    if errors:
        if made and undo is not None:
            undo(made[0])
        _raise(errors[0][0], *errors[0][1])
    return made[0]


def _texts_of_all(messenger: Messenger, own: str) -> list[str]:
    gathering = messenger.start_all_gather(own.encode())
    while not gathering.done():
        time.sleep(_NAP_S)
    return [text.decode() for text in gathering.texts()]


def _raise(rank: int, name: str, text: str) -> NoReturn:
    raise rebuild(name, f"rank {rank}: {text}")
