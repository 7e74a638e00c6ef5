"""The port to NCCL: bytes among GPUs, put on streams.

Rules of the file: NCCL carries bytes and adds nothing, so that every dtype travels and the
order of a sum is ours. All members of a communicator put the same calls on it in the same
order; calls of one thread that need one another, such as a send and a receive, or those of
several members in one process, are in one `group`. What a call reads or writes must be
left alone until the stream has done it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager

from .array import DeviceArray
from .device import Device, Stream

UNIQUE_ID_BYTES = 128


class Communicator(ABC):
    """One GPU's membership in a group of GPUs.

    Attributes
    ----------
    rank, size : int
        Its place in the group, and how many members that has.
    device : int
        The number of its GPU in this process.
    """

    rank: int
    size: int
    device: int

    @abstractmethod
    def send(self, source: DeviceArray, peer: int, on: Stream) -> None:
        """Send bytes to one other member, which receives as many (ncclSend)."""

    @abstractmethod
    def receive(self, out: DeviceArray, peer: int, on: Stream) -> None:
        """Receive what one other member sends (ncclRecv)."""

    @abstractmethod
    def all_gather(self, source: DeviceArray, out: DeviceArray, on: Stream) -> None:
        """Give all members' bytes to all, by rank (ncclAllGather).

        Parameters
        ----------
        source : DeviceArray
            Of as many bytes on every member; may be its own place in `out`.
        out : DeviceArray
            Of `size` times as many.
        on : Stream
        """

    @abstractmethod
    def broadcast(self, buffer: DeviceArray, root: int, on: Stream) -> None:
        """Copy the root's bytes to all members (ncclBroadcast)."""

    @abstractmethod
    def check(self) -> None:
        """Raise what has gone wrong meanwhile (ncclCommGetAsyncError); never waits.

        Raises
        ------
        CollectiveError
            With NCCL's own last error.
        """

    @abstractmethod
    def abort(self) -> None:
        """End it without the others: what is on streams ends, too (ncclCommAbort); never raises."""

    @abstractmethod
    def destroy(self) -> None:
        """Give back what it holds, once its work is done (ncclCommDestroy)."""


class Nccl(ABC):
    """The library.

    Attributes
    ----------
    version : tuple of int
        As ``(2, 30, 3)``.
    """

    version: tuple[int, int, int]

    @abstractmethod
    def unique_id(self) -> bytes:
        """Make the name by which the members of a new communicator find one another.

        Raises
        ------
        CollectiveError
            NCCL finds no network to be found by.
        """

    @abstractmethod
    def init_rank(self, size: int, unique_id: bytes, rank: int, device: Device) -> Communicator:
        """Become a member, from each process one; returns once all have come (ncclCommInitRank).

        Raises
        ------
        CollectiveError
            With NCCL's own last error.
        """

    @abstractmethod
    def init_all(self, devices: Sequence[Device]) -> list[Communicator]:
        """Make a communicator of GPUs of this process (ncclCommInitAll).

        Raises
        ------
        CollectiveError
            With NCCL's own last error.
        """

    @abstractmethod
    def group(self) -> AbstractContextManager[None]:
        """Begin calls that count as one; they are made at its end (ncclGroupStart, ncclGroupEnd).

        Raises
        ------
        CollectiveError
            One of the calls was wrong. Where the block raises, the group is ended, too.
        """
