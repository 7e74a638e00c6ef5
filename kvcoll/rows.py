"""Sums of rows over the ranks: only the rows travel, to every rank.

Rules of the file: each rank adds all ranks' rows by itself, in the one order there is, so
the sums are the same bits on all; every rank calls with the same keys in one order.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .arrays import Array, DType, wide
from .sparse import Rows, add_rows, rounded
from .sums import Order
from .transport.contract import Transport

_MESSAGE_BYTES = 1 << 30  # MPI counts are 32-bit in Open MPI 5


def sum_rows(
    transport: Transport, order: Order, own: Sequence[Rows], dtypes: Sequence[DType]
) -> list[Rows]:
    """Sum the rows of several keys over the ranks; collective.

    Parameters
    ----------
    transport : Transport
    order : Order
        In which the ranks are added.
    own : sequence of Rows
        For each key what this rank pushes, in the key's dtype or the one in which its sums
        are taken; in memory that nobody else writes to.
    dtypes : sequence of numpy.dtype
        For each key its dtype.

    Returns
    -------
    list of Rows
        For each key its sum, rounded once to the key's dtype.

    Notes
    -----
    Cost: a short message from each rank to each other, and then its rows, with 8 bytes an
    index; memory for the rows of all ranks. Source: MPI_Allgatherv.
    """
    if not own:
        return []
    parts = [own] if transport.topology.size == 1 else all_gather(transport, own, dtypes)
    return [
        rounded(_added(order, [part[key] for part in parts], wide(dtype)), dtype)
        for key, dtype in enumerate(dtypes)
    ]


def all_gather(
    transport: Transport, own: Sequence[Rows], dtypes: Sequence[DType]
) -> list[Sequence[Rows]]:
    """Give every rank's rows of every key, by rank; collective."""
    topology = transport.topology
    counts = np.zeros((topology.size, len(own)), np.int64)
    counts[topology.rank] = [
        2 * rows.indices.size + (rows.data.dtype != dtype)
        for rows, dtype in zip(own, dtypes, strict=True)
    ]
    _exchange(transport, [[row] for row in counts])
    parts: list[Sequence[Rows]] = []
    for rank, row in enumerate(counts.tolist()):
        if rank == topology.rank:
            parts.append(own)
            continue
        parts.append(
            [
                _space(count >> 1, mine.data.shape[1], wide(dtype) if count & 1 else dtype)
                for count, mine, dtype in zip(row, own, dtypes, strict=True)
            ]
        )
    _exchange(transport, [[array for rows in part for array in rows] for part in parts])
    return parts


def _exchange(transport: Transport, arrays: Sequence[Sequence[Array]]) -> None:
    """Send this rank's arrays to all others, and receive theirs; by rank."""
    rank = transport.topology.rank
    messages = [[array.reshape(-1).view(np.uint8) for array in part] for part in arrays]
    under_way = []
    for number in range(len(messages[rank])):
        longest = max(part[number].size for part in messages)
        for start in range(0, longest, _MESSAGE_BYTES):
            pieces = [part[number][start : start + _MESSAGE_BYTES] for part in messages]
            received = {k: piece for k, piece in enumerate(pieces) if k != rank}
            sent = dict.fromkeys(received, pieces[rank])
            under_way.append(transport.start_all_to_all(sent, received))
    for exchange in under_way:
        exchange.wait()


def _space(n: int, width: int, dtype: DType) -> Rows:
    return Rows(np.empty(n, np.int64), np.empty((n, width), dtype))


def _added(order: Order, parts: Sequence[Rows], dtype: DType) -> Rows:
    if isinstance(order, int):
        return parts[order]
    return add_rows([_added(one, parts, dtype) for one in order], dtype)
