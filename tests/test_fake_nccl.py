"""The fake NCCL carries bytes, and catches what would hang or mix up numbers on real GPUs."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from fake_gpu import FakeGpus, RuleBrokenError
from fake_nccl import FakeNccl, mailbox

from kvcoll.errors import CollectiveError, DeviceError
from kvcoll.gpu.array import DeviceArray
from kvcoll.gpu.device import Stream
from kvcoll.gpu.nccl import Communicator

if TYPE_CHECKING:
    from mpi4py import MPI


class InOneProcess:
    """So many GPUs of this process, each with a stream and with a row of numbers of its own."""

    def __init__(self, count: int) -> None:
        self.gpus = FakeGpus(count)
        self.nccl = FakeNccl(self.gpus)
        self.comms: Sequence[Communicator] = self.nccl.init_all(self.gpus.devices)
        self.streams: list[Stream] = [device.stream() for device in self.gpus.devices]
        self.rows = [self.array(k, np.arange(6, dtype=np.int32) + 10 * k) for k in range(count)]

    def array(self, k: int, values: np.typing.NDArray[np.int32]) -> DeviceArray:
        array = self.gpus.devices[k].empty(values.size, values.dtype, self.streams[k])
        self.gpus.write(array, values, self.streams[k])
        return array

    def read(self, k: int, array: DeviceArray) -> list[int]:
        numbers: list[int] = self.gpus.read(array, self.streams[k]).tolist()
        return numbers


@pytest.mark.single
def test_all_gather_gives_every_member_all_rows_by_rank() -> None:
    own = InOneProcess(3)
    outs = [own.array(k, np.zeros(18, np.int32)) for k in range(3)]
    with own.nccl.group():
        for k, comm in enumerate(own.comms):
            comm.all_gather(own.rows[k], outs[k], own.streams[k])
    expected = [*range(6), *range(10, 16), *range(20, 26)]
    assert [own.read(k, outs[k]) for k in range(3)] == [expected] * 3
    own.gpus.finish()


@pytest.mark.single
def test_messages_and_broadcasts_of_one_group_go_where_they_are_sent() -> None:
    own = InOneProcess(3)
    out = own.array(2, np.zeros(6, np.int32))
    with own.nccl.group():
        own.comms[0].send(own.rows[0][:3], 2, own.streams[0])
        own.comms[2].receive(out[3:], 0, own.streams[2])
        own.comms[1].send(own.rows[1][3:], 2, own.streams[1])
        own.comms[2].receive(out[:3], 1, own.streams[2])
    assert own.read(2, out) == [13, 14, 15, 0, 1, 2]
    with own.nccl.group():
        for k, comm in enumerate(own.comms):
            comm.broadcast(own.rows[k], 1, own.streams[k])
    assert [own.read(k, own.rows[k]) for k in range(3)] == [[*range(10, 16)]] * 3
    own.gpus.finish()


@pytest.mark.single
def test_a_member_that_is_missing_from_a_group_is_an_error_and_no_hang() -> None:
    own = InOneProcess(2)
    outs = [own.array(k, np.zeros(12, np.int32)) for k in range(2)]
    with pytest.raises(RuleBrokenError, match="the members of a communicator call"):
        own.comms[0].all_gather(own.rows[0], outs[0], own.streams[0])
    with pytest.raises(RuleBrokenError, match="meets no receive"):
        own.comms[0].send(own.rows[0], 1, own.streams[0])


def call_differently(own: InOneProcess, wrong: str) -> None:
    """Let the second member differ from the first in one thing, in one group."""
    other, root = own.rows[1], 0
    if wrong == "count":
        other = other[:5]
    elif wrong == "dtype":
        other = other.view(np.float32)
    elif wrong == "root":
        root = 1
    outs = [own.array(k, np.zeros(12, np.int32)) for k in range(2)]
    with own.nccl.group():
        own.comms[0].broadcast(own.rows[0], 0, own.streams[0])
        if wrong != "order":
            own.comms[1].broadcast(other, root, own.streams[1])
        own.comms[0].all_gather(outs[0][:6], outs[0], own.streams[0])
        own.comms[1].all_gather(outs[1][6:], outs[1], own.streams[1])
        if wrong == "order":
            own.comms[1].broadcast(other, root, own.streams[1])


@pytest.mark.single
def test_calls_of_members_that_are_alike_are_none() -> None:
    own = InOneProcess(2)
    call_differently(own, "nothing")
    assert own.read(1, own.rows[1]) == [*range(6)]
    own.gpus.finish()


@pytest.mark.single
@pytest.mark.parametrize("wrong", ["count", "dtype", "order", "root"])
def test_calls_of_members_that_differ_are_an_error(wrong: str) -> None:
    with pytest.raises(RuleBrokenError, match="the members of a communicator call"):
        call_differently(InOneProcess(2), wrong)


def send_into_what_is_read(own: InOneProcess) -> None:
    with own.nccl.group():
        own.comms[0].send(own.rows[0], 1, own.streams[0])
        own.comms[0].receive(own.rows[0][3:], 1, own.streams[0])
        own.comms[1].send(own.rows[1][3:], 0, own.streams[1])
        own.comms[1].receive(own.rows[1][:3], 0, own.streams[1])


@pytest.mark.single
def test_what_one_call_of_a_group_writes_no_other_of_it_may_read() -> None:
    with pytest.raises(RuleBrokenError, match="of its group uses"):
        send_into_what_is_read(InOneProcess(2))


@pytest.mark.single
def test_what_is_received_must_be_waited_for_by_other_streams() -> None:
    own = InOneProcess(2)
    out = own.array(1, np.zeros(6, np.int32))
    with own.nccl.group():
        own.comms[0].send(own.rows[0], 1, own.streams[0])
        own.comms[1].receive(out, 0, own.streams[1])
    other = own.gpus.devices[1].stream()
    with pytest.raises(RuleBrokenError, match="nothing says which is first"):
        own.gpus.read(out, other)
    with pytest.raises(RuleBrokenError, match="nothing says which is first"):
        own.gpus.write(own.rows[0], np.zeros(6), own.gpus.devices[0].stream())


@pytest.fixture
def mail(comm: MPI.Intracomm) -> Iterator[Path]:
    with mailbox(comm) as folder:
        yield folder


class Member:
    """This rank's one GPU, in a communicator of all ranks."""

    def __init__(self, folder: Path, rank: int, size: int) -> None:
        self.gpus = FakeGpus(1)
        self.nccl = FakeNccl(self.gpus, folder)
        unique_id = b"all".ljust(128, b"\0")
        self.comm = self.nccl.init_rank(size, unique_id, rank, self.gpus.devices[0])
        self.stream = self.gpus.devices[0].stream()
        self.row = self.gpus.devices[0].empty(4, np.int32, self.stream)
        self.gpus.write(self.row, np.arange(4) + 10 * rank, self.stream)


