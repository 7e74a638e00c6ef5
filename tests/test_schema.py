"""Keys and what they hold: what is taken, what is refused in which words, and the digest."""

from __future__ import annotations

from enum import Enum, IntEnum
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from kvcoll.errors import (
    ArgumentError,
    DTypeMismatchError,
    KeyKindError,
    ShapeMismatchError,
)
from kvcoll.schema import (
    Key,
    Spec,
    as_key,
    as_keys,
    digest,
    one_per_key,
    require_one_kind,
    show_keys,
)

pytestmark = pytest.mark.single


class Layer(str, Enum):
    WEIGHT = "w"


class Number(IntEnum):
    SEVEN = 7


class Text(str):
    def __str__(self) -> str:
        return "something else"


@pytest.mark.parametrize(
    ("given", "key"),
    [
        (0, 0),
        (-7, -7),
        (2**63 - 1, 2**63 - 1),
        (-(2**63), -(2**63)),
        (np.int8(-3), -3),
        (np.uint64(2**63 - 1), 2**63 - 1),
        (Number.SEVEN, 7),
        ("", ""),
        ("weight", "weight"),
        ("größe 重み \U0001f600 \x00 \x1f", "größe 重み \U0001f600 \x00 \x1f"),
        (np.str_("w"), "w"),
        (Layer.WEIGHT, "w"),
        (Text("w"), "w"),
    ],
)
def test_a_key_is_a_plain_int_or_a_plain_str(given: object, key: Key) -> None:
    taken = as_key(given)
    assert taken == key
    assert type(taken) is type(key)


@pytest.mark.parametrize(
    "given",
    [
        True,
        np.True_,
        1.0,
        np.float32(1),
        None,
        b"w",
        (1,),
        np.timedelta64(3, "s"),
        np.array(3),
        int,
    ],
)
def test_what_is_no_key_is_refused_by_its_type(given: object) -> None:
    with pytest.raises(KeyKindError) as raised:
        as_key(given)
    assert str(raised.value) == (
        f"a key is an int or a str, got {given!r} of type {type(given).__name__}"
    )


@pytest.mark.parametrize("given", [2**63, -(2**63) - 1, 10**30, np.uint64(2**63)])
def test_an_int_of_more_than_64_bits_is_refused(given: Any) -> None:
    with pytest.raises(ArgumentError, match=rf"^key {int(given)} does not fit into 64 bits$"):
        as_key(given)


def test_a_str_that_is_not_unicode_is_refused() -> None:
    with pytest.raises(ArgumentError, match=r"^key 'w\\udc80' is not valid unicode: surrogates"):
        as_key("w\udc80")


def test_a_key_and_a_list_of_one_key_are_told_apart() -> None:
    assert as_keys(5) == ([5], False)
    assert as_keys([5]) == ([5], True)
    assert as_keys(("a", "b", "a")) == (["a", "b", "a"], True)
    assert as_keys([]) == ([], True)


@pytest.mark.parametrize(
    ("keys", "kind", "odd", "others"),
    [([1, 2, "a"], None, "'a'", "int"), (["a", 3], None, "3", "str"), ([4], str, "4", "str")],
)
def test_keys_of_two_kinds_are_refused(
    keys: list[Key], kind: type | None, odd: str, others: str
) -> None:
    with pytest.raises(KeyKindError) as raised:
        require_one_kind(keys, kind)
    other = {"int": "str", "str": "int"}[others]
    assert str(raised.value) == (
        f"key {odd} is of type {other}, the others are {others}: "
        "a store has keys of one kind, all int or all str"
    )


def test_one_kind_is_given_back_and_none_is_fixed_by_nothing() -> None:
    assert require_one_kind([]) is None
    assert require_one_kind([], str) is str
    assert require_one_kind([1, 2]) is int
    assert require_one_kind(["a"], str) is str


def test_values_are_sorted_into_one_list_a_key() -> None:
    a, b, c = object(), object(), object()
    assert one_per_key([1], False, a, "values") == [[a]]
    assert one_per_key([1], False, [a, b], "values") == [[a, b]]
    assert one_per_key([1], False, (a, b), "values") == [[a, b]]
    assert one_per_key([1], True, [a], "values") == [[a]]
    assert one_per_key([1], True, [[a, b]], "values") == [[a, b]]
    assert one_per_key([1, 2], True, (a, [b, c]), "values") == [[a], [b, c]]
    assert one_per_key([], True, [], "values") == []


def test_the_callers_lists_are_not_handed_on() -> None:
    mine = [object()]
    assert one_per_key([1], False, mine, "values")[0] is not mine


