"""What every transport must do, as tests: derive a class named Test…, and give it a transport.

Each rank knows what all ranks push, so that what must come out is worked out here,
and not by asking the others.
"""

from __future__ import annotations

import functools
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

from kvcoll.transport.contract import Transport

Array: TypeAlias = npt.NDArray[Any]
DType: TypeAlias = np.dtype[Any]
Check: TypeAlias = Callable[[Array, Array], None]

BF16 = np.dtype(ml_dtypes.bfloat16)
F16, F32, F64 = np.dtype("f2"), np.dtype("f4"), np.dtype("f8")
SMALL_FLOATS = (F16, BF16, np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e5m2))
EXACT = tuple(map(np.dtype, ("?", "i1", "u4", "i8")))
FLOATS = tuple(map(np.dtype, ("f4", "f8", "g", "c8", "c16", "G")))

dtypes = pytest.mark.parametrize("dtype", EXACT + FLOATS + SMALL_FLOATS, ids=str)
one_of_each_kind = pytest.mark.parametrize(
    "dtype", [F32, F16, BF16, np.dtype("G"), np.dtype("?")], ids=str
)


def pushed(dtype: DType, n: int, size: int) -> list[Array]:
    """Give what each rank pushes: other numbers on each, whose sums are not exact."""
    longest = max(1024, 1 << (n - 1).bit_length())
    return [_numbers(dtype, rank, longest)[longest - n :] for rank in range(size)]


@functools.cache
def _numbers(dtype: DType, rank: int, n: int) -> Array:
    """Draw numbers once: every rank needs those of all, again and again."""
    random = np.random.default_rng([n, rank])
    if dtype.kind == "b":
        numbers = random.random(n) < 0.4
    elif dtype.kind in "iu":
        numbers = np.frombuffer(random.bytes(n * dtype.itemsize), dtype)
    else:
        base = 2.0 if dtype in SMALL_FLOATS else 10.0
        real = random.standard_normal(n) * base ** random.integers(-3, 4, n)
        wide: Array = real.astype(np.clongdouble if dtype.kind == "c" else np.longdouble)
        # Longer digits than a float64 has, for those that can hold them.
        wide *= 1 + np.longdouble(rank + 1) * np.longdouble(2) ** -60
        if dtype.kind == "c":
            wide = wide + 1j * random.standard_normal(n)
        narrow: Any = np.float64 if dtype in SMALL_FLOATS else wide.dtype
        numbers = wide.astype(narrow).astype(dtype)
    numbers.setflags(write=False)
    return numbers


def in_order(arrays: Sequence[Array], out_dtype: DType, groups: Sequence[Sequence[int]]) -> Array:
    """Sum each host's ranks in their order, then the hosts; small floats in float32."""
    wide = F32 if arrays[0].dtype in SMALL_FLOATS else arrays[0].dtype
    total = None
    for group in groups:
        of_host = arrays[group[0]].astype(wide)
        for k in group[1:]:
            of_host = of_host + arrays[k].astype(wide)
        total = of_host if total is None else total + of_host
    assert total is not None
    return total.astype(out_dtype)


def in_tree(arrays: Sequence[Array], out_dtype: DType) -> Array:
    """Sum ``(0 + 1) + 2`` or ``(0 + 1) + (2 + 3)``: written out for up to 4 ranks."""
    wide = F32 if arrays[0].dtype in SMALL_FLOATS else arrays[0].dtype
    a = [array.astype(wide) for array in arrays]
    if len(a) < 3:
        total = a[0] if len(a) == 1 else a[0] + a[1]
    else:
        total = (a[0] + a[1]) + (a[2] if len(a) == 3 else a[2] + a[3])
    return total.astype(out_dtype)


def bits(array: Array) -> bytes:
    """Give the bytes that count: those of a long double have a gap."""
    if array.dtype.kind in "fc" and array.dtype.char in "gG":
        parts = array.view(np.longdouble)
        return parts.astype(F64).tobytes() + (parts - parts.astype(F64)).astype(F64).tobytes()
    return array.tobytes()


def message(turn: int, source: int, dest: int, n: int) -> Array:
    """Give what one rank sends to another."""
    n = 0 if (source + 2 * dest + turn) % 5 == 4 else n + source
    return np.random.default_rng([turn, source, dest]).integers(0, 256, n, np.uint8)


