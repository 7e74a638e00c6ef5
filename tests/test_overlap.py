"""Pushes that return before their sum is taken: what is later, and what must not change."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, final

import numpy as np
import pytest
from raised_by_all import raised_by_all

import kvcoll
from kvcoll import KVStore, optimizer
from kvcoll.agreement import Alone
from kvcoll.arrays import Array, DType
from kvcoll.errors import RanksDisagreeError, ShapeMismatchError
from kvcoll.launch import Overlap
from kvcoll.topology import Topology
from kvcoll.transport.alone import AloneTransport
from kvcoll.transport.contract import Exchange, Sink, Transport, Window

LIMIT_S = 20


@final
class Gate(Transport):
    """One rank's transport whose sums wait until they are let through, and are listed."""

    def __init__(self) -> None:
        self._alone = AloneTransport()
        self.topology = Topology.alone()
        self.open = threading.Event()
        self.began = threading.Event()
        self.sums: list[float] = []

    def all_reduce(self, source: Array, out: Array) -> None:
        self._alone.all_reduce(source, out)

    def all_reduce_pieces(self, source: Array, dtype: DType, sink: Sink) -> None:
        self.began.set()
        assert self.open.wait(LIMIT_S)
        self.sums.append(float(source[0]))
        self._alone.all_reduce_pieces(source, dtype, sink)

    def window(self, private: Array) -> Window:
        return self._alone.window(private)

    def all_reduce_window(self, window: Window, start: int, stop: int, sink: Sink) -> None:
        self._alone.all_reduce_window(window, start, stop, sink)

    def broadcast(self, buffer: Array, root: int = 0) -> None:
        self._alone.broadcast(buffer, root)

    def start_all_to_all(
        self, sent: Mapping[int, Array], received: Mapping[int, Array]
    ) -> Exchange:
        return self._alone.start_all_to_all(sent, received)

    def abort(self, why: str) -> None:
        self._alone.abort(why)

    def close(self) -> None:
        self._alone.close()


overlapping = partial(Overlap, leads=True)


@pytest.fixture
def gate() -> Gate:
    return Gate()


@pytest.fixture
def held(gate: Gate) -> Iterator[KVStore]:
    """Give a store of one rank whose pushes wait for the gate."""
    with KVStore("dist_sync", gate, Alone(), one_thread=True, launching=overlapping) as store:
        store.init(["a", "b", "c"], [np.zeros(3, np.float32)] * 3)
        yield store
        gate.open.set()


def full(value: float) -> Array:
    return np.full(3, value, np.float32)


@pytest.mark.single
def test_a_push_returns_before_its_sum_and_the_caller_may_change_its_array(
    held: KVStore, gate: Gate
) -> None:
    value = full(5)
    held.push("a", value)
    value[:] = 77
    assert not gate.sums
    gate.open.set()
    np.testing.assert_array_equal(held.pull("a"), full(5))


@pytest.mark.single
def test_a_pull_waits_for_its_own_keys_only(held: KVStore, gate: Gate) -> None:
    held.push("a", full(5))
    assert gate.began.wait(LIMIT_S)
    np.testing.assert_array_equal(held.pull("b"), full(0))  # returns, though "a" waits
    got = []

    def let_through() -> None:
        time.sleep(0.05)
        got.append(list(gate.sums))
        gate.open.set()

    other = threading.Thread(target=let_through)
    other.start()
    np.testing.assert_array_equal(held.pull(["b", "a"])[1], full(5))
    other.join()
    assert got == [[]]


@pytest.mark.single
def test_pushes_that_wait_are_summed_by_priority(held: KVStore, gate: Gate) -> None:
    held.push("a", full(1))
    assert gate.began.wait(LIMIT_S)
    held.push("b", full(2), priority=-1)
    held.push("c", full(3), priority=np.int64(1))
    gate.open.set()
    held.wait()
    assert gate.sums == [1, 3, 2]


@pytest.mark.single
@pytest.mark.parametrize("key", ["a", ["a"], None])
def test_wait_lets_a_view_show_what_was_pushed(
    held: KVStore, gate: Gate, key: str | list[str] | None
) -> None:
    view = held.view("a")
    held.push("a", full(5))
    np.testing.assert_array_equal(view, full(0))
    gate.open.set()
    held.wait(key)
    np.testing.assert_array_equal(view, full(5))


