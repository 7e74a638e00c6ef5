"""Do all ranks mean the same call? One digest, and one named error on every rank.

Before a collective moves data the ranks compare 64-bit digests of what each of them
is about to do. Equal digests cost a message or two; on a difference all ranks learn
it at the same place, exchange descriptions, and raise the same error.

Rules of the file: every rank takes part in every agreement, also the one that has
found a mistake in its own call, and the one that ends; nothing may fail between an
agreement and the collective that follows it.

The comparison is a dissemination (Hensgen, Finkel, Manber 1988): in round k each
rank tells rank + 2^k what it has seen, so after ceil(log2(size)) rounds each rank
knows the join of all. That is exact because the join is idempotent: equal digests
stay, different ones become `_DIFFERENT`; flags are or-ed. A rank that has joined, and
takes part in whatever the others do, is below every digest: it takes theirs. Then one of
them says in words what it is, and the ranks agree once more.
"""

from __future__ import annotations

import json
import struct
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NoReturn, final

from .errors import (
    RankLeftError,
    RanksDisagreeError,
    ThreadError,
    WaitEndedError,
    name_of,
    rebuild,
    text_of,
)
from .transport.alarm import Alarm
from .transport.contract import Messenger

_STATE = struct.Struct("<QQQ")  # digest, number of the agreement, flags
_DIFFERENT = 1
_REFUSED = 2
_LEFT = 3
_JOINED = 4
_FIRST = 16  # or-ed into every other digest, so that none is one of the words above
_CLOSE = 0x5AFE5C105ED00000
_CAME_THROUGH = 0x5E771ED0CA110000
_FIRST_NAP_S, _LONGER, _LONGEST_NAP_S = 1e-5, 1.3, 2e-3
_STORE_STEP = 0x9E3779B97F4A7C15 & ~31  # leaves the words above what they are
_MASK = 2**64 - 1
_SOME_JOINED = 1 << 63  # a flag
_EXIT = "exit"
_SHOWN_GROUPS = 6


@dataclass(frozen=True)
class Call:
    """What a rank is about to do.

    Attributes
    ----------
    name : str
        The method, for messages: ``'push'``.
    digest : int
        64 bits over everything that must be equal on all ranks.
    items : iterable of str
        The same in words, one part each; written and compared only when digests differ.
    keys : tuple, optional
        For ranks that have joined: the key or list of keys that is pushed, and those of
        them of which only rows are pushed.
    ends_push : bool
        Whether it is what the ranks agree on after the updates of a push: part of that.
    is_of_files : bool
        Whether a rank may come late to it since it works with a file.
    """

    name: str
    digest: int
    items: Iterable[str] = field(default=(), repr=False)
    keys: Any = field(default=None, repr=False)
    ends_push: bool = field(default=False, repr=False)
    is_of_files: bool = field(default=False, repr=False)

    @property
    def is_push(self) -> bool:
        """Whether it is a push."""
        return self.keys is not None


_END_OF_JOIN = Call("the end of join()", _JOINED)


@dataclass(frozen=True)
class Report:
    """What one rank says of itself once it is known that the ranks differ."""

    call: str
    items: tuple[str, ...] = ()
    error_name: str = ""
    error_text: str = ""
    left: bool = False

    @property
    def left_quietly(self) -> bool:
        """Whether the rank has left, and nothing was wrong."""
        return self.left and not self.error_text

    def encode(self) -> bytes:
        """Write it as JSON: it comes from a peer, so nothing in it can run."""
        return json.dumps(
            [self.call, self.items, self.error_name, self.error_text, self.left]
        ).encode("utf-8", "surrogatepass")

    @classmethod
    def decode(cls, raw: bytes) -> Report:
        """Read what `encode` wrote."""
        call, items, name, text, left = json.loads(raw.decode("utf-8", "surrogatepass"))
        return cls(call, tuple(items), name, text, left)


