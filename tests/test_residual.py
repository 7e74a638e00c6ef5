"""Residuals follow their keys, whatever shares a bucket; what cannot be encoded changes none."""

from __future__ import annotations

from typing import Any, TypeAlias

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

from kvcoll.bucket import Bucket, plan
from kvcoll.compression import Compression, parse
from kvcoll.errors import ArgumentError
from kvcoll.replica import Entry, Replica
from kvcoll.residual import Residuals
from kvcoll.schema import Spec
from kvcoll.words import BLOCK_ELEMENTS

pytestmark = pytest.mark.single

Array: TypeAlias = npt.NDArray[Any]
BF16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = tuple(map(np.dtype, ("f4", "f8", "f2", BF16)))
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def made(**params: object) -> Compression:
    compression = parse(params)
    assert compression is not None
    return compression


def entries_of(sizes: list[int], dtype: Any) -> list[Entry]:
    replica = Replica(chunk_bytes=1 << 10)  # several chunks
    for key, n in enumerate(sizes):
        spec = Spec(key, (n,), np.dtype(dtype), key)
        replica.keep(replica.draft([spec]), [np.zeros(n, dtype)])
    return list(replica.entries.values())


def gradients_of(bucket: Bucket, turn: int) -> list[Array]:
    return [
        np.random.default_rng([turn, m.entry.spec.order])
        .standard_normal(m.stop - m.start)
        .astype(bucket.dtype)
        for m in bucket.members
    ]


def pushed(residuals: Residuals, compression: Compression, bucket: Bucket, flat: Array) -> Array:
    """Give what one rank's push of a bucket comes to, encoded in two parts."""
    code = compression.code(1)
    residuals.check(bucket, flat)
    encode = residuals.encode(bucket, flat)
    values = []
    middle = bucket.n_elements // 3
    for start, stop in [(0, middle), (middle, bucket.n_elements)]:
        n = stop - start
        codes = np.empty(code.part_bytes(n, (0,)), np.uint8)
        encode(start, stop, codes)
        total, out = np.empty(code.total_bytes(n), np.uint8), np.empty(n, bucket.wide_dtype)
        code.finish(n, [((0,), codes)], total)
        code.decode(n, total, 0, out)
        values.append(out)
    return np.concatenate(values)


@dtypes
def test_each_key_keeps_its_residual_whatever_it_is_pushed_with(dtype: Any) -> None:
    sizes = [5, 300, 0, 77, BLOCK_ELEMENTS + 9, 1, 64]
    entries = entries_of(sizes, dtype)
    compression = made(type="2bit", threshold=0.5)
    residuals = Residuals(compression)
    wide = np.float64 if dtype == np.float64 else np.float32
    right = [np.zeros(n, wide) for n in sizes]
    lists = [entries, entries[::-1], entries[1::2], [entries[4]], [entries[6], entries[0]]]
    for turn, keys in enumerate(lists):
        buckets = plan(keys)
        residuals.prepare(buckets)
        for bucket in buckets:
            gradients = gradients_of(bucket, turn)
            flat = np.concatenate(gradients)
            before = flat.copy()
            values = pushed(residuals, compression, bucket, flat)
            assert flat.tobytes() == before.tobytes()
            for member, gradient in zip(bucket.members, gradients, strict=True):
                r = right[member.entry.spec.order]
                r += gradient.astype(wide)
                value = np.where(r >= 0.5, 0.5, 0) - np.where(r <= -0.5, 0.5, 0)
                r -= value.astype(wide)
                np.testing.assert_array_equal(values[member.start : member.stop], value)
        for entry in entries:
            if entry in keys:
                assert residuals.of(entry).dtype == wide
                np.testing.assert_array_equal(residuals.of(entry), right[entry.spec.order])


