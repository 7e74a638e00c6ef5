"""Short messages between the watchdogs of ranks, whatever their main threads do.

Rules of the file: nothing here waits for another rank; messages are JSON, so that nothing
in them can run; what a lost rank will never take is dropped.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, Final, TypeAlias, final

import numpy as np

from .processes import Place, own_place

if TYPE_CHECKING:
    from mpi4py import MPI

Message: TypeAlias = "dict[str, Any]"

_TAG: Final = 1
_HOST_BYTES: Final = 64
_MOST_AT_A_LOOK: Final = 4096


class Post(ABC):
    """Messages to and from the other ranks.

    Attributes
    ----------
    rank, size : int
    reaches_others : bool
    """

    rank: int
    size: int
    reaches_others = True

    @abstractmethod
    def send(self, rank: int, message: Message) -> None:
        """Send a message to a rank, in time."""

    @abstractmethod
    def receive(self) -> list[tuple[int, Message]]:
        """Give what has come, each with the rank it is from."""


@final
class NoPost(Post):
    """Where MPI was not started for several threads: nobody is asked, nobody answers."""

    reaches_others = False

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size

    def send(self, rank: int, message: Message) -> None:
        """Drop it."""

    def receive(self) -> list[tuple[int, Message]]:
        """Give nothing."""
        return []


@final
class MpiPost(Post):
    """Messages by MPI_Isend, MPI_Iprobe and MPI_Recv.

    Parameters
    ----------
    comm : mpi4py.MPI.Intracomm
        The watchdog's own.
    mpi : module
        ``mpi4py.MPI``.
    """

    def __init__(self, comm: MPI.Intracomm, mpi: Any) -> None:
        self.comm, self._mpi = comm, mpi
        self.rank, self.size = comm.rank, comm.size
        self._sends: list[tuple[MPI.Request, bytes]] = []

    def send(self, rank: int, message: Message) -> None:
        """Begin to send; see `Post.send`."""
        self._sends = [sent for sent in self._sends if not self._is_over(sent[0])]
        data = json.dumps(message).encode()
        try:
            request = self.comm.Isend([data, self._mpi.BYTE], rank, _TAG)
        except self._mpi.Exception:  # the rank is lost: it answers nobody any more
            return
        self._sends.append((request, data))

    def receive(self) -> list[tuple[int, Message]]:
        """Receive what lies there; see `Post.receive`."""
        messages: list[tuple[int, Message]] = []
        status, mpi = self._mpi.Status(), self._mpi
        try:
            while len(messages) < _MOST_AT_A_LOOK and self.comm.Iprobe(
                mpi.ANY_SOURCE, _TAG, status
            ):
                data = bytearray(status.Get_count(mpi.BYTE))
                self.comm.Recv([data, mpi.BYTE], status.source, _TAG)
                messages.append((status.source, json.loads(data)))
        except mpi.Exception:  # a rank is lost: from the others messages go on to come
            self.comm.Ack_failed()
        return messages

    def _is_over(self, request: MPI.Request) -> bool:
        try:
            return bool(request.Test())
        except self._mpi.Exception:
            return True


def introduce(comm: MPI.Intracomm, world_rank: int, file: int) -> list[Place]:
    """Tell all ranks where this one is, and learn it of them; collective (MPI_Allgather).

    Parameters
    ----------
    comm : mpi4py.MPI.Intracomm
    world_rank, file : int
        As for `Place`.
    """
    own, size = own_place(world_rank, file), comm.size
    hosts = np.zeros((size, _HOST_BYTES), np.uint8)
    numbers = np.zeros((size, 4), np.int64)
    name = own.host.encode()[:_HOST_BYTES]
    host = np.zeros(_HOST_BYTES, np.uint8)
    host[: len(name)] = np.frombuffer(name, np.uint8)
    comm.Allgather(host, hosts)
    comm.Allgather(np.array([own.pid, own.started, world_rank, file], np.int64), numbers)
    names = [bytes(row).rstrip(b"\0").decode(errors="replace") for row in hosts]
    return [Place(name, *numbered) for name, numbered in zip(names, numbers.tolist(), strict=True)]
