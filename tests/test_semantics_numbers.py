"""Which bits a sum has: its order, its rounding, and that every rank holds the same."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

import kvcoll
from kvcoll import KVStore

Array = npt.NDArray[Any]
Add = Callable[[Sequence[Array]], Array]
BF16 = np.dtype(ml_dtypes.bfloat16)
F16, F32 = np.dtype(np.float16), np.dtype(np.float32)
# Across what is sent at once: one message, a stage of shared memory, and several of them.
SIZES = [1, 7, 1000, 4097, 8193, 40_000, 300_001]


@pytest.fixture
def dist(comm: object) -> Iterator[KVStore]:
    with kvcoll.create("dist_sync") as store:
        yield store


def one_by_one(rows: Sequence[Array]) -> Array:
    """Add left to right, each step rounded to the dtype of the rows."""
    total: Array = rows[0].copy()
    for row in rows[1:]:
        total = np.add(total, row, dtype=total.dtype)
    return total


def by_hosts(host_of: Sequence[int]) -> Add:
    """Return what adds the ranks of each host left to right, then the hosts' sums."""

    def add(rows: Sequence[Array]) -> Array:
        hosts = [
            [row for row, at in zip(rows, host_of, strict=True) if at == h]
            for h in range(max(host_of) + 1)
        ]
        return one_by_one([one_by_one(of_host) for of_host in hosts])

    return add


def by_tree(rows: Sequence[Array]) -> Array:
    """Add (0 + 1) + (2 + 3), and what is left over last."""
    level = list(rows)
    while len(level) > 1:
        pairs = [np.add(a, b) for a, b in zip(level[::2], level[1::2], strict=False)]
        level = pairs + level[len(pairs) * 2 :]
    return level[0]


def random_values(rank: int, size: int, dtype: np.dtype[Any], length: int = 1) -> list[Array]:
    """Make one rank's values, of very different magnitudes, so that the order matters."""
    random = np.random.default_rng([rank, size, length])
    numbers = random.standard_normal((length, size)) * 10.0 ** random.integers(-3, 4, size)
    return list(numbers.astype(dtype))


def expected_sum(of_ranks: Sequence[list[Array]], dtype: np.dtype[Any], add: Add) -> Array:
    """Sum lists left to right, then ranks; in float32 for 16 bits, and round once."""
    wide = F32 if dtype in (F16, BF16) else dtype
    rows = [one_by_one([value.astype(wide) for value in values]) for values in of_ranks]
    total: Array = add(rows).astype(dtype)
    return total


def assert_same_bits(got: Array, expected: Array, comm: Any = None) -> None:
    assert got.dtype == expected.dtype
    assert got.tobytes() == expected.tobytes()
    if comm is not None:
        everyones = comm.allgather(got.tobytes())
        assert all(bits == everyones[0] for bits in everyones)


def assert_same_numbers(got: Array, expected: Array) -> None:
    assert got.dtype == expected.dtype
    # NumPy takes a NaN for equal to a NaN only in dtypes of its own.
    np.testing.assert_array_equal(got.astype(np.float64), expected.astype(np.float64))


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_five_16_bit_values_in_a_list_are_rounded_once(kv: KVStore, dtype: np.dtype[Any]) -> None:
    kv.init(3, np.zeros(3, dtype))
    large = {F16: 2048, BF16: 256}[dtype]  # from here on neighbours are 2 apart
    values = [np.full(3, x, dtype) for x in (large, 1, 1, 1, 1)]
    if kv.rank:
        values = [np.zeros(3, dtype)]
    kv.push(3, values)
    np.testing.assert_array_equal(kv.pull(3), np.full(3, large + 4, dtype))
    assert kv.pull(3)[0] == {F16: 2052, BF16: 260}[dtype]


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
@pytest.mark.parametrize("n", [1, 20_000])
def test_five_16_bit_values_spread_over_ranks_are_rounded_once(
    dist: KVStore, dtype: np.dtype[Any], n: int
) -> None:
    dist.init(3, np.zeros(n, dtype))
    large = {F16: 2048, BF16: 256}[dtype]
    terms = [large, 1, 1, 1, 1]
    mine = terms[dist.rank :: dist.num_workers]  # in lists where there are fewer ranks
    dist.push(3, [np.full(n, x, dtype) for x in mine])
    np.testing.assert_array_equal(dist.pull(3), np.full(n, large + 4, dtype))