@dtypes
@pytest.mark.parametrize("kind", ["fp16", "bf16"])
def test_without_error_feedback_there_is_no_residual(dtype: Any, kind: str) -> None:
    entries = entries_of([300, 20], dtype)
    compression = made(type=kind)
    residuals = Residuals(compression)
    half = np.dtype("f2") if kind == "fp16" else BF16
    for bucket in plan(entries):
        residuals.prepare([bucket])
        flat = np.concatenate(gradients_of(bucket, 1))
        right = flat if kind == "fp16" else flat.astype("f4")
        for source in (flat, flat.astype(bucket.wide_dtype)):  # as one array, or as a list's sum
            for _ in range(2):
                values = pushed(residuals, compression, bucket, source)
                np.testing.assert_array_equal(values, right.astype(half).astype(values.dtype))


def test_another_threshold_keeps_the_residual() -> None:
    entries = entries_of([4], "f4")
    (bucket,) = plan(entries)
    residuals = Residuals(made(type="2bit", threshold=10.0))
    residuals.prepare([bucket])
    flat = np.array([1, -2, 3, -9.5], np.float32)
    assert not pushed(residuals, made(type="2bit", threshold=10.0), bucket, flat).any()
    residuals.change(made(type="2bit", threshold=2.0))
    residuals.prepare([bucket])
    values = pushed(residuals, made(type="2bit", threshold=2.0), bucket, np.zeros(4, np.float32))
    assert values.tolist() == [0, -2, 2, -2]
    assert residuals.of(entries[0]).tolist() == [1, 0, 1, -7.5]


@dtypes
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("params", [{"type": "2bit"}, {"type": "1bit"}], ids=lambda p: p["type"])
def test_a_gradient_without_codes_names_its_key_and_changes_nothing(
    params: dict[str, object], value: float, dtype: Any
) -> None:
    sizes = [40, 5, BLOCK_ELEMENTS + 3, 6]
    entries = entries_of(sizes, dtype)
    residuals = Residuals(made(**params))
    buckets = plan(entries)
    residuals.prepare(buckets)
    for key, n in enumerate(sizes):
        (bucket,) = [b for b in buckets if any(m.entry is entries[key] for m in b.members)]
        member = next(m for m in bucket.members if m.entry is entries[key])
        flat = np.ones(bucket.n_elements, dtype)
        flat[member.stop - 1] = value
        with pytest.raises(ArgumentError, match=rf"^key {key} holds {dtype}\[{n}\], pushed NaN or"):
            residuals.check(bucket, flat)
        assert not any(residuals.of(entry).any() for entry in entries)


def test_what_overflows_with_the_residual_stays_at_the_largest_number() -> None:
    entries = entries_of([4], "f4")
    (bucket,) = plan(entries)
    compression = made(type="1bit")
    residuals = Residuals(compression)
    residuals.prepare([bucket])
    flat = np.array([1, 3e38, -3e38, 2], np.float32)
    with np.errstate(all="raise"):
        for _ in range(2):
            assert pushed(residuals, compression, bucket, flat).tolist() == [1, 1, -1, 1]
    largest = float(np.finfo(np.float32).max)
    assert residuals.of(entries[0]).tolist() == [0, largest, -largest, 2]
    with np.errstate(all="raise"):
        pushed(residuals, compression, bucket, -flat)  # and comes down again
    assert abs(residuals.of(entries[0])[1:3]).max() < 1e38


def test_16_bits_let_infinities_through_but_no_nan() -> None:
    (bucket,) = plan(entries_of([3], "f4"))
    compression = made(type="fp16")
    residuals = Residuals(compression)
    residuals.prepare([bucket])
    flat = np.array([np.inf, -np.inf, 1e6], np.float32)
    assert pushed(residuals, compression, bucket, flat).tolist() == [np.inf, -np.inf, np.inf]
    with pytest.raises(ArgumentError, match=r"^key 0 holds .*pushed NaN, for which fp16"):
        residuals.check(bucket, np.array([1, np.nan, np.inf], np.float32))


def test_a_key_that_cannot_be_compressed_is_named_when_memory_is_taken() -> None:
    residuals = Residuals(made(type="2bit"))
    with pytest.raises(ArgumentError, match=r"^key 0 holds int64"):
        residuals.prepare(plan(entries_of([4], "i8")))
