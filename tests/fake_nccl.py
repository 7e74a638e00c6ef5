"""An NCCL for fake GPUs that enforces NCCL's rules, within a process and across processes.

Within a process all members of a communicator must be in one group, sends must meet receives,
and counts and dtypes must fit: what is missing would hang for ever, and is an error at the end
of the group. Across processes bytes travel as files of a folder that all ranks see, each with a
header: which call of which communicator, of how many bytes of which dtype. What another rank
called differently is an error of the device; a rank that does not come lets the others wait, as
on a GPU, until the communicator is aborted. Such work goes on while the host does other things.
"""

from __future__ import annotations

import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, final

import numpy as np
from fake_gpu import FakeGpus, FakeStream, merge, numpy_of, span_of

from kvcoll.errors import CollectiveError
from kvcoll.gpu.array import DeviceArray
from kvcoll.gpu.device import Device, Stream
from kvcoll.gpu.nccl import UNIQUE_ID_BYTES, Communicator, Nccl

if TYPE_CHECKING:
    from mpi4py import MPI

_INIT_LIMIT_S = 30.0


@contextmanager
def mailbox(comm: MPI.Intracomm) -> Iterator[Path]:
    """Give a folder that all ranks see; rank 0 removes it once all have left it.

    It is no folder of pytest's, which removes old ones as a run ends, and warns where many files
    make the runs of several ranks meet in it.
    """
    made = tempfile.mkdtemp(prefix="kvcoll-nccl-") if comm.rank == 0 else ""
    folder = Path(comm.bcast(made))
    try:
        yield folder
    finally:
        comm.barrier()
        if comm.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)


@dataclass
class _Call:
    """One call of one member, of a group that may still be open."""

    comm: FakeCommunicator
    kind: str
    peer: int  # for collectives the root, or 0
    source: DeviceArray | None
    out: DeviceArray | None
    stream: FakeStream
    number: int  # how many collectives this member has called before

    @property
    def header(self) -> str:
        """What both sides must agree on."""
        array = self.source if self.source is not None else self.out
        assert array is not None
        kind = (
            "message"
            if self.kind in ("send", "receive")
            else f"{self.kind} {self.peer} as {self.number}"
        )
        return f"{kind}, {array.nbytes} bytes of {array.dtype.name}"

    def __str__(self) -> str:
        return f"{self.kind}({self.peer}) of rank {self.comm.rank} [{self.header}]"


