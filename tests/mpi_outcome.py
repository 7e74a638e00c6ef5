"""Makes one test report of what each rank saw of one phase of a test; pure, no MPI."""

from __future__ import annotations

from enum import IntEnum
from typing import Final, NamedTuple, final

import pytest
from _pytest._code.code import ReprFileLocation, TerminalRepr
from _pytest._io import TerminalWriter

STRICT_XPASS: Final = "[XPASS(strict)]"


class State(IntEnum):
    """How a phase ended on one rank; the highest of all ranks decides for all."""

    PASSED = 0
    SKIPPED = 1
    XPASSED = 2  # ended well though marked as a strict xfail
    XFAILED = 3  # an expected failure is one on whichever rank it comes
    FAILED = 4


class Account(NamedTuple):
    """What one rank has to say about a phase of a test; it travels between ranks."""

    state: State
    place: tuple[str, int]
    message: str
    text: str
    sections: list[tuple[str, str]]


@final
class RankReports(TerminalRepr):
    """The failure texts of some ranks, each named; equal texts are shown once."""

    def __init__(self, texts: dict[int, str], size: int, place: tuple[str, int], message: str):
        self._texts = texts
        self._size = size
        self.reprcrash = ReprFileLocation(*place, f"{named(list(texts), size)}: {message}")

    def toterminal(self, tw: TerminalWriter) -> None:
        """Write the texts, each under the ranks that sent it."""
        for text in dict.fromkeys(self._texts.values()):
            ranks = [rank for rank, of_rank in self._texts.items() if of_rank == text]
            tw.sep("-", named(ranks, self._size), bold=True)
            for line in text.splitlines():
                tw.line(line, red=line.startswith("E "), bold=line.startswith("E "))


def named(ranks: list[int], size: int) -> str:
    """Name ranks for a reader: `rank 1 of 3`, `ranks 0, 2 of 3`."""
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))} of {size}"


def state_of(report: pytest.TestReport | pytest.CollectReport) -> State:
    """Return how this rank's own report ended."""
    if report.failed:
        strict_xpass = str(report.longrepr).startswith(STRICT_XPASS)
        return State.XPASSED if strict_xpass else State.FAILED
    if report.skipped:
        return State.XFAILED if hasattr(report, "wasxfail") else State.SKIPPED
    return State.PASSED


def account_of(report: pytest.TestReport) -> Account:
    """Return what this rank tells the others about its own report."""
    place, message = (report.location[0], (report.location[1] or 0) + 1), ""
    crash = getattr(report.longrepr, "reprcrash", None)
    if crash is not None:
        place, message = (crash.path, crash.lineno), crash.message
    elif isinstance(report.longrepr, tuple):
        place, message = (report.longrepr[0], report.longrepr[1]), report.longrepr[2]
    elif report.longrepr is not None:
        message = report.longreprtext
    return Account(state_of(report), place, message, report.longreprtext, report.sections)


def merge(report: pytest.TestReport, accounts: list[Account]) -> None:
    """Turn one rank's report into the report of all ranks, the same on each."""
    size, verdict = len(accounts), max(account.state for account in accounts)
    decisive = {rank: one for rank, one in enumerate(accounts) if one.state is verdict}
    place, message = next((one.place, one.message) for one in decisive.values())
    if verdict is State.SKIPPED:
        where = "" if len(decisive) == size else f" (only on {named(list(decisive), size)})"
        report.outcome, report.longrepr = "skipped", (*place, message + where)
        return
    texts = {rank: one.text for rank, one in decisive.items()}
    report.longrepr = RankReports(texts, size, place, message)
    report.sections = [
        (f"{title} on rank {rank}", text)
        for rank, one in enumerate(accounts)
        for title, text in one.sections
    ]
    if verdict is State.XFAILED:
        report.outcome = "skipped"
        report.wasxfail = getattr(report, "wasxfail", f"only on {named(list(decisive), size)}")
    else:
        report.outcome = "failed"
        report.__dict__.pop("wasxfail", None)
