"""The bars that kvcoll is held to, and whether what was measured meets them; pure.

Rules of the file: a bar is left out where what it compares was not measured, and where
it is meant for another number of ranks or hosts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bench_cases import (
    HUNDRED,
    IN_PLACE,
    OWN,
    OWN_REPRODUCIBLE,
    PLAIN,
    REPRODUCIBLE,
    SMALL_KEY,
)
from bench_clock import Result
from bench_memory import Memory
from bench_overlap import ALONE, COMPUTE, IN_LINE, OVERLAPPED, hidden
from bench_wire import FLOAT32, Wire

_MIB = 2**20


@dataclass(frozen=True)
class Bar:
    """A limit, and where the measurement lies.

    Attributes
    ----------
    name, what : str
    unit : str
        'x', 'us' or 'MiB'.
    value, limit : float
    at_least : bool
        Whether the limit is the lowest good value; else it is the highest.
    """

    name: str
    what: str
    unit: str
    value: float
    limit: float
    at_least: bool = False

    @property
    def met(self) -> bool:
        """Whether the value is on the right side of the limit."""
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    @property
    def margin(self) -> float:
        """By how much of the limit it is met, or missed if below zero."""
        way = self.value - self.limit if self.at_least else self.limit - self.value
        return way / self.limit


class _Medians:
    def __init__(self, results: Sequence[Result]) -> None:
        self._results = results

    def of(self, case: str, n_elements: int, way: str) -> float | None:
        """Give the median of one way in seconds, if it was measured."""
        found = (r for r in self._of_case(case, n_elements) if r.way == way)
        return next((r.median_s for r in found), None)

    def best(self, case: str, n_elements: int, role: str) -> float | None:
        """Give the least median of a role."""
        found = (r.median_s for r in self._of_case(case, n_elements) if r.role == role)
        return min(found, default=None)

    def sizes(self, case: str) -> list[int]:
        return sorted({r.job.n_elements for r in self._results if r.job.case == case})

    def _of_case(self, case: str, n_elements: int) -> Iterator[Result]:
        fits = (case, n_elements)
        return (r for r in self._results if (r.job.case, r.job.n_elements) == fits)


def bars_of(
    results: Sequence[Result],
    memory: Sequence[Memory],
    wire: Sequence[Wire] = (),
    *,
    ranks: int,
    hosts: int,
    link_mbit: float | None,
) -> list[Bar]:
    """Hold what was measured against the bars.

    Parameters
    ----------
    results : sequence of Result
    memory : sequence of Memory
    wire : sequence of Wire
    ranks, hosts : int
    link_mbit : float or None
        What a host's link carries in each direction, in Mbit/s.
    """
    medians = _Medians(results)
    bars: list[Bar] = []
    if (ranks, hosts) == (2, 1):
        bars += [*_large(medians), *_resnet50(medians), *_small(medians), *_mxnet(medians)]
    if hosts > 1 and link_mbit is not None:
        bars += _wire(medians, hosts, link_mbit)
    bars += [*_reproducible(medians), *_overlap(medians, hosts)]
    bars += _bytes_sent(wire, ranks, hosts)
    for one in memory:
        bars.append(Bar("P9", f"memory, {one.way}", "MiB", one.beyond_bytes / _MIB, 64))
    return bars


def _large(medians: _Medians) -> Iterator[Bar]:
    for name, way, limit in (("P1", PLAIN, 0.7), ("P2", OWN, 0.35)):
        for n in (10_000_000, 64_000_000):
            ours, theirs = medians.of("key", n, way), medians.best("key", n, "by hand")
            if ours is not None and theirs is not None:
                what = f"1 key of {n:,}: {way} / MPI by hand"
                yield Bar(name, what, "x", ours / theirs, limit)


def _resnet50(medians: _Medians) -> Iterator[Bar]:
    for n in medians.sizes("resnet50"):
        for way, limit in ((PLAIN, 0.6), (OWN, 0.35)):
            for settings in ("defaults", "bucket views, fused SGD"):
                ours = medians.of("resnet50", n, way)
                theirs = medians.of("resnet50", n, f"torch DDP gloo + SGD, {settings}")
                if ours is not None and theirs is not None:
                    what = f"ResNet-50: {way} / torch DDP + SGD, {settings}"
                    yield Bar("P3", what, "x", ours / theirs, limit)


def _small(medians: _Medians) -> Iterator[Bar]:
    raw = medians.of("key", SMALL_KEY, IN_PLACE)
    for way in (PLAIN, OWN):
        ours = medians.of("key", SMALL_KEY, way)
        if ours is not None and raw is not None:
            what = f"1 key of {SMALL_KEY:,}: {way}"
            yield Bar("P4", f"{what}; raw x 2 + 10 us", "us", ours * 1e6, 2e6 * raw + 10)
    ours = medians.of("key", SMALL_KEY, PLAIN)
    if ours is not None and raw is not None:
        what = f"1 key of {SMALL_KEY:,}: {PLAIN}, beyond raw MPI_Allreduce"
        yield Bar("latency", what, "us", (ours - raw) * 1e6, 30)


def _reproducible(medians: _Medians) -> Iterator[Bar]:
    for n in medians.sizes("key"):
        for way, default in ((REPRODUCIBLE, PLAIN), (OWN_REPRODUCIBLE, OWN)):
            ours, theirs = medians.of("key", n, way), medians.of("key", n, default)
            if ours is not None and theirs is not None:
                yield Bar("tree", f"1 key of {n:,}: {way} / {default}", "x", ours / theirs, 1.15)


def _overlap(medians: _Medians, hosts: int) -> Iterator[Bar]:
    for n in medians.sizes("overlap"):
        times = [medians.of("overlap", n, way) for way in (ALONE, COMPUTE, IN_LINE, OVERLAPPED)]
        alone_s, compute_s, in_line_s, overlapped_s = (time or 0.0 for time in times)
        if hosts > 1:
            share = hidden(alone_s, compute_s, overlapped_s)
            what = f"1 key of {n:,}: communication hidden behind as much computing"
            yield Bar("P7", what, "x", share, 0.8, True)
        what = f"1 key of {n:,}: {OVERLAPPED} / {IN_LINE}"
        yield Bar("P7", what, "x", overlapped_s / in_line_s, 1.02)


def _bytes_sent(wire: Sequence[Wire], ranks: int, hosts: int) -> Iterator[Bar]:
    sent = {one.way: one.sent_bytes for one in wire}
    if FLOAT32 not in sent:
        return
    floor = 2 * (hosts - 1) / hosts * 4 * wire[0].n_elements
    yield Bar("P8", "bytes on the wire: float32 / the floor", "x", sent[FLOAT32] / floor, 1.05)
    if ranks == hosts == 2:
        for way, limit in (("fp16", 0.53), ("bf16", 0.53), ("2bit", 0.07)):
            what = f"bytes on the wire: {way} / float32"
            yield Bar("P8", what, "x", sent[way] / sent[FLOAT32], limit)


def _mxnet(medians: _Medians) -> Iterator[Bar]:
    for case, n, limit in (
        ("key", 10_000_000, 10),
        ("key", 1_000, 25),
        ("keys", HUNDRED * SMALL_KEY, 50),
    ):
        theirs = medians.best(case, n, "MXNet")
        for way in (PLAIN, OWN):
            ours = medians.of(case, n, way)
            if ours is not None and theirs is not None:
                what = f"{HUNDRED} keys of {SMALL_KEY:,}" if case == "keys" else f"1 key of {n:,}"
                what = f"{what}: MXNet dist_sync / {way}"
                yield Bar("P5", what, "x", theirs / ours, limit, True)


def _wire(medians: _Medians, hosts: int, link_mbit: float) -> Iterator[Bar]:
    n = 10_000_000
    floor_s = 2 * (hosts - 1) / hosts * 4 * n * 8 / (link_mbit * 1e6)
    for way in (PLAIN, OWN):
        ours = medians.of("key", n, way)
        if ours is not None:
            what = f"1 key of {n:,}: {way} / the link's floor of {floor_s * 1e3:.0f} ms"
            yield Bar("P6", what, "x", ours / floor_s, 1.15)