@final
class FakeNccl(Nccl):
    """NCCL for the GPUs of one process.

    Parameters
    ----------
    gpus : FakeGpus
    folder : Path, optional
        The same for all ranks of a host, empty at first.
    version : tuple of int, optional
    """

    def __init__(
        self,
        gpus: FakeGpus,
        folder: Path | None = None,
        version: tuple[int, int, int] = (2, 30, 3),
    ) -> None:
        self.version = version
        self.gpus, self._folder = gpus, folder
        self._depth = 0
        self._calls: list[_Call] = []
        self.open: list[FakeCommunicator] = []  # neither destroyed nor aborted
        self.id_error: str | None = None  # planted: why no unique id can be made
        self.init_error: str | None = None

    def unique_id(self) -> bytes:
        if self.id_error is not None:
            raise CollectiveError(f"ncclGetUniqueId: {self.id_error}")
        return secrets.token_hex(16).encode().ljust(UNIQUE_ID_BYTES, b"\0")

    def init_rank(self, size: int, unique_id: bytes, rank: int, device: Device) -> Communicator:
        assert self._folder is not None, "ranks of several processes need a folder"
        assert len(unique_id) == UNIQUE_ID_BYTES
        if self.init_error is not None:
            raise CollectiveError(f"ncclCommInitRank: {self.init_error}")
        mail = self._folder / unique_id.rstrip(b"\0").decode()
        mail.mkdir(exist_ok=True)
        (mail / f"member-{rank}").touch()
        end = time.monotonic() + _INIT_LIMIT_S
        while any(not (mail / f"member-{k}").exists() for k in range(size)):
            if time.monotonic() > end:
                raise CollectiveError("ncclCommInitRank: not all members came")
            time.sleep(0.001)
        self.gpus.pump_in_background()
        return self._opened(FakeCommunicator(self, self.gpus, rank, size, device.index, mail))

    def init_all(self, devices: Sequence[Device]) -> list[Communicator]:
        if self.init_error is not None:
            raise CollectiveError(f"ncclCommInitAll: {self.init_error}")
        if len({device.uuid for device in devices}) < len(devices):
            raise CollectiveError("ncclCommInitAll: a GPU stands twice in the list")
        members = [
            FakeCommunicator(self, self.gpus, k, len(devices), device.index, None)
            for k, device in enumerate(devices)
        ]
        for member in members:
            member.clique = members
            self._opened(member)
        return list(members)

    @contextmanager
    def group(self) -> Iterator[None]:
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            calls, self._calls = self._calls, self._calls if self._depth else []
        if not self._depth:
            self._launch(calls)

    def add(self, call: _Call) -> None:
        """Take a call into the open group, or make it one of its own."""
        self._check_call(call)
        if self._depth:
            self._calls.append(call)
        else:
            self._launch([call])

    def _opened(self, comm: FakeCommunicator) -> FakeCommunicator:
        self.open.append(comm)
        return comm

    def _check_call(self, call: _Call) -> None:
        comm = call.comm
        if comm not in self.open:
            self.gpus.break_rule(f"{call} on a communicator that was closed")
        for array in (call.source, call.out):
            if array is not None and array.device != comm.device:
                self.gpus.break_rule(f"{call}: {array!r} is not on GPU {comm.device}")
            if array is not None and array.nbytes == 0:
                self.gpus.break_rule(f"{call}: nothing to carry")
        if call.stream.device != comm.device:
            self.gpus.break_rule(f"{call}: its stream is of GPU {call.stream.device}")
        if not 0 <= call.peer < comm.size:
            self.gpus.break_rule(f"{call}: there are {comm.size} members")
        if call.kind in ("send", "receive") and call.peer == comm.rank:
            self.gpus.break_rule(f"{call}: to itself")
        if call.kind == "all_gather":
            assert call.source is not None
            assert call.out is not None
            if call.out.nbytes != comm.size * call.source.nbytes:
                self.gpus.break_rule(f"{call}: it fills {call.out!r}")
            at = call.out.address + comm.rank * call.source.nbytes
            if _meet(call.source, call.out) and call.source.address != at:
                self.gpus.break_rule(f"{call}: it overlaps, but not in its own place")

    def _launch(self, calls: list[_Call]) -> None:
        """Put a whole group on its streams."""
        if not calls:
            return
        self._check_group(calls)
        for comm in dict.fromkeys(call.comm for call in calls):
            own = [call for call in calls if call.comm is comm]
            if comm.clique is None:
                self._put(own, comm.rounds(own))
        local = [call for call in calls if call.comm.clique is not None]
        for clique in {id(call.comm.clique): call.comm.clique for call in local}.values():
            assert clique is not None
            self._put_clique(clique, [call for call in local if call.comm in clique])

    def _check_group(self, calls: list[_Call]) -> None:
        for comm in dict.fromkeys(call.comm for call in calls):
            own = [call for call in calls if call.comm is comm]
            if len({call.stream.handle for call in own}) > 1:
                self.gpus.break_rule(f"a group puts calls of rank {comm.rank} on several streams")
        for number, call in enumerate(calls):
            for other in calls[number + 1 :]:
                for written, array in ((call.out, other.source), (call.out, other.out)):
                    if written is not None and array is not None and _meet(written, array):
                        self.gpus.break_rule(f"{call} writes what {other} of its group uses")
                if (
                    other.out is not None
                    and call.source is not None
                    and _meet(other.out, call.source)
                ):
                    self.gpus.break_rule(f"{other} writes what {call} of its group uses")

    def _put(self, calls: list[_Call], run: Callable[[], bool]) -> None:
        """Put the calls of one member on its stream."""
        reads = [call.source for call in calls if call.source is not None]
        writes = [call.out for call in calls if call.out is not None]
        self.gpus.put_part(calls[0].stream, run, reads, writes, f"nccl {calls[0].kind}")

    def _put_clique(self, clique: Sequence[FakeCommunicator], calls: list[_Call]) -> None:
        """Match the calls of members in one process, and put all of them on their streams."""
        moves = list(_matched(clique, calls, self.gpus))
        for call in calls:  # what is received comes after what its sender did before
            for other in calls:
                merge(call.stream.clock, other.stream.clock)

        def run() -> bool:
            numbers = [numpy_of(source).reshape(-1).view(np.uint8).copy() for source, _ in moves]
            for (_, out), its in zip(moves, numbers, strict=True):
                numpy_of(out).reshape(-1).view(np.uint8)[...] = its
            return True

        present = [comm for comm in clique if any(call.comm is comm for call in calls)]
        for number, comm in enumerate(present):
            own = [call for call in calls if call.comm is comm]
            self._put(own, run if number == 0 else lambda: True)


