"""Going on without ranks that were lost: all stores of a communicator, on the ranks that are left.

Rules of the file: all survivors take all steps, and agree at the end that they have come
through; a loss on the way makes all of them begin anew. Until then a store changes only where
its replica is brought to the state of another, and knows of it by not being whole meanwhile.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, final

from .agreement import AcrossRanks, Agreement
from .arrays import Array
from .errors import BrokenMPIError, NoWholeReplicaError, RankFailedError, WaitEndedError
from .schema import Key
from .topology import Topology
from .transport.alarm import Alarm
from .transport.contract import Transport
from .transport.losses import Losses
from .transport.waiting import Waiting

if TYPE_CHECKING:
    from mpi4py import MPI

    from .transport.lifeline import Lifeline

_NOT_ALL = "not all ranks that are left have it: it was being made or closed when one was lost"
_CAME_THROUGH, _WELL, _WHOLE, _RIGHT = 1, 2, 4, 8  # bits of an agreement
_ALL = _CAME_THROUGH | _WELL | _WHOLE | _RIGHT


@dataclass(eq=False)
class Link:
    """What the stores of one communicator share.

    Attributes
    ----------
    comm : mpi4py.MPI.Intracomm
    topology : Topology
    ranks : AcrossRanks
    losses : Losses
    idle : callable
        As for `AcrossRanks`.
    n_made : int
        How many stores were made.
    lifeline : Lifeline or None
        What notices that another host is gone.
    """

    comm: MPI.Intracomm
    topology: Topology
    ranks: AcrossRanks
    losses: Losses
    idle: Callable[[], None]
    n_made: int = 0
    lifeline: Lifeline | None = None

    def move(
        self, comm: MPI.Intracomm, topology: Topology, ranks: AcrossRanks, losses: Losses
    ) -> None:
        """Go on with other ranks."""
        self.comm, self.topology, self.ranks, self.losses = comm, topology, ranks, losses

    def guard_hosts(self) -> str:
        """Have the job end if a host is lost, and nobody tells; called by all ranks.

        Returns
        -------
        str
            Why that cannot be, or ``''``.
        """
        from .transport import mpi
        from .transport.lifeline import open_lifeline  # a store of one host needs no sockets

        lost = partial(mpi.end_job, self.comm)
        lifeline, why_not = open_lifeline(
            self.topology, self.ranks.tell, lost, survives=self.losses.survives
        )
        if self.lifeline is not None:
            self.lifeline.close()
        self.lifeline = lifeline
        return why_not

    def count(self, n_made: int) -> None:
        """Count the stores that were made on any rank."""
        self.n_made = n_made


@dataclass(frozen=True)
class Standing:
    """How far one rank's replica has come.

    Attributes
    ----------
    steps : int
        Counts what has been applied, as finely as that may be interrupted.
    version : int
        How many pushes are wholly in it.
    is_whole : bool
        Whether nothing has been interrupted while it changed.
    keys : list of int or str
    updater : str
        Of which kind.
    n_changes : int
        How many calls that change the store were settled, see `Agreement.atomic`.
    """

    steps: int
    version: int
    is_whole: bool
    keys: Sequence[Key]
    updater: str
    n_changes: int


@dataclass(frozen=True)
class Left:
    """The ranks that are left, as one of them sees them.

    Attributes
    ----------
    topology : Topology
        Of them.
    before : tuple of int
        For each of them the rank that it had.
    places : tuple of int
        For those of this host their places among the ranks that it had.
    """

    topology: Topology
    before: tuple[int, ...]
    places: tuple[int, ...]

    @classmethod
    def of(cls, old: Topology, new: Topology, before: Sequence[int]) -> Left:
        """Find the places."""
        here = old.ranks_on(old.host)
        places = tuple(here.index(before[rank]) for rank in new.ranks_on(new.host))
        return cls(new, tuple(before), places)


class Recoverable(ABC):
    """A store, as recovery sees it.

    Attributes
    ----------
    number : int
        The same on all ranks.
    is_late : bool
        As it was created: whether it agrees in a thread of its own.
    """

    number: int
    is_late: bool

    @abstractmethod
    def interrupt(self) -> None:
        """Let go of pushes under way; to be called once the alarm has sounded."""

    @abstractmethod
    def standing(self) -> Standing:
        """Say how far the replica has come."""

    @abstractmethod
    def join(
        self, comm: MPI.Intracomm, topology: Topology, losses: Losses
    ) -> tuple[Transport, Callable[[], None]]:
        """Make the transport over the ranks that are left; collective.

        Returns
        -------
        transport : Transport
        take_over : callable
            Lets it take the place of the one of before; cannot fail.
        """

    @abstractmethod
    def told(self) -> str:
        """Say in JSON what else than arrays another replica needs to become as this one."""

    @abstractmethod
    def level(self, told: str, keys: Sequence[Key], *, is_source: bool) -> list[Array]:
        """Give the arrays that are to be copied from the source, the same on all ranks.

        The replica is not whole from now on, unless it is the source.

        Parameters
        ----------
        told : str
            What the source's `told` gave.
        keys : sequence of int or str
            Which all survivors have; others are dropped.
        is_source : bool
        """

    @abstractmethod
    def levelled(self, standing: Standing) -> None:
        """Take note that the copy is complete, and of whose state it is."""

    @abstractmethod
    def prepare(self, transport: Transport, agreement: Agreement, left: Left) -> Callable[[], None]:
        """Take what moving to other ranks needs; give what moves, and cannot fail."""

    @abstractmethod
    def lose(self, why: str) -> None:
        """Close: not all survivors have this store."""


def recover(link: Link, stores: Mapping[Recoverable, Link], limit_s: float) -> None:
    """Leave lost ranks behind; called by all survivors.

    Parameters
    ----------
    link : Link
        It and the stores are of the survivors afterwards.
    stores : mapping of Recoverable to Link
        All stores of the link, each with that by which it agrees: a late one has its own.
    limit_s : float
        How long to wait for the others.

    Raises
    ------
    NoWholeReplicaError, BrokenMPIError, RankFailedError
        There is no going on; on all survivors.
    """
    from .transport import mpi

    link.losses.alarm.sound(WaitEndedError("another rank called recover()"))
    for store in stores:
        store.interrupt()
    late = f"not all ranks that are left came through recover() within {limit_s:g} s"
    base = link.comm
    while True:
        with mpi.limited(link.comm, late, limit_s):
            base = mpi.regroup(base)
            attempt = _Attempt(link, base, stores, limit_s)
            bits = attempt.run()
        if bits == _ALL:
            break
        if bits is not None and not bits & _WELL:
            raise _verdict(attempt.error, bits)
    attempt.commit()
    link.guard_hosts()


@final
class _Attempt:
    """One try to bring all stores to a new communicator."""

    def __init__(
        self, link: Link, comm: MPI.Intracomm, stores: Mapping[Recoverable, Link], limit_s: float
    ) -> None:
        from .transport import mpi

        self._link, self._comm, self._stores, self._limit_s = link, comm, stores, limit_s
        self._losses = mpi.losses_of(comm, Alarm())
        self._commits: list[Callable[[], None]] = []
        self.error: Exception | None = None

    def run(self) -> int | None:
        """Do all but what cannot fail; give what all ranks say of it, None if one has died."""
        from .transport import mpi

        bits = _ALL
        try:
            self._try()
        except WaitEndedError:
            bits = _ALL - _CAME_THROUGH
        except NoWholeReplicaError as error:
            self.error, bits = error, _ALL - _WELL - _WHOLE
        except BrokenMPIError as error:
            self.error, bits = error, _ALL - _WELL - _RIGHT
        except Exception as error:  # whatever it is: the others wait to agree
            self.error, bits = error, _ALL - _WELL
        if bits != _ALL:
            # Whoever waits in a call of this attempt comes out: it will not be completed.
            self._losses.alarm.sound(_not_through())
        agreed = mpi.agree(self._comm, bits)
        if agreed != _ALL:
            self._losses.alarm.sound(_not_through())  # what it has made on GPUs is let go of
        return agreed

    def commit(self) -> None:
        """Go on with what is left."""
        for commit in self._commits:
            commit()

    def _try(self) -> None:
        from .transport import mpi

        link, comm, losses = self._link, self._comm, self._losses
        mpi.check_collectives(comm, losses)
        topology = mpi.topology_of(comm, losses)
        messenger = mpi.messenger_of(comm, topology, losses, self._limit_s)
        ranks = AcrossRanks(messenger, losses.alarm, link.idle)
        left = Left.of(link.topology, topology, mpi.ranks_in(comm, link.comm))
        mine = {str(store.number): asdict(store.standing()) for store in self._stores}
        told = [json.loads(text) for text in ranks.tell(json.dumps([link.n_made, mine]))]
        n_made = max(one[0] for one in told)
        everywhere = set.intersection(*(set(one[1]) for one in told))
        for store in sorted(self._stores, key=lambda store: store.number):
            number = str(store.number)
            if number not in everywhere:
                self._commits.append(partial(store.lose, _NOT_ALL))
                continue
            own = mpi.duplicate(comm, self._limit_s, losses)
            transport, take_over = store.join(own, topology, losses)
            _level(store, [Standing(**one[1][number]) for one in told], ranks, transport)
            if store.is_late:
                its_ranks = late_ranks(own, topology, losses, link.idle, self._limit_s)
                its_link = self._stores[store]
                self._commits.append(partial(its_link.move, own, topology, its_ranks, losses))
            else:
                its_ranks = ranks
            self._commits.append(store.prepare(transport, its_ranks.of_store(), left))
            self._commits.append(take_over)
        link_moves = partial(link.move, comm, topology, ranks, losses)
        self._commits += [link_moves, partial(link.count, n_made)]


def _verdict(own: Exception | None, bits: int) -> Exception:
    """Make the error of all ranks; one that another rank has found may have caused this one's."""
    if not bits & _RIGHT:
        if isinstance(own, BrokenMPIError):
            return own
        error: Exception = BrokenMPIError(
            "MPI gave another rank, which says more, wrong results after the loss: go on from a "
            "checkpoint in a new job"
        )
    elif not bits & _WHOLE:
        if isinstance(own, NoWholeReplicaError):
            return own
        error = NoWholeReplicaError(
            "no replica is whole, or the ranks have different updaters, as another rank was the "
            "first to find: load a checkpoint; create(..., elastic=True) keeps replicas whole"
        )
    else:
        return own or RankFailedError("recover() failed on another rank, which has raised why")
    error.__cause__ = own
    return error


