"""How late stores end: with pushes that still wait, with errors that nobody has asked for."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from mpi_job import Job

import kvcoll
from kvcoll import KVStore
from kvcoll.backlog import Backlog
from kvcoll.backlog import Job as Queued
from kvcoll.errors import KeyNotFoundError, RankLostError, ThreadError, UpdaterError

HEAD = """
import sys
import numpy as np, kvcoll
ones = np.ones(3)
"""


def add(key: object, value: Any, stored: Any) -> None:
    stored += value


@pytest.fixture
def kv(comm: Any) -> Iterator[KVStore]:
    with kvcoll.create("dist_async") as store:
        store.init("w", np.zeros(3, np.float32))
        yield store


def test_an_updater_may_not_wait(kv: KVStore) -> None:
    seen: list[str] = []

    def update(key: object, value: Any, stored: Any) -> None:
        stored += value
        for what in (None, "w"):
            with pytest.raises(ThreadError) as raised:
                kv.wait(what)
            seen.append(str(raised.value))

    kv.set_updater(update)
    kv.push("w", np.ones(3, np.float32))
    kv.barrier()
    assert len(seen) == 2
    assert all("must not init, push, set, wait" in text for text in seen)


@pytest.mark.ranks(at_least=2)
def test_a_wait_that_is_interrupted_is_waited_for_again(kv: KVStore, comm: Any) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    kv.set_updater(add)
    if comm.rank == 0:
        kv.push("w", np.full(3, 1, np.float32))
        before = signal.signal(signal.SIGALRM, interrupt)
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(KeyboardInterrupt):
            kv.wait("w")
        signal.signal(signal.SIGALRM, before)
        for rank in range(1, comm.size):
            comm.send("now", dest=rank)
        kv.wait("w")
    else:
        assert comm.recv(source=0) == "now"
        kv.push("w", np.full(3, comm.rank + 1, np.float32))
        kv.wait("w")
    assert np.all(kv.pull("w") == comm.size * (comm.size + 1) // 2)


@pytest.mark.ranks(at_least=2)
def test_another_mistake_does_not_hide_the_error_of_a_push(comm: Any) -> None:
    def update(key: object, value: Any, stored: Any) -> None:
        if comm.rank == 1:
            raise OSError("no disk")

    kv = kvcoll.create("dist_async")
    kv.init("w", np.zeros(3, np.float32))
    kv.set_updater(update)
    kv.push("w", np.ones(3, np.float32))
    while not kv.closed:
        time.sleep(0.01)
    with pytest.raises((KeyNotFoundError, OSError, UpdaterError)) as first:
        kv.pull("no such key")
    if first.type is KeyNotFoundError:
        with pytest.raises(OSError if comm.rank == 1 else UpdaterError, match="no disk"):
            kv.close()
    kv.close()


@pytest.mark.ranks(at_least=2)
def test_a_pull_tells_of_the_error_of_a_push(comm: Any) -> None:
    def update(key: object, value: Any, stored: Any) -> None:
        if comm.rank == 1:
            raise OSError("no disk")

    kv = kvcoll.create("dist_async")
    kv.init("w", np.zeros(3, np.float32))
    kv.set_updater(update)
    kv.push("w", np.ones(3, np.float32))
    while not kv.closed:
        time.sleep(0.01)
    with pytest.raises(OSError if comm.rank == 1 else UpdaterError, match="no disk"):
        kv.pull("w")


ENDS = {
    "a rank fails with a push that waits, the others are in another store": """
with kvcoll.create("dist_sync") as a, kvcoll.create("dist_async") as b:
    for kv in (a, b):
        kv.init("w", ones)
    b.set_optimizer("test")
    if b.rank == 0:
        b.push("w", ones)
        raise ValueError("no more data")
    a.barrier()
""",
    "the same without a with-block": """
a, b = kvcoll.create("dist_sync"), kvcoll.create("dist_async")
for kv in (a, b):
    kv.init("w", ones)
b.set_optimizer("test")
if b.rank == 0:
    b.push("w", ones)
    raise ValueError("no more data")
a.barrier()
""",
    "an updater exits": """
def update(key, value, stored):
    if kv.rank == 1:
        sys.exit(3)
kv = kvcoll.create("dist_async")
kv.init("w", ones)
kv.set_updater(update)
kv.push("w", ones)
while not kv.closed:
    pass
sys.exit("no more data")
""",
    "a store cannot be made on one rank": """
made = kvcoll.create.__globals__["transport_for"]
def fail(comm, *args, **kwargs):
    transport = made(comm, *args, **kwargs)
    if comm.rank == 1:
        raise MemoryError("no more data")
    return transport
kvcoll.create.__globals__["transport_for"] = fail
kvcoll.create("dist_async")
""",
}


@pytest.mark.jobs
@pytest.mark.limit(60)
@pytest.mark.parametrize("body", ENDS.values(), ids=list(ENDS))
def test_the_job_ends_by_itself_and_says_why(mpirun: Callable[..., Job], body: str) -> None:
    job = mpirun(2, "-c", HEAD + body, timeout_s=30)
    assert not job.timed_out
    assert job.returncode != 0
    assert "no more data" in job.stderr


@pytest.mark.single
@pytest.mark.parametrize(
    "options", [{"name": "dist_async"}, {"name": "dist_sync", "overlap": "always"}], ids=str
)
def test_a_push_that_finds_its_backlog_ended_by_a_loss_is_not_counted(
    comm: Any, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    def end(backlog: Backlog, job: Queued) -> None:
        raise RankLostError("rank 3 of 4 was lost", [3])

    with kvcoll.create(**options) as kv:
        kv.init([1, 2], [np.zeros(3, np.float32), np.zeros(3, np.float64)])
        kv.set_optimizer("adam")
        kv.push([1, 2], [np.ones(3, np.float32), np.ones(3)])
        kv.wait()
        counts = dict(kv._updater.counts())
        with monkeypatch.context() as patched:
            patched.setattr(Backlog, "add", end)
            with pytest.raises(RankLostError):
                kv.push([1, 2], [np.ones(3, np.float32), np.ones(3)])
        assert counts == {1: 1, 2: 1}
        assert kv._updater.counts() == counts