def _matched(
    clique: Sequence[FakeCommunicator], calls: list[_Call], gpus: FakeGpus
) -> Iterator[tuple[DeviceArray, DeviceArray]]:
    """Pair what is sent with where it goes; what has no counterpart would hang."""
    queues = {comm: [call for call in calls if call.comm is comm] for comm in clique}
    sends = [call for call in calls if call.kind == "send"]
    for call in [call for call in calls if call.kind == "receive"]:
        sender = next(
            (s for s in sends if s.comm.rank == call.peer and s.peer == call.comm.rank), None
        )
        if sender is None or sender.header != call.header:
            gpus.break_rule(f"{call} meets {sender or 'no send'}")
        assert sender is not None
        assert sender.source is not None
        assert call.out is not None
        sends.remove(sender)
        yield sender.source, call.out
    if sends:
        gpus.break_rule(f"{sends[0]} meets no receive")
    together = [[c for c in own if c.kind in _COLLECTIVE] for own in queues.values()]
    headers = [[call.header for call in own] for own in together]
    if any(other != headers[0] for other in headers):
        gpus.break_rule(f"the members of a communicator call {headers}")
    for number in range(len(together[0])):
        yield from _collective_moves([own[number] for own in together])


_COLLECTIVE = ("all_gather", "broadcast")


def _collective_moves(calls: list[_Call]) -> Iterator[tuple[DeviceArray, DeviceArray]]:
    for call in calls:
        assert call.out is not None
        if call.kind == "broadcast":
            source = calls[call.peer].out
            if source is not call.out and source is not None:
                yield source, call.out
            continue
        for rank, other in enumerate(calls):
            assert other.source is not None
            yield other.source, _place(call.out, rank, other.source.nbytes)


def _place(out: DeviceArray, rank: int, n_bytes: int) -> DeviceArray:
    return out.reshape(-1).view(np.uint8)[rank * n_bytes : (rank + 1) * n_bytes]


def _meet(one: DeviceArray, other: DeviceArray) -> bool:
    (low, high), (start, stop) = span_of(one), span_of(other)
    return one.device == other.device and low < stop and start < high