class Agreement(ABC):
    """Whether the ranks of a store are at the same call."""

    @abstractmethod
    def confirm(self, call: Call, flags: int = 0) -> int:
        """Return once it is known that all ranks make this call.

        Parameters
        ----------
        call : Call
        flags : int, optional
            Bits that may differ between ranks.

        Returns
        -------
        int
            The flags of all ranks, or-ed.

        Raises
        ------
        KVCollError
            The ranks differ; the same error on every rank.
        """

    @abstractmethod
    def refuse(self, call_name: str, error: Exception) -> NoReturn:
        """Tell the others that this rank's call is wrong; all raise the same error."""

    @abstractmethod
    def tell(self, text: str) -> list[str]:
        """Tell all ranks a text; give those of all, by rank. All ranks call it."""

    @abstractmethod
    def serve(self) -> Call | None:
        """Wait for the next call of the ranks that have not joined.

        Returns
        -------
        Call or None
            What they do, with `name` and `keys` only; this rank then does the same. None
            when all ranks have joined.

        Raises
        ------
        KVCollError
            As `confirm`.
        """

    @property
    @abstractmethod
    def num_active(self) -> int:
        """How many ranks had not joined at the last push."""

    @abstractmethod
    def close(self) -> None:
        """Agree that the store is closed, on all ranks.

        Raises
        ------
        KVCollError
            The ranks differ. Ranks that have ended without a word count as agreed.
        """

    @abstractmethod
    def leave(self, why: str) -> Generator[None, None, Exception | None]:
        """Take leave of the other ranks, in steps that do not wait; a store is open no more.

        Parameters
        ----------
        why : str
            For ranks that are at another call: what made this rank leave, or ``''``.

        Returns
        -------
        generator
            To be run until it ends; its value is the error that the other ranks raise
            because they did not leave, or None when all have left.
        """

    @abstractmethod
    def held(self) -> AbstractContextManager[None]:
        """Refuse, in a with-block, all agreements of this rank: the user's code runs."""

    @abstractmethod
    def atomic(self) -> AbstractContextManager[None]:
        """Let a with-block of all ranks, whose agreements are in it, end on all or on none.

        A rank may be lost when some have come through the last agreement, and others are
        still in it: then it ends with the loss's error on all that are left. What it
        changes for good is to be changed after it.
        """

    @property
    @abstractmethod
    def n_settled(self) -> int:
        """How many such blocks this rank has come through, of all stores that agree together."""

    @property
    @abstractmethod
    def ended(self) -> str:
        """Why no rank can be asked any more, or ``''``."""


@final
class Alone(Agreement):
    """The agreement of a store in one process: a mistake is raised as it is."""

    def confirm(self, call: Call, flags: int = 0) -> int:
        """Return at once."""
        return flags

    def refuse(self, call_name: str, error: Exception) -> NoReturn:
        """Raise the error."""
        raise error

    def tell(self, text: str) -> list[str]:
        """Give the one text there is."""
        return [text]

    def serve(self) -> Call | None:
        """Return at once: there are no others."""
        return None

    @property
    def num_active(self) -> int:
        """One."""
        return 1

    def close(self) -> None:
        """Return at once."""

    def leave(self, why: str) -> Generator[None, None, Exception | None]:
        """End at once."""
        yield from ()
        return None

    def held(self) -> AbstractContextManager[None]:
        """Do nothing."""
        return nullcontext()

    def atomic(self) -> AbstractContextManager[None]:
        """Do nothing."""
        return nullcontext()

    @property
    def n_settled(self) -> int:
        """None: nothing can come between."""
        return 0

    @property
    def ended(self) -> str:
        """Never anything."""
        return ""