@pytest.mark.ranks(at_least=3)
def test_single_16_bit_values_are_not_rounded_between_ranks(dist: KVStore) -> None:
    dist.init(3, np.zeros(9, np.float16))
    dist.push(3, np.full(9, [2048, 1, 1, 0][dist.rank], np.float16))
    np.testing.assert_array_equal(dist.pull(3), np.full(9, 2050, np.float16))


@pytest.mark.ranks(at_least=2)
def test_a_wide_value_on_one_rank_alone_is_not_rounded_before_the_sum(dist: KVStore) -> None:
    # 2049 is no float16; with rank 1's 1 the sum is, and is lost if rank 0's part is rounded.
    dist.init([3, 4], [np.zeros(5, np.float16)] * 2)
    terms = {0: np.full(5, 2049, np.float32), 1: np.full(5, 1, np.float16)}
    value = terms.get(dist.rank, np.zeros(5, np.float16))
    dist.push(3, value)
    dist.push([3, 4], [value, value])
    np.testing.assert_array_equal(dist.pull(3), np.full(5, 2050, np.float16))
    np.testing.assert_array_equal(dist.pull(4), np.full(5, 2050, np.float16))


@pytest.mark.parametrize("dtype", [F32, F16, BF16, np.dtype(np.complex64)], ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_every_rank_holds_the_bits_of_the_sum_in_the_order_of_the_ranks(
    dist: KVStore, comm: Any, host_of: tuple[int, ...], dtype: np.dtype[Any], size: int
) -> None:
    n, add = dist.num_workers, by_hosts(host_of)
    dist.init(3, np.zeros(size, dtype))
    for length in (1, 2):
        of_ranks = [random_values(r, size, dtype, length) for r in range(n)]
        dist.push(3, of_ranks[dist.rank])
        assert_same_bits(dist.pull(3), expected_sum(of_ranks, dtype, add), comm)


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize("reproducible", [False, True])
def test_bits_do_not_depend_on_the_keys_that_are_pushed_together(
    comm: Any, host_of: tuple[int, ...], dtype: np.dtype[Any], reproducible: bool
) -> None:
    keys = list(range(len(SIZES)))
    add = by_tree if reproducible else by_hosts(host_of)
    with kvcoll.create("dist_sync", reproducible=reproducible) as kv:
        kv.init(keys, [np.zeros(size, dtype) for size in SIZES])
        of_ranks = [[random_values(r, s, dtype) for s in SIZES] for r in range(kv.num_workers)]
        mine = of_ranks[kv.rank]
        for together in ([[k] for k in keys], [keys], [keys[::-1]], [keys[::2], keys[1::2]]):
            for group in together:
                kv.push(group, [mine[k] for k in group])
            for k in keys:
                expected = expected_sum([values[k] for values in of_ranks], dtype, add)
                assert_same_bits(kv.pull(k), expected, comm)


@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
@pytest.mark.parametrize("size", [5, 9001, 300_001])
@pytest.mark.parametrize("order", ["as in the world", "reversed"])
def test_a_reproducible_sum_is_a_binary_tree_over_the_ranks_of_the_store(
    comm: Any, dtype: np.dtype[Any], size: int, order: str
) -> None:
    group = comm.Split(0, key=comm.rank if order == "as in the world" else -comm.rank)
    with kvcoll.create("dist_sync", comm=group, reproducible=True) as kv:
        if order == "reversed":
            assert kv.rank == comm.size - 1 - comm.rank
        kv.init(3, np.zeros(size, dtype))
        of_ranks = [random_values(r, size, dtype, 2) for r in range(kv.num_workers)]
        kv.push(3, of_ranks[kv.rank])
        assert_same_bits(kv.pull(3), expected_sum(of_ranks, dtype, by_tree), comm)
    group.Free()


def test_the_two_orders_of_a_sum_differ_in_their_bits() -> None:
    # Else the tests above would not tell one from the other.
    rows = [random_values(r, 9001, F32)[0] for r in range(4)]
    assert one_by_one(rows).tobytes() != by_tree(rows).tobytes()
    assert by_tree(rows).tobytes() == ((rows[0] + rows[1]) + (rows[2] + rows[3])).tobytes()
    assert by_tree(rows[:3]).tobytes() == ((rows[0] + rows[1]) + rows[2]).tobytes()


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32, np.uint64], ids=str)
def test_integers_wrap_as_numpys_do(kv: KVStore, dtype: Any) -> None:
    info = np.iinfo(dtype)
    kv.init(3, np.zeros(2, dtype))
    kv.push(3, [np.array([info.max, info.min], dtype), np.array([3, 5], dtype)])
    modulus = 2**info.bits
    wrapped = [(x - info.min) % modulus + info.min for x in (info.max + 3, info.min + 5)]
    total = [(x * kv.num_workers - info.min) % modulus + info.min for x in wrapped]
    np.testing.assert_array_equal(kv.pull(3), np.array(total, dtype))


