"""Where this rank stands in one order of calls: that of a communicator, or of a late store.

Rules of the file: what is read here is written by the threads that call the stores, with no
lock and no clock; so each look takes what it sees as it is, and only what stays the same
from look to look counts as a wait.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Final, final

from ..agreement import AcrossRanks
from .bound import Learnt
from .settings import Watchdog

# Stances.
WAITS: Final = "waits"  # in an agreement: not all ranks have come to this call
INSIDE: Final = "inside"  # in the rest of a call: sums, copies, files
UPDATES: Final = "updates"  # in a function of the user's, that a push has called
OUTSIDE: Final = "outside"
LEFT: Final = "left"
ENDS: Final = "ends"  # its program has come to the end, and waits until the others take note

_MAY_WAIT: Final = (WAITS, INSIDE, ENDS)


@dataclass(frozen=True)
class Watched:
    """A store, as far as its watchdog sees it.

    Attributes
    ----------
    name : str
        For messages.
    settings : Watchdog or None
        None where this store's waits are nobody's business.
    calls : callable
        Gives how many calls of it have begun, and how many of these have ended.
    version : callable
        Gives how many pushes have been made.
    thread : callable
        Gives the number of the thread that calls it; None before the first call.
    beside : callable
        Gives the number of the thread in which its updates run, if that is another one.
    is_closed : callable
    """

    name: str
    settings: Watchdog | None
    calls: Callable[[], tuple[int, int]]
    version: Callable[[], int]
    thread: Callable[[], int | None]
    beside: Callable[[], int | None]
    is_closed: Callable[[], bool]


@dataclass(frozen=True)
class Position:
    """Where a rank stands; it travels between ranks.

    Attributes
    ----------
    entered, passed : int
        How many agreements it has come to, and how many it has passed.
    stance : str
        What it does.
    call : str
        The call of its last agreement, in words.
    of_push : bool
        Whether that call is a push.
    store : str
        Which store it is of, where there are several; or ``''``.
    version : int
        How many pushes of that store have been made.
    for_s : float
        For how long all this has been so.
    """

    entered: int
    passed: int
    stance: str
    call: str = ""
    of_push: bool = False
    store: str = ""
    version: int = 0
    for_s: float = 0.0

    def encode(self) -> dict[str, Any]:
        """Give what JSON holds."""
        return asdict(self)

    @classmethod
    def decode(cls, told: dict[str, Any]) -> Position:
        """Read what `encode` gave."""
        return cls(**told)

    @property
    def waits(self) -> bool:
        """Whether it may wait for other ranks."""
        return self.stance in _MAY_WAIT


@final
class Track:
    """One order of calls, as this rank goes through it.

    Parameters
    ----------
    ranks : AcrossRanks
        Whose agreements are in that order.
    settings : Watchdog
        For waits in no store: in `create`.
    is_beside : bool
        Whether the agreements are made in a thread beside the caller's, so that nobody
        waits for them but in a call of the store.
    is_lasting : bool
        Whether stores may still come when all are closed.
    """

    def __init__(
        self,
        ranks: AcrossRanks,
        settings: Watchdog,
        *,
        is_beside: bool = False,
        is_lasting: bool = False,
    ) -> None:
        self.ranks, self._is_beside, self._is_lasting = ranks, is_beside, is_lasting
        self._default = settings
        self.program_ends = False
        self._stores: list[Watched] = []
        self._had_stores = False
        self._learnt = Learnt()
        self._seen: tuple[object, ...] = ()
        self._entered = ranks.entered
        self._for_s = self._still_s = 0.0
        self._said_s = self._said_before_s = 0.0  # this wait was spoken of after so long

    def add(self, store: Watched) -> None:
        """Watch one more store; called in the thread of `create`."""
        self._stores = [*(one for one in self._stores if not one.is_closed()), store]
        self._had_stores = True
        if store.settings is not None:
            self._default = store.settings

    def look(self, elapsed_s: float) -> float:
        """See whether anything has moved.

        Parameters
        ----------
        elapsed_s : float
            Since the last look.

        Returns
        -------
        float
            For how long a wait has lasted that was spoken of and is over now; else 0.
        """
        store = self._inside
        stance = self._stance(store)
        calls = store.calls()[0] if store else 0
        seen = (self.ranks.entered, self.ranks.passed, stance, calls)
        entered = self.ranks.entered
        if entered == self._entered:
            self._still_s += elapsed_s
        else:
            self._learnt.passed(entered - self._entered, self._still_s)
            self._entered, self._still_s = entered, 0.0
        if seen == self._seen:
            self._for_s += elapsed_s
            return 0.0
        over_s = self._for_s if self._said_s else 0.0
        self._seen, self._for_s = seen, 0.0
        self._said_s = self._said_before_s = 0.0
        return over_s

    def position(self) -> Position:
        """Say where this rank stands."""
        store, call = self._inside, self.ranks.call
        stance = self._stance(store)
        shown = store or (self._stores[-1] if self._stores else None)
        several = len(self._stores) > 1 or self._is_beside
        return Position(
            self.ranks.entered,
            self.ranks.passed,
            stance,
            "" if call is None else call.name,
            call is not None and call.is_push,
            shown.name if shown and several else "",
            shown.version() if shown else 0,
            self._for_s,
        )

    def has_waited(self) -> float:
        """Say for how long this rank has waited, if it is to be spoken of at all; else 0."""
        store = self._inside
        watched = store is None or store.settings is not None
        return self._for_s if watched and self._stance(store) in _MAY_WAIT else 0.0

    def is_due(self) -> bool:
        """Say whether it is time to speak of this rank's wait, for the first time or again."""
        if not self.has_waited():
            return False
        if self._said_s:
            return self._for_s >= 2 * self._said_s
        call = self.ranks.call
        of_push = call is not None and call.is_push and not self.program_ends
        return self._for_s >= self._learnt.bound_s(self.settings, of_push=of_push)

    def is_beyond_limit(self) -> bool:
        """Say whether this rank has waited for longer than it may."""
        limit_s = self.settings.limit_s
        if self.program_ends:  # the others may well have something else to do
            return False
        return limit_s is not None and self.has_waited() >= limit_s

    def was_spoken_of(self) -> None:
        """Note that this wait has been spoken of, whichever rank it was due on."""
        self._said_before_s = self._said_s
        if self.has_waited():
            self._said_s = max(self._for_s, 1e-3)

    def was_not_spoken_of(self) -> None:
        """Take the last note of that kind back."""
        self._said_s = self._said_before_s

    @property
    def settings(self) -> Watchdog:
        """Those of the store whose call it is."""
        store = self._inside
        return (store.settings if store else None) or self._default

    @property
    def is_over(self) -> bool:
        """Whether there will be nothing more to see."""
        self._stores = [store for store in self._stores if not store.is_closed()]
        are_closed = self._had_stores and not self._stores and not self._is_lasting
        return are_closed or self.ranks.is_over

    @property
    def thread(self) -> int | None:
        """The thread that calls the stores, or in which the user's code runs for them."""
        is_held = self.ranks.is_held
        idents = [(store.beside() if is_held else None) or store.thread() for store in self._stores]
        return next((ident for ident in idents if ident is not None), None)

    @property
    def _inside(self) -> Watched | None:
        for store in self._stores:
            begun, ended = store.calls()
            if begun != ended:
                return store
        return None

    def _stance(self, store: Watched | None) -> str:
        if self.ranks.is_over:
            return LEFT
        if self.ranks.is_held:
            return UPDATES
        if self.ranks.is_leaving:  # behind the program, or at its end
            return ENDS if self.program_ends else OUTSIDE
        if self.ranks.entered > self.ranks.passed and (store or not self._is_beside):
            return WAITS
        return INSIDE if store else OUTSIDE