@final
class AcrossRanks(Agreement):
    """The agreement of all distributed stores of one communicator.

    They share it, so that the calls of all of them are in one order on all ranks, and a
    rank that is at another store is named like one that is at another key. Cost:
    ``ceil(log2(size))`` exchanges of 24 bytes, some 1 to 2 microseconds each between
    ranks of one machine.

    Parameters
    ----------
    messenger : Messenger
    alarm : Alarm or None, default None
        Why no rank need be asked any more.
    idle : callable, optional
        Called over and over while a farewell is under way; it may push that on.
    one_error_ends : bool, default False
        Whether after an error no rank can be asked any more: where the ranks do not raise
        it at the same place, they could not go on together.
    """

    def __init__(
        self,
        messenger: Messenger,
        alarm: Alarm | None = None,
        idle: Callable[[], None] | None = None,
        *,
        one_error_ends: bool = False,
    ) -> None:
        self._one_error_ends = one_error_ends
        self._messenger = messenger
        self._alarm = alarm or Alarm()
        self._idle = idle or _nap
        self._is_held = False
        topology = messenger.topology
        rank, size = topology.rank, topology.size
        self._rounds = [
            ((rank + 2**k) % size, (rank - 2**k) % size) for k in range((size - 1).bit_length())
        ]
        self._number = 0
        self.call: Call | None = None  # of the last agreement; for a watchdog, as `passed` is
        self.passed = 0
        self._num_active = self._size = size
        self._n_stores = self._n_settled = 0
        self._open: set[int] = set()
        self._ended = ""
        self.is_final = False  # whether a rank has ended, and not just left its stores
        self._leaving: deque[object] = deque()
        self._sent = bytearray(_STATE.size)
        self._received = bytearray(_STATE.size)

    def of_store(self) -> Agreement:
        """Give the agreement of one more store."""
        self._n_stores += 1
        self._open.add(self._n_stores)
        return _OfStore(self, self._n_stores)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Refuse agreements in a with-block; see `Agreement.held`."""
        before, self._is_held = self._is_held, True
        try:
            yield
        finally:
            self._is_held = before

    @contextmanager
    def atomic(self, store: int = 0) -> Iterator[None]:
        """Let a with-block end on all ranks or on none; see `Agreement.atomic`."""
        if not self._messenger.settles:
            yield
            return
        try:
            yield
            # A rank that has left, or is at another call, is told here: it settles nothing.
            name = self.call.name if self.call is not None else "a call"
            self.confirm(Call(f"the end of {name}", _CAME_THROUGH), store=store)
        except WaitEndedError:
            self._settle(came_through=False)
            raise
        self._settle(came_through=True)
        self._n_settled += 1

    @property
    def n_settled(self) -> int:
        """How many such blocks this rank has come through."""
        return self._n_settled

    def _settle(self, *, came_through: bool) -> None:
        settling = self._messenger.start_settling(came_through)
        self._number += 1
        try:
            _wait_for(settling.done)
        except BaseException:
            settling.give_up()
            raise
        finally:
            self.passed = self._number
        if came_through:
            settling.check()

    @property
    def n_stores(self) -> int:
        """How many stores there have been: the number of the last one."""
        return self._n_stores

    @property
    def entered(self) -> int:
        """How many agreements this rank has come to; it has `passed` all, or all but one."""
        return self._number

    @property
    def is_over(self) -> bool:
        """Whether there can be no more agreement: a rank has left, or waiting was ended."""
        return bool(self._ended) or self._alarm.error is not None

    @property
    def is_leaving(self) -> bool:
        """Whether a farewell is under way."""
        return bool(self._leaving)

    @property
    def is_held(self) -> bool:
        """Whether the user's code runs in the midst of a push."""
        return self._is_held

    @property
    def has_open_store(self) -> bool:
        """Whether a store uses it."""
        return bool(self._open)

    @property
    def num_active(self) -> int:
        """How many ranks had not joined at the last push, of whatever store."""
        return self._num_active

    def settle(self) -> None:
        """Wait for farewells that are under way."""
        while self._leaving:
            self._idle()

    @property
    def ended(self) -> str:
        """Which rank has left, so that there can be no more agreement; or ``''``."""
        return self._ended

    def confirm(self, call: Call, flags: int = 0, store: int = 0) -> int:
        """Compare digests; see `Agreement.confirm`."""
        if not call.ends_push:
            self.call = call
        own = (call.digest + store * _STORE_STEP) & _MASK | _FIRST
        digest, joined = self._join(own, flags, is_patient=call.is_of_files)
        if joined & _SOME_JOINED:
            digest, joined = self._with_joined(digest, own, flags, call, store)
        elif call.keys is not None:
            self._num_active = self._size
        if digest == _DIFFERENT:
            raise self._verdict(Report(self._named(call.name, store), tuple(call.items)))
        return joined

    def serve(self, store: int = 0) -> Call | None:
        """Take part in the next agreement as one that has joined; see `Agreement.serve`."""
        self.call = _END_OF_JOIN
        digest, _ = self._join(_JOINED, _SOME_JOINED)
        if digest == _DIFFERENT:
            raise self._verdict(Report(self._named(_END_OF_JOIN.name, store)))
        if digest == _JOINED:
            return None
        told = [json.loads(raw) for raw in self._all_texts(b"null")]
        name, keys, its_store = next(one for one in told if one is not None)
        if its_store != store:
            name, keys = f"{name} of another store", None
        if keys is not None:
            self._num_active = sum(one is not None for one in told)
        return Call(name, 0, (), keys)

    def refuse(self, call_name: str, error: Exception, store: int = 0) -> NoReturn:
        """Raise what all ranks raise, from this rank's own error."""
        self.call = Call(call_name, _REFUSED)
        self._join(_REFUSED, 0)
        call = self._named(call_name, store)
        raise self._verdict(Report(call, (), name_of(error), text_of(error))) from error

    def tell(self, text: str) -> list[str]:
        """Gather the texts of all ranks."""
        return [
            raw.decode(errors="replace") for raw in self._all_texts(text.encode(errors="replace"))
        ]

    def close(self, store: int = 0) -> None:
        """Agree that a store is closed; see `Agreement.close`."""
        if self._ended:
            return
        self.call = Call("close()", 0)
        own = (_CLOSE + store * _STORE_STEP) & _MASK | _FIRST
        digest, joined = self._join(own, 0)
        if joined & _SOME_JOINED:
            digest, _ = self._with_joined(digest, own, 0, self.call, store)
        if digest == _DIFFERENT:
            mine = Report(self._named("close()", store))
            reports = self._reports(mine)
            if any(not (report == mine or report.left_quietly) for report in reports):
                raise self._judged(reports)
            self._judged(reports)
        self._open.discard(store)

    def leave(self, why: str, store: int = 0) -> Generator[None, None, Exception | None]:
        """Take part in the next agreement as one that leaves; see `Agreement.leave`."""
        self._open.discard(store)  # now: how far the steps have come differs between ranks
        return self._leave_in_turn(why, store)

    def _leave_in_turn(self, why: str, store: int) -> Generator[None, None, Exception | None]:
        turn = object()
        self._leaving.append(turn)
        while self._leaving[0] is not turn:
            yield
        try:
            if self._ended or self._alarm.error is not None:  # nobody can be told
                return None
            return (yield from self._leave(why, store))
        finally:
            self._leaving.remove(turn)

    def _leave(self, why: str, store: int) -> Generator[None, None, Exception | None]:
        digest = (_LEFT + store * _STORE_STEP) & _MASK
        number = self._number
        self._number += 1
        self.passed = self._number  # nobody waits here: the program goes on, or ends
        for dest, source in self._rounds:
            sent, received = bytearray(_STATE.pack(digest, number, 0)), bytearray(_STATE.size)
            pending = self._messenger.start_exchange(sent, received, dest, source)
            while not pending.done():
                yield
            digest = _joined(digest, number, received)[0]
        if digest != _DIFFERENT:
            return None
        mine = Report("leave" if store else _EXIT, (), "", why, True)
        farewell = self._messenger.start_all_gather(mine.encode())
        while not farewell.done():
            yield
        return self._judged([Report.decode(raw) for raw in farewell.texts()])

    def _with_joined(
        self, digest: int, own: int, flags: int, call: Call, store: int
    ) -> tuple[int, int]:
        """Tell ranks that have joined what the call is, and agree once more."""
        if digest == _DIFFERENT:
            return digest, 0
        texts = self._all_texts(json.dumps([call.name, call.keys, store]).encode())
        if call.keys is not None:
            self._num_active = sum(text != b"null" for text in texts)
        return self._join(own, flags)

    def _join(self, digest: int, flags: int, *, is_patient: bool = False) -> tuple[int, int]:
        if self._is_held:
            raise ThreadError(
                "an updater may pull, but must not init, push, set, wait or close, "
                "whichever the store: the ranks are in the middle of a push"
            )
        if self._leaving:  # what another store has begun to say comes first
            self.settle()
        if self._ended:
            raise RankLeftError(self._ended)
        if self._alarm.error is not None:
            self._alarm.check()
        number = self._number
        self._number = number + 1
        sent, received = self._sent, self._received
        exchange = self._exchange_patiently if is_patient else self._messenger.exchange
        try:
            for dest, source in self._rounds:
                _STATE.pack_into(sent, 0, digest, number, flags)
                exchange(sent, received, dest, source)
                digest, theirs = _joined(digest, number, received)
                flags |= theirs
        finally:
            self.passed = number + 1
        return digest, flags

    def _exchange_patiently(
        self, sent: bytearray, received: bytearray, dest: int, source: int
    ) -> None:
        """Exchange, and leave the core to others meanwhile.

        Ranks that wait by offering their cores to one another, where there are more ranks than
        cores, kept Linux 6.18 from syncing the file for which they waited, for a minute.
        """
        _wait_for(self._messenger.start_exchange(sent, received, dest, source).done)

    def _verdict(self, mine: Report) -> Exception:
        return self._judged(self._reports(mine))

    def _reports(self, mine: Report) -> list[Report]:
        return [Report.decode(raw) for raw in self._all_texts(mine.encode())]

    def _judged(self, reports: list[Report]) -> Exception:
        error = verdict(reports)
        if isinstance(error, RankLeftError):
            self._ended = str(error)
            self.is_final = any(report.left and report.call == _EXIT for report in reports)
        elif self._one_error_ends:
            self._ended = str(error)
        return error

    def _all_texts(self, text: bytes) -> list[bytes]:
        pending = self._messenger.start_all_gather(text)
        while not pending.done():
            time.sleep(0)
        return pending.texts()

    def _named(self, call_name: str, store: int) -> str:
        return f"{call_name} of store {store}" if store and len(self._open) > 1 else call_name


