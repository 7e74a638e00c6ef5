"""A segment's way across hosts: every piece waits for what it needs, or the fakes catch it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, final

import numpy as np
import numpy.typing as npt
import pytest
from fake_gpu import FakeGpus, FakeStream, RuleBrokenError
from fake_nccl import FakeNccl

from kvcoll.errors import CollectiveError
from kvcoll.gpu.device import Event
from kvcoll.nccl.crossing import Crossing
from kvcoll.nccl.watch import Watch
from kvcoll.transport.leg import Leg, LegSizes
from kvcoll.transport.waiting import Waiting

pytestmark = pytest.mark.single

Array = npt.NDArray[Any]


@final
class SlowLeg(Leg):
    """A leg whose one peer adds 10 to everything, some looks later.

    What it must find at its end it reads at its end; what it may write to it spoils at once.
    """

    def __init__(self, sizes: LegSizes, looks: int = 3) -> None:
        self.was_cut = False
        self.sizes = sizes
        self._looks = looks
        self._under_way: deque[tuple[Array, Array, int]] = deque()
        self.most_under_way = 0

    def start(self, mine: Array, out: Array) -> None:
        assert len(self._under_way) < self.sizes.depth
        assert mine.nbytes <= self.sizes.segment_bytes
        out.view(np.uint8)[...] = 0x5A
        self._under_way.append((mine, out, self._looks))
        self.most_under_way = max(self.most_under_way, len(self._under_way))

    def cut(self) -> None:
        self.was_cut = True

    def finish_one(self) -> bool:
        if not self._under_way:
            return False
        mine, out, looks = self._under_way[0]
        if looks:
            self._under_way[0] = mine, out, looks - 1
            return False
        out[...] = mine + 10
        self._under_way.popleft()
        return True


class Way:
    """One GPU, a stream, and a crossing in pieces of 8 float32."""

    def __init__(self, depth: int = 2) -> None:
        self.gpus = FakeGpus(1)
        self.device = self.gpus.devices[0]
        self.stream = self.device.stream()
        self.leg = SlowLeg(LegSizes(32, 32, depth, 0))
        watch = Watch([], 30, "rank 0 of 2")
        self.crossing = Crossing(self.leg, self.gpus, self.device, Waiting(looks=1), watch)

    def sum(self, values: Array, dtype: str = "f4") -> Array:
        mine = self.device.empty(values.size, np.float32, self.stream)
        out = self.device.empty(values.size, dtype, self.stream)
        self.gpus.write(mine, values, self.stream)
        self.crossing.sum(mine, out, self.stream.record(), self.stream)
        return self.gpus.read(out, self.stream)


@pytest.mark.parametrize("n", [1, 8, 9, 100])
@pytest.mark.parametrize("depth", [1, 2, 5])
def test_all_pieces_come_back_in_their_places(n: int, depth: int) -> None:
    way = Way(depth)
    for turn in range(3):
        values = np.arange(n, dtype=np.float32) + turn
        np.testing.assert_array_equal(way.sum(values), values + 10)
        np.testing.assert_array_equal(way.sum(values, "f2"), (values + 10).astype("f2"))
    assert way.leg.most_under_way == min(depth, -(-n // 8))
    way.gpus.finish()


def test_copies_down_are_ahead_of_the_leg_and_copies_up_behind_it() -> None:
    way = Way(depth=2)
    way.sum(np.zeros(80, np.float32))
    labels = [label for label in way.gpus.launches if label in ("download", "upload")]
    assert labels[:4] == ["download"] * 4
    assert labels[4:10].count("upload") >= 2
    assert labels.count("download") == labels.count("upload") == 10


def plant_no_wait_for_copies_down(patched: pytest.MonkeyPatch) -> None:
    def may_start(own: Crossing, under_way: int, number: int, down: Event) -> bool:
        came_up = own._came_up[number % own._n_slots]
        return under_way < own._leg.sizes.depth and (came_up is None or came_up.done())

    patched.setattr(Crossing, "_may_start", may_start)


def test_a_leg_that_starts_before_its_piece_is_down_gives_other_sums(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plant_no_wait_for_copies_down(monkeypatch)
    values = np.arange(100, dtype=np.float32)
    assert (Way().sum(values) != values + 10).any()


def test_a_leg_that_writes_where_a_copy_up_still_reads_is_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def may_start(own: Crossing, under_way: int, number: int, down: Event) -> bool:
        return under_way < own._leg.sizes.depth and down.done()

    monkeypatch.setattr(Crossing, "_may_start", may_start)
    way = Way(depth=1)

    def run() -> None:
        way.sum(np.arange(200, dtype=np.float32))
        way.gpus.finish()

    with pytest.raises(RuleBrokenError, match="the host changed memory while a copy"):
        run()


@pytest.mark.parametrize("forgotten", ["before", "after"])
def test_streams_that_do_not_wait_for_one_another_are_caught(
    monkeypatch: pytest.MonkeyPatch, forgotten: str
) -> None:
    way = Way()
    own = way.stream.handle
    wait: Callable[[FakeStream, Event], None] = FakeStream.wait

    def forget(stream: FakeStream, event: Event) -> None:
        if (stream.handle == own) != (forgotten == "after"):
            wait(stream, event)

    monkeypatch.setattr(FakeStream, "wait", forget)
    with pytest.raises(RuleBrokenError, match="nothing says which is first"):
        way.sum(np.arange(9, dtype=np.float32))


def test_what_fails_on_the_gpus_ends_the_wait_for_other_hosts() -> None:
    gpus = FakeGpus(2)
    nccl = FakeNccl(gpus)
    comm = nccl.init_all(gpus.devices)[0]
    stream = gpus.devices[0].stream()
    leg = SlowLeg(LegSizes(32, 32, 2, 0), looks=10**9)
    watch = Watch([comm], 30, "rank 0 of 2")
    crossing = Crossing(leg, gpus, gpus.devices[0], Waiting(looks=1), watch)
    mine = gpus.devices[0].empty(4, np.float32, stream)
    gpus.write(mine, np.zeros(4), stream)
    comm.error = "a link is down"  # type: ignore[attr-defined]
    with pytest.raises(CollectiveError, match="rank 0 of 2: NCCL: a link is down"):
        crossing.sum(mine, mine, stream.record(), stream)
    assert leg.was_cut
