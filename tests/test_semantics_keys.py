"""What may be a key, and in which order keys are updated."""

from __future__ import annotations

from enum import Enum, IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from kvcoll import KVStore
from kvcoll.errors import KeyExistsError, KeyKindError, KeyNotFoundError, KVCollError

Array = npt.NDArray[Any]
Key = Any


class Part(str, Enum):
    WEIGHT = "weight"


class Number(IntEnum):
    FIVE = 5


def f32(*numbers: float) -> Array:
    return np.array(numbers, np.float32)


class Recorder:
    """An updater that adds, and notes the keys that it got."""

    def __init__(self) -> None:
        self.keys: list[Key] = []

    def __call__(self, key: Key, input: Array, stored: Array) -> None:
        self.keys.append(key)
        stored += input


INTS = [0, -1, 7, 2**31, 2**63 - 1, -(2**63)]
STRS = ["", "w", "layer.0/weight", "größe", "重み", "🙂", "\x00", "a b\n", "0", "x" * 5000]


@pytest.mark.parametrize("keys", [INTS, STRS], ids=["int", "str"])
def test_keys_of_every_form_hold_their_own_values(kv: KVStore, keys: list[Key]) -> None:
    kv.init(keys, [f32(k) for k in range(len(keys))])
    kv.push(keys, [f32(10 * k + kv.rank) for k in range(len(keys))])
    ranks = sum(range(kv.num_workers))
    for k, key in enumerate(keys):
        np.testing.assert_array_equal(kv.pull(key), f32(10 * k * kv.num_workers + ranks))


def test_the_updater_gets_the_key_as_it_was_given(kv: KVStore) -> None:
    recorder = Recorder()
    kv.init(STRS, [f32(0)] * len(STRS))
    kv.set_updater(recorder)
    for key in STRS:
        kv.push(key, f32(1))
    assert recorder.keys == STRS
    assert {type(key) for key in recorder.keys} == {str}


@pytest.mark.parametrize("kind", [np.int8, np.uint8, np.int32, np.uint32, np.int64, np.uint64])
def test_numpys_integers_are_keys_like_int(kv: KVStore, kind: Any) -> None:
    recorder = Recorder()
    kv.init(kind(5), f32(1))
    kv.set_updater(recorder)
    kv.push([5, kind(5)], [f32(10), f32(20)])
    np.testing.assert_array_equal(kv.pull(5), f32(1 + 30 * kv.num_workers))
    assert recorder.keys == [5]
    assert type(recorder.keys[0]) is int


def test_an_enum_of_int_is_its_number(kv: KVStore) -> None:
    kv.init(Number.FIVE, f32(3))
    np.testing.assert_array_equal(kv.pull(5), f32(3))


def test_an_enum_of_str_is_its_text(kv: KVStore) -> None:
    kv.init(Part.WEIGHT, f32(3))
    np.testing.assert_array_equal(kv.pull("weight"), f32(3))


def test_numpys_str_is_a_str(kv: KVStore) -> None:
    kv.init(np.str_("w"), f32(3))
    np.testing.assert_array_equal(kv.pull("w"), f32(3))


def test_int_keys_are_updated_in_ascending_order(kv: KVStore) -> None:
    recorder = Recorder()
    keys = [9, -4, 5, 2**40, 7, 0]
    kv.init(keys, [f32(0)] * len(keys))
    kv.set_updater(recorder)
    for pushed in (keys, keys[::-1], [7, 9, 5, 9]):
        recorder.keys.clear()
        kv.push(pushed, [f32(1)] * len(pushed))
        assert recorder.keys == sorted(set(pushed))


def test_str_keys_are_updated_in_the_order_of_init(kv: KVStore) -> None:
    recorder = Recorder()
    kv.init("m", f32(0))
    kv.init(["z", "a"], [f32(0)] * 2)
    kv.init("", f32(0))
    kv.set_updater(recorder)
    for pushed in (["a", "", "z", "m"], ["z", "m"], ["", "a", "a", "m"]):
        recorder.keys.clear()
        kv.push(pushed, [f32(1)] * len(pushed))
        assert recorder.keys == [key for key in ["m", "z", "a", ""] if key in pushed]


def test_the_order_holds_across_dtypes_and_sizes(kv: KVStore) -> None:
    recorder = Recorder()
    values: dict[int, Array] = {
        1: np.zeros(3, np.float32),
        2: np.zeros(2, np.float64),
        3: np.zeros(400_000, np.float32),
        4: np.zeros((), np.int32),
        5: np.zeros(0, np.float32),
        6: np.zeros(1, np.float64),
    }
    kv.init(list(values), list(values.values()))
    kv.set_updater(recorder)
    pushed = [6, 3, 5, 1, 4, 2]
    kv.push(pushed, [np.full_like(values[k], k * (kv.rank + 1)) for k in pushed])
    assert recorder.keys == [1, 2, 3, 4, 5, 6]
    total = sum(range(1, kv.num_workers + 1))
    for key, value in values.items():
        np.testing.assert_array_equal(kv.pull(key), np.full_like(value, key * total))


@pytest.mark.parametrize("key", [True, False, np.True_, 1.0, None, b"w", (1, [2]), 1j])
def test_what_is_no_key_is_refused(kv: KVStore, key: Key) -> None:
    with pytest.raises(KeyKindError, match="a key is an int or a str"):
        kv.init(key, f32(1) if not isinstance(key, tuple) else [f32(1)] * 2)
    with pytest.raises(KVCollError):
        kv.pull(key)


def test_a_failed_call_does_not_fix_the_kind_of_the_keys(kv: KVStore) -> None:
    with pytest.raises(KeyNotFoundError):
        kv.push(3, f32(1))
    with pytest.raises(KVCollError):
        kv.init(3, "no array")
    with pytest.raises(KVCollError):
        kv.init([3, "w"], [f32(1), f32(2)])
    with pytest.raises(KeyExistsError):
        kv.init([3, 3], [f32(1), f32(2)])
    kv.init("w", f32(4))
    np.testing.assert_array_equal(kv.pull("w"), f32(4))


@pytest.mark.parametrize(("first", "second"), [(3, "3"), ("3", 3)])
def test_a_store_has_keys_of_one_kind(kv: KVStore, first: Key, second: Key) -> None:
    kv.init(first, f32(1))
    for call in (kv.init, kv.push):
        for key, value in ((second, f32(2)), ([first, second], [f32(2), f32(2)])):
            with pytest.raises(KeyKindError, match="keys of one kind"):
                call(key, value)
    np.testing.assert_array_equal(kv.pull(first), f32(1))


def test_no_key_of_a_list_is_stored_when_one_of_them_exists(kv: KVStore) -> None:
    kv.init(3, f32(1))
    with pytest.raises(KeyExistsError, match="key 3"):
        kv.init([2, 3, 4], [f32(7), f32(8), f32(9)])
    for key in (2, 4):
        with pytest.raises(KeyNotFoundError):
            kv.pull(key)
        kv.init(key, f32(key))
    for key, value in ((2, 2), (3, 1), (4, 4)):
        np.testing.assert_array_equal(kv.pull(key), f32(value))
