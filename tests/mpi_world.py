"""The ranks that run the suite together, and the exchange by which they agree.

Rules of this file
- Only private duplicates of COMM_WORLD are spoken on: a test owns COMM_WORLD itself.
- Waiting polls with short sleeps, because a rank that spins takes the core from one that works.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, TypeVar, final

import pytest

if TYPE_CHECKING:
    from mpi4py import MPI

T = TypeVar("T")

LONGEST_PAUSE_S: Final = 0.005
DIGEST_BYTES: Final = 8
SIZES_TOLD_BY_LAUNCHERS: Final = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")


class DifferentPlacesError(Exception):
    """Ranks came to one exchange from different places of the suite."""


@final
class World:
    """COMM_WORLD with private duplicates, or a single rank where no MPI can be loaded."""

    def __init__(self) -> None:
        self.rank, self.size = 0, 1
        self.comm: MPI.Intracomm | None = None
        self.why_no_mpi = ""
        try:
            from mpi4py import MPI
        except (ImportError, RuntimeError) as error:  # RuntimeError: mpi4py without an MPI
            self.why_no_mpi = f"no MPI can be loaded: {' '.join(str(error).split())}"
        else:
            self.comm = MPI.COMM_WORLD
            self.rank, self.size = self.comm.rank, self.comm.size
        self._check_launcher()
        self._outcomes = self.duplicate()
        self._shared = self.duplicate()

    def duplicate(self) -> MPI.Intracomm | None:
        """Return a private communicator of all ranks; None for a single rank."""
        return self.comm.Dup() if self.comm is not None and self.size > 1 else None

    def exchange(self, where: str, state: int, while_waiting: Callable[[], None]) -> list[int]:
        """Tell all ranks this one's state at `where` and return all states, by rank.

        `while_waiting` is called again and again until every rank has come.
        """
        if self._outcomes is None:
            return [state]
        digest = hashlib.blake2b(where.encode(), digest_size=DIGEST_BYTES).digest()
        mine = digest + bytes([state])
        everyone = bytearray(len(mine) * self.size)
        _poll(self._outcomes.Iallgather(mine, everyone), while_waiting)
        parts = [bytes(everyone[i : i + len(mine)]) for i in range(0, len(everyone), len(mine))]
        if any(part[:DIGEST_BYTES] != digest for part in parts):
            places = self._outcomes.allgather(where)
            listed = "".join(f"\n  rank {rank}: {place}" for rank, place in enumerate(places))
            raise DifferentPlacesError(f"the ranks are at different places of the suite:{listed}")
        return [part[DIGEST_BYTES] for part in parts]

    def gather(self, mine: T) -> list[T]:
        """Return every rank's object, by rank; only where all ranks are known to have come."""
        return [mine] if self._outcomes is None else self._outcomes.allgather(mine)

    def from_rank_0(self, mine: T) -> T:
        """Return rank 0's object; for fixtures, so that a failing one cannot upset `exchange`."""
        return mine if self._shared is None else self._shared.bcast(mine)

    def _check_launcher(self) -> None:
        """Refuse a launcher of another MPI, under which every process thinks that it is alone."""
        for name in SIZES_TOLD_BY_LAUNCHERS:
            started = os.environ.get(name, "")
            if started.isdigit() and int(started) != self.size:
                raise pytest.UsageError(
                    f"mpirun started {started} ranks ({name}), but this Python's MPI sees "
                    f"{self.size}: start it with the mpirun of the MPI that mpi4py loads "
                    f"({self.why_no_mpi or 'they are of different MPIs'})"
                )


def _poll(request: MPI.Request, while_waiting: Callable[[], None]) -> None:
    pause_s = 0.0
    while not request.Test():
        time.sleep(pause_s)
        pause_s = min(1.5 * pause_s + 1e-5, LONGEST_PAUSE_S)
        while_waiting()