def _not_through() -> WaitEndedError:
    return WaitEndedError("recover() has not come through")


def late_ranks(
    own: MPI.Intracomm,
    topology: Topology,
    losses: Losses,
    idle: Callable[[], None],
    limit_s: float,
) -> AcrossRanks:
    """Make the agreement of one store, whose thread agrees while the caller uses others."""
    from .transport import mpi

    patient = Waiting.patient(losses.alarm)
    messenger = mpi.messenger_of(own, topology, losses, limit_s, patient)
    return AcrossRanks(messenger, losses.alarm, idle, one_error_ends=True)


def _level(
    store: Recoverable, standings: list[Standing], ranks: AcrossRanks, transport: Transport
) -> None:
    """Bring all replicas of a store to one state: the earliest that is whole on some rank."""
    rank = transport.topology.rank
    whole = [k for k, standing in enumerate(standings) if standing.is_whole]
    if not whole:
        raise NoWholeReplicaError(
            "no replica is whole: the loss has interrupted a push of all ranks that are left "
            "halfway. Load a checkpoint; create(..., elastic=True) keeps replicas whole"
        )
    source = min(whole, key=lambda k: standings[k].steps)
    goal = standings[source]
    if {(one.updater, one.n_changes) for one in standings} != {(goal.updater, goal.n_changes)}:
        raise NoWholeReplicaError(
            "some ranks have loaded or set what others have not, as one was too late for it: load "
            "a checkpoint"
        )
    if all(one.is_whole and (one.steps, one.keys) == (goal.steps, goal.keys) for one in standings):
        store.levelled(goal)
        return
    keys = [key for key in goal.keys if all(key in one.keys for one in standings)]
    is_source = rank == source
    told = ranks.tell(store.told() if is_source else "")[source]
    for array in store.level(told, keys, is_source=is_source):
        transport.broadcast(array, source)
    transport.wait()
    store.levelled(goal)