@pytest.mark.single
def test_an_update_goes_by_the_settings_of_its_push_not_by_later_ones(
    held: KVStore, gate: Gate
) -> None:
    sgd = optimizer.SGD(learning_rate=0.5, rescale_grad=2)
    held.set_optimizer(sgd)
    held.push("a", full(3))
    sgd.rescale_grad, sgd.lr = 100, 100
    gate.open.set()
    np.testing.assert_array_equal(held.pull("a"), full(-0.5 * 2 * 3))
    held.push("a", full(1))
    np.testing.assert_array_equal(held.pull("a"), full(-3 - 100 * 100))


@pytest.mark.single
def test_new_values_and_updaters_come_after_the_pushes_that_wait(held: KVStore, gate: Gate) -> None:
    held.push("a", full(5))
    threading.Timer(0.05, gate.open.set).start()
    held.set_updater(lambda key, input, stored: np.add(stored, 2 * input, out=stored))
    held.push("a", full(1))
    np.testing.assert_array_equal(held.pull("a"), full(5 + 2))


@pytest.mark.single
def test_a_priority_that_is_no_int_is_an_error(held: KVStore) -> None:
    with pytest.raises(TypeError, match="a priority is an int, got 'high'"):
        held.push("a", full(1), priority="high")  # type: ignore[arg-type]


@pytest.mark.single
@pytest.mark.parametrize("overlap", ["sometimes", 1, None])
def test_overlap_that_is_no_bool_is_an_error(overlap: Any) -> None:
    with pytest.raises(TypeError, match="overlap is a bool or 'always', got"):
        kvcoll.create("local", overlap=overlap)


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_replicas_hold_the_bits_that_they_hold_without_overlap(comm: Any, name: str) -> None:
    rng = np.random.default_rng(comm.rank)
    shapes = [(3,), (1000,), (70_000,), (), (0, 4), (300_000,)]
    keys = [f"k{number}" for number in range(len(shapes))]
    first = [np.ones(shape, np.float32) for shape in shapes]
    stores = [kvcoll.create("dist_sync", overlap=overlap) for overlap in (False, "always")]
    for kv in stores:
        kv.init(keys, first)
        kv.set_optimizer(name, learning_rate=0.1)
    for step in range(4):
        grads = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
        for kv in stores:
            if step % 2:
                kv.push(keys, grads)
            else:  # of which each rank has another opinion: rank 0's counts
                for number, (key, grad) in enumerate(zip(keys, grads, strict=True)):
                    kv.push(key, grad, priority=number * (-1) ** comm.rank)
    for inline, behind in zip(stores[0].pull(keys), stores[1].pull(keys), strict=True):
        assert inline.tobytes() == behind.tobytes()
    for kv in stores:
        kv.close()


def test_own_arrays_may_be_written_as_soon_as_a_push_returns(comm: Any) -> None:
    with kvcoll.create("dist_sync", overlap="always") as kv:
        kv.init("w", np.zeros(100_000, np.float32))
        own, view = kv.empty("w"), kv.view("w")
        for step in range(1, 6):
            own[...] = step * (comm.rank + 1)
            kv.push("w", own)
            own[...] = np.nan
            kv.wait("w")
            assert np.all(view == step * comm.size * (comm.size + 1) // 2)


def test_mistakes_are_raised_on_all_ranks_while_pushes_wait(comm: Any) -> None:
    with kvcoll.create("dist_sync", overlap="always") as kv:
        kv.init("w", np.zeros(50_000, np.float32))
        kv.push("w", np.ones(50_000, np.float32))
        wrong = np.ones(7, np.float32)
        right = np.ones(50_000, np.float32)
        last = comm.rank == comm.size - 1
        error = raised_by_all(comm, lambda: kv.push("w", wrong if last else right))
        assert isinstance(error, ShapeMismatchError)
        assert np.all(kv.pull("w") == comm.size)


@pytest.mark.ranks(at_least=2)
def test_overlap_on_one_rank_only_is_an_error_of_create(comm: Any) -> None:
    error = raised_by_all(
        comm, lambda: kvcoll.create("dist_sync", overlap=comm.rank == 1 and "always")
    )
    assert isinstance(error, RanksDisagreeError)
    assert "overlap='always'" in str(error)


@pytest.mark.single
def test_a_program_that_ends_with_pushes_that_wait_ends_well(mpirun: Any) -> None:
    program = """
import sys
import numpy as np, kvcoll
kv = kvcoll.create("dist_sync", overlap="always")
kv.init("w", np.zeros(3_000_000, np.float32))
for _ in range(3):
    kv.push("w", np.ones(3_000_000, np.float32))
print("pushed")
"""
    job = mpirun(2, "-c", program, timeout_s=60)
    assert job.returncode == 0, job
    assert job.stdout.count("pushed") == 2
