"""A store does not hand out what a failed sum has left; NCCL ends with the process."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from fake_gpu import FakeGpus
from fake_nccl import FakeNccl
from host_kernel import needs_compiler

import kvcoll
from kvcoll import on_gpus
from kvcoll.errors import CollectiveError
from kvcoll.gpu.device import Event
from kvcoll.gpu.patience import Patience
from kvcoll.gpu.staging import Staging

pytestmark = [pytest.mark.single, needs_compiler]

N = 100_000  # large enough for NCCL


@pytest.fixture
def nccl(monkeypatch: pytest.MonkeyPatch) -> FakeNccl:
    gpus = FakeGpus(2)
    made = FakeNccl(gpus)
    monkeypatch.setattr(on_gpus, "find", lambda: (gpus, made))
    monkeypatch.setattr(on_gpus, "find_gpus", lambda: gpus)
    return made


@pytest.fixture
def pushed(nccl: FakeNccl) -> Any:
    """Give a store that has summed over two GPUs."""
    kv = kvcoll.create("nccl")
    kv.init("w", nccl.gpus.array(np.zeros(N, np.float32)))
    kv.push("w", [nccl.gpus.array(np.full(N, k + 1, np.float32), k) for k in (0, 1)])
    assert (kv.pull("w").get() == 3).all()
    assert len(nccl.open) == 2
    return kv


@pytest.mark.parametrize("call", ["pull", "pull to the host", "push"])
def test_a_link_that_broke_after_a_push_is_raised_by_the_next_call(
    pushed: Any, nccl: FakeNccl, call: str
) -> None:
    nccl.open[0].error = "a link is down"
    value = nccl.gpus.array(np.ones(N, np.float32))
    calls = {
        "pull": lambda: pushed.pull("w"),
        "pull to the host": lambda: pushed.pull("w", out=np.empty(N, np.float32)),
        "push": lambda: pushed.push("w", value),
    }
    for _ in range(2):
        with pytest.raises(CollectiveError, match="NCCL: a link is down"):
            calls[call]()
    assert not nccl.open


def test_the_end_of_the_process_closes_what_nccl_holds(pushed: Any, nccl: FakeNccl) -> None:
    on_gpus.end_joined()  # as MPI ends, which the store does not need
    assert (pushed.pull("w").get() == 3).all()
    on_gpus.end_own()
    assert not nccl.open
    on_gpus.end_own()


class Impatient(Patience):
    def wait(self, event: Event) -> None:
        raise CollectiveError("it stalls")

    def check(self) -> None:
        pass


def test_a_copy_to_the_host_waits_as_its_store_does() -> None:
    gpus = FakeGpus(1)
    device = gpus.devices[0]
    stream = device.stream()
    array = device.empty(4, np.float32, stream)
    gpus.write(array, np.ones(4), stream)
    staging = Staging(gpus, device, stream, patience=Impatient())
    with pytest.raises(CollectiveError, match="it stalls"):
        staging.download(array, np.empty(4, np.float32))