@final
class _OfStore(Agreement):
    """One store's share of the agreement of its communicator."""

    def __init__(self, ranks: AcrossRanks, number: int) -> None:
        self._ranks = ranks
        self._number = number

    def confirm(self, call: Call, flags: int = 0) -> int:
        return self._ranks.confirm(call, flags, self._number)

    def refuse(self, call_name: str, error: Exception) -> NoReturn:
        self._ranks.refuse(call_name, error, self._number)

    def tell(self, text: str) -> list[str]:
        return self._ranks.tell(text)

    def serve(self) -> Call | None:
        return self._ranks.serve(self._number)

    @property
    def num_active(self) -> int:
        return self._ranks.num_active

    def close(self) -> None:
        self._ranks.close(self._number)

    def leave(self, why: str) -> Generator[None, None, Exception | None]:
        return self._ranks.leave(why, self._number)

    def held(self) -> AbstractContextManager[None]:
        return self._ranks.held()

    def atomic(self) -> AbstractContextManager[None]:
        return self._ranks.atomic(self._number)

    @property
    def n_settled(self) -> int:
        return self._ranks.n_settled

    @property
    def ended(self) -> str:
        return self._ranks.ended


def _nap() -> None:
    time.sleep(1e-4)


def _wait_for(done: Callable[[], bool]) -> None:
    """Wait, and leave the core to others meanwhile."""
    nap_s = _FIRST_NAP_S
    while not done():
        try:
            time.sleep(nap_s)
        except BaseException:  # of a signal's handler: the others count on this rank
            while not done():
                time.sleep(nap_s)
            raise
        nap_s = min(_LONGER * nap_s, _LONGEST_NAP_S)


