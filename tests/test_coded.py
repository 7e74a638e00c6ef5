"""Sums of codes: right, the same bits wherever the ranks are, in as few bytes as promised."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
from coded_ranks import ThreadTransport, on_ranks
from coded_sums import (
    F32,
    F64,
    IN_PIECES,
    KINDS,
    PLACES,
    USUAL,
    Array,
    Settings,
    compression_of,
    expected,
    sum_codes,
)

from kvcoll.coded import CodedSum

pytestmark = pytest.mark.single

kinds = pytest.mark.parametrize("kind", KINDS)
SIZES = (1, 7, 8, 9, 1000, 4097)


class Outcome(NamedTuple):
    total: Array
    sent_bytes: dict[str, int]


def summed(
    host_of: tuple[int, ...],
    kind: str,
    n: int,
    dtype: np.dtype[Any] = F32,
    settings: Settings = USUAL,
) -> list[Outcome]:
    def act(transport: ThreadTransport) -> Outcome:
        out = sum_codes(transport, kind, n, dtype, settings)
        return Outcome(out, {k: v // 2 for k, v in transport.sent_bytes.items()})

    return on_ranks(host_of, act)


@kinds
@pytest.mark.parametrize(
    "size", [size if size <= 4 else pytest.param(size, marks=pytest.mark.long) for size in PLACES]
)
def test_sums_are_those_of_the_formulae_wherever_the_ranks_are(kind: str, size: int) -> None:
    for n in SIZES:
        right = expected(kind, size, n).tobytes()
        for host_of in PLACES[size]:
            for settings in (USUAL, IN_PIECES):
                outcomes = summed(host_of, kind, n, F32, settings)
                for rank, outcome in enumerate(outcomes):
                    assert outcome.total.tobytes() == right, (host_of, n, rank, settings)


@kinds
def test_nothing_is_summed_of_nothing(kind: str) -> None:
    assert [one.total.size for one in summed((0, 1), kind, 0)] == [0, 0]


@kinds
def test_float64_keys_keep_their_digits(kind: str) -> None:
    for outcome in summed((0, 0, 1), kind, 1001, F64):
        assert outcome.total.tobytes() == expected(kind, 3, 1001, F64).tobytes()


@pytest.mark.parametrize("size", [100, 150, 300])
@pytest.mark.parametrize("kind", ["2bit", "1bit"])
def test_counts_of_many_ranks_do_not_overflow(kind: str, size: int) -> None:
    compression = compression_of(kind)
    code = compression.code(size)
    n = 21
    parts = []
    for rank in range(size):
        own = np.full(n, [-1.0, 1.0][rank % 50 > 0 or n < 0], np.float32)
        own[rank % n] = 0.0
        codes = np.zeros(code.part_bytes(n, (rank,)), np.uint8)
        compression.encode(own, codes)
        parts.append(((rank,), codes))
    third = size // 3
    merged = []
    for low, high in [(0, 1), (1, third), (third, size)]:
        ranks = tuple(range(low, high))
        to = np.zeros(code.part_bytes(n, ranks), np.uint8)
        code.merge(n, parts[low:high], to)
        merged.append((ranks, to))
    total, out = np.zeros(code.total_bytes(n), np.uint8), np.zeros(n, np.float32)
    code.finish(n, merged[::-1], total)
    code.decode(n, total, 0, out)
    signs = np.array([[1 if rank % 50 else -1] * n for rank in range(size)])
    for rank in range(size):
        signs[rank, rank % n] = 0 if kind == "2bit" else -1
    step = np.float32(0.3) if kind == "2bit" else np.float32(1)
    np.testing.assert_array_equal(out, signs.sum(0).astype(np.float32) * step)


@pytest.mark.parametrize(("kind", "most"), [("2bit", 0.07), ("1bit", 0.035), ("fp16", 0.53)])
def test_two_hosts_of_one_rank_send_only_codes(kind: str, most: float) -> None:
    n = 2_000_000
    for outcome in summed((0, 1), kind, n):
        float32_bytes = 4 * n  # the floor for a sum over two hosts
        assert 0.02 < outcome.sent_bytes["other hosts"] / float32_bytes <= most


def test_2bit_is_a_sixteenth_of_float32_and_at_most_5_percent() -> None:
    n = 100_000
    for outcome in summed((0, 1), "2bit", n):
        assert 1 / 16 <= outcome.sent_bytes["other hosts"] / (4 * n) <= 1.05 / 16


# Bits an element that a host sends: the lesser of all to all hosts, and of a segment to
# each and its total back; sums of m codes of 2 bits need (2 m).bit_length() bits.
@pytest.mark.parametrize(
    ("host_of", "kind", "bits"),
    [
        ((0, 1, 2, 3), "2bit", 3 / 4 * (2 + 4)),
        ((0, 1, 2), "1bit", 2 / 3 * (1 + 2)),
        ((0, 1, 2), "2bit", 2 / 3 * (2 + 3)),
        ((0, 0, 1, 1), "2bit", 3),
        ((0, 0, 1, 1), "1bit", 2),
        ((0, 1, 2), "fp16", 2 / 3 * (16 + 16)),
        ((0, 0, 1, 1), "fp16", 1 / 2 * (32 + 16)),
        ((0, 1, 0, 1), "bf16", 1 / 2 * (32 + 16)),
        ((0,) * 4 + (1,) * 4, "2bit", 4),
        ((0,) * 4 + (1,) * 4, "bf16", 1 / 2 * (32 + 16)),
    ],
)
def test_hosts_send_the_least_of_what_they_could(
    host_of: tuple[int, ...], kind: str, bits: float
) -> None:
    n = 480_000
    sent = [0] * (max(host_of) + 1)
    for rank, outcome in enumerate(summed(host_of, kind, n)):
        sent[host_of[rank]] += outcome.sent_bytes["other hosts"]
    assert max(sent) * 8 / n == pytest.approx(bits, rel=0.01)


def test_memory_is_that_of_a_piece_and_not_of_the_array() -> None:
    import tracemalloc

    def act(transport: ThreadTransport) -> int:
        coded = CodedSum(transport, compression_of("2bit").code(1))
        tracemalloc.start()
        coded.all_reduce(1 << 24, lambda *_: None, F32, lambda *_: None)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    assert on_ranks((0,), act)[0] < 1 << 20
