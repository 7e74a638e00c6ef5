"""Stores over the GPUs of several hosts, end to end: the hosts are made up, the sums are not.

The bits are those of a store on the hosts' memory, at every size at which the way changes.
"""

from __future__ import annotations

import socket
import time
import warnings
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from any_gpus import ARE_REAL, AnyGpus, check_closed, gpus_and_nccl, needs_kernels
from fake_gpu import FakeGpus
from fake_nccl import mailbox

import kvcoll
from kvcoll import Watchdog, mpi_takes, on_gpus
from kvcoll.nccl import setup
from kvcoll.nccl.crossing import Crossing
from kvcoll.topology import Topology
from kvcoll.transport import mpi

if TYPE_CHECKING:
    from mpi4py import MPI

pytestmark = [needs_kernels, pytest.mark.ranks(at_least=2)]

#: Of each rank its host, by number of ranks: two hosts, the first one with one more if need be.
HOSTS = {size: tuple(int(2 * rank >= size) for rank in range(size)) for size in range(2, 65)}
SIZES = (1, 40, 3000, 20_000)


@pytest.fixture
def gpus(
    comm: MPI.Intracomm, host_of: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> Iterator[AnyGpus]:
    if len(set(host_of)) > 1:
        pytest.skip("fake GPUs of several processes find one another on one machine")
    hosts = Topology(comm.rank, HOSTS[comm.size])
    with mailbox(comm) as folder:
        own, nccl = gpus_and_nccl(comm.size, folder)
        monkeypatch.setattr(on_gpus, "find", lambda: (own, nccl))
        monkeypatch.setattr(on_gpus, "find_gpus", lambda: own)
        monkeypatch.setattr(mpi, "topology_of", lambda *_: hosts)
        small = partial(setup.transport_for, scratch_bytes=16 << 10, small_bytes=1 << 10)
        monkeypatch.setattr(setup, "transport_for", small)
        yield own
        check_closed(nccl)
        own.finish()


@pytest.mark.parametrize("says", [True, False, None])
def test_rank_0_warns_where_mpi_says_that_it_takes_gpus_and_does_not(
    comm: MPI.Intracomm, gpus: AnyGpus, monkeypatch: pytest.MonkeyPatch, says: bool | None
) -> None:
    host = HOSTS[comm.size][comm.rank]
    monkeypatch.delenv(mpi_takes.VARIABLE, raising=False)
    monkeypatch.setattr(mpi_takes, "says", lambda: says)
    monkeypatch.setattr(mpi_takes, "why_not", lambda _: "signal 11\n  in x" * host)
    monkeypatch.setattr(socket, "gethostname", lambda: f"node{host}")
    own = comm.Dup()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        kvcoll.create("dist_device_sync", comm=own).close()
    texts = [str(one.message) for one in caught if one.category is RuntimeWarning]
    assert len(texts) == (says is True and comm.rank == 0)
    if texts:
        assert "a trial came to nothing on node1: signal 11 in x." in texts[0]
        assert caught[0].filename == __file__
    own.Free()


@pytest.mark.parametrize("way", [mpi_takes.STAGED, mpi_takes.DIRECT])
@pytest.mark.skipif(ARE_REAL, reason="a real GPU does not tell in which thread it is current")
def test_the_watchdog_calls_mpi_on_the_gpu_whose_memory_mpi_gets(
    comm: MPI.Intracomm, gpus: AnyGpus, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    assert isinstance(gpus, FakeGpus)
    monkeypatch.setenv(mpi_takes.VARIABLE, way)
    monkeypatch.setattr(on_gpus, "_given_to_mpi", set())
    own = comm.Dup()
    with kvcoll.create("dist_device_sync", comm=own, watchdog=Watchdog(floor_s=0.1)) as kv:
        home = gpus.devices[kv.local_rank]
        crosses = kv.local_rank < comm.size // 2  # as many as the smaller host has
        end = time.monotonic() + (20 if way == mpi_takes.DIRECT and crosses else 0.1)
        while not home.used_in and time.monotonic() < end:
            time.sleep(0.01)
        used_in = {"kvcoll-watchdog"} if way == mpi_takes.DIRECT and crosses else set()
        assert [d.used_in for d in gpus.devices if d is not home] == [set()] * (comm.size - 1)
        assert home.used_in == used_in
    own.Free()


@pytest.mark.parametrize("way", [mpi_takes.STAGED, mpi_takes.DIRECT])
def test_pushes_over_hosts_have_the_bits_of_a_store_on_the_host(
    comm: MPI.Intracomm, gpus: AnyGpus, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    if ARE_REAL and way == mpi_takes.DIRECT and mpi_takes.why_not(0):
        pytest.skip(f"this MPI takes no memory of GPUs: {mpi_takes.why_not(0)}")
    monkeypatch.setenv(mpi_takes.VARIABLE, way.upper())
    made: list[bool] = []
    honest = Crossing.__init__

    def init(self: Crossing, *args: Any, direct: bool, **options: Any) -> None:
        made.append(direct)
        honest(self, *args, direct=direct, **options)

    monkeypatch.setattr(Crossing, "__init__", init)
    own = comm.Dup()
    random = np.random.default_rng(comm.rank)
    with (
        kvcoll.create("dist_device_sync", comm=own) as on_gpu,
        kvcoll.create("dist_sync", comm=own) as on_host,
    ):
        assert on_gpu.num_hosts == on_host.num_hosts == len(set(HOSTS[comm.size]))
        for store in (on_gpu, on_host):
            store.set_optimizer(kvcoll.optimizer.create("sgd", learning_rate=0.1, momentum=0.9))
        for key, n in enumerate(SIZES):
            first = np.full(n, 1.5, np.float32)
            on_gpu.init(key, gpus.array(first, on_gpu.local_rank))
            on_host.init(key, first)
        for _ in range(3):
            grads = [random.standard_normal(n).astype(np.float32) for n in SIZES]
            keys = list(range(len(SIZES)))
            on_gpu.push(keys, [gpus.array(grad, on_gpu.local_rank) for grad in grads])
            on_host.push(keys, grads)
        for key, n in enumerate(SIZES):
            expected: Any = np.empty(n, np.float32)
            on_host.pull(key, out=expected)
            assert on_gpu.pull(key).get().tobytes() == expected.tobytes()
            assert len({*comm.allgather(expected.tobytes())}) == 1
    assert set(made) <= {way == mpi_takes.DIRECT}
    assert any(comm.allgather(bool(made)))
    own.Free()