def _joined(digest: int, number: int, received: bytearray) -> tuple[int, int]:
    their_digest, their_number, their_flags = _STATE.unpack_from(received)
    if their_number != number:
        return _DIFFERENT, their_flags
    if their_digest == digest or (their_digest == _JOINED and digest & _FIRST):
        return digest, their_flags
    if digest == _JOINED and their_digest & _FIRST:
        return their_digest, their_flags
    return _DIFFERENT, their_flags


def verdict(reports: list[Report]) -> Exception:
    """Make of all ranks' reports the one error that each of them raises.

    Parameters
    ----------
    reports : list of Report
        By rank.
    """
    if any(report.left for report in reports):
        return RankLeftError(_who_left(reports))
    wrong = [report for report in reports if report.error_name]
    if not wrong:
        return RanksDisagreeError(_who_called_what(reports))
    if len(wrong) == len(reports) and len(set(wrong)) == 1:
        return rebuild(wrong[0].error_name, wrong[0].error_text)
    texts = [report.error_text if report.error_name else "" for report in reports]
    said = "; ".join(f"{ranks}: {text}" for text, ranks in _groups(texts) if text)
    return rebuild(wrong[0].error_name, said)


def _who_left(reports: list[Report]) -> str:
    gone = [
        (f" ({report.error_text})" if report.error_text else "") if report.left else "-"
        for report in reports
    ]
    here = ["-" if report.left else report.call for report in reports]
    left = ", ".join(f"{ranks} left the store{why}" for why, ranks in _groups(gone) if why != "-")
    stayed = ", ".join(f"{ranks} called {call}" for call, ranks in _groups(here) if call != "-")
    return (
        f"{left}, while {stayed}: all ranks must make the same number of calls; "
        "the stores of these ranks are closed now"
    )


