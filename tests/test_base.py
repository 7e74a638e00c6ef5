"""Stores of others by name, and the smallest store there is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import kvcoll
from kvcoll import KVStoreBase, base
from kvcoll.errors import ArgumentError, DTypeMismatchError, ShapeMismatchError

pytestmark = pytest.mark.single


@pytest.fixture(autouse=True)
def forget_names() -> Iterator[None]:
    before = dict(base.registered())
    yield
    base.registered().clear()
    base.registered().update(before)


class Doubling(KVStoreBase):
    """A store of somebody's: what is pushed comes back twice as large."""

    def broadcast(self, key: Any, value: Any, out: Any, priority: int = 0) -> Any:
        np.copyto(out, value)
        return out

    def pushpull(self, key: Any, value: Any, out: Any = None, priority: int = 0) -> Any:
        np.multiply(value, 2, out=out)
        return out

    def is_capable(self, capability: str) -> bool:
        return False

    @property
    def type(self) -> str:
        return "doubling"

    @property
    def rank(self) -> int:
        return 0

    @property
    def num_workers(self) -> int:
        return 1


def test_a_registered_store_is_made_by_its_name_of_any_case() -> None:
    assert KVStoreBase.register(Doubling) is Doubling
    kv = kvcoll.create("DOUBLING")
    assert type(kv) is Doubling
    out = np.zeros(3)
    kv.pushpull("w", np.arange(3.0), out=out)
    np.testing.assert_array_equal(out, [0, 2, 4])


def test_the_same_class_may_be_registered_again_but_not_another_of_its_name() -> None:
    KVStoreBase.register(Doubling)
    KVStoreBase.register(Doubling)
    other = type("Doubling", (Doubling,), {"__module__": "elsewhere"})
    with pytest.raises(ArgumentError, match="a store named 'doubling' exists already"):
        KVStoreBase.register(other)


@pytest.mark.parametrize("name", ["Local", "dist_sync", "TestStore"])
def test_a_name_of_kvcolls_own_cannot_be_taken(name: str) -> None:
    with pytest.raises(ArgumentError, match=f"a store named '{name.lower()}' exists already"):
        KVStoreBase.register(type(name, (Doubling,), {}))


@pytest.mark.parametrize("what", [int, Doubling(), "doubling"])
def test_only_a_store_class_is_registered(what: Any) -> None:
    with pytest.raises(TypeError, match="only a class derived from KVStoreBase is registered"):
        KVStoreBase.register(what)


def test_an_unknown_name_lists_registered_ones_too() -> None:
    KVStoreBase.register(Doubling)
    with pytest.raises(
        ValueError, match=r"unknown type of store 'foo': known are local, .*doubling"
    ):
        kvcoll.create("foo")


@pytest.mark.parametrize("options", [{"comm": 1}, {"reproducible": True}, {"staleness": 0}])
def test_stores_of_others_take_no_options(options: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError, match="a 'teststore' store takes no options"):
        kvcoll.create("teststore", **options)


def test_kvcolls_own_store_is_a_store_by_the_same_calls() -> None:
    with kvcoll.create() as kv:
        assert isinstance(kv, KVStoreBase)
        assert kv.is_capable(KVStoreBase.OPTIMIZER)


def test_the_teststore_broadcasts_and_sums_and_does_no_more() -> None:
    kv = kvcoll.create("teststore")
    assert (kv.type, kv.rank, kv.num_workers) == ("teststore", 0, 1)
    assert not kv.is_capable("Optimizer")
    outs = [np.zeros((2, 3), np.float32) for _ in range(2)]
    assert kv.broadcast("w", np.full((2, 3), 7, np.float32), outs) is outs
    assert all(np.all(out == 7) for out in outs)
    values = [np.full((2, 3), n, np.float32) for n in (1, 2, 4)]
    kv.pushpull("w", values, out=outs)
    assert all(np.all(out == 7) for out in outs)
    kv.pushpull(["a", "b"], [values[:2], values[2]], out=[outs[0], outs[1]])
    assert np.all(outs[0] == 3)
    assert np.all(outs[1] == 4)
    for missing in ("push", "pull", "init", "set_optimizer"):
        assert missing not in dir(kv)


def test_the_teststore_sums_in_place_and_16_bit_floats_in_32() -> None:
    kv = kvcoll.create("teststore")
    values = [np.full(2, n, np.float16) for n in (2048, 1, 1, 1, 1)]
    kv.pushpull(3, values)
    assert all(np.all(value == 2052) for value in values)


def test_the_teststore_changes_nothing_on_a_mistake() -> None:
    kv = kvcoll.create("teststore")
    out = np.zeros(3, np.float32)
    with pytest.raises(ShapeMismatchError):
        kv.pushpull(["a", "b"], [np.ones(3, np.float32)] * 2, out=[out, np.zeros(4, np.float32)])
    with pytest.raises(DTypeMismatchError):
        kv.pushpull("a", [np.ones(3, np.int32), np.ones(3, np.float32)], out=out)
    with pytest.raises(ArgumentError, match="broadcast takes one value"):
        kv.broadcast("a", [np.ones(3), np.ones(3)], out)
    assert np.all(out == 0)
