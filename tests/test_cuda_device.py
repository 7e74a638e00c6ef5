"""A GPU as CuPy fills the port: its streams, its memory, and errors that CUDA raises late."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from arrays_of import f32
from fake_cupy import CUDARuntimeError, Device, World, shown
from host_kernel import needs_compiler

import kvcoll
from kvcoll.cuda import find
from kvcoll.errors import DeviceError
from kvcoll.gpu.device import Gpus
from kvcoll.gpu.kernel import Access, KernelSource, Parameter

pytestmark = [pytest.mark.single, needs_compiler]


@pytest.fixture
def world() -> Iterator[World]:
    with shown(2) as made:
        yield made


@pytest.fixture
def gpus(world: World) -> Gpus:
    return find.find_gpus()


def test_gpus_are_known_by_name_and_by_the_uuid_that_nvidia_smi_shows(gpus: Gpus) -> None:
    assert gpus.driver_version == 13000
    assert [device.name for device in gpus.devices] == ["Fake GPU"] * 2
    assert gpus.devices[1].uuid == "02020202-0202-0202-0202-020202020202"


@pytest.mark.parametrize("is_list", [False, True])
@pytest.mark.parametrize("device", [0, 1])
def test_arrays_of_cupy_are_in_the_order_of_the_stream_that_is_current(
    world: World, device: int, is_list: bool
) -> None:
    cupy = sys.modules["cupy"]
    kv = kvcoll.create("device")
    keys = ["w", "b"]
    kv.init(keys, [cupy.asarray(f32([0, 0])) for _ in keys])
    with Device(world, device):
        stream = cupy.cuda.Stream(non_blocking=True)
        users = device, stream.ptr
        with stream:
            grad, out, beside = (cupy.asarray(f32([0, 0])) for _ in range(3))
            key: Any = keys if is_list else "w"
            given, outs = ([grad, beside], [out, beside]) if is_list else (grad, out)
            for call in (lambda: kv.push(key, given), lambda: kv.pull(key, out=outs)):
                grad[...] = f32([1, 2])
                n_done, before = len(world.done), world.tick(users)
                call()
                assert len(world.done) > n_done
                for own, clock in world.done[n_done:]:
                    assert clock[users] == before
                    assert world.is_behind(users, own)
    assert out.get().tolist() == [1, 2]
    assert world.n_host_waits == 0
    assert world.current == 0  # as it was


def test_what_fails_on_a_gpu_is_named_by_whoever_looks(
    gpus: Gpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    event = gpus.devices[0].stream().record()
    runtime = sys.modules["cupy.cuda.runtime"]
    monkeypatch.setattr(runtime, "eventQuery", lambda _: 600)
    assert not event.done()
    monkeypatch.setattr(runtime, "eventQuery", lambda _: 700)
    with pytest.raises(DeviceError, match="work on a GPU has failed: cudaError 700"):
        event.done()

    def fails(_: object) -> None:
        raise CUDARuntimeError(700)

    monkeypatch.setattr("fake_cupy.Event.synchronize", fails)
    with pytest.raises(DeviceError, match="work on a GPU has failed: cudaError 700"):
        event.synchronize()


def test_memory_of_no_pool_that_is_not_there_is_a_memory_error(
    gpus: Gpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(n_bytes: int) -> Any:
        raise CUDARuntimeError(2)

    monkeypatch.setattr(sys.modules["cupy.cuda"], "Memory", fails)
    with pytest.raises(MemoryError, match="Fake GPU has no 4096 bytes more: cudaError 2"):
        gpus.devices[0].plain(4096)


@pytest.mark.parametrize("status", [704, 217])
def test_peers_are_let_in_once_and_nccl_may_have_done_it_before(
    gpus: Gpus, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    asked: list[int] = []

    def enable(other: int) -> None:
        asked.append(other)
        raise CUDARuntimeError(status)

    monkeypatch.setattr(sys.modules["cupy.cuda.runtime"], "deviceEnablePeerAccess", enable)
    here, there = gpus.devices
    stream = here.stream()
    out = here.empty(4, np.float32, stream)
    source = there.empty(4, np.float32, there.stream())
    if status == 704:  # it has been done
        for _ in range(2):
            here.copy(source, out, stream)
        assert asked == [1]
        return
    with pytest.raises(CUDARuntimeError):
        here.copy(source, out, stream)


def test_copies_of_unequal_lengths_are_refused(gpus: Gpus) -> None:
    device = gpus.devices[0]
    stream = device.stream()
    array, host = device.empty(4, np.float32, stream), gpus.pinned(12)
    for copy in (device.upload, device.copy, device.download):
        first: Any = array if copy == device.download else host
        second: Any = host if copy == device.download else array
        with pytest.raises(ValueError, match=r"a copy of .* bytes into"):
            copy(first, second, stream)


def test_a_kernel_that_does_not_compile_is_named_with_what_nvrtc_says(gpus: Gpus) -> None:
    source = KernelSource("bad", (Parameter("float", "out", Access.WRITE),), "out[i] = nothing;")
    with pytest.raises(DeviceError, match=r"(?s)the kernel bad does not compile: .*nothing"):
        gpus.devices[0].compile(source)


def test_a_kernel_is_compiled_once_and_runs_over_all_elements(gpus: Gpus) -> None:
    device = gpus.devices[1]
    stream = device.stream()
    parameters = (Parameter("float", "out", Access.WRITE), Parameter("float", "x", Access.VALUE))
    source = KernelSource("fill", parameters, "out[i] = x + i;")
    kernel = device.compile(source)
    assert device.compile(source) is kernel
    out, host = device.empty(1000, np.float32, stream), gpus.pinned(4000).view(np.float32)
    kernel.launch(1000, (out, np.float32(0.5)), stream)
    device.download(out, host, stream)
    np.testing.assert_array_equal(host, np.arange(1000) + 0.5)
    device.zero(out, stream)
    kernel.launch(0, (out, np.float32(0.5)), stream)
    device.download(out, host, stream)
    assert not host.any()