NOT_FINITE = [np.nan, np.inf, -np.inf, 0.0, 1.0]


@pytest.mark.parametrize("dtype", [F16, BF16, F32, np.dtype(np.float64)], ids=str)
@pytest.mark.parametrize("n_copies", [1, 20_000])
def test_nan_and_infinity_go_through(kv: KVStore, dtype: np.dtype[Any], n_copies: int) -> None:
    kv.init(3, np.zeros(5 * n_copies, dtype))
    kv.push(3, np.tile(np.array(NOT_FINITE, dtype), n_copies))
    expected = np.array([np.nan, np.inf, -np.inf, 0, kv.num_workers], dtype)
    assert_same_numbers(kv.pull(3), np.tile(expected, n_copies))


@pytest.mark.limit(10)
@pytest.mark.parametrize("n", [1, 20_000])
@pytest.mark.parametrize("where", ["list of a local store", "list", "ranks"])
@pytest.mark.parametrize(
    ("dtype", "terms", "expected"),
    [
        (F32, (np.inf, -np.inf), np.nan),
        (F32, (3e38, 3e38), np.inf),
        (F16, (60_000, 60_000), np.inf),
        (BF16, (3e38, 3e38), np.inf),
        (F16, (np.inf, -np.inf), np.nan),
    ],
    ids=["inf - inf", "f32 overflow", "f16 overflow", "bf16 overflow", "f16 inf - inf"],
)
def test_a_sum_that_is_not_finite_is_no_error_and_no_warning(
    comm: Any, dtype: np.dtype[Any], terms: Sequence[float], expected: float, n: int, where: str
) -> None:
    if where == "ranks" and comm.size == 1:
        pytest.skip("one rank has no other to add to")
    # The test turns warnings into errors: one on a single rank would leave the others waiting.
    name = "local" if "local" in where else "dist_sync"
    with warnings.catch_warnings(), kvcoll.create(name) as kv:
        warnings.simplefilter("error")
        kv.init(3, np.zeros(n, dtype))
        with np.errstate(all="raise"):
            if where == "ranks":
                own = terms[kv.rank : kv.rank + 1] or (0.0,)
            else:
                own = (0.0,) if kv.rank else terms
            kv.push(3, [np.full(n, x).astype(dtype) for x in own])
        assert_same_numbers(kv.pull(3), np.full(n, expected, dtype))


def test_an_updaters_own_warnings_still_count(kv: KVStore) -> None:
    def update(key: Any, input: Array, stored: Array) -> None:
        stored /= input

    kv.init(3, np.zeros(2, np.float32))
    kv.set_updater(update)
    with np.errstate(all="raise"), pytest.raises(FloatingPointError):
        kv.push(3, np.zeros(2, np.float32))
