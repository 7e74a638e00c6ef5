"""A transport over GPUs is made on all ranks or on none, and ends by itself or by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from fake_gpu import FakeGpus
from fake_nccl import FakeNccl, mailbox
from host_kernel import needs_compiler

from kvcoll import mpi_takes, on_gpus
from kvcoll.errors import (
    ArgumentError,
    CollectiveError,
    DeviceError,
    KVCollError,
    MissingDependencyError,
)
from kvcoll.gpu.array import as_any
from kvcoll.nccl import setup
from kvcoll.nccl.transport import GpuTransport
from kvcoll.topology import Topology
from kvcoll.transport import mpi

if TYPE_CHECKING:
    from mpi4py import MPI

pytestmark = [pytest.mark.ranks(at_least=2), needs_compiler]


class Ranks:
    """Fake GPUs and NCCL of this rank, on as many hosts as asked for."""

    def __init__(self, comm: MPI.Intracomm, folder: Path, *, one_host: bool = True) -> None:
        self.comm, self.rank, self.size = comm, comm.rank, comm.size
        hosts = (0,) * comm.size if one_host else tuple(range(comm.size))
        self.topology = Topology(comm.rank, hosts)
        self.gpus = FakeGpus(1, [f"gpu-{comm.rank}"])
        self.nccl = FakeNccl(self.gpus, folder)

    def make(
        self,
        find: Callable[[], tuple[FakeGpus, FakeNccl]] | None = None,
        *,
        limit_s: float = 20,
        tree: bool = False,
        mpi_gets: str = mpi_takes.STAGED,
    ) -> GpuTransport:
        return setup.transport_for(
            mpi.duplicate(self.comm, 30),
            self.topology,
            find or (lambda: (self.gpus, self.nccl)),
            limit_s=limit_s,
            tree=tree,
            mpi_gets=mpi_gets,
            scratch_bytes=8 << 10,
        )

    def check_all_raise(self, make: Callable[[], object], kind: type[KVCollError]) -> str:
        """Check that all ranks get an error of this kind, of one text; give the text."""
        with pytest.raises(kind) as raised:
            make()
        assert type(raised.value) is kind
        texts = self.comm.allgather(str(raised.value))
        assert texts == [texts[0]] * self.size
        return str(texts[0])


@pytest.fixture
def ranks(comm: MPI.Intracomm, host_of: tuple[int, ...]) -> Iterator[Ranks]:
    if len(set(host_of)) > 1:
        pytest.skip("fake GPUs of several processes find one another on one machine")
    with mailbox(comm) as folder:
        yield Ranks(comm, folder)


def test_a_rank_that_finds_no_gpu_tells_all(ranks: Ranks) -> None:
    def find() -> tuple[FakeGpus, FakeNccl]:
        if ranks.rank == 1:
            raise DeviceError("there is no NVIDIA driver here")
        return ranks.gpus, ranks.nccl

    text = ranks.check_all_raise(lambda: ranks.make(find), DeviceError)
    assert text == "rank 1: there is no NVIDIA driver here"


def test_a_library_that_is_missing_on_one_rank_is_missing_for_all(ranks: Ranks) -> None:
    def find() -> tuple[FakeGpus, FakeNccl]:
        if ranks.rank == ranks.size - 1:
            raise MissingDependencyError("CuPy is not installed")
        return ranks.gpus, ranks.nccl

    text = ranks.check_all_raise(lambda: ranks.make(find), MissingDependencyError)
    assert text == f"rank {ranks.size - 1}: CuPy is not installed"


def test_two_ranks_on_one_gpu_are_one_error_on_all(ranks: Ranks) -> None:
    gpus = FakeGpus(1, ["the only one"])
    nccl = FakeNccl(gpus, None)
    text = ranks.check_all_raise(lambda: ranks.make(lambda: (gpus, nccl)), DeviceError)
    assert text.startswith("ranks 0 and 1 are both on GPU the only one")


def test_an_id_that_cannot_be_made_is_told_before_anybody_waits_for_it(ranks: Ranks) -> None:
    if ranks.rank == 0:
        ranks.nccl.id_error = "no socket interface found"
    text = ranks.check_all_raise(ranks.make, CollectiveError)
    assert text == "rank 0: ncclGetUniqueId: no socket interface found"
    assert not ranks.nccl.open


def test_a_rank_on_which_nccl_does_not_start_tells_all(ranks: Ranks) -> None:
    if ranks.rank == 1:
        ranks.nccl.init_error = "unhandled cuda error"
    text = ranks.check_all_raise(lambda: ranks.make(limit_s=0.5), CollectiveError)
    # The others wait for its member in vain; the lowest rank's error is told.
    assert text.startswith(
        "rank 0: NCCL has not brought the GPUs of this host together within 0.5 s"
    )


def test_memory_that_one_rank_does_not_have_is_an_error_on_all(
    ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    if ranks.rank == 1:

        def none_left(*_: object) -> None:
            raise MemoryError("no more pinned memory")

        monkeypatch.setattr(ranks.gpus, "pinned", none_left)
    with pytest.raises(MemoryError, match="rank 1: no more pinned memory"):
        ranks.make()
    assert not ranks.nccl.open


@pytest.mark.ranks(exactly=4)
def test_nccl_that_starts_on_one_host_only_is_closed_there(
    comm: MPI.Intracomm, ranks: Ranks
) -> None:
    ranks.topology = Topology(comm.rank, (0, 0, 1, 1))
    if comm.rank >= 2:
        ranks.nccl.init_error = "no route"
    text = ranks.check_all_raise(ranks.make, CollectiveError)
    assert text == "rank 2: ncclCommInitRank: no route"
    assert not ranks.nccl.open


@pytest.mark.ranks(at_least=3)
def test_trees_that_hosts_cannot_add_are_refused(comm: MPI.Intracomm, ranks: Ranks) -> None:
    ranks.topology = Topology(comm.rank, tuple(k % 2 for k in range(comm.size)))
    text = ranks.check_all_raise(lambda: ranks.make(tree=True), ArgumentError)
    assert text.startswith("reproducible sums on GPUs need as many ranks on each host")


def push(transport: GpuTransport, gpus: FakeGpus, n: int, value: float) -> float:
    """Sum n elements of this value; give the first of the sum."""
    array = transport.device.empty(n, np.float32, transport.stream)
    gpus.write(array, np.full(n, value), transport.stream)
    transport.all_reduce(as_any(array), as_any(array))
    return float(gpus.read(array, transport.stream)[0])


@pytest.mark.long
def test_a_rank_that_does_not_come_to_a_sum_lets_the_others_fail_by_name(ranks: Ranks) -> None:
    transport = ranks.make(limit_s=4)
    expected = ranks.size * (ranks.size + 1) / 2
    assert push(transport, ranks.gpus, 9, ranks.rank + 1) == expected
    if ranks.rank > 0:
        array = transport.device.empty(9, np.float32, transport.stream)
        ranks.gpus.write(array, np.ones(9), transport.stream)
        transport.all_reduce(as_any(array), as_any(array))
        with pytest.raises(CollectiveError, match=r"all_reduce of float32\[9\] among .* aborted"):
            transport.wait()
        with pytest.raises(CollectiveError, match="was aborted"):
            push(transport, ranks.gpus, 9, 1)
    transport.end()
    assert not ranks.nccl.open
    ranks.comm.Barrier()


def test_an_order_of_calls_that_differs_between_ranks_is_caught(ranks: Ranks) -> None:
    transport = ranks.make(limit_s=5)
    array = transport.device.empty(9, np.float32, transport.stream)
    ranks.gpus.write(array, np.ones(9), transport.stream)

    def call() -> None:
        if ranks.rank == 0:
            transport.broadcast(as_any(array))
        transport.all_reduce(as_any(array), as_any(array))
        if ranks.rank > 0:
            transport.broadcast(as_any(array))
        transport.wait()

    with pytest.raises(CollectiveError, match="another rank"):
        call()
    transport.end()
    assert not ranks.nccl.open


@pytest.mark.long
def test_segments_given_before_they_are_brought_are_caught(
    ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    transport = ranks.make(limit_s=5)
    clique = transport._clique
    if ranks.rank == 0:
        exchange, give = clique.exchange, clique.give

        def early(*arguments: object) -> object:
            give({0: arguments[1][0]}, arguments[2])  # type: ignore[arg-type,index]
            return exchange(*arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(clique, "exchange", early)
    n = 40 << 10
    array = transport.device.empty(2 * n, np.float32, transport.stream)
    ranks.gpus.write(array, np.arange(2 * n), transport.stream)
    source, out = array[:n], array[n:]
    expected = np.arange(n) * ranks.size
    try:
        transport.all_reduce(as_any(source), as_any(out))
        transport.wait()
        wrong = bool((ranks.gpus.read(out, transport.stream) != expected).any())
    except (CollectiveError, DeviceError):
        wrong = True
    assert any(ranks.comm.allgather(wrong))
    transport.end()


def test_a_transport_is_closed_once_and_leaves_nothing_open(ranks: Ranks) -> None:
    transport = ranks.make()
    assert push(transport, ranks.gpus, 4000, 1) == ranks.size
    transport.close()
    transport.end()
    assert not ranks.nccl.open
    ranks.gpus.finish()


def test_one_rank_a_host_needs_no_nccl(comm: MPI.Intracomm, ranks: Ranks) -> None:
    ranks.topology = Topology(comm.rank, tuple(range(comm.size)))
    ranks.nccl.id_error = ranks.nccl.init_error = "there is no NCCL"
    transport = ranks.make()
    assert push(transport, ranks.gpus, 4000, ranks.rank + 1) == ranks.size * (ranks.size + 1) / 2
    transport.close()
    ranks.gpus.finish()


def test_nothing_is_waited_for_on_one_host(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    transport = ranks.make()
    arrays = [transport.device.empty(4000, np.float32, transport.stream) for _ in range(5)]
    for number, array in enumerate(arrays):
        ranks.gpus.write(array, np.full(4000, number + ranks.rank), transport.stream)
    with monkeypatch.context() as patched:
        # Whoever waits for work on the GPU asks an event; the watch does so from beside.
        patched.setattr(FakeGpus, "wait_for", None)
        patched.setattr(FakeGpus, "seen_by_host", None)
        for array in arrays:
            transport.all_reduce(as_any(array), as_any(array))
        transport.broadcast(as_any(arrays[0]), 1)
    places = sum(range(ranks.size))
    for number, array in enumerate(arrays):
        total = ranks.gpus.read(array, transport.stream)
        np.testing.assert_array_equal(total, np.full(4000, number * ranks.size + places))
    transport.close()
    ranks.gpus.finish()


WAYS = [
    ([mpi_takes.AUTO], ["", ""], True),
    ([mpi_takes.AUTO], ["", "signal 11"], False),
    ([mpi_takes.AUTO], ["signal 11", ""], False),
    ([mpi_takes.DIRECT], None, True),
    ([mpi_takes.STAGED], None, False),
    ([mpi_takes.AUTO, mpi_takes.STAGED], ["", ""], False),
    ([mpi_takes.DIRECT, mpi_takes.STAGED], None, False),
    ([mpi_takes.DIRECT, mpi_takes.AUTO], ["", "signal 11"], False),
]


@pytest.mark.parametrize(("words", "why_not", "direct"), WAYS)
def test_mpi_gets_addresses_of_gpus_on_all_ranks_or_on_none(
    comm: MPI.Intracomm,
    host_of: tuple[int, ...],
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    why_not: list[str] | None,
    direct: bool,
) -> None:
    if len(set(host_of)) > 1:
        pytest.skip("fake GPUs of several processes find one another on one machine")

    def tried(device: int) -> str:
        assert why_not is not None, "it is tried where the environment has decided"
        return why_not[comm.rank % 2]

    monkeypatch.setattr(mpi_takes, "why_not", tried)
    with mailbox(comm) as folder:
        own = Ranks(comm, folder, one_host=False)
        made = own.make(mpi_gets=words[comm.rank % len(words)])
        assert made.crossing is not None
        assert made.crossing.direct is direct
        made.close()
        own.gpus.finish()


def test_more_hosts_than_one_kernel_adds_are_staged(
    comm: MPI.Intracomm, host_of: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    if len(set(host_of)) > 1:
        pytest.skip("fake GPUs of several processes find one another on one machine")
    monkeypatch.setattr(mpi_takes, "why_not", lambda device: pytest.fail("it was tried"))
    monkeypatch.setattr(setup, "MOST_ROWS", comm.size - 1)
    for wanted in (mpi_takes.AUTO, mpi_takes.DIRECT):
        with mailbox(comm) as folder:
            own = Ranks(comm, folder, one_host=False)
            made = own.make(mpi_gets=wanted)
            assert not made.way.direct
            n, total = 3000, comm.size * (comm.size + 1) / 2
            assert push(made, own.gpus, n, comm.rank + 1) == total
            made.close()
            own.gpus.finish()


@pytest.mark.parametrize("why_not", ["", "signal 11"])
def test_ranks_that_are_left_go_on_in_the_way_of_before_and_try_nothing(
    comm: MPI.Intracomm,
    host_of: tuple[int, ...],
    monkeypatch: pytest.MonkeyPatch,
    why_not: str,
) -> None:
    if len(set(host_of)) > 1:
        pytest.skip("fake GPUs of several processes find one another on one machine")
    tries: list[int] = []

    def tried(device: int) -> str:
        tries.append(device)
        return why_not

    monkeypatch.setattr(mpi_takes, "why_not", tried)
    monkeypatch.setattr(mpi_takes, "says", lambda: None)
    with mailbox(comm) as folder:
        own = Ranks(comm, folder, one_host=False)
        monkeypatch.setattr(on_gpus, "find", lambda: (own.gpus, own.nccl))
        monkeypatch.setattr(on_gpus, "find_gpus", lambda: own.gpus)
        monkeypatch.setattr(on_gpus, "_given_to_mpi", set())
        joining = on_gpus.Joining(tree=False, limit_s=20, mpi_gets=mpi_takes.AUTO)
        comms = [mpi.duplicate(comm, 30) for _ in range(2)]
        joining.join(comms[0], own.topology, mpi.losses_of(comms[0]))
        first = joining.transport
        assert first.way.direct is (why_not == "")
        _, take_over = joining.again(comms[1], own.topology, mpi.losses_of(comms[1]))
        take_over()
        assert joining.transport is not first
        assert joining.transport.way == first.way
        assert len(tries) == 1
        first.close()
        joining.transport.close()
        own.gpus.finish()


def test_on_one_host_nothing_is_tried(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mpi_takes, "why_not", lambda device: pytest.fail("it was tried"))
    ranks.make(mpi_gets=mpi_takes.AUTO).close()


def test_one_rank_of_each_host_tries_it(
    comm: MPI.Intracomm, host_of: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    if len(set(host_of)) > 1 or comm.size < 3:
        pytest.skip("it takes a host of two ranks, which are on one machine")
    asked: list[int] = []

    def tried(device: int) -> str:
        asked.append(device)
        return "no"

    monkeypatch.setattr(mpi_takes, "why_not", tried)
    with mailbox(comm) as folder:
        own = Ranks(comm, folder)
        own.topology = Topology(comm.rank, (0,) * (comm.size - 1) + (1,))
        own.make(mpi_gets=mpi_takes.AUTO).close()
        assert asked == ([0] if comm.rank in (0, comm.size - 1) else [])
        own.gpus.finish()
