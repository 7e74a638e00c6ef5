"""The fake GPUs catch what would be a race or a crash on real ones, and nothing else."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
from fake_gpu import FakeGpus, RuleBrokenError, numpy_of
from host_kernel import needs_compiler

from kvcoll.errors import DeviceError
from kvcoll.gpu.array import DeviceArray
from kvcoll.gpu.device import Exposed
from kvcoll.gpu.kernel import Access, KernelSource, Parameter

pytestmark = pytest.mark.single

TWICE = KernelSource(
    "twice",
    (
        Parameter("float", "x", Access.READ),
        Parameter("float", "y", Access.WRITE),
        Parameter("float", "more", Access.VALUE),
    ),
    "y[i] = 2 * x[i] + more;",
)


def test_work_of_two_streams_on_the_same_bytes_needs_an_event() -> None:
    gpus = FakeGpus(1)
    device = gpus.devices[0]
    first, second = device.stream(), device.stream()
    array = device.empty(8, np.float32, first)
    gpus.write(array, np.arange(8), first)
    with pytest.raises(RuleBrokenError, match="nothing says which is first"):
        gpus.read(array, second)
    second.wait(first.record())
    np.testing.assert_array_equal(gpus.read(array, second), np.arange(8))


def test_two_streams_may_read_the_same_bytes_and_write_neighbours() -> None:
    gpus = FakeGpus(1)
    device = gpus.devices[0]
    first, second = device.stream(), device.stream()
    array = device.empty(8, np.float32, first)
    gpus.write(array, np.arange(8), first)
    second.wait(first.record())
    gpus.read(array[:4], first)
    gpus.read(array[:4], second)
    gpus.write(array[:2], [5, 6], first)
    gpus.write(array[4:], [1, 2, 3, 4], second)
    with pytest.raises(RuleBrokenError):
        gpus.write(array[1:2], [0], second)


def test_an_event_orders_what_was_before_it_only() -> None:
    gpus = FakeGpus(1)
    device = gpus.devices[0]
    first, second = device.stream(), device.stream()
    array = device.empty(8, np.float32, first)
    gpus.write(array, np.arange(8), first)
    event = first.record()
    gpus.write(array, np.arange(8) * 2, first)
    second.wait(event)
    with pytest.raises(RuleBrokenError):
        gpus.read(array, second)


def test_events_that_the_host_saw_order_what_it_puts_on_streams_later() -> None:
    gpus = FakeGpus(1)
    device = gpus.devices[0]
    first, second = device.stream(), device.stream()
    array = device.empty(8, np.float32, first)
    gpus.write(array, np.arange(8), first)
    event = first.record()
    while not event.done():
        pass
    np.testing.assert_array_equal(gpus.read(array, second), np.arange(8))


def test_a_copy_to_the_host_shows_its_numbers_when_the_host_has_seen_it_done() -> None:
    gpus = FakeGpus(1)
    device = gpus.devices[0]
    stream = device.stream()
    array, host = device.empty(4, np.int32, stream), gpus.pinned(16).view(np.int32)
    gpus.write(array, [3, 1, 4, 1], stream)
    device.download(array, host, stream)
    assert host.tolist() != [3, 1, 4, 1]
    event = stream.record()
    assert not event.done()
    assert host.tolist() != [3, 1, 4, 1]
    event.synchronize()
    assert host.tolist() == [3, 1, 4, 1]
    gpus.finish()


def test_the_source_of_a_copy_from_the_host_must_not_change_before_it_is_done() -> None:
    gpus = FakeGpus(1)
    device = gpus.devices[0]
    stream = device.stream()
    array, host = device.empty(4, np.int32, stream), gpus.pinned(16).view(np.int32)
    host[:] = [3, 1, 4, 1]
    device.upload(host, array, stream)
    stream.synchronize()
    host[:] = 0  # it was seen done
    device.upload(host, array, stream)
    host[1] = 5
    with pytest.raises(RuleBrokenError, match="the host changed memory"):
        stream.synchronize()


def test_what_came_down_goes_up_in_the_order_of_streams_and_the_host_does_not_see_it() -> None:
    gpus = FakeGpus(1)
    device = gpus.devices[0]
    stream = device.stream()
    array, out = (device.empty(6, np.int32, stream) for _ in range(2))
    host = gpus.pinned(24).view(np.int32)
    host[:] = 0
    may_go_on: list[bool] = []
    gpus.write(array, [3, 1, 4, 1, 5, 9], stream)
    gpus.put_part(stream, lambda: bool(may_go_on), (), (), "what other ranks are late for")
    device.download(array[:4], host[1:5], stream)
    device.upload(host, out, stream)
    assert 3 not in host.tolist()  # neither has begun
    may_go_on.append(True)
    gpus.pump()
    assert 3 not in host.tolist()  # both are done, but the host has not seen it
    assert gpus.read(out, stream).tolist() == [0, 3, 1, 4, 1, 0]
    assert host.tolist() == [0, 3, 1, 4, 1, 0]
    gpus.finish()


def test_what_came_down_on_another_stream_goes_up_after_an_event_only() -> None:
    gpus = FakeGpus(1)
    device = gpus.devices[0]
    first, second = device.stream(), device.stream()
    array, host = device.empty(4, np.int32, first), gpus.pinned(16).view(np.int32)
    out = device.empty(4, np.int32, second)
    gpus.write(array, [3, 1, 4, 1], first)
    device.download(array, host, first)
    with pytest.raises(RuleBrokenError, match=r"upload on stream .* reads what download"):
        device.upload(host, out, second)
    second.wait(first.record())
    device.upload(host, out, second)
    assert gpus.read(out, second).tolist() == [3, 1, 4, 1]


def exposed_to_mpi(gpus: FakeGpus, array: DeviceArray, *, to_write: bool) -> Exposed:
    with gpus.devices[0].here():
        return gpus.devices[0].expose(array, to_write=to_write)


def test_mpi_gets_memory_only_once_the_host_has_seen_the_work_on_it_done() -> None:
    gpus = FakeGpus(1)
    stream = gpus.devices[0].stream()
    array = gpus.devices[0].plain(8)
    gpus.write(array, np.arange(8), stream)
    for to_write in (False, True):
        with pytest.raises(RuleBrokenError, match=r"MPI on stream .*nothing says which is first"):
            exposed_to_mpi(gpus, array, to_write=to_write)
    stream.synchronize()
    reads = [exposed_to_mpi(gpus, array, to_write=False) for _ in range(2)]
    assert gpus.read(array, stream).tolist() == list(range(8))  # who reads beside does no harm
    with pytest.raises(RuleBrokenError, match=r"write on stream .* writes what MPI"):
        gpus.write(array, np.arange(8), stream)
    for one in reads:
        one.withdraw()
    gpus.write(array, np.arange(8), stream)


def test_what_mpi_writes_is_read_only_once_it_is_done() -> None:
    gpus = FakeGpus(1)
    stream = gpus.devices[0].stream()
    array = gpus.devices[0].plain(8)
    gpus.write(array, np.arange(8), stream)
    stream.synchronize()
    for turn in range(3):
        exposed = exposed_to_mpi(gpus, array, to_write=True)
        numpy_of(array)[:4] = turn
        with pytest.raises(RuleBrokenError, match=r"read on stream .* reads what MPI"):
            gpus.read(array, stream)
        exposed.withdraw()
        seen = gpus.read(array, stream)
        assert seen[:4].tolist() == [turn] * 4
        assert (seen[4:] > 8).all()  # nothing of what was there before


def test_mpi_gets_no_memory_of_a_pools_nor_while_another_gpu_is_current() -> None:
    gpus = FakeGpus(2)
    stream = gpus.devices[0].stream()
    with pytest.raises(RuleBrokenError, match="is a pool's"):
        exposed_to_mpi(gpus, gpus.devices[0].empty(8, np.uint8, stream), to_write=False)
    array = gpus.devices[0].plain(8)
    with gpus.devices[1].here(), pytest.raises(RuleBrokenError, match="is not the current one"):
        gpus.devices[0].expose(array, to_write=False)
    exposed_to_mpi(gpus, array, to_write=False)
    with pytest.raises(AssertionError, match="left exposed to MPI"):
        gpus.finish()


def test_memory_must_not_go_while_mpi_uses_it() -> None:
    gpus = FakeGpus(1)
    array = gpus.devices[0].plain(8)
    exposed = exposed_to_mpi(gpus, array[:4], to_write=True)
    del array, exposed
    gpus.exposed.clear()
    gc.collect()
    with pytest.raises(AssertionError, match="memory went while MPI"):
        gpus.finish()


def test_memory_of_the_host_that_is_not_pinned_is_refused() -> None:
    gpus = FakeGpus(1)
    device = gpus.devices[0]
    stream = device.stream()
    with pytest.raises(RuleBrokenError, match="neither a GPU's nor pinned"):
        device.upload(np.zeros(4, np.int32), device.empty(4, np.int32, stream), stream)


def test_memory_must_not_go_while_another_stream_uses_it() -> None:
    gpus = FakeGpus(1)
    device = gpus.devices[0]
    first, second = device.stream(), device.stream()
    array = device.empty(4, np.int32, first)
    gpus.write(array, [1, 2, 3, 4], first)
    second.wait(first.record())
    device.zero(array, second)
    del array
    gc.collect()
    with pytest.raises(AssertionError, match="memory went"):
        gpus.finish()


def test_memory_may_go_once_its_stream_waits_for_the_others() -> None:
    gpus = FakeGpus(1)
    device = gpus.devices[0]
    first, second = device.stream(), device.stream()
    array = device.empty(4, np.int32, first)
    gpus.write(array, [1, 2, 3, 4], first)
    second.wait(first.record())
    device.zero(array, second)
    first.wait(second.record())
    del array
    gc.collect()
    gpus.finish()


@needs_compiler
def test_memory_that_went_is_given_to_nobody_while_work_of_its_stream_waits() -> None:
    gpus = FakeGpus(1)
    device = gpus.devices[0]
    stream = device.stream()
    x, y = (device.empty(1000, np.float32, stream) for _ in range(2))
    gpus.write(x, np.arange(1000), stream)
    stream.synchronize()
    may_go_on: list[bool] = []
    gpus.put_part(stream, lambda: bool(may_go_on), (), (), "what other ranks are late for")
    device.compile(TWICE).launch(1000, (x, y, np.float32(1)), stream)
    bytes_of_x = weakref.ref(numpy_of(x).base)
    del x  # as its stream allows
    gc.collect()
    others = [device.empty(1000, np.float32, stream) for _ in range(8)]
    assert bytes_of_x() is not None
    may_go_on.append(True)
    np.testing.assert_array_equal(gpus.read(y, stream), 2 * np.arange(1000) + 1)
    assert bytes_of_x() is None
    del others
    gpus.finish()


def test_arrays_and_streams_of_another_gpu_are_refused() -> None:
    gpus = FakeGpus(2)
    first, second = gpus.devices
    stream = first.stream()
    array = first.empty(4, np.int32, stream)
    with pytest.raises(RuleBrokenError):
        second.zero(array, stream)
    with pytest.raises(RuleBrokenError):
        first.zero(array, second.stream())


@needs_compiler
def test_a_kernel_runs_over_all_elements_and_takes_part_in_the_order_of_streams() -> None:
    gpus = FakeGpus(1)
    device = gpus.devices[0]
    first, second = device.stream(), device.stream()
    x, y = device.empty(5, np.float32, first), device.empty(5, np.float32, first)
    gpus.write(x, [1, 2, 3, 4, 5], first)
    kernel = device.compile(TWICE)
    kernel.launch(4, (x, y, np.float32(0.5)), first)
    assert gpus.read(y, first)[:4].tolist() == [2.5, 4.5, 6.5, 8.5]
    kernel.launch(4, (x, y, np.float32(1.5)), second)  # the host has seen all before
    with pytest.raises(RuleBrokenError, match="read on stream"):
        gpus.read(y, first)
    with pytest.raises(AssertionError, match="more of twice is a float32"):
        kernel.launch(4, (x, y, np.float64(0.5)), first)


@needs_compiler
def test_a_kernel_that_does_not_compile_is_a_named_error() -> None:
    wrong = KernelSource("wrong", (Parameter("float", "x", Access.WRITE),), "x[i] = nothing;")
    with pytest.raises(DeviceError, match="does not compile"):
        FakeGpus(1).devices[0].compile(wrong)


def test_an_array_of_the_users_works_like_numpys_on_its_current_stream() -> None:
    gpus = FakeGpus(1)
    array = gpus.array(np.arange(6, dtype=np.float32).reshape(2, 3))
    array += array * 2
    np.testing.assert_array_equal(array.get(), np.arange(6).reshape(2, 3) * 3)
    own = gpus.devices[0].stream()
    adopted = gpus.adopt(array, own)
    gpus.write(adopted, np.ones((2, 3)), own)
    with pytest.raises(RuleBrokenError):
        array.get()
    gpus.give_back(array, own)
    assert array.get().sum() == 6
