"""What a single rank can do wrong: each mistake has its error, and changes nothing."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from one_process import DEVICE, LOCAL

import kvcoll
from kvcoll import KVStore, optimizer
from kvcoll.errors import (
    ArgumentError,
    ArrayError,
    DTypeMismatchError,
    KeyExistsError,
    KeyKindError,
    KeyNotFoundError,
    ShapeMismatchError,
)

Array = npt.NDArray[Any]
Call = Callable[[KVStore], object]


def f32(*numbers: float) -> Array:
    return np.array(numbers, np.float32)


def read_only(array: Array) -> Array:
    array.flags.writeable = False
    return array


@pytest.fixture(params=[LOCAL, DEVICE, "dist_sync"])
def kv(request: pytest.FixtureRequest) -> Iterator[KVStore]:
    """Give a store with key 3 = [1, 2] and key 4 = [5]."""
    if request.param.startswith("dist"):
        request.getfixturevalue("comm")
    with kvcoll.create(request.param) as store:
        store.init([3, 4], [f32(1, 2), f32(5)])
        yield store


def assert_unharmed(kv: KVStore) -> None:
    """Check that nothing was applied, and that the store still works."""
    np.testing.assert_array_equal(kv.pull(3), f32(1, 2))
    np.testing.assert_array_equal(kv.pull(4), f32(5))
    for key in (6, 7, 8):
        with pytest.raises(KeyNotFoundError):
            kv.pull(key)
    kv.push([4, 3], [f32(10 * kv.rank), f32(kv.rank, 7)])
    ranks = sum(range(kv.num_workers))
    np.testing.assert_array_equal(kv.pull(3), f32(ranks, 7 * kv.num_workers))
    np.testing.assert_array_equal(kv.pull(4), f32(10 * ranks))


X, Y = f32(8, 9), f32(8)
DEEP = [[[X]]]
STRUCTURED = np.zeros(2, [("a", "f4"), ("b", "f4")])
DATES = np.array(["2020-01-01", "2020-01-02"], "M8[D]")

# fmt: off
MISTAKES: dict[str, tuple[Call, type[Exception], str]] = {
    # Keys
    "init: key exists": (lambda kv: kv.init(3, X), KeyExistsError, "key 3 holds float32[2] alread"),
    "init: one of the keys exists": (
        lambda kv: kv.init([6, 4, 7], [X, X, X]), KeyExistsError, "key 4"),
    "init: a key twice": (lambda kv: kv.init([6, 7, 6], [X] * 3), KeyExistsError, "key 6 stands"),
    "init: str in a store of int": (
        lambda kv: kv.init("w", X), KeyKindError, "key 'w' is of type str, the others are int"),
    "init: mixed kinds": (lambda kv: kv.init([6, "w"], [X, X]), KeyKindError, "one kind"),
    "push: no such key": (
        lambda kv: kv.push(6, X), KeyNotFoundError, "key 6 is not in the store: init it first"),
    "push: one key of a list is not there": (
        lambda kv: kv.push([3, 6], [X, X]), KeyNotFoundError, "key 6"),
    "push: str in a store of int": (lambda kv: kv.push("3", X), KeyKindError, "one kind"),
    "pull: no such key": (lambda kv: kv.pull(6), KeyNotFoundError, "key 6"),
    "push: True as a key": (lambda kv: kv.push(True, X), KeyKindError, "got True of type bool"),
    "push: NumPy's bool as a key": (lambda kv: kv.push(np.True_, X), KeyKindError, "type bool"),
    "push: a float as a key": (lambda kv: kv.push(3.0, X), KeyKindError, "3.0 of type float"),
    "push: NumPy's float as a key": (lambda kv: kv.push(np.float32(3), X), KeyKindError, "float32"),
    "push: None as a key": (lambda kv: kv.push(None, X), KeyKindError, "got None"),
    "push: bytes as a key": (lambda kv: kv.push(b"3", X), KeyKindError, "type bytes"),
    "push: a dict as a key": (lambda kv: kv.push({3: X}, X), KeyKindError, "type dict"),
    "push: a set of keys": (lambda kv: kv.push({3}, [X]), KeyKindError, "type set"),
    "push: a range of keys": (lambda kv: kv.push(range(3, 5), [X, Y]), KeyKindError, "type range"),
    "push: an array of keys": (
        lambda kv: kv.push(np.array([3, 4]), [X, Y]), KeyKindError, "type ndarray"),
    "push: a list of lists of keys": (lambda kv: kv.push([[3]], [X]), KeyKindError, "type list"),
    "push: True among the keys": (lambda kv: kv.push([3, True], [X, X]), KeyKindError, "True"),
    "init: key over 64 bits": (
        lambda kv: kv.init(2**63, X), ArgumentError, "key 9223372036854775808 does not fit"),
    "init: key under 64 bits": (lambda kv: kv.init(-(2**63) - 1, X), ArgumentError, "64 bits"),
    "init: uint64 over int64": (lambda kv: kv.init(np.uint64(2**63), X), ArgumentError, "64 bits"),
    "push: a huge key": (lambda kv: kv.push(10**40, X), ArgumentError, "64 bits"),
    "init: half of a surrogate pair": (
        lambda kv: kv.init("\ud800", X), ArgumentError, "not valid unicode"),
    # Lists
    "push: fewer values than keys": (
        lambda kv: kv.push([3, 4], [X]), ArgumentError, "2 keys but 1 values"),
    "push: more values than keys": (
        lambda kv: kv.push([3], [X, X]), ArgumentError, "1 keys but 2 values"),
    "push: keys and no values": (lambda kv: kv.push([3, 4], []), ArgumentError, "2 keys but 0"),
    "push: no keys and a value": (lambda kv: kv.push([], [X]), ArgumentError, "0 keys but 1"),
    "push: a list of keys and one array": (
        lambda kv: kv.push([3, 4], X), ArgumentError, "keys were given as a list, but values as"),
    "push: one key in a list and an array": (
        lambda kv: kv.push([3], X), ArgumentError, "values as ndarray"),
    "push: an empty list of values": (
        lambda kv: kv.push(3, []), ArgumentError, "key 3: the list of values is empty"),
    "push: an empty list for the second key": (
        lambda kv: kv.push([3, 4], [X, []]), ArgumentError, "key 4: the list of values is empty"),
    "push: lists too deep": (lambda kv: kv.push([3], DEEP), ArrayError, "got list"),
    "push: a list too deep for one key": (lambda kv: kv.push(3, [[X]]), ArrayError, "got list"),
    "init: two values of one key": (
        lambda kv: kv.init(6, [X, X]), ArgumentError, "init takes one value, or a list of one"),
    "init: an empty list": (lambda kv: kv.init(6, []), ArgumentError, "is empty"),
    "init: values missing": (lambda kv: kv.init([6, 7], [X]), ArgumentError, "2 keys but 1"),
    "pull: fewer outputs than keys": (
        lambda kv: kv.pull([3, 4], out=[f32(0, 0)]), ArgumentError, "2 keys but 1 outputs"),
    "pull: an empty list of outputs": (
        lambda kv: kv.pull(3, out=[]), ArgumentError, "the list of outputs is empty"),
    # Values
    "push: None": (lambda kv: kv.push(3, None), ArrayError, "got NoneType"),
    "push: a str": (lambda kv: kv.push(3, "12"), ArrayError, "got str"),
    "push: a dict": (lambda kv: kv.push(3, {0: X}), ArrayError, "got dict"),
    "push: a set": (lambda kv: kv.push(3, {1.0, 2.0}), ArrayError, "got set"),
    "push: a float": (lambda kv: kv.push(4, 1.0), ArrayError, "got float"),
    "push: a list of floats": (lambda kv: kv.push(3, [1.0, 2.0]), ArrayError, "got float"),
    "push: a generator": (lambda kv: kv.push(3, (x for x in [X])), ArrayError, "got generator"),
    "push: a memoryview": (
        lambda kv: kv.push(3, memoryview(b"12345678")), ArrayError, "got memoryview"),
    "push: None in a list": (lambda kv: kv.push(3, [X, None]), ArrayError, "got NoneType"),
    "push: a masked array": (
        lambda kv: kv.push(3, np.ma.array(X, mask=[False, True])), ArrayError, "masked array"),
    "init: a masked array": (lambda kv: kv.init(6, np.ma.array(X)), ArrayError, "masked array"),
    "init: a str": (lambda kv: kv.init(6, "abc"), ArrayError, "got str"),
    "init: a list of floats": (lambda kv: kv.init(6, [1.0]), ArrayError, "got float"),
    "init: the second of two is no array": (
        lambda kv: kv.init([6, 7], [X, 3]), ArrayError, "got int"),
    # Shapes
    "push: another shape": (
        lambda kv: kv.push(3, f32(1, 2, 3)), ShapeMismatchError,
        "key 3 holds float32[2], pushed float32[3]: reshape it"),
    "push: the same size": (
        lambda kv: kv.push(3, f32(1, 2).reshape(2, 1)), ShapeMismatchError, "float32[2, 1]"),
    "push: what would broadcast": (
        lambda kv: kv.push(3, f32(1)), ShapeMismatchError, "pushed float32[1]"),
    "push: a scalar": (lambda kv: kv.push(4, np.float32(1)), ShapeMismatchError, "float32[]"),
    "push: another shape in the list": (
        lambda kv: kv.push(3, [X, X, Y]), ShapeMismatchError, "float32[1]"),
    "push: shapes exchanged": (
        lambda kv: kv.push([3, 4], [Y, X]), ShapeMismatchError, "key 3 holds float32[2]"),
    "pull: another shape": (
        lambda kv: kv.pull(3, out=f32(0, 0, 0)), ShapeMismatchError, "the output is float32[3]"),
    "pull: another shape in the list": (
        lambda kv: kv.pull(3, out=[f32(0, 0), f32(0)]), ShapeMismatchError, "float32[1]"),
    # Dtypes
    "push: complex into float": (
        lambda kv: kv.push(3, X.astype(complex)), DTypeMismatchError, "same_kind"),
    "push: str array": (lambda kv: kv.push(3, np.array(["1", "2"])), DTypeMismatchError, "str"),
    "push: object array": (
        lambda kv: kv.push(3, np.array([1, 2], object)), DTypeMismatchError, "object"),
    "push: structured array": (lambda kv: kv.push(3, STRUCTURED), DTypeMismatchError, "void"),
    "push: dates": (lambda kv: kv.push(3, DATES), DTypeMismatchError, "datetime64"),
    "init: object array": (
        lambda kv: kv.init(6, np.array([1, None])), DTypeMismatchError, "object cannot be summed"),
    "init: structured array": (lambda kv: kv.init(6, STRUCTURED), DTypeMismatchError, "summed"),
    "init: dates": (lambda kv: kv.init(6, DATES), DTypeMismatchError, "datetime64[D] cannot"),
    "init: timedeltas": (
        lambda kv: kv.init(6, np.array([datetime.timedelta(1)])), DTypeMismatchError, "summed"),
    "init: str array": (lambda kv: kv.init(6, np.array(["a"])), DTypeMismatchError, "<U1"),
    "init: int4": (
        lambda kv: kv.init(6, np.zeros(2, ml_dtypes.int4)), DTypeMismatchError, "int4"),
    "pull: float into int": (
        lambda kv: kv.pull(3, out=np.zeros(2, np.int32)), DTypeMismatchError, "same_kind"),
    "pull: float into bool": (
        lambda kv: kv.pull(3, out=np.zeros(2, bool)), DTypeMismatchError, "bool"),
    # Outputs
    "pull: read-only": (
        lambda kv: kv.pull(3, out=read_only(f32(0, 0))), ArrayError, "float32[2] is read-only"),
    "pull: no array": (lambda kv: kv.pull(3, out="x"), ArrayError, "must be an array, got str"),
    "pull: a list of floats": (
        lambda kv: kv.pull(3, out=[0.0, 0.0]), ArrayError, "must be an array, got float"),
    "pull: a broadcast view": (
        lambda kv: kv.pull(3, out=np.broadcast_to(Y, 2)), ArrayError, "read-only"),
    "pushpull: read-only value and no out": (
        lambda kv: kv.pushpull(3, read_only(f32(8, 9))), ArrayError, "read-only"),
    "pushpull: a scalar cannot be filled": (
        lambda kv: kv.pushpull([3, 4], [np.float32(1), X]), ShapeMismatchError, "key 3"),
    "pushpull: out of another shape": (
        lambda kv: kv.pushpull(3, X, out=f32(0)), ShapeMismatchError, "the output"),
    "pushpull: value that cannot hold the result": (
        lambda kv: kv.pushpull(3, np.array([8, 9])), DTypeMismatchError, "float32 does not cast"),
    "pushpull: outputs missing": (
        lambda kv: kv.pushpull([3, 4], [X, Y], out=[X]), ArgumentError, "1 outputs"),
    "broadcast: key exists": (lambda kv: kv.broadcast(3, X, f32(0, 0)), KeyExistsError, "key 3"),
    "broadcast: no output": (lambda kv: kv.broadcast(6, X, None), ArrayError, "got NoneType"),
    "broadcast: read-only output": (
        lambda kv: kv.broadcast(6, X, read_only(f32(0, 0))), ArrayError, "read-only"),
    "broadcast: output of another shape": (
        lambda kv: kv.broadcast(6, X, f32(0)), ShapeMismatchError, "key 6"),
    # Updaters and optimizers
    "set_updater: None": (lambda kv: kv.set_updater(None), TypeError, "must be callable"),  # type: ignore[arg-type]
    "set_updater: an int": (lambda kv: kv._set_updater(3), TypeError, "got int"),  # type: ignore[arg-type]
    "set_optimizer: None": (lambda kv: kv.set_optimizer(None), TypeError, "got NoneType"),  # type: ignore[arg-type]
    "set_optimizer: a class": (lambda kv: kv.set_optimizer(optimizer.SGD), TypeError, "got "),  # type: ignore[arg-type]
    "set_optimizer: no such name": (
        lambda kv: kv.set_optimizer("nope"), ArgumentError, "unknown optimizer 'nope': known are"),
    "set_optimizer: no such setting": (
        lambda kv: kv.set_optimizer("sgd", momemtum=0.9), TypeError, "momemtum"),
    "set_optimizer: settings beside an object": (
        lambda kv: kv.set_optimizer(optimizer.SGD(), wd=1.0), TypeError, "settings (wd)"),
    "set_optimizer: learning rate of another type": (
        lambda kv: kv.set_optimizer("sgd", learning_rate="fast"), ValueError, "'fast'"),
    "set_optimizer: clip below 0": (
        lambda kv: kv.set_optimizer("sgd", clip_gradient=-1.0), ArgumentError, "clip_gradient"),
    "set_optimizer: no schedule": (
        lambda kv: kv.set_optimizer("sgd", lr_scheduler=3), TypeError, "must be callable"),
    "is_capable: another word": (
        lambda kv: kv.is_capable("flying"), ArgumentError, "unknown capability 'flying'"),
    "is_capable: no word": (lambda kv: kv.is_capable(3), ArgumentError, "3"),  # type: ignore[arg-type]
}
# fmt: on


@pytest.mark.parametrize(("call", "error", "piece"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_has_its_error_and_changes_nothing(
    kv: KVStore, call: Call, error: type[Exception], piece: str
) -> None:
    with pytest.raises(error) as raised:
        call(kv)
    assert type(raised.value) in (error, TypeError)
    assert piece in str(raised.value)
    assert_unharmed(kv)


INTO: dict[str, tuple[Any, Any]] = {
    "float into int": (np.zeros(2, np.int64), f32(1, 2)),
    "int into uint": (np.zeros(2, np.uint8), np.zeros(2, np.int8)),
    "int into bool": (np.zeros(2, bool), np.zeros(2, np.int8)),
    "bfloat16 into int": (np.zeros(2, np.int32), np.zeros(2, ml_dtypes.bfloat16)),
    "complex into bfloat16": (np.zeros(2, ml_dtypes.bfloat16), np.zeros(2, complex)),
}


@pytest.mark.parametrize(("held", "pushed"), INTO.values(), ids=INTO.keys())
def test_a_dtype_that_does_not_cast_by_same_kind_is_refused(
    kv: KVStore, held: Array, pushed: Array
) -> None:
    kv.init(9, held)
    with pytest.raises(DTypeMismatchError, match=r"does not cast to .* by NumPy's same_kind rule"):
        kv.push(9, pushed)
    with pytest.raises(DTypeMismatchError, match="does not cast"):
        kv.push([9, 9], [held, [held, pushed]])
    np.testing.assert_array_equal(kv.pull(9), held)


@pytest.mark.parametrize("dtype", [np.int64, np.complex64, bool])
def test_an_optimizer_refuses_keys_that_hold_no_real_floats(kv: KVStore, dtype: Any) -> None:
    kv.init(9, np.ones(2, dtype))
    kv.set_optimizer("sgd", learning_rate=1.0)
    with pytest.raises(DTypeMismatchError, match="real floats only"):
        kv.push([3, 9], [X, np.ones(2, dtype)])
    np.testing.assert_array_equal(kv.pull(9), np.ones(2, dtype))
    kv.push(3, f32(1, 1))
    np.testing.assert_array_equal(kv.pull(3), f32(1, 2) - kv.num_workers)


def test_a_mistake_in_a_list_of_outputs_fills_none_of_them(kv: KVStore) -> None:
    good = f32(-1, -1)
    with pytest.raises(ShapeMismatchError):
        kv.pull([3, 4], out=[good, f32(0, 0)])
    np.testing.assert_array_equal(good, f32(-1, -1))