WRONG_LENGTHS: list[tuple[list[Key], bool, Any, str]] = [
    ([1, 2], True, [0], "2 keys but 1 values: give one for each key"),
    ([1], True, [0, 0], "1 keys but 2 values: give one for each key"),
    ([], True, [0], "0 keys but 1 values: give one for each key"),
    ([1], False, [], "key 1: the list of values is empty"),
    ([1, 2], True, [0, []], "key 2: the list of values is empty"),
    (["a"], True, [()], "key 'a': the list of values is empty"),
    (
        [1, 2],
        True,
        np.zeros(2),
        "2 keys were given as a list, but values as ndarray: give a list of the same length",
    ),
]


@pytest.mark.parametrize(("keys", "is_list", "values", "text"), WRONG_LENGTHS)
def test_lists_that_do_not_fit_are_refused(
    keys: list[Key], is_list: bool, values: Any, text: str
) -> None:
    with pytest.raises(ArgumentError) as raised:
        one_per_key(keys, is_list, values, "values")
    assert str(raised.value) == text


SPEC = Spec("w", (2, 3), np.dtype(np.float32), 0)


def test_a_spec_knows_its_size_and_reads_in_one_notation() -> None:
    assert str(SPEC) == "key 'w' holds float32[2, 3]"
    assert SPEC.n_elements == 6
    assert Spec(3, (), np.dtype("i8"), 1).n_elements == 1
    assert Spec(3, (4, 0, 2), np.dtype("i8"), 1).n_elements == 0
    assert Spec(3, (2**20, 2**20, 2**20), np.dtype("i1"), 1).n_elements == 2**60


@pytest.mark.parametrize("dtype", ["f4", ">f4", "f8", "f2", "i8", "?", ml_dtypes.bfloat16])
def test_a_push_of_the_shape_and_a_dtype_that_casts_passes(dtype: Any) -> None:
    SPEC.check_pushed(np.zeros((2, 3), dtype))


def test_a_push_of_another_shape_is_refused_with_the_cure() -> None:
    with pytest.raises(ShapeMismatchError) as raised:
        SPEC.check_pushed(np.zeros((3, 2), np.float16), "rank 1 pushed")
    assert str(raised.value) == (
        "key 'w' holds float32[2, 3], rank 1 pushed float16[3, 2]: "
        "reshape it, or init the key with that shape"
    )


def test_a_push_that_does_not_cast_is_refused_with_the_cure() -> None:
    with pytest.raises(DTypeMismatchError) as raised:
        SPEC.check_pushed(np.zeros((2, 3), np.complex64))
    assert str(raised.value) == (
        "key 'w' holds float32[2, 3], pushed complex64[2, 3]: complex64 does not cast to "
        "float32 by NumPy's same_kind rule; convert it with astype"
    )


def test_an_output_that_does_not_fit_is_refused_with_the_cure() -> None:
    SPEC.check_output(np.zeros((2, 3), np.float16))
    with pytest.raises(ShapeMismatchError) as shape:
        SPEC.check_output(np.zeros(6, np.float32))
    assert str(shape.value) == ("key 'w' holds float32[2, 3], the output is float32[6]: reshape it")
    with pytest.raises(DTypeMismatchError) as dtype:
        SPEC.check_output(np.zeros((2, 3), np.int32))
    assert str(dtype.value) == (
        "key 'w' holds float32[2, 3], the output is int32[2, 3]: float32 does not cast to "
        "int32 by NumPy's same_kind rule; give an array of another dtype"
    )


def test_long_lists_of_keys_are_written_short() -> None:
    assert show_keys([3]) == "key 3"
    assert show_keys(["a", "b"]) == "keys ['a', 'b']"
    assert show_keys([1, 2, 3, 4]) == "keys [1, 2, 3, 4]"
    assert show_keys(list(range(1000))) == "keys [0, 1, 2, 3, … 1000 in all]"


def test_a_digest_is_the_same_number_on_every_machine() -> None:
    assert digest("push", "key 'w' holds float32[2, 3]", 7) == 7576808250991893291
    assert digest("é") == 16281180426384714778


def test_digests_differ_where_words_do() -> None:
    words: list[tuple[object, ...]] = [
        (),
        ("",),
        ("", ""),
        ("ab",),
        ("a", "b"),
        ("b", "a"),
        ("a\x1fb",),
        ("a', 'b",),
        ("a'\x1f'b",),
        (1,),
        ("1",),
        (-1,),
        (11,),
        (1, 1),
    ]
    assert len({digest(*of_call) for of_call in words}) == len(words)
    assert all(0 <= digest(*of_call) < 2**64 for of_call in words)
