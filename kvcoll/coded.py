"""Sums of codes over the ranks: what crosses between ranks is codes, and nothing else.

The codes of a host's ranks are added on the host, each local rank its own lane, and the
host's sum goes to the other hosts in as few bits as it needs: as a whole to each of
them, or each host adds one segment and hands that out, whichever moves fewer bytes.
Where there is one host, or one rank a host, all ranks count as hosts of one.

Rules of the file: large arrays go in pieces, two of which are under way at once, so that
one is encoded while another travels; all ranks take the same steps in the same order;
memory is taken when the object is made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias, final

import numpy as np

from .arrays import Array, DType, round_to, wide
from .codes import Code, Ranks
from .transport.contract import Exchange, Sink, Transport

# Takes start, stop and where to put the codes of the elements between.
Encode: TypeAlias = Callable[[int, int, Array], None]
_Row: TypeAlias = tuple[Array, list[Array]]  # one message, and the blocks in it

# Per rank that adds a part of it, so that messages are long enough for a wire.
_PIECE_ELEMENTS = 1 << 19
_MOST_ELEMENTS = 1 << 23
_SUNK_ELEMENTS = 1 << 16  # handed over at once, fresh in cache
_SMALL_BYTES = 16 << 10  # of all codes: the fewer messages are the quicker way
_LINE_BYTES = 64
_BITS_SAMPLE = 1 << 13


@dataclass(frozen=True)
class _Block:
    """Elements that are packed as one."""

    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start


@final
class _Arena:
    """Memory for one piece, handed out from the first byte on."""

    def __init__(self, n_bytes: int) -> None:
        words = np.empty(-(-n_bytes // 16), np.complex128)  # aligned for every dtype
        self._raw: Array = words.view(np.uint8)
        self._used = 0

    def clear(self) -> None:
        self._used = 0

    def take(self, sizes: list[int]) -> _Row:
        """Give one array for a message, and in it one a size."""
        first = stop = self._used
        parts = []
        for n_bytes in sizes:
            parts.append(self._raw[self._used : self._used + n_bytes])
            stop = self._used + n_bytes
            self._used += _padded(n_bytes)
        return self._raw[first:stop], parts


def _padded(n_bytes: int) -> int:
    return -(-n_bytes // _LINE_BYTES) * _LINE_BYTES


@dataclass
class _Incoming:
    """What one rank sends: the sum of some ranks' codes."""

    source: int
    ranks: Ranks
    row: _Row


@dataclass
class _Flight:
    """Sums under way from other ranks."""

    exchange: Exchange
    incoming: list[_Incoming]

    def land(self) -> list[tuple[Ranks, list[Array]]]:
        """Wait for them; give whose sums they are, and the blocks."""
        self.exchange.wait()
        return [(one.ranks, one.row[1]) for one in self.incoming]


@dataclass
class _Piece:
    """One piece of an array on its way."""

    lanes: list[list[_Block]]
    rows: list[_Row]  # this rank's codes, by lane
    arena: _Arena
    flight: _Flight


