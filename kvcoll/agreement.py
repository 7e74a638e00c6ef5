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
stay, different ones become `_DIFFERENT`; flags are or-ed.
"""

from __future__ import annotations

import json
import struct
import time
from abc import ABC, abstractmethod
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import NoReturn, final

from .errors import RankLeftError, RanksDisagreeError, name_of, rebuild, text_of
from .transport.contract import Messenger

_STATE = struct.Struct("<QQQ")  # digest, number of the agreement, flags
_DIFFERENT = 1
_REFUSED = 2
_LEFT = 3
_FIRST_DIGEST = 16  # or-ed into every digest, so that none is one of the words above
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
    items : sequence of str
        The same in words, one part each; compared only when digests differ.
    """

    name: str
    digest: int
    items: Sequence[str] = field(default=(), repr=False)


@dataclass(frozen=True)
class Report:
    """What one rank says of itself once it is known that the ranks differ."""

    call: str
    items: tuple[str, ...] = ()
    error_name: str = ""
    error_text: str = ""
    left: bool = False

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
    def leave(self, why: str) -> Generator[None, None, Exception | None]:
        """Take leave of the other ranks, in steps that do not wait.

        Parameters
        ----------
        why : str
            For ranks that are at another call: what made this rank leave, or ``''``.

        Returns
        -------
        generator
            To be run until it ends; its value is the error that the other ranks
            raise because they did not leave, or None when all have left.
        """


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

    def leave(self, why: str) -> Generator[None, None, Exception | None]:
        """End at once."""
        yield from ()
        return None


@final
class AcrossRanks(Agreement):
    """The agreement of a distributed store.

    Cost: ``ceil(log2(size))`` exchanges of 24 bytes, some 1 to 2 microseconds each
    between ranks of one machine.
    """

    def __init__(self, messenger: Messenger) -> None:
        self._messenger = messenger
        topology = messenger.topology
        rank, size = topology.rank, topology.size
        self._rounds = [
            ((rank + 2**k) % size, (rank - 2**k) % size) for k in range((size - 1).bit_length())
        ]
        self._number = 0
        self._sent = bytearray(_STATE.size)
        self._received = bytearray(_STATE.size)

    def confirm(self, call: Call, flags: int = 0) -> int:
        """Compare digests; see `Agreement.confirm`."""
        digest, flags = self._join(call.digest | _FIRST_DIGEST, flags)
        if digest == _DIFFERENT:
            raise self._explain(Report(call.name, tuple(call.items)))
        return flags

    def refuse(self, call_name: str, error: Exception) -> NoReturn:
        """Raise what all ranks raise, from this rank's own error."""
        self._join(_REFUSED, 0)
        report = Report(call_name, (), name_of(error), text_of(error))
        raise self._explain(report) from error

    def tell(self, text: str) -> list[str]:
        """Gather the texts of all ranks."""
        return [
            raw.decode(errors="replace") for raw in self._all_texts(text.encode(errors="replace"))
        ]

    def leave(self, why: str) -> Generator[None, None, Exception | None]:
        """Take part in the next agreement as one that leaves; see `Agreement.leave`."""
        digest, number = _LEFT, self._number
        self._number += 1
        for dest, source in self._rounds:
            sent, received = bytearray(_STATE.pack(digest, number, 0)), bytearray(_STATE.size)
            pending = self._messenger.start_exchange(sent, received, dest, source)
            while not pending.done():
                yield
            digest = _joined(digest, number, received)[0]
        if digest != _DIFFERENT:
            return None
        farewell = self._messenger.start_all_gather(Report("close", (), "", why, True).encode())
        while not farewell.done():
            yield
        return verdict([Report.decode(raw) for raw in farewell.texts()])

    def _join(self, digest: int, flags: int) -> tuple[int, int]:
        number = self._number
        self._number = number + 1
        sent, received = self._sent, self._received
        exchange = self._messenger.exchange
        for dest, source in self._rounds:
            _STATE.pack_into(sent, 0, digest, number, flags)
            exchange(sent, received, dest, source)
            digest, theirs = _joined(digest, number, received)
            flags |= theirs
        # A rank that refuses differs also from one that refuses for the same reason.
        return (_DIFFERENT if digest == _REFUSED else digest), flags

    def _explain(self, mine: Report) -> Exception:
        return verdict([Report.decode(raw) for raw in self._all_texts(mine.encode())])

    def _all_texts(self, text: bytes) -> list[bytes]:
        pending = self._messenger.start_all_gather(text)
        while not pending.done():
            time.sleep(0)
        return pending.texts()


def _joined(digest: int, number: int, received: bytearray) -> tuple[int, int]:
    their_digest, their_number, their_flags = _STATE.unpack_from(received)
    equal = their_digest == digest and their_number == number
    return (digest if equal else _DIFFERENT), their_flags


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
        "the store is closed now"
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
