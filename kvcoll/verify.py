"""Do all ranks hold the same bits? Fingerprints compared, and one named error on every rank.

Rules of the file: every rank takes every step, and each makes the same of what all have told;
values, and the optimizer's states and master copies, count; what is a rank's own, as what
compression has left over, does not.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, final

from . import fingerprint
from .agreement import Agreement, Call, name_ranks
from .arrays import Array
from .errors import ArgumentError, ReplicasDifferError
from .history import History
from .place import Place
from .replica import Entry
from .schema import Key, digest
from .states import names_of
from .transport.contract import Transport
from .updater import Optimize, Updater

VOTE: Final = "vote"
NAME: Final = "verify()"
REPAIR_NAME: Final = f"verify(repair={VOTE!r})"
_HALF_BITS = 31  # two numbers of so many bits fit into the flags of an agreement
_HALF = 2**_HALF_BITS - 1
_SECOND_HALF = Call("the end of verify()", digest("verify", "second half"))
_SHOWN = 4


class Part:
    """A value, or a state of one, of a rank's replica.

    Attributes
    ----------
    name : str
        As in a checkpoint: ``value:w``, ``state0:w``, ``master:w``.
    entry : Entry
    flat : Array, shape (n,)
        Where the store's values lie.
    """

    def __init__(self, kind: str, entry: Entry, flat: Array, place: Place) -> None:
        self._place = place
        self.name = f"{kind}:{entry.spec.key}"
        self.entry, self.flat = entry, flat
        self._kind = kind

    def fingerprint(self) -> str:
        """Give the fingerprint of what it holds."""
        at_host = self._place.at_host(self.flat)
        return fingerprint.of(at_host, self.name, self.entry.spec.shape)

    def take(self, transport: Transport, root: int) -> None:
        """Take what a rank has, by way of the host; called by all ranks."""
        at_host = self._place.at_host(self.flat)
        transport.broadcast(at_host, root)
        if at_host is not self.flat:
            self._place.copy(at_host, self.flat)

    def __str__(self) -> str:
        key = f"key {self.entry.spec.key!r}"
        if self._kind == "value":
            return key
        if self._kind == "master":
            return f"the float32 master copy of {key}"
        return f"{self._kind} of the optimizer for {key}"


def parts_of(entries: Iterable[Entry], updater: Updater) -> list[Part]:
    """List all that must be the same on all ranks, key by key."""
    parts = []
    counts = updater.counts() if isinstance(updater, Optimize) else {}
    for entry in entries:
        parts.append(Part("value", entry, entry.flat, updater.place))
        if isinstance(updater, Optimize) and entry.spec.key in counts:
            names = names_of(updater.optimizer, entry.spec.dtype)
            states = zip(names, updater.states_of(entry), strict=True)
            parts += [Part(name, entry, state, updater.place) for name, state in states]
    return parts


def check_repair(repair: object) -> bool:
    """Say whether differences shall be repaired.

    Raises
    ------
    ArgumentError
        `repair` is something else than ``'vote'`` or None.
    """
    if repair is not None and repair != VOTE:
        raise ArgumentError(f"repair is {VOTE!r} or None, got {repair!r}")
    return repair is not None


@dataclass(frozen=True)
class _Difference:
    """What the ranks hold of one part."""

    part: Part
    root: int  # whose bits most ranks have; rank 0 if no bits are those of most
    is_tie: bool
    others: tuple[int, ...]
    first_push: int | None  # whose sample shows it

    def __str__(self) -> str:
        same = f"that of rank {self.root}" if self.is_tie else "that of most ranks"
        return f"{name_ranks(self.others)}: {self.part} is not {same}"


@final
class Verifier:
    """Compares the replicas of one store.

    Parameters
    ----------
    transport : Transport
        For arrays of the host.
    agreement : Agreement
    history : History or None
        Samples of the pushes, if they are taken.

    Attributes
    ----------
    verified : int
        After which push the replicas were the same for the last time.
    """

    def __init__(self, transport: Transport, agreement: Agreement, history: History | None) -> None:
        self.verified = 0
        self._transport, self._agreement, self._history = transport, agreement, history

    def trust(self, version: int) -> None:
        """Take note that the replicas are the same after so many pushes."""
        self.verified = version
        if self._history is not None:
            self._history.clear()

    def move(self, transport: Transport, agreement: Agreement) -> None:
        """Go on with other ranks; samples of pushes that some of them have taken back go."""
        self._transport, self._agreement = transport, agreement
        if self._history is not None:
            self._history.clear()

    def compare(
        self,
        parts: Sequence[Part],
        fingerprints: Mapping[str, str],
        updater: Updater,
        version: int,
        *,
        repair: bool,
    ) -> str:
        """Compare, and repair what differs if that is wanted; give the fingerprint of all.

        Parameters
        ----------
        parts : sequence of Part
            Of this rank; nothing that changes them is under way.
        fingerprints : mapping of str to str
            Theirs, by name.
        updater : Updater
        version : int
            How many pushes have been made.
        repair : bool

        Raises
        ------
        ReplicasDifferError
            On every rank.
        """
        name = REPAIR_NAME if repair else NAME
        call = Call(name, digest("verify", repair, version))
        whole = fingerprint.of_all(fingerprints)
        if self._are_same(call, whole):
            self.trust(version)
            return whole
        differences = self._differences(parts, fingerprints, updater)
        said = self._describe(differences, version)
        if not repair:
            raise ReplicasDifferError(
                f"{said}; call verify(repair={VOTE!r}) to give all ranks the bits of most of "
                "them, or go back to a checkpoint, and see to the memory of the machine"
            )
        for difference in differences:
            difference.part.take(self._transport, difference.root)
        whole = fingerprint.of_all({part.name: part.fingerprint() for part in parts})
        if not self._are_same(call, whole):
            raise ReplicasDifferError(f"{said}; a repair came to nothing: go back to a checkpoint")
        self.trust(version)
        if self._transport.topology.rank == 0:
            warnings.warn(f"{said}; {_repaired(differences)}", RuntimeWarning, stacklevel=4)
        return whole

    def _are_same(self, call: Call, whole: str) -> bool:
        """Say whether all ranks have this fingerprint, by 62 of its bits.

        Flags are or-ed: a bit that is set both among the bits of all and among their
        complements is not the same everywhere.
        """
        number = int(whole, 16)
        differ = 0
        for half, step in enumerate((call, _SECOND_HALF)):
            own = number >> half * _HALF_BITS & _HALF
            flags = self._agreement.confirm(step, own | (own ^ _HALF) << _HALF_BITS)
            differ |= flags & flags >> _HALF_BITS & _HALF
        return not differ

    def _differences(
        self, parts: Sequence[Part], fingerprints: Mapping[str, str], updater: Updater
    ) -> list[_Difference]:
        """Find what differs, that which differed first at the head."""
        own = [fingerprints[part.name] for part in parts]
        told = [json.loads(text) for text in self._agreement.tell(json.dumps(own))]
        differing = [k for k in range(len(parts)) if len({one[k] for one in told}) > 1]
        first = self._first_pushes([parts[k] for k in differing], updater)
        found = []
        for k in differing:
            root, is_tie = _voted([one[k] for one in told])
            others = tuple(rank for rank, one in enumerate(told) if one[k] != told[root][k])
            found.append(_Difference(parts[k], root, is_tie, others, first.get(parts[k].name)))
        return sorted(found, key=lambda one: (one.first_push is None, one.first_push or 0))

    def _first_pushes(self, parts: Sequence[Part], updater: Updater) -> dict[str, int]:
        """Find for each part the first push of which the ranks' samples differ, if one does."""
        if self._history is None:
            return {}
        wanted: dict[Key, list[str]] = {}
        for entry in {part.entry.spec.key: part.entry for part in parts}.values():
            names = [part.name for part in parts_of([entry], updater)]
            wanted[entry.spec.key] = names
        own = self._history.digests(updater, wanted)
        told = [json.loads(text) for text in self._agreement.tell(json.dumps(own))]
        first: dict[str, int] = {}
        for part in parts:
            samples = [dict(one.get(part.name, ())) for one in told]
            pushes = sorted(set.intersection(*map(set, samples)))
            shown = (n for n in pushes if len({of_rank[n] for of_rank in samples}) > 1)
            number = next(shown, None)
            if number is not None:
                first[part.name] = number
        return first

    def _describe(self, differences: Sequence[_Difference], version: int) -> str:
        """Say what differs, and since when."""
        shown = "; ".join(map(str, differences[:_SHOWN]))
        more = f"; and {len(differences) - _SHOWN} more" if len(differences) > _SHOWN else ""
        return f"the replicas differ, {self._when(differences[0], version)}: {shown}{more}"

    def _when(self, difference: _Difference, version: int) -> str:
        same = f"push {self.verified}" if self.verified else "init"
        last = version if difference.first_push is None else difference.first_push
        if last <= self.verified:
            return f"though no push has been made since {same}, after which they were the same"
        if last == self.verified + 1:
            return f"since push {last}"
        if difference.first_push is not None:
            return f"since push {last}, whose sample shows it, and the same after {same}"
        return f"since a push after {same} and not after push {last}"


def _voted(told: Sequence[str]) -> tuple[int, bool]:
    """Give the lowest rank that has what most ranks have; rank 0 and True on a tie."""
    counts = {one: told.count(one) for one in told}
    most = max(counts.values())
    leading = [one for one, n in counts.items() if n == most]
    return (told.index(leading[0]), False) if len(leading) == 1 else (0, True)


def _repaired(differences: Sequence[_Difference]) -> str:
    tied = sum(one.is_tie for one in differences)
    if not tied:
        return "all ranks hold now what most of them did"
    taken = "all ranks hold now what rank 0 did, as no bits were those of most ranks"
    if tied < len(differences):
        taken = f"all ranks hold now what most of them did or, of {tied} on a tie, what rank 0 did"
    return f"{taken}: that it was right is not known"