@final
class FakeCommunicator(Communicator):
    def __init__(
        self,
        nccl: FakeNccl,
        gpus: FakeGpus,
        rank: int,
        size: int,
        device: int,
        mail: Path | None,
    ) -> None:
        self.rank, self.size, self.device = rank, size, device
        self.clique: Sequence[FakeCommunicator] | None = None
        self._nccl, self.gpus, self._mail = nccl, gpus, mail
        self._sent = dict.fromkeys(range(size), 0)
        self._received = dict.fromkeys(range(size), 0)
        self._n_collectives = 0
        self._is_aborted = False
        self.error: str | None = None  # what `check` raises; planted, or another rank's mistake

    def send(self, source: DeviceArray, peer: int, on: Stream) -> None:
        self._add("send", peer, source, None, on)

    def receive(self, out: DeviceArray, peer: int, on: Stream) -> None:
        self._add("receive", peer, None, out, on)

    def all_gather(self, source: DeviceArray, out: DeviceArray, on: Stream) -> None:
        self._add("all_gather", 0, source, out, on)

    def broadcast(self, buffer: DeviceArray, root: int, on: Stream) -> None:
        self._add("broadcast", root, None, buffer, on)

    def check(self) -> None:
        if self.error is not None:
            raise CollectiveError(f"NCCL: {self.error}")

    def abort(self) -> None:
        self._is_aborted = True
        self._close()

    def destroy(self) -> None:
        if any(not work.is_done for work in self.gpus._queue):
            self.gpus.break_rule("a communicator is destroyed while work is on its streams")
        self._close()

    def rounds(self, calls: list[_Call]) -> Callable[[], bool]:
        """Give what carries a group's bytes to and from other processes; True once it is done."""
        out: list[tuple[int, str, DeviceArray]] = []
        into: list[tuple[int, str, DeviceArray]] = []
        own: list[tuple[DeviceArray, DeviceArray]] = []
        others = [k for k in range(self.size) if k != self.rank]
        for call in calls:
            if call.kind == "send" and call.source is not None:
                out.append((call.peer, call.header, call.source))
            elif call.kind == "receive" and call.out is not None:
                into.append((call.peer, call.header, call.out))
            elif call.kind == "broadcast" and call.out is not None:
                if call.peer == self.rank:
                    out += [(k, call.header, call.out) for k in others]
                else:
                    into.append((call.peer, call.header, call.out))
            elif call.source is not None and call.out is not None:
                n_bytes = call.source.nbytes
                out += [(k, call.header, call.source) for k in others]
                into += [(k, call.header, _place(call.out, k, n_bytes)) for k in others]
                own.append((call.source, _place(call.out, self.rank, n_bytes)))
        posts = [(self._path(self.rank, k, self._sent), h, a) for k, h, a in out]
        wants = [(self._path(k, self.rank, self._received), h, a) for k, h, a in into]
        state = {"posted": False}

        def run() -> bool:
            if not state["posted"]:
                for path, header, array in posts:
                    _post(path, header, numpy_of(array).tobytes())
                for source, to in own:
                    raw = numpy_of(source).reshape(-1).view(np.uint8).copy()
                    numpy_of(to).reshape(-1).view(np.uint8)[...] = raw
                state["posted"] = True
            while wants and not self._is_aborted:
                path, header, array = wants[0]
                if not path.exists():
                    return False
                self._take(path, header, array)
                wants.pop(0)
            return True

        return run

    def _path(self, source: int, dest: int, counts: dict[int, int]) -> Path:
        assert self._mail is not None
        peer = dest if source == self.rank else source
        counts[peer] += 1
        return self._mail / f"{source}-{dest}-{counts[peer]}"

    def _take(self, path: Path, header: str, array: DeviceArray) -> None:
        content = path.read_bytes()
        path.unlink()
        other, raw = content.split(b"\n", 1)
        if other.decode() != header:
            self.error = f"rank {self.rank} called {header}, another rank {other.decode()}"
            raise CollectiveError(self.error)
        numbers = np.frombuffer(raw, np.uint8)
        numpy_of(array).reshape(-1).view(np.uint8)[...] = numbers

    def _add(
        self,
        kind: str,
        peer: int,
        source: DeviceArray | None,
        out: DeviceArray | None,
        on: Stream,
    ) -> None:
        assert isinstance(on, FakeStream)
        self._nccl.add(_Call(self, kind, peer, source, out, on, self._n_collectives))
        self._n_collectives += kind in _COLLECTIVE

    def _close(self) -> None:
        if self in self._nccl.open:
            self._nccl.open.remove(self)


def _post(path: Path, header: str, raw: bytes) -> None:
    part = path.with_suffix(".part")
    part.write_bytes(header.encode() + b"\n" + raw)
    part.replace(path)