@final
class CodedSum:
    """Sums gradients that `encode` turns into codes.

    Moves, with H hosts and a host's sum of w bits an element and a total of v bits, the
    lesser of ``(H - 1) w`` and ``(H - 1) / H (w + v)`` bits an element each way and host.

    Parameters
    ----------
    transport : Transport
    code : Code
        Of as many ranks.
    piece_elements : int, optional
        How many elements go in one piece for each rank that adds a part of it.
    small_bytes : int, optional
        Up to which size of all codes together they go to all hosts at once in any case.
    """

    def __init__(
        self,
        transport: Transport,
        code: Code,
        *,
        piece_elements: int = _PIECE_ELEMENTS,
        small_bytes: int = _SMALL_BYTES,
    ) -> None:
        topology = transport.topology
        self._transport, self._code = transport, code
        self._rank, self._small_bytes = topology.rank, small_bytes
        self._has_local = 1 < topology.num_hosts < topology.size
        singles = tuple((rank,) for rank in range(topology.size))
        self._hosts: tuple[Ranks, ...] = topology.hosts if self._has_local else singles
        self._host = topology.host if self._has_local else topology.rank
        self._here = self._hosts[self._host]
        self._lane = self._here.index(topology.rank)
        self._n_lanes = min(len(ranks) for ranks in self._hosts)
        adders = self._n_lanes * len(self._hosts)
        self._piece_elements = min(piece_elements * adders, max(_MOST_ELEMENTS, piece_elements))
        n_bytes = max(self._capacity(self._piece_elements, gathers) for gathers in (True, False))
        self._arenas = (_Arena(n_bytes), _Arena(n_bytes))
        self._wide = np.empty(_SUNK_ELEMENTS, np.complex128)
        self._narrow = np.empty(_SUNK_ELEMENTS, np.complex128)

    def all_reduce(self, n_elements: int, encode: Encode, dtype: DType, sink: Sink) -> None:
        """Sum the codes of all ranks, and hand over what they stand for.

        Parameters
        ----------
        n_elements : int
            The same on all ranks.
        encode : callable
            ``encode(start, stop, codes)`` writes this rank's codes of some elements into
            `Code.part_bytes` bytes. It is called once for every element, in ascending
            order, and must not raise.
        dtype : numpy.dtype
            Of the sum. Its value is worked out in float32 or, for wider floats, in
            `dtype`, and rounded to `dtype` last.
        sink : callable
            As for `Transport.all_reduce_pieces`. It is called for a piece once a later
            one may have been encoded.
        """
        gathers = self._gathers(n_elements)
        before: _Piece | None = None
        for number, start in enumerate(range(0, n_elements, self._piece_elements)):
            stop = min(start + self._piece_elements, n_elements)
            piece = self._begin(self._cut(start, stop, gathers), self._arenas[number % 2], encode)
            if before is not None:
                self._end(before, dtype, sink)
            before = piece
        if before is not None:
            self._end(before, dtype, sink)

    def _begin(self, lanes: list[list[_Block]], arena: _Arena, encode: Encode) -> _Piece:
        """Encode a piece, and send it on its first way."""
        arena.clear()
        rows = []
        for blocks in lanes:
            row = arena.take(self._sizes(blocks, (self._rank,)))
            for block, codes in zip(blocks, row[1], strict=True):
                if block.size:
                    encode(block.start, block.stop, codes)
            rows.append(row)
        if self._has_local:
            return _Piece(lanes, rows, arena, self._start_local(lanes, rows, arena))
        return _Piece(lanes, rows, arena, self._start_hosts(lanes[0], rows[0], arena))

    def _end(self, piece: _Piece, dtype: DType, sink: Sink) -> None:
        """Bring a piece to its sum, and hand that over."""
        adds = self._lane < self._n_lanes
        mine, flight = piece.rows[0], piece.flight
        if self._has_local:
            parts = flight.land()
            if adds:
                mine = self._merge(piece, parts)
                flight = self._start_hosts(piece.lanes[self._lane], mine, piece.arena)
        totals = [
            piece.arena.take([self._code.total_bytes(block.size) for block in blocks])
            for blocks in piece.lanes
        ]
        if adds:
            self._finish(piece.lanes[self._lane], mine, flight.land(), totals[self._lane])
        if self._has_local:
            self._hand_out(totals)
        for blocks, (_, own) in zip(piece.lanes, totals, strict=True):
            for block, total in zip(blocks, own, strict=True):
                self._decode(block, total, dtype, sink)

    def _start_local(self, lanes: list[list[_Block]], rows: list[_Row], arena: _Arena) -> _Flight:
        """Send each lane to the local rank that adds it."""
        others = [k for k in self._here if k != self._rank]
        to = {self._here[lane]: row for lane, (row, _) in enumerate(rows)}
        incoming = []
        if self._lane < self._n_lanes:
            blocks = lanes[self._lane]
            incoming = [_Incoming(k, (k,), arena.take(self._sizes(blocks, (k,)))) for k in others]
        return self._start({k: to[k] for k in others if k in to}, incoming)

    def _merge(self, piece: _Piece, parts: list[tuple[Ranks, list[Array]]]) -> _Row:
        """Add the codes of the host's ranks for this rank's lane."""
        blocks = piece.lanes[self._lane]
        parts = [*parts, ((self._rank,), piece.rows[self._lane][1])]
        row = piece.arena.take(self._sizes(blocks, self._here))
        for number, block in enumerate(blocks):
            own = [(ranks, theirs[number]) for ranks, theirs in parts]
            self._code.merge(block.size, own, row[1][number])
        return row

    def _start_hosts(self, blocks: list[_Block], mine: _Row, arena: _Arena) -> _Flight:
        """Send the host's sum of this rank's lane: all to all hosts, or to each its segment."""
        sent, incoming = {}, []
        gathers = len(blocks) == 1
        own = blocks[0 if gathers else self._host]
        for host, ranks in enumerate(self._hosts):
            if host != self._host:
                peer = ranks[self._lane]
                sent[peer] = mine[0] if gathers else mine[1][host]
                incoming.append(_Incoming(peer, ranks, arena.take(self._sizes([own], ranks))))
        return self._start(sent, incoming)

    def _finish(
        self,
        blocks: list[_Block],
        mine: _Row,
        parts: list[tuple[Ranks, list[Array]]],
        totals: _Row,
    ) -> None:
        """Add the hosts' sums, and tell the other hosts where each has its own segment."""
        gathers = len(blocks) == 1
        number = 0 if gathers else self._host
        own = [(self._here, mine[1][number]), *((ranks, theirs[0]) for ranks, theirs in parts)]
        self._code.finish(blocks[number].size, own, totals[1][number])
        if gathers:
            return
        peers = {h: ranks[self._lane] for h, ranks in enumerate(self._hosts) if h != self._host}
        self._transport.start_all_to_all(
            dict.fromkeys(peers.values(), totals[1][number]),
            {peer: totals[1][host] for host, peer in peers.items()},
        ).wait()

    def _hand_out(self, totals: list[_Row]) -> None:
        """Give each local rank the totals of all lanes."""
        others = [k for k in self._here if k != self._rank]
        adders = enumerate(self._here[: self._n_lanes])
        sent = {}
        if self._lane < self._n_lanes:
            sent = dict.fromkeys(others, totals[self._lane][0])
        received = {k: totals[j][0] for j, k in adders if k != self._rank}
        self._transport.start_all_to_all(sent, received).wait()

    def _decode(self, block: _Block, total: Array, dtype: DType, sink: Sink) -> None:
        own = wide(dtype)
        for start in range(0, block.size, _SUNK_ELEMENTS):
            n = min(_SUNK_ELEMENTS, block.size - start)
            value: Array = self._wide.view(own)[:n]
            self._code.decode(block.size, total, start, value)
            if own != dtype:
                rounded: Array = self._narrow.view(dtype)[:n]
                round_to(value, rounded)
                value = rounded
            sink(block.start + start, block.start + start + n, value)

    def _start(self, sent: Mapping[int, Array], incoming: list[_Incoming]) -> _Flight:
        received = {one.source: one.row[0] for one in incoming}
        return _Flight(self._transport.start_all_to_all(sent, received), incoming)

    def _cut(self, start: int, stop: int, gathers: bool) -> list[list[_Block]]:
        """Cut a piece into lanes, and these into a segment a host unless all gather all."""
        each = 1 if gathers else len(self._hosts)
        n, size = self._n_lanes * each, stop - start
        bounds = [start + size * k // n for k in range(n + 1)]
        blocks = [_Block(bounds[k], bounds[k + 1]) for k in range(n)]
        return [blocks[lane * each : (lane + 1) * each] for lane in range(self._n_lanes)]

    def _gathers(self, n_elements: int) -> bool:
        """Say whether each host's sum goes to all hosts, which then add all of them."""
        size = self._transport.topology.size
        if self._code.part_bytes(n_elements, (0,)) * size <= self._small_bytes:
            return True
        host_bytes = max(self._code.part_bytes(_BITS_SAMPLE, ranks) for ranks in self._hosts)
        total_bytes = self._code.total_bytes(_BITS_SAMPLE)
        return len(self._hosts) * host_bytes <= host_bytes + total_bytes

    def _sizes(self, blocks: list[_Block], ranks: Ranks) -> list[int]:
        return [self._code.part_bytes(block.size, ranks) for block in blocks]

    def _capacity(self, n_elements: int, gathers: bool) -> int:
        """Say how much memory a piece of so many elements takes at most."""
        lanes = self._cut(0, n_elements, gathers)
        blocks = [block for lane in lanes for block in lane]
        sizes = self._sizes(blocks, (self._rank,))
        sizes += [self._code.total_bytes(block.size) for block in blocks]
        longest = [_Block(0, max(block.size for block in blocks))] * len(lanes[0])
        if self._has_local and self._lane < self._n_lanes:
            for ranks in [*((k,) for k in self._here if k != self._rank), self._here]:
                sizes += self._sizes(longest, ranks)
        for ranks in self._hosts:
            sizes += self._sizes(longest[:1], ranks)
        return sum(map(_padded, sizes))
