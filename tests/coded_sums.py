"""What ranks push where gradients are compressed, and what must come out, by the formulae."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import ml_dtypes
import numpy as np
import numpy.typing as npt

from kvcoll.coded import CodedSum
from kvcoll.compression import Compression, parse
from kvcoll.transport.contract import Transport

Array: TypeAlias = npt.NDArray[Any]

F32, F64, F16 = np.dtype("f4"), np.dtype("f8"), np.dtype("f2")
BF16 = np.dtype(ml_dtypes.bfloat16)
KINDS = ("2bit", "1bit", "fp16", "bf16")
# Ranks by host: one host, one rank a host, even, uneven, in turns, and more.
PLACES: dict[int, list[tuple[int, ...]]] = {
    1: [(0,)],
    2: [(0, 0), (0, 1)],
    3: [(0, 0, 0), (0, 1, 2), (0, 0, 1), (0, 1, 0)],
    4: [(0, 0, 0, 0), (0, 1, 2, 3), (0, 0, 1, 1), (0, 1, 0, 1), (0, 1, 1, 1), (0, 1, 0, 2)],
    5: [(0, 0, 0, 0, 0), (0, 1, 2, 3, 4), (0, 0, 0, 1, 1), (0, 1, 2, 0, 1)],
    7: [(0,) * 7, tuple(range(7)), (0, 0, 0, 0, 1, 1, 1), (0, 1, 2, 1, 1, 0, 2)],
}


class Settings(NamedTuple):
    piece_elements: int
    small_bytes: int


USUAL = Settings(1 << 19, 16 << 10)
IN_PIECES = Settings(264, 0)  # and segment by segment where that moves fewer bytes


def compression_of(kind: str) -> Compression:
    made = parse({"type": kind, "threshold": 0.3} if kind.endswith("bit") else {"type": kind})
    assert made is not None
    return made


def gradient(rank: int, n: int, dtype: np.dtype[Any] = F32) -> Array:
    random = np.random.default_rng([rank, n])
    return (random.standard_normal(n) * 2.0 ** random.integers(-6, 4, n)).astype(dtype)


def in_tree(parts: list[Array]) -> Array:
    """Add ``(0 + 1) + (2 + 3)``: the left branch takes as many as a power of two holds."""
    if len(parts) == 1:
        return parts[0]
    half = 1
    while 2 * half < len(parts):
        half *= 2
    total: Array = in_tree(parts[:half]) + in_tree(parts[half:])
    return total


def expected(kind: str, size: int, n: int, dtype: np.dtype[Any] = F32) -> Array:
    """Work the sum of the codes out from the formulae."""
    gradients = [gradient(rank, n, dtype) for rank in range(size)]
    if kind == "2bit":
        t = dtype.type(0.3)
        signs = [(g >= t).astype(int) - (g <= -t).astype(int) for g in gradients]
        value: Array = np.sum(signs, axis=0).astype(dtype) * t
        return value
    if kind == "1bit":
        t = dtype.type(0.3)
        ones: Array = np.sum([np.where(g > t, 1, -1) for g in gradients], axis=0).astype(dtype)
        return ones
    half = F16 if kind == "fp16" else BF16
    # NumPy rounds float64 straight to float16; bfloat16 is what is left of a float32.
    narrow = [g if kind == "fp16" else g.astype(F32) for g in gradients]
    total = in_tree([g.astype(half).astype(F32) for g in narrow])
    return total.astype(half).astype(dtype)


def sum_codes(
    transport: Transport, kind: str, n: int, dtype: np.dtype[Any] = F32, settings: Settings = USUAL
) -> Array:
    """Sum on one rank, twice, and look at the pieces."""
    compression = compression_of(kind)
    rank, size = transport.topology.rank, transport.topology.size
    coded = CodedSum(transport, compression.code(size), **settings._asdict())
    out = np.zeros(n, dtype)
    for _ in range(2):
        own, ends, encoded = gradient(rank, n, dtype), [0], [0]
        out[:] = 0

        def encode(start: int, stop: int, codes: Array, own: Any = own, e: Any = encoded) -> None:
            assert start == e[-1]
            e.append(stop)
            compression.encode(own[start:stop], codes)

        def sink(start: int, stop: int, total: Array, ends: list[int] = ends) -> None:
            assert start == ends[-1]
            ends.append(stop)
            out[start:stop] = total

        coded.all_reduce(n, encode, dtype, sink)
        assert ends[-1] == encoded[-1] == n
    return out
