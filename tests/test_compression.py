"""Codes follow the formulae to the bit; settings are checked; sums of codes are exact."""

from __future__ import annotations

from typing import Any, TypeAlias

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

from kvcoll.compression import Compression, describe, parse
from kvcoll.errors import ArgumentError
from kvcoll.schema import Spec
from kvcoll.words import BLOCK_ELEMENTS, Words

pytestmark = pytest.mark.single

Array: TypeAlias = npt.NDArray[Any]
F32, F64 = np.dtype("f4"), np.dtype("f8")
BF16 = np.dtype(ml_dtypes.bfloat16)
LONG = 2 * BLOCK_ELEMENTS + 13
QUANTIZED = ({"type": "2bit", "threshold": 0.5}, {"type": "1bit", "threshold": 0.1})


def made(**params: object) -> Compression:
    compression = parse(params)
    assert compression is not None
    return compression


class Ranks:
    """Some ranks' residuals, and the sum of what they push."""

    def __init__(self, compression: Compression, size: int, n: int, dtype: Any = F32) -> None:
        self.compression = compression
        self.residuals = [np.zeros(n, dtype) for _ in range(size)]

    def push(self, *gradients: Any) -> Array:
        """Give what a push of one gradient a rank comes to."""
        size, n = len(self.residuals), self.residuals[0].size
        code = self.compression.code(size)
        parts = []
        for rank, (residual, gradient) in enumerate(zip(self.residuals, gradients, strict=True)):
            residual += np.asarray(gradient, residual.dtype)
            codes = np.empty(code.part_bytes(n, (rank,)), np.uint8)
            self.compression.encode(residual, codes)
            parts.append(((rank,), codes))
        total, out = np.empty(code.total_bytes(n), np.uint8), np.empty_like(self.residuals[0])
        code.finish(n, parts, total)
        code.decode(n, total, 0, out)
        return out


def test_one_rank_of_2bit_gives_what_mxnet_gives() -> None:
    gradient = [-1, -0.9, -0.8, -0.7, -0.6, -0.5, -0.4, -0.3, -0.2, -0.1, 0]
    gradient += [-g for g in gradient[9::-1]]
    one = Ranks(made(type="2bit", threshold=0.5), 1, 21)
    first = one.push(gradient)
    assert first.tolist() == [-0.5] * 6 + [0] * 9 + [0.5] * 6
    second = one.push([0] * 21)
    assert second.tolist() == [-0.5] + [0] * 19 + [0.5]


def test_two_ranks_of_2bit_give_what_mxnet_gives() -> None:
    two = Ranks(made(type="2bit"), 2, 6)  # 0.5 is the default
    gradient = [-1.2, -0.5, -0.4, 0.3, 0.5, 2]
    assert two.push(gradient, gradient).tolist() == [-1, -1, 0, 0, 1, 1]
    assert two.push([0] * 6, [0] * 6).tolist() == [-1, 0, 0, 0, 0, 1]
    lists = np.full(6, 0.3, np.float32) + np.full(6, 0.3, np.float32)
    assert two.push(lists, lists).tolist() == [0, 1, 0, 1, 1, 1]


def quantize(params: dict[str, Any], accumulated: Array) -> Array:
    """Give what a gradient with its residual stands for, after SEMANTICS.md."""
    t = accumulated.dtype.type(params["threshold"])
    if params["type"] == "1bit":
        ones: Array = np.where(accumulated > t, 1, -1).astype(accumulated.dtype)
        return ones
    signs = (accumulated >= t).astype(int) - (accumulated <= -t).astype(int)
    value: Array = signs.astype(accumulated.dtype) * t
    return value


@pytest.mark.parametrize("params", QUANTIZED, ids=lambda params: str(params["type"]))
@pytest.mark.parametrize("dtype", [F32, F64, np.dtype("g")], ids=str)
@pytest.mark.parametrize("n", [1, 7, 8, 9, 1000, LONG])
def test_codes_and_residuals_follow_the_formula_push_by_push(
    params: dict[str, Any], dtype: Any, n: int
) -> None:
    random = np.random.default_rng(n)
    one, residual = Ranks(made(**params), 1, n, dtype), np.zeros(n, dtype)
    for _ in range(4):
        gradient = random.standard_normal(n).astype(dtype)
        residual = residual + gradient
        value = quantize(params, residual)
        residual = residual - value
        np.testing.assert_array_equal(one.push(gradient), value)
        np.testing.assert_array_equal(one.residuals[0], residual)