def _who_called_what(reports: list[Report]) -> str:
    if len({report.call for report in reports}) > 1:
        return _disagree([report.call for report in reports])
    call = reports[0].call
    lengths = {len(report.items) for report in reports}
    for number in range(min(lengths)):
        parts = [report.items[number] for report in reports]
        if len(set(parts)) > 1:
            return _disagree([f"{call} with {part}" for part in parts])
    if len(lengths) > 1:
        return _disagree([f"{call} with {len(report.items)} keys" for report in reports])
    return _disagree([f"{call} after another number of calls" for _ in reports])


def _disagree(said: list[str]) -> str:
    groups = _groups(said)
    shown = ", ".join(f"{ranks} called {what}" for what, ranks in groups[:_SHOWN_GROUPS])
    more = f", and {len(groups) - _SHOWN_GROUPS} other ways" if len(groups) > _SHOWN_GROUPS else ""
    return f"the ranks disagree: {shown}{more}; every rank must make the same calls in one order"


def _groups(said: list[str]) -> list[tuple[str, str]]:
    """Name together the ranks that say the same, in the order of the ranks."""
    ranks_of: dict[str, list[int]] = {}
    for rank, what in enumerate(said):
        ranks_of.setdefault(what, []).append(rank)
    return [(what, name_ranks(ranks)) for what, ranks in ranks_of.items()]


def name_ranks(ranks: Sequence[int]) -> str:
    """Write ranks as messages do: ``rank 1``, or ``ranks 0, 2``."""
    shown = ", ".join(map(str, ranks[:8])) + (", …" if len(ranks) > 8 else "")
    return f"rank {shown}" if len(ranks) == 1 else f"ranks {shown}"
