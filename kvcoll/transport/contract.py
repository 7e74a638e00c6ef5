"""What every way of moving bytes among ranks must do.

Rules of the file: a transport knows ranks and flat arrays, not keys; its calls are
collective, made by all ranks in one order, which the layers above have agreed upon;
what can fail on one rank alone is done before the call.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from ..arrays import Array, DType
from ..topology import Topology

# Takes start, stop and the sum of the elements between; the array is valid until it returns.
Sink: TypeAlias = Callable[[int, int, Array], None]


def copies_to(out: Array) -> Sink:
    """Give a sink that writes the sum into an array."""

    def copy(start: int, stop: int, total: Array) -> None:
        out[start:stop] = total

    return copy


@dataclass(frozen=True)
class Window:
    """Memory whose contents are summed without being packed.

    Attributes
    ----------
    rows : tuple of numpy.ndarray, shape (n,)
        For each rank of the host its memory; only this rank's where none is shared.
    place : int
        Which of the rows is this rank's.
    is_shared : bool
        Whether the ranks of a host see one another's; the same on all hosts.
    """

    rows: tuple[Array, ...]
    place: int = 0
    is_shared: bool = False

    @property
    def own(self) -> Array:
        """The memory of this rank, to be written to."""
        return self.rows[self.place]

    def of_survivors(self, places: Sequence[int], place: int) -> Window:
        """Leave out the ranks that are lost; no array moves.

        Parameters
        ----------
        places : sequence of int
            Which of the rows are those of survivors, in the order of their ranks.
        place : int
            Which of them is this rank's.
        """
        if not self.is_shared:
            return self
        return Window(tuple(self.rows[k] for k in places), place, True)


class Transport(ABC):
    """Sums and copies of flat arrays over the ranks of one group."""

    topology: Topology

    @property
    def for_host(self) -> Transport:
        """The one over the same ranks for arrays of the host."""
        return self

    def wait(self) -> None:
        """Return once all sums and copies so far are there: calls that put them on a GPU do not.

        Raises
        ------
        RankFailedError
            They will not be.
        """
        return

    def was_cut(self) -> bool:
        """Let go of what is under way, as the alarm has sounded; say if there was anything."""
        return False

    @abstractmethod
    def all_reduce(self, source: Array, out: Array) -> None:
        """Sum the ranks' arrays, the same bits on every rank.

        An element's sum is taken in the order of the ranks, in float32 for 16-bit
        and 8-bit floats, and rounded once; it does not depend on where in the array
        the element stands.

        Parameters
        ----------
        source : numpy.ndarray, shape (n,)
            Contiguous; of the dtype of `out`, or the dtype in which its sums are taken.
        out : numpy.ndarray, shape (n,)
            Contiguous. May be `source` itself, else must not overlap it.
        """

    @abstractmethod
    def all_reduce_pieces(self, source: Array, dtype: DType, sink: Sink) -> None:
        """Sum as `all_reduce`, but hand over the sum piece by piece, fresh in cache.

        Parameters
        ----------
        source : numpy.ndarray, shape (n,)
            As for `all_reduce`.
        dtype : numpy.dtype
            Of the sum.
        sink : callable
            ``sink(start, stop, total)`` is called for pieces in ascending order that
            cover all elements once. It must not raise.
        """

    @abstractmethod
    def window(self, private: Array) -> Window:
        """Give memory from which, and into which, sums are quickest; collective.

        Parameters
        ----------
        private : numpy.ndarray, shape (n,)
            What the window is where ranks share no memory: taken beforehand, so that
            nothing fails here on one rank alone. Else a window has its size and dtype.
        """

    @abstractmethod
    def all_reduce_window(self, window: Window, start: int, stop: int, sink: Sink) -> None:
        """Sum a part of a window as `all_reduce_pieces` does.

        Parameters
        ----------
        window : Window
            From `window`, the same on all ranks.
        start, stop : int
            Which elements.
        sink : callable
            Gets places counted from `start`.
        """

    def all_reduce_to_window(
        self, source: Array | None, out: Window, start: int, stop: int
    ) -> None:
        """Sum as `all_reduce`, into a part of a window.

        Parameters
        ----------
        source : numpy.ndarray, shape (stop - start,), or None
            As for `all_reduce`; None for what lies in that part of `out` already. Must
            not overlap `out`.
        out : Window
            From `window`, the same on all ranks. Until the call returns that part holds
            nothing of use.
        start, stop : int
            Which elements of `out`.
        """
        own = out.own[start:stop]
        self.all_reduce(own if source is None else source, own)

    def all_reduce_windows(self, source: Window, out: Window, start: int, stop: int) -> None:
        """Sum a part of a window into the same part of another.

        Parameters
        ----------
        source, out : Window
            From `window`, the same on all ranks, of one dtype; not one window.
        start, stop : int
            Which elements.
        """
        self.all_reduce_window(source, start, stop, copies_to(out.own[start:stop]))

    @abstractmethod
    def broadcast(self, buffer: Array, root: int = 0) -> None:
        """Copy the contiguous array of rank `root` into that of every rank."""

    @abstractmethod
    def start_all_to_all(
        self, sent: Mapping[int, Array], received: Mapping[int, Array]
    ) -> Exchange:
        """Begin to send bytes to some of the other ranks, and to receive from some.

        Several may be under way. Two ranks that have messages for each other begin them in
        the same order; a rank that has none need not call it.

        Parameters
        ----------
        sent : mapping of int to numpy.ndarray of uint8
            For other ranks what they get, contiguous; nothing is sent where it is empty.
        received : mapping of int to numpy.ndarray of uint8
            For other ranks where to put what they send, of the same size as there.

        Returns
        -------
        Exchange
            Until it has been waited for, `sent` must not change nor `received` be read.
        """

    @abstractmethod
    def abort(self, why: str) -> None:
        """End the job, as this rank cannot end a sum that the others wait for.

        Returns only where there are no others.
        """

    @abstractmethod
    def close(self) -> None:
        """Give back what the transport holds; called by all ranks, or by none."""


class Exchange(ABC):
    """Bytes under way between ranks."""

    @abstractmethod
    def wait(self) -> None:
        """Wait until all have been sent and received; to be called once."""


class Messenger(ABC):
    """Short messages between two ranks: the way on which the ranks agree."""

    topology: Topology

    @abstractmethod
    def exchange(self, sent: bytearray, received: bytearray, dest: int, source: int) -> None:
        """Send to one rank while receiving as many bytes from another."""

    @abstractmethod
    def start_exchange(
        self, sent: bytearray, received: bytearray, dest: int, source: int
    ) -> Pending:
        """Do as `exchange`, but without waiting."""

    @abstractmethod
    def start_all_gather(self, text: bytes) -> Pending:
        """Begin to send a text of any length to every rank and receive theirs."""

    @property
    @abstractmethod
    def settles(self) -> bool:
        """Whether calls need be settled: a loss does not end the job."""

    @abstractmethod
    def start_settling(self, came_through: bool) -> Settling:
        """Begin to learn whether all ranks came through; where it `settles`, by all that may have.

        All that are left learn the same, whoever is lost meanwhile.
        """


class Settling(ABC):
    """What comes of a call, while the ranks settle it."""

    @abstractmethod
    def done(self) -> bool:
        """Push it on; say whether it is settled."""

    @abstractmethod
    def check(self) -> None:
        """Raise what ended the waiting unless all ranks came through; only once it is `done`."""

    @abstractmethod
    def give_up(self) -> None:
        """Leave it to the others: this rank does not wait until it is `done`."""


class Pending(ABC):
    """An exchange under way."""

    @abstractmethod
    def done(self) -> bool:
        """Push the exchange on; say whether it is complete."""

    @abstractmethod
    def texts(self) -> list[bytes]:
        """Give what each rank sent, by rank; only once it is `done`."""