@pytest.mark.parametrize("threshold", [-2.0, 0.0, 0.5, 3.0])
def test_1bit_is_1_above_the_threshold_and_minus_1_elsewhere_whatever_the_threshold(
    threshold: float,
) -> None:
    one = Ranks(made(type="1bit", threshold=threshold), 1, 3)
    gradient = [threshold - 0.25, threshold, threshold + 0.25]
    assert one.push(gradient).tolist() == [-1, -1, 1]
    assert one.residuals[0].tolist() == [threshold + 0.75, threshold + 1, threshold - 0.75]


def test_a_value_at_the_edge_of_a_threshold_that_is_no_float32_goes_by_the_keys_dtype() -> None:
    one = Ranks(made(type="2bit", threshold=0.1), 1, 3)
    edge = np.float32(0.1)
    gradient = [np.nextafter(edge, np.float32(0)), edge, -edge]
    assert one.push(gradient).tolist() == [0, edge, -edge]


@pytest.mark.parametrize("kind", ["fp16", "bf16"])
def test_16_bits_round_as_numpy_and_ml_dtypes_do(kind: str) -> None:
    half = np.dtype("f2") if kind == "fp16" else BF16
    every = np.arange(1 << 16, dtype=np.uint16)
    random = np.random.default_rng(3)
    patterns = random.integers(0, 1 << 32, LONG, np.uint32)
    # Each 16-bit number, its neighbours and the ties between them, and any float32.
    sides = (every.astype(np.uint32)[:, None] << 16) + np.array([0, 1, 0x7FFF, 0x8000, 0x8001])
    source = np.concatenate([sides.ravel().astype(np.uint32), patterns]).view(np.float32)
    words = Words(brain=kind == "bf16")
    rounded, widened = np.empty(source.size, np.uint16), np.empty(source.size, np.float32)
    words.round(source, rounded)
    words.widen(rounded, widened)
    with np.errstate(all="ignore"):
        right = source.astype(half)
    np.testing.assert_array_equal(widened, right.astype(np.float32))
    numbers = ~np.isnan(source)
    assert (rounded == right.view(np.uint16))[numbers].all()


@pytest.mark.parametrize("kind", ["fp16", "bf16"])
def test_errors_of_rounding_are_fed_back_only_if_asked_for(kind: str) -> None:
    half = np.dtype("f2") if kind == "fp16" else BF16
    gradient = np.random.default_rng(1).standard_normal(LONG).astype(F32)
    fed = Ranks(made(type=kind, error_feedback=True), 1, LONG)
    residual = np.zeros(LONG, F32)
    for _ in range(3):
        residual = residual + gradient
        value = residual.astype(half).astype(F32)
        residual = residual - value
        np.testing.assert_array_equal(fed.push(gradient), value)
        np.testing.assert_array_equal(fed.residuals[0], residual)
    plain = Ranks(made(type=kind), 1, LONG)
    first = plain.push(gradient)
    np.testing.assert_array_equal(first, gradient.astype(half).astype(F32))
    np.testing.assert_array_equal(plain.residuals[0], gradient)  # it was not written to


def test_sums_of_16_bits_are_float32_and_rounded_once() -> None:
    sizes = Ranks(made(type="fp16"), 5, 1)
    assert sizes.push(2048, 1, 1, 1, 1).tolist() == [2052]
    # A float16 that cannot hold the sum says so, and nothing raises.
    with np.errstate(all="raise"):
        assert Ranks(made(type="fp16"), 2, 1).push(65504, 65504).tolist() == [np.inf]
        assert Ranks(made(type="bf16"), 2, 1).push(65504, 65504).tolist() == [131072]


@pytest.mark.parametrize("params", [*QUANTIZED, {"type": "fp16"}, {"type": "bf16"}], ids=str)
def test_nan_is_never_accepted_and_infinity_only_where_nothing_is_left_over(
    params: dict[str, Any],
) -> None:
    compression = made(**params)
    fine = np.linspace(-3, 3, 100).astype(F32)
    assert compression.accepts(fine)
    assert compression.accepts(fine[:0])
    for place in (0, 50, 99):
        for value, accepted in [
            (np.nan, False),
            (-np.nan, False),
            (np.inf, not compression.has_residual),
            (-np.inf, not compression.has_residual),
            (3e38, True),
        ]:
            spoilt = fine.copy()
            spoilt[place] = value
            assert compression.accepts(spoilt) is accepted, (place, value)


@pytest.mark.parametrize(
    ("kind", "largest"), [("fp16", 65504.0), ("bf16", float.fromhex("0x1.fep127"))]
)
def test_error_feedback_sends_what_16_bits_cannot_hold_with_the_next_pushes(
    kind: str, largest: float
) -> None:
    one = Ranks(made(type=kind, error_feedback=True), 1, 3, F64)
    assert one.push([2.5 * largest, -1.5 * largest, 1]).tolist() == [largest, -largest, 1]
    assert one.push([0, 0, 1]).tolist() == [largest, -0.5 * largest, 1]
    assert one.push([0, 0, 1]).tolist() == [0.5 * largest, 0, 1]