@pytest.mark.ranks(at_least=2)
def test_ranks_of_several_processes_gather_broadcast_and_send(
    mail: Path, rank: int, size: int
) -> None:
    own = Member(mail, rank, size)
    out = own.gpus.devices[0].empty(4 * size, np.int32, own.stream)
    own.comm.all_gather(own.row, out, own.stream)
    expected = [10 * k + i for k in range(size) for i in range(4)]
    assert own.gpus.read(out, own.stream).tolist() == expected
    own.comm.broadcast(own.row, size - 1, own.stream)
    assert own.gpus.read(own.row, own.stream).tolist() == expected[-4:]
    own.gpus.write(own.row, np.arange(4) * (rank + 1), own.stream)
    with own.nccl.group():
        own.comm.send(own.row, (rank + 1) % size, own.stream)
        own.comm.receive(out[:4], (rank - 1) % size, own.stream)
    assert own.gpus.read(out[:4], own.stream).tolist() == [
        i * ((rank - 1) % size + 1) for i in range(4)
    ]
    own.comm.destroy()
    own.gpus.finish()


@pytest.mark.ranks(at_least=2)
@pytest.mark.parametrize("wrong", ["count", "dtype", "order"])
def test_ranks_that_call_different_things_get_an_error_of_their_device(
    mail: Path, rank: int, size: int, wrong: str
) -> None:
    own = Member(mail, rank, size)
    row = own.row
    if rank == 0 and wrong == "count":
        row = row[:3]
    if rank == 0 and wrong == "dtype":
        row = row.view(np.float32)
    out = own.gpus.devices[0].empty(size * row.size, row.dtype, own.stream)
    if rank == 0 and wrong == "order":
        own.comm.broadcast(row, 0, own.stream)
    own.comm.all_gather(row, out, own.stream)
    with pytest.raises(DeviceError, match="another rank"):
        own.stream.synchronize()
    with pytest.raises(CollectiveError, match="another rank"):
        own.comm.check()


@pytest.mark.ranks(at_least=2)
def test_a_rank_that_does_not_come_lets_the_others_wait_until_they_abort(
    mail: Path, rank: int, size: int
) -> None:
    own = Member(mail, rank, size)
    if rank == 0:
        return
    out = own.gpus.devices[0].empty(4 * size, np.int32, own.stream)
    own.comm.all_gather(own.row, out, own.stream)
    event = own.stream.record()
    end = time.monotonic() + 0.05
    while time.monotonic() < end:
        assert not event.done()
    own.comm.abort()
    event.synchronize()
