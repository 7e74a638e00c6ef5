"""What is under way among GPUs ends, or fails by name, whoever waits for it and how."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import final

import pytest
from fake_gpu import FakeGpus
from fake_nccl import FakeNccl

from kvcoll.errors import CollectiveError, DeviceError
from kvcoll.gpu.device import Event
from kvcoll.nccl.watch import Watch

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


def watched(limit_s: float) -> tuple[Watch, FakeNccl]:
    gpus = FakeGpus(2)
    nccl = FakeNccl(gpus)
    return Watch(nccl.init_all(gpus.devices), limit_s, "rank 1 of 4"), nccl


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