@pytest.mark.parametrize(
    ("params", "said"),
    [
        (
            {"type": "3bit"},
            "the type of compression is one of 2bit, 1bit, fp16, bf16, none, got '3",
        ),
        ({"type": 2}, "the type of compression is one of .*, got 2$"),
        ({"type": ["2bit"]}, r"the type of compression is one of .*, got \['2bit'\]$"),
        ({"threshold": 0.5}, "the type of compression is one of .*, got no type"),
        ({}, "got no type"),
        ("2bit", "compression is set by a dict such as .*, got '2bit'"),
        (None, "compression is set by a dict such as .*, got None"),
        ({"type": "2bit", "treshold": 1}, "2bit compression takes type and threshold, got 'tresh"),
        ({"type": "fp16", "threshold": 1}, "fp16 compression takes type and error_feedback, got"),
        ({"type": "none", "threshold": 1}, "none compression takes type, got 'threshold'"),
        ({"type": "2bit", 5: 1}, "2bit compression takes type and threshold, got 5"),
        ({"type": "2bit", "threshold": 0}, "of 2bit compression is a finite number above 0, got 0"),
        ({"type": "2bit", "threshold": -0.5}, "is a finite number above 0, got -0.5"),
        ({"type": "2bit", "threshold": "0.5"}, "is a finite number above 0, got '0.5'"),
        ({"type": "2bit", "threshold": None}, "is a finite number above 0, got None"),
        ({"type": "2bit", "threshold": True}, "is a finite number above 0, got True"),
        ({"type": "2bit", "threshold": np.nan}, "is a finite number above 0, got nan"),
        ({"type": "2bit", "threshold": np.inf}, "is a finite number above 0, got inf"),
        ({"type": "2bit", "threshold": 10**400}, "is a finite number above 0, got 1000"),
        ({"type": "1bit", "threshold": 1j}, "of 1bit compression is a finite number, got 1j"),
        (
            {"type": "1bit", "threshold": -np.inf},
            "of 1bit compression is a finite number, got -inf",
        ),
        (
            {"type": "bf16", "error_feedback": 1},
            "error_feedback of bf16 .* is True or False, got 1",
        ),
    ],
)
def test_settings_that_are_wrong_are_named_with_what_was_expected(params: Any, said: str) -> None:
    with pytest.raises(ArgumentError, match=said) as caught:
        parse(params)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("params", "text"),
    [
        ({"type": "none"}, "no compression"),
        ({"type": "2bit"}, "2bit compression with threshold 0.5"),
        ({"type": "2bit", "threshold": np.float32(0.25)}, "2bit compression with threshold 0.25"),
        ({"type": "1bit", "threshold": -1}, "1bit compression with threshold -1.0"),
        ({"type": "fp16"}, "fp16 compression"),
        ({"type": "bf16", "error_feedback": True}, "bf16 compression with error feedback"),
    ],
)
def test_settings_are_described_so_that_ranks_can_compare_them(
    params: dict[str, object], text: str
) -> None:
    assert describe(parse(params)) == text


@pytest.mark.parametrize("params", [*QUANTIZED, {"type": "fp16"}, {"type": "bf16"}], ids=str)
def test_only_keys_of_real_floats_are_compressed(params: dict[str, Any]) -> None:
    compression = made(**params)
    for dtype in ("f2", BF16, "f4", "f8"):
        compression.check(Spec("w", (2, 3), np.dtype(dtype), 0))
    for dtype in ("i4", "u1", "?", "c8"):
        name = np.dtype(dtype).name
        with pytest.raises(
            ArgumentError, match=rf"^key 'w' holds {name}\[2, 3\], which {params['type']}"
        ):
            compression.check(Spec("w", (2, 3), np.dtype(dtype), 0))


def test_a_threshold_that_a_key_cannot_hold_is_named() -> None:
    compression = made(type="2bit", threshold=1e-60)
    compression.check(Spec("w", (), F64, 0))
    with pytest.raises(ArgumentError, match=r"key 'w' holds bfloat16\[\], .* 1e-60 .* float32 can"):
        compression.check(Spec("w", (), BF16, 0))


@pytest.mark.parametrize("params", QUANTIZED, ids=lambda params: str(params["type"]))
def test_nothing_raises_whatever_numpy_is_told_to_raise(params: dict[str, Any]) -> None:
    one = Ranks(made(**params), 1, 4)
    largest = float(np.finfo(F32).max)
    with np.errstate(all="raise"):
        assert np.sign(one.push([1e-45, -1e-45, largest, -largest]))[2:].tolist() == [1, -1]
