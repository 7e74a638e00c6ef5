"""What is under way among GPUs ends, or fails by name, whoever waits for it and how."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import final

import pytest
from fake_gpu import FakeGpus
from fake_nccl import FakeNccl

from kvcoll.cuda.nccl import CupyCommunicator, CupyNccl
from kvcoll.errors import CollectiveError, DeviceError, RankLostError
from kvcoll.gpu.device import Event
from kvcoll.nccl.watch import Watch
from kvcoll.transport.alarm import Alarm

pytestmark = pytest.mark.single


@final
class Switch(Event):
    """An event that is done when the test says so."""

    def __init__(self) -> None:
        self.is_done = False
        self.error: DeviceError | None = None

    def done(self) -> bool:
        if self.error is not None:
            raise self.error
        return self.is_done

    def synchronize(self) -> None:
        while not self.is_done:
            time.sleep(0.001)


def watched(
    limit_s: float, alarm: Alarm | None = None, *, survives: bool = False
) -> tuple[Watch, FakeNccl]:
    gpus = FakeGpus(2)
    nccl = FakeNccl(gpus)
    comms = nccl.init_all(gpus.devices)
    return Watch(comms, limit_s, "rank 1 of 4", alarm, survives=survives), nccl


def until(done: object, limit_s: float = 20) -> None:
    end = time.monotonic() + limit_s
    while not done():  # type: ignore[operator]
        assert time.monotonic() < end
        time.sleep(0.005)


def test_a_transfer_that_makes_no_way_is_aborted_from_beside_and_named() -> None:
    watch, nccl = watched(0.2)
    watch.expect("all_reduce of float32[9]", Switch())
    until(lambda: not nccl.open)  # though nobody of ours waits: the user may, in CuPy
    for _ in range(2):
        with pytest.raises(CollectiveError, match=r"rank 1 of 4: all_reduce of float32\[9\] has"):
            watch.check()
    with pytest.raises(CollectiveError, match=r"within 0\.2 s and was aborted"):
        watch.expect("the next", Switch())
    assert watch.failed
    assert not watch.end()


def test_each_transfer_that_ends_gives_the_next_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    clock = SimpleNamespace(monotonic=lambda: now[0], sleep=time.sleep)
    monkeypatch.setattr("kvcoll.nccl.watch.time", clock)
    watch, nccl = watched(10)
    events = [Switch() for _ in range(4)]
    for number, event in enumerate(events):
        watch.expect(f"transfer {number}", event)
    for event in events[:3]:
        now[0] += 9
        event.is_done = True
        watch.look()
        watch.check()
    now[0] += 11
    watch.look()
    with pytest.raises(CollectiveError, match="transfer 3 has not ended within 10 s"):
        watch.check()
    assert not nccl.open


def test_a_watch_ends_well_once_all_has_ended() -> None:
    watch, nccl = watched(30)
    event = Switch()
    watch.expect("the only one", event)
    event.is_done = True
    assert watch.end()
    assert len(nccl.open) == 2


def test_a_wait_ends_with_what_it_waits_for() -> None:
    watch, _ = watched(30)
    event = Switch()
    event.is_done = True
    watch.wait(event)


def test_a_wait_for_what_stalls_ends_with_its_name() -> None:
    watch, nccl = watched(0.1)
    event = Switch()
    watch.expect("broadcast of int64[3]", event)
    with pytest.raises(CollectiveError, match=r"broadcast of int64\[3\] has not ended"):
        watch.wait(event)
    assert not nccl.open


def test_a_wait_for_work_that_nobody_named_has_a_limit_too() -> None:
    watch, _ = watched(0.05)
    with pytest.raises(CollectiveError, match=r"work on the GPU has not ended in 0\.1 s"):
        watch.wait(Switch())


def test_errors_of_nccl_are_raised_at_the_next_look_and_stay() -> None:
    watch, nccl = watched(30)
    nccl.open[1].error = "remote process exited"
    with pytest.raises(CollectiveError, match="rank 1 of 4: NCCL: remote process exited"):
        watch.check()
    assert not nccl.open  # what is on the streams was ended
    with pytest.raises(CollectiveError, match="remote process exited"):
        watch.expect("the next", Switch())


def test_work_that_fails_on_the_gpu_is_named() -> None:
    watch, _ = watched(30)
    event = Switch()
    watch.expect("all_reduce of float32[9]", event)
    event.error = DeviceError("an illegal memory access")
    watch.look()
    with pytest.raises(CollectiveError, match=r"float32\[9\]: an illegal memory access"):
        watch.check()


def test_a_watch_that_is_no_more_looks_no_more() -> None:
    watch, _ = watched(0.2)
    watch.expect("something", Switch())
    thread = watch._thread
    assert thread is not None
    del watch
    until(lambda: not thread.is_alive())


LOST = RankLostError("rank 2 of 4 was lost", (2,))


@pytest.mark.parametrize("is_done", [False, True])
def test_the_alarm_aborts_all_and_whether_it_cut_anything_is_known(is_done: bool) -> None:
    alarm = Alarm()
    watch, nccl = watched(30, alarm)
    first, last = Switch(), Switch()
    watch.expect("the first", first)
    watch.expect("the last", last)
    first.is_done, last.is_done = True, is_done
    alarm.sound(LOST)
    assert not nccl.open
    assert watch.was_cut is not is_done
    last.is_done = True  # as an abort leaves it
    watch.look()
    assert watch.was_cut is not is_done
    with pytest.raises(RankLostError, match="rank 2 of 4") as raised:
        watch.check()
    assert raised.value.ranks == (2,)


def test_who_waits_for_a_gpu_looks_for_lost_ranks() -> None:
    alarm = Alarm()
    watch, nccl = watched(30, alarm)

    def look() -> None:
        alarm.sound(LOST)

    alarm.look_by(look)
    with pytest.raises(RankLostError, match="rank 2 of 4"):
        watch.wait(Switch())
    assert not nccl.open


def test_what_nccl_notices_first_of_a_lost_rank_is_said_by_mpi() -> None:
    alarm, looks = Alarm(), [0]

    def look() -> None:
        looks[0] += 1
        if looks[0] > 3:
            alarm.sound(LOST)

    watch, nccl = watched(30, alarm, survives=True)
    alarm.look_by(look)
    nccl.open[0].error = "remote process exited"
    with pytest.raises(RankLostError, match="rank 2 of 4"):
        watch.check()
    assert not nccl.open


def test_a_watch_that_has_ended_hears_no_alarm() -> None:
    alarm = Alarm()
    watch, nccl = watched(30, alarm)
    assert watch.end()
    alarm.sound(LOST)
    assert len(nccl.open) == 2  # its owner's to destroy


def test_an_abort_of_which_nccl_complains_ends_all_waiting_even_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class NcclError(Exception):
        pass

    def abort() -> None:
        raise NcclError("remote process exited")

    library = SimpleNamespace(NcclError=NcclError, NCCL_UINT8=1, get_version=lambda: 22703)
    monkeypatch.setattr("kvcoll.cuda.nccl.import_cupy", SimpleNamespace)
    monkeypatch.setattr("kvcoll.cuda.nccl.import_nccl", lambda: library)
    comm = CupyCommunicator(CupyNccl(), SimpleNamespace(abort=abort), 0, 2, 0)
    alarm, heard = Alarm(), list[bool]()
    watch = Watch([comm], 30, "rank 0 of 2", alarm)
    alarm.on_sound(lambda: heard.append(True))  # as MPI's communicators, which are revoked
    alarm.sound(LOST)
    assert heard
    assert watch.failed
