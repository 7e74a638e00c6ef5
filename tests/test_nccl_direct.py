"""A segment's way across hosts where MPI takes memory of GPUs: what would be a race is caught."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from types import SimpleNamespace, TracebackType
from typing import Any, NamedTuple, final

import numpy as np
import numpy.typing as npt
import pytest
from fake_gpu import FakeExposed, FakeGpus, RuleBrokenError
from host_kernel import needs_compiler

from kvcoll.gpu.device import Event
from kvcoll.nccl.crossing import Crossing
from kvcoll.nccl.gpu_leg import GpuLeg
from kvcoll.nccl.watch import Watch
from kvcoll.transport.alarm import Alarm
from kvcoll.transport.leg import LegSizes
from kvcoll.transport.waiting import Waiting

pytestmark = [pytest.mark.single, needs_compiler]

Array = npt.NDArray[Any]
LOOKS = 3


class Message(NamedTuple):
    """Memory that MPI was handed, by its address."""

    address: int
    n_bytes: int


@final
class Request:
    def __init__(self, message: Message, *, receives: bool) -> None:
        self.message, self.receives = message, receives
        self.looks_left = LOOKS


@final
class Mpi:
    """MPI as far as a leg uses it, of rank 0 of 2, whose peer sends nothing but 10s.

    A message is under way until it was looked for some times, and MPI touches its memory at the
    end: that must still be exposed then.
    """

    Exception = KeyError
    BYTE = "byte"
    rank, size = 0, 2

    def __init__(self, gpus: FakeGpus) -> None:
        self._gpus = gpus
        self.buffer = SimpleNamespace(fromaddress=Message)
        self.Request = SimpleNamespace(Testall=self.test_all)
        self.most_under_way = self._n_under_way = 0
        self.sent: list[Array] = []
        self.posted: list[Request] = []
        self.most_posted = sys.maxsize

    def Irecv(self, what: tuple[Message, str], source: int, tag: int) -> Request:  # noqa: N802
        return self._started(what[0], receives=True)

    def Isend(self, what: tuple[Message, str], dest: int, tag: int) -> Request:  # noqa: N802
        return self._started(what[0], receives=False)

    def _started(self, message: Message, *, receives: bool) -> Request:
        if len(self.posted) == self.most_posted:
            raise self.Exception("no more requests")
        self._n_under_way += 1
        self.most_under_way = max(self.most_under_way, self._n_under_way)
        self.posted.append(Request(message, receives=receives))
        return self.posted[-1]

    def test_all(self, requests: list[Request]) -> bool:
        for request in requests:
            request.looks_left -= 1
            if request.looks_left == 0:
                self._end(request)
        return all(request.looks_left <= 0 for request in requests)

    def _end(self, request: Request) -> None:
        address, n_bytes = request.message
        self._n_under_way -= 1
        if not any(one.address == address for one in self._gpus.exposed):
            self._gpus.break_rule("MPI touches memory that it was told to leave")
        numbers = np.ctypeslib.as_array((ctypes.c_float * (n_bytes // 4)).from_address(address))
        if request.receives:
            numbers[:] = 10
        else:
            self.sent.append(numbers.copy())


class NoLosses:
    """No rank is ever lost."""

    def __enter__(self) -> None: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...

    def __init__(self) -> None:
        self.held: list[object] = []

    def meaning(self, error: Exception) -> Exception:
        return error

    def hold(self, *things: object) -> None:
        self.held += things


class Way:
    """One GPU, a stream, and a crossing in pieces of 8 float32: whole, or in two phases."""

    def __init__(self, depth: int = 2, *, whole: bool = True) -> None:
        self.gpus = FakeGpus(1)
        self.device = self.gpus.devices[0]
        self.stream = self.device.stream()
        self.mpi = Mpi(self.gpus)
        comm: Any = self.mpi
        sizes = LegSizes(32, 12, depth, 32 * whole)
        self.losses = NoLosses()
        losses: Any = self.losses
        leg = GpuLeg(comm, self.mpi, self.device, sizes, losses)
        watch = Watch([], 30, "rank 0 of 2")
        self.alarm = Alarm()
        waiting = Waiting(looks=1, alarm=self.alarm)
        self.crossing = Crossing(leg, self.gpus, self.device, waiting, watch, direct=True)

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
        np.testing.assert_array_equal(np.concatenate(way.mpi.sent), values)
        way.mpi.sent.clear()
    way.gpus.finish()


def test_nothing_goes_through_the_memory_of_the_host() -> None:
    way = Way()
    way.sum(np.arange(40, dtype=np.float32))
    assert not {"download", "upload"} & {*way.gpus.launches}
    assert way.mpi.most_under_way > 2


def test_a_sum_in_two_phases_gives_out_what_was_added() -> None:
    way = Way(whole=False)
    for turn in range(3):
        values = np.arange(20, dtype=np.float32) + turn
        expected = values + 10
        for low, high in ((4, 8), (12, 16), (18, 20)):  # the peer's parts: 10s in place of sums
            expected[low:high] = 10
        np.testing.assert_array_equal(way.sum(values), expected)
    way.gpus.finish()


def test_whatever_calls_mpi_while_a_sum_is_under_way_does_so_on_its_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("kvcoll.transport.alarm._LOOK_EVERY_S", 0)
    way, looks = Way(), list[bool]()
    # As a look for lost ranks, which asks MPI for messages.
    way.alarm.look_by(lambda: looks.append(way.device.is_current))
    tested, test_all = list[bool](), way.mpi.test_all

    def test(requests: list[Request]) -> bool:
        tested.append(way.device.is_current)
        return test_all(requests)

    monkeypatch.setattr(way.crossing._leg, "_test_all", test)
    way.sum(np.arange(100, dtype=np.float32))
    assert {*looks} == {*tested} == {True}
    assert not way.device.is_current


@pytest.mark.parametrize("n_posted", range(1, 8))
def test_what_mpi_has_begun_is_held_where_it_fails_halfway(n_posted: int) -> None:
    way = Way(whole=False)  # in each of two phases two messages each way
    way.mpi.most_posted = n_posted
    with pytest.raises(KeyError, match="no more requests"):
        way.sum(np.arange(8, dtype=np.float32))
    (leg,) = {one for one in way.losses.held if isinstance(one, GpuLeg)}
    segments = [*leg._scattering, *leg._adding, *leg._gathering]
    held = {id(request) for segment in segments for request in segment.requests}
    under_way = {id(request) for request in way.mpi.posted if request.looks_left > 0}
    assert under_way <= held
    assert len(way.mpi.posted) == n_posted


def plant(patched: pytest.MonkeyPatch, name: str, done: Callable[..., bool]) -> None:
    patched.setattr(GpuLeg if name == "_is_through" else Crossing, name, done)


def test_mpi_that_reads_before_its_piece_is_there_is_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def may_start(own: Crossing, under_way: int, number: int, down: Event) -> bool:
        came_up = own._came_up[number % own._n_slots]
        return under_way < own._leg.sizes.depth and (came_up is None or came_up.done())

    plant(monkeypatch, "_may_start", may_start)
    with pytest.raises(RuleBrokenError, match=r"MPI on stream .* reads what copy"):
        Way().sum(np.arange(100, dtype=np.float32))


def test_sums_written_where_a_copy_still_reads_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def may_start(own: Crossing, under_way: int, number: int, down: Event) -> bool:
        return under_way < own._leg.sizes.depth and down.done()

    plant(monkeypatch, "_may_start", may_start)
    with pytest.raises(RuleBrokenError, match="writes what copy"):
        Way(depth=1).sum(np.arange(200, dtype=np.float32))


def test_a_kernel_that_adds_before_mpi_has_brought_its_rows_is_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plant(monkeypatch, "_is_through", lambda *_: True)
    with pytest.raises(RuleBrokenError, match=r"kvcoll_add_2.* reads what MPI"):
        Way().sum(np.arange(9, dtype=np.float32))


def test_memory_that_is_withdrawn_before_mpi_is_done_is_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expose = FakeGpus.expose

    def never(own: FakeGpus, array: Any, *, to_write: bool) -> FakeExposed:
        exposed = expose(own, array, to_write=to_write)
        exposed.withdraw()
        return exposed

    monkeypatch.setattr(FakeGpus, "expose", never)
    with pytest.raises(RuleBrokenError, match="told to leave"):
        Way().sum(np.arange(9, dtype=np.float32))


def test_a_sum_that_is_given_out_before_it_is_there_is_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("kvcoll.nccl.gpu_leg._is_added", lambda segment: True)
    with pytest.raises(RuleBrokenError, match=r"MPI on stream .* reads what kvcoll_add_2"):
        Way(whole=False).sum(np.arange(9, dtype=np.float32))


def test_a_copy_out_of_the_leg_waits_for_mpis_last_word(monkeypatch: pytest.MonkeyPatch) -> None:
    finish = GpuLeg._finish_one

    def early(own: GpuLeg) -> bool:
        if own._gathering and own._gathering[0].requests:
            own._gathering.popleft()
            own._free.append(own._used.popleft())
            return True
        return finish(own)

    monkeypatch.setattr(GpuLeg, "_finish_one", early)
    with pytest.raises(RuleBrokenError, match=r"copy on stream .* reads what MPI"):
        Way(whole=False).sum(np.arange(9, dtype=np.float32))