class TransportContract(ABC):
    """The suite; `edges_bytes` are sizes of an array at which the transport changes its way.

    All ranks go through a test without a look at one another until its end: a message more
    a check would be most of the time.
    """

    edges_bytes: tuple[int, ...] = ()
    tree = False
    groups: tuple[tuple[int, ...], ...] = ((0,),)  # the ranks of each host

    @abstractmethod
    def all_of(self, mine: bytes) -> list[bytes]:
        """Give what each rank gave, by rank."""

    def expected(self, arrays: Sequence[Array], out_dtype: DType) -> Array:
        if self.tree:
            return in_tree(arrays, out_dtype)
        return in_order(arrays, out_dtype, self.groups)

    def sizes(self, itemsize: int) -> list[int]:
        around = {edge // itemsize + more for edge in self.edges_bytes for more in (-1, 0, 1)}
        return sorted({0, 1, 3, 97} | {n for n in around if n > 0})

    def check_equal(self, out: Array, expected: Array) -> None:
        """Compare with what is expected and with all ranks, at once."""
        assert bits(out) == bits(expected)
        assert len({*self.all_of(bits(out))}) == 1

    @pytest.fixture
    def check(self) -> Iterator[Check]:
        """Compare with what is expected, and at the end what all ranks got, bit by bit."""
        seen = hashlib.sha256()

        def check(out: Array, expected: Array) -> None:
            assert out.dtype == expected.dtype
            assert bits(out) == bits(expected)
            seen.update(bits(out))

        yield check
        assert len({*self.all_of(seen.digest())}) == 1

    @dtypes
    def test_sums_are_those_in_rank_order(
        self, transport: Transport, check: Check, dtype: DType
    ) -> None:
        rank, size = transport.topology.rank, transport.topology.size
        for n in self.sizes(dtype.itemsize):
            arrays = pushed(dtype, n, size)
            source, out = arrays[rank].copy(), np.full(n, 3).astype(dtype)
            transport.all_reduce(source, out)
            check(out, self.expected(arrays, dtype))
            assert bits(source) == bits(arrays[rank])

    @one_of_each_kind
    def test_sums_in_place_are_those_in_rank_order(
        self, transport: Transport, check: Check, dtype: DType
    ) -> None:
        rank, size = transport.topology.rank, transport.topology.size
        for n in self.sizes(dtype.itemsize)[::-2]:
            arrays = pushed(dtype, n, size)
            both = arrays[rank].copy()
            transport.all_reduce(both, both)
            check(both, self.expected(arrays, dtype))

    @pytest.mark.parametrize("dtype", SMALL_FLOATS, ids=str)
    def test_sums_of_few_bits_can_travel_in_float32(
        self, transport: Transport, check: Check, dtype: DType
    ) -> None:
        rank, size = transport.topology.rank, transport.topology.size
        for n in self.sizes(4):
            arrays = pushed(F32, n, size)
            source, out = arrays[rank].copy(), np.zeros(n, dtype)
            transport.all_reduce(source, out)
            with np.errstate(over="ignore", invalid="ignore"):
                expected = self.expected(arrays, dtype)
            check(out, expected)
            assert bits(source) == bits(arrays[rank])

    @one_of_each_kind
    def test_pieces_cover_the_sum_once_and_in_order(
        self, transport: Transport, check: Check, dtype: DType
    ) -> None:
        rank, size = transport.topology.rank, transport.topology.size
        for n in self.sizes(dtype.itemsize):
            arrays = pushed(dtype, n, size)
            source, out, ends = arrays[rank].copy(), np.zeros(n, dtype), [0]

            def sink(
                start: int, stop: int, total: Array, out: Array = out, ends: list[int] = ends
            ) -> None:
                assert start == ends[-1]
                ends.append(stop)
                out[start:stop] = total

            transport.all_reduce_pieces(source, dtype, sink)
            assert ends[-1] == n
            check(out, self.expected(arrays, dtype))
            assert bits(source) == bits(arrays[rank])

    @one_of_each_kind
    def test_a_window_is_summed_where_it_lies(
        self, transport: Transport, check: Check, dtype: DType
    ) -> None:
        rank, size = transport.topology.rank, transport.topology.size
        n = max(self.sizes(dtype.itemsize))
        arrays = pushed(dtype, n, size)
        window = transport.window(np.empty(n, dtype))
        window.own[:] = arrays[rank]
        for start, stop in [(0, n), (1, n - 1), (n // 3, n // 3 + 1), (n // 2, n // 2)]:
            out = np.zeros(stop - start, dtype)

            def sink(low: int, high: int, total: Array, out: Array = out) -> None:
                out[low:high] = total

            transport.all_reduce_window(window, start, stop, sink)
            check(out, self.expected(arrays, dtype)[start:stop])
        assert bits(window.own) == bits(arrays[rank])

    @one_of_each_kind
    def test_sums_go_into_a_part_of_a_window(
        self, transport: Transport, check: Check, dtype: DType
    ) -> None:
        rank, size = transport.topology.rank, transport.topology.size
        n = max(self.sizes(dtype.itemsize))
        arrays = pushed(dtype, n, size)
        whole = self.expected(arrays, dtype)
        source, out = transport.window(np.empty(n, dtype)), transport.window(np.empty(n, dtype))
        source.own[:] = arrays[rank]
        for start, stop in [
            (0, n),
            (1, n - 1),
            (n // 3, n // 3 + 1),
            (n // 2, n // 2),
            (3, n // 2),
        ]:
            for way in ("array", "in place", "window"):
                expected = np.full(n, 3).astype(dtype)
                out.own[:] = expected
                expected[start:stop] = whole[start:stop]
                own = arrays[rank][start:stop].copy()
                if way == "array":
                    transport.all_reduce_to_window(own, out, start, stop)
                elif way == "in place":
                    out.own[start:stop] = own
                    transport.all_reduce_to_window(None, out, start, stop)
                else:
                    transport.all_reduce_windows(source, out, start, stop)
                check(out.own, expected)
                assert bits(own) == bits(arrays[rank][start:stop])
        assert bits(source.own) == bits(arrays[rank])

    @pytest.mark.parametrize("dtype", SMALL_FLOATS, ids=str)
    def test_sums_of_few_bits_go_into_a_window_from_float32(
        self, transport: Transport, check: Check, dtype: DType
    ) -> None:
        rank, size = transport.topology.rank, transport.topology.size
        for n in self.sizes(4)[-2:]:
            arrays = pushed(F32, n, size)
            out = transport.window(np.empty(n, dtype))
            transport.all_reduce_to_window(arrays[rank], out, 0, n)
            with np.errstate(over="ignore", invalid="ignore"):
                check(out.own, self.expected(arrays, dtype))

    def test_a_dtype_that_is_equal_but_another_object_on_one_rank_is_the_same(
        self, transport: Transport, check: Check
    ) -> None:
        rank, size = transport.topology.rank, transport.topology.size
        n = max(self.sizes(4))
        arrays = pushed(F32, n, size)
        dtype = np.dtype(F32, metadata={"made": "elsewhere"}) if rank == size - 1 else F32
        out = transport.window(np.empty(n, F32))
        transport.all_reduce_to_window(arrays[rank].view(dtype), out, 0, n)
        check(out.own, self.expected(arrays, F32))

    @pytest.mark.parametrize("dtype", [F32, F16, BF16, np.dtype("c8")], ids=str)
    def test_an_elements_sum_does_not_depend_on_its_place(
        self, transport: Transport, check: Check, dtype: DType
    ) -> None:
        rank, size = transport.topology.rank, transport.topology.size
        n = max(self.sizes(dtype.itemsize))
        arrays = pushed(dtype, n, size)
        whole = self.expected(arrays, dtype)
        for start, stop in [(1, n), (0, n - 1), (n // 2, n), (3, 20), (n - 1, n), (5, 5 + n // 3)]:
            behind = np.zeros(n + size, dtype)  # each rank's at another distance from a line
            out = behind[rank : rank + stop - start]
            transport.all_reduce(arrays[rank][start:stop], out)
            check(out, whole[start:stop])
            assert not behind[rank + stop - start :].any()

    @pytest.mark.parametrize("dtype", [F32, F64, F16, np.dtype("c8")], ids=str)
    def test_nans_of_different_payloads_are_the_same_bits_on_all_ranks(
        self, transport: Transport, check: Check, dtype: DType
    ) -> None:
        rank, size = transport.topology.rank, transport.topology.size
        part = np.dtype(f"f{dtype.itemsize // 2}") if dtype.kind == "c" else dtype
        quiet = np.array(np.nan, part).view(f"u{part.itemsize}")
        for n in self.sizes(dtype.itemsize):
            n_words = n * dtype.itemsize // part.itemsize
            words = np.full(n_words, int(quiet) + rank + 1, quiet.dtype)
            words[rank :: size + 1] ^= np.array(1 << (8 * part.itemsize - 1), words.dtype)
            source = words.view(dtype)
            behind = np.zeros(n + size, dtype)
            out = behind[rank : rank + n]
            transport.all_reduce(source, out)
            assert np.isnan(out).all()
            check(out, out.copy())

    @pytest.mark.parametrize("dtype", [F32, F16, BF16, np.dtype("c8")], ids=str)
    def test_infinities_and_overflows_go_through_whatever_numpy_is_told_to_raise(
        self, transport: Transport, check: Check, dtype: DType
    ) -> None:
        rank, size = transport.topology.rank, transport.topology.size
        info: Any = ml_dtypes.finfo
        largest = info(dtype).max
        row = np.array([np.inf, np.inf, -np.inf, largest, 1], dtype)
        if rank:
            row[1:4] = [-np.inf, -np.inf, largest]
        alone = size == 1
        third = np.inf if alone else np.nan
        expected = np.array([np.inf, third, -np.inf, largest if alone else np.inf, size])
        for n in self.sizes(dtype.itemsize):
            source = np.resize(row, n)
            out = np.zeros(n, dtype)
            with np.errstate(all="raise" if rank == size - 1 else "ignore"):
                transport.all_reduce(source, out)
            with np.errstate(all="ignore"):
                rounded = np.resize(expected, n).astype(dtype).real
                np.testing.assert_array_equal(out.real.astype(F64), rounded.astype(F64))

    @pytest.mark.parametrize("dtype", [F32, BF16, np.dtype("?"), np.dtype("i8")], ids=str)
    def test_every_rank_can_broadcast(
        self, transport: Transport, check: Check, dtype: DType
    ) -> None:
        rank, size = transport.topology.rank, transport.topology.size
        for root in range(size):
            for n in self.sizes(dtype.itemsize)[root::size]:
                arrays = pushed(dtype, n, size)
                buffer = arrays[rank].copy()
                transport.broadcast(buffer, root)
                check(buffer, arrays[root])

    def test_bytes_go_to_every_rank_and_come_from_every_rank(self, transport: Transport) -> None:
        rank, size = transport.topology.rank, transport.topology.size
        others = [k for k in range(size) if k != rank]
        under_way = []
        for turn, n in enumerate(self.sizes(1)):
            # Not all of one length, and none at all between some.
            sent = {k: message(turn, rank, k, n) for k in others}
            received = {k: np.zeros(message(turn, k, rank, n).size, np.uint8) for k in others}
            under_way.append((received, transport.start_all_to_all(sent, received)))
        for (received, exchange), (turn, n) in zip(
            under_way, enumerate(self.sizes(1)), strict=True
        ):
            exchange.wait()
            for k in others:
                np.testing.assert_array_equal(received[k], message(turn, k, rank, n))

    def test_some_ranks_may_have_messages_while_others_have_none(
        self, transport: Transport
    ) -> None:
        rank, size = transport.topology.rank, transport.topology.size
        for n in self.sizes(1):
            sent, received = dict[int, Array](), dict[int, Array]()
            if rank == 0:
                sent = {k: message(0, 0, k, n) for k in range(1, size)}
            else:
                received = {0: np.zeros(message(0, 0, rank, n).size, np.uint8)}
            if sent or received:
                transport.start_all_to_all(sent, received).wait()
            if received:
                np.testing.assert_array_equal(received[0], message(0, 0, rank, n))

    def test_calls_of_all_kinds_and_sizes_follow_one_another(
        self, transport: Transport, check: Check
    ) -> None:
        rank, size = transport.topology.rank, transport.topology.size
        sizes = self.sizes(4)
        window, stored = (transport.window(np.empty(max(sizes), F32)) for _ in range(2))
        random = np.random.default_rng(7)  # the same turns on every rank
        for turn in range(60):
            n = sizes[random.integers(len(sizes))]
            arrays = [array + turn for array in pushed(F32, n, size)]
            expected, out = self.expected(arrays, F32), np.zeros(n, F32)

            def sink(start: int, stop: int, total: Array, out: Array = out) -> None:
                out[start:stop] = total

            match int(random.integers(6)):
                case 0:
                    transport.all_reduce(arrays[rank], out)
                case 1:
                    transport.all_reduce_pieces(arrays[rank], F32, sink)
                case 2:
                    window.own[:n] = arrays[rank]
                    transport.all_reduce_window(window, 0, n, sink)
                case 3:
                    window.own[:n] = arrays[rank]
                    transport.all_reduce_windows(window, stored, 0, n)
                    out = stored.own[:n]
                case 4:
                    transport.all_reduce_to_window(arrays[rank], stored, 0, n)
                    out = stored.own[:n]
                case _:
                    transport.broadcast(arrays[rank], turn % size)
                    out, expected = arrays[rank], arrays[turn % size]
                    expected = pushed(F32, n, size)[turn % size] + turn
            check(out, expected)
