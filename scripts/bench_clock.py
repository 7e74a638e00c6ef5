"""How several ways to do one job are timed side by side: round after round, each way in each round.

Rules of the file: every rank makes the same calls; a barrier stands before each
sample; the slowest rank's time counts; what drifts on the machine meets all ways alike.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Any, final

import numpy as np
from bench_peer import Peer

if TYPE_CHECKING:
    from mpi4py import MPI

_TRIALS, _TRIAL_CALLS = 5, 2
_MOST_CALLS = 10_000


@dataclass(frozen=True)
class Job:
    """What all ways of a case do.

    Attributes
    ----------
    case : str
        'barrier', 'key', 'keys' or 'resnet50'.
    title : str
        As people read it.
    n_keys, n_elements : int
        In all; the elements are float32.
    """

    case: str
    title: str
    n_keys: int
    n_elements: int
    dtype: str = "float32"

    @property
    def n_bytes(self) -> int:
        """How many bytes a rank's values have."""
        return 4 * self.n_elements


@dataclass(frozen=True)
class Pace:
    """How long to measure.

    Attributes
    ----------
    sample_s : float
        A sample is as many calls as take about this long.
    budget_s : float
        About how long all samples of a case may take.
    least_rounds, most_rounds : int
    """

    sample_s: float
    budget_s: float
    least_rounds: int
    most_rounds: int


class Way(ABC):
    """One way to do a job.

    Parameters
    ----------
    name : str
    role : str
        'kvcoll', or in whose column of ratios it stands: 'raw', 'by hand', 'torch', 'MXNet'.
    """

    def __init__(self, name: str, role: str) -> None:
        self.name, self.role = name, role

    @abstractmethod
    def time(self, calls: int) -> float:
        """Do it so many times; give the seconds that one took on this rank."""

    @abstractmethod
    def check(self) -> None:
        """Raise if the first call gave a wrong result."""


@final
class OwnWay(Way):
    """A way that the benchmark's own ranks go.

    Parameters
    ----------
    name, role
        As for `Way`.
    call : callable
        Does the job once.
    is_right : callable, optional
        Says whether the first call did what it should.
    """

    def __init__(
        self,
        name: str,
        role: str,
        call: Callable[[], None],
        is_right: Callable[[], bool] = lambda: True,
    ) -> None:
        super().__init__(name, role)
        self._call, self._is_right = call, is_right

    def time(self, calls: int) -> float:
        """Call it; see `Way.time`."""
        call = self._call
        began_s = perf_counter()
        for _ in range(calls):
            call()
        return (perf_counter() - began_s) / calls

    def check(self) -> None:
        """Compare with arithmetic; see `Way.check`."""
        if not self._is_right():
            raise AssertionError(f"{self.name} gave a wrong sum: its time would mean nothing")


@final
class PeerWay(Way):
    """A way that another program goes; see `Peer.time` for the request."""

    def __init__(self, name: str, role: str, peer: Peer, request: dict[str, Any]) -> None:
        super().__init__(name, role)
        self._peer, self._request = peer, request

    def time(self, calls: int) -> float:
        """Ask the peer; see `Way.time`."""
        return self._peer.time(self._request | {"calls": calls})

    def check(self) -> None:
        """Trust the peer; see `Way.check`."""


@dataclass(frozen=True)
class Result:
    """What one way took.

    Attributes
    ----------
    job : Job
    way, role : str
    warm_up : int
        How many calls went before the first sample.
    calls : int
        How many calls a sample is the mean of.
    samples_s : tuple of float
        Seconds a call, one a round, on the slowest rank.
    """

    job: Job
    way: str
    role: str
    warm_up: int
    calls: int
    samples_s: tuple[float, ...]

    @property
    def quartiles_s(self) -> tuple[float, float, float]:
        """The lower quartile, the median and the upper quartile."""
        low, median, high = np.percentile(self.samples_s, [25, 50, 75])
        return float(low), float(median), float(high)

    @property
    def median_s(self) -> float:
        """The median of the samples."""
        return self.quartiles_s[1]


def compare(comm: MPI.Intracomm, job: Job, ways: Sequence[Way], pace: Pace) -> list[Result]:
    """Time all ways of a job; collective.

    Parameters
    ----------
    comm : mpi4py.MPI.Intracomm
        All ranks, which go the same ways.
    job : Job
    ways : sequence of Way
    pace : Pace

    Returns
    -------
    list of Result
        One a way, on every rank.
    """
    calls, warm_ups, round_s = [], [], 0.0
    for way in ways:
        way.time(1)
        way.check()
        call_s, warm_up = math.inf, 1
        for _ in range(_TRIALS):
            if call_s < pace.sample_s or warm_up == 1:
                call_s = min(call_s, _slowest(comm, [_sample(comm, way, _TRIAL_CALLS)])[0])
                warm_up += _TRIAL_CALLS
        calls.append(min(max(math.ceil(pace.sample_s / max(call_s, 1e-7)), 1), _MOST_CALLS))
        round_s += _slowest(comm, [_sample(comm, way, calls[-1])])[0] * calls[-1]
        warm_ups.append(warm_up + calls[-1])
    rounds = int(pace.budget_s / max(round_s, 1e-6))
    rounds = min(max(rounds, pace.least_rounds), pace.most_rounds)
    samples = np.empty((len(ways), rounds))
    for number in range(rounds):
        for k in range(len(ways)):
            turn = (number + k) % len(ways)  # nobody always comes after the same
            samples[turn, number] = _sample(comm, ways[turn], calls[turn])
    slowest = _slowest(comm, samples).tolist()
    return [
        Result(job, way.name, way.role, warm_ups[k], calls[k], tuple(slowest[k]))
        for k, way in enumerate(ways)
    ]


def _sample(comm: MPI.Intracomm, way: Way, calls: int) -> float:
    comm.Barrier()
    return way.time(calls)


def _slowest(comm: MPI.Intracomm, mine: Any) -> Any:
    """Give for each number the greatest of all ranks."""
    return np.max(comm.allgather(np.asarray(mine)), axis=0)
