"""Sums of rows over ranks: their order, wherever the ranks are, and what travels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from coded_ranks import ThreadTransport, on_ranks
from coded_sums import PLACES
from sparse_values import F16, F32, numbers

from kvcoll import RowSparse, reduction, rows
from kvcoll.rows import sum_rows
from kvcoll.sparse import Rows, combine
from kvcoll.sums import order_of
from kvcoll.topology import Topology
from kvcoll.transport import mpi

F64 = np.dtype("f8")
N_ROWS = 60


def own_rows(rank: int, dtype: Any, n: int, *, twice: bool = False) -> Rows:
    """Give distinct rows of a rank; `twice`: of two values, so that 16 bits travel in 32."""
    rng = np.random.default_rng([rank, n])
    indices = rng.choice(N_ROWS, n, replace=False)
    value = RowSparse(numbers((n, 5), 10 * n + rank, dtype), indices, (N_ROWS, 5))
    return combine([value] * (2 if twice else 1), dtype)


def dense(part: Rows) -> Any:
    out = np.zeros((N_ROWS, part.data.shape[1]), part.data.dtype)
    part.write_to(out)
    return out


@pytest.mark.parametrize("tree", [False, True])
def test_sums_of_rows_are_the_bits_of_sums_of_arrays_wherever_the_ranks_are(
    comm: Any, rank: int, size: int, tree: bool
) -> None:
    for host_of in PLACES[size]:
        topology = Topology(rank, host_of)
        transport = reduction.transport_for(mpi.duplicate(comm, 30), topology, tree=tree)
        order = order_of(topology.hosts, tree=tree)
        for n in (0, 1, 37):
            own = [own_rows(rank, F32, n if rank else 3), own_rows(rank, F64, (n + rank) % 38)]
            for part, total in zip(own, sum_rows(transport, order, own, [F32, F64]), strict=True):
                out = np.empty(N_ROWS * 5, part.data.dtype)
                transport.all_reduce(dense(part).reshape(-1), out)
                assert dense(total).tobytes() == out.tobytes(), host_of
        transport.close()


@pytest.mark.single
@pytest.mark.parametrize("limit_bytes", [1 << 30, 7, 64])
@pytest.mark.parametrize("host_of", [(0, 0), (0, 1, 0), (0, 0, 1, 1, 1)], ids=str)
def test_long_messages_go_in_parts_and_ranks_may_send_16_or_32_bits(
    monkeypatch: pytest.MonkeyPatch, host_of: tuple[int, ...], limit_bytes: int
) -> None:
    monkeypatch.setattr(rows, "_MESSAGE_BYTES", limit_bytes)
    size = len(host_of)
    sent = [own_rows(rank, F16, 3 * rank, twice=rank == 1) for rank in range(size)]
    assert [part.data.dtype for part in sent[1:2]] == [F32]

    def act(transport: ThreadTransport) -> Rows:
        own = Rows(*(array.copy() for array in sent[transport.topology.rank]))
        return sum_rows(transport, order_of(transport.topology.hosts, tree=False), [own], [F16])[0]

    in_order = [sent[rank] for ranks in Topology(0, host_of).hosts for rank in ranks]
    hosts = Topology(0, host_of).hosts
    assert len(in_order) == size
    expected = sum(
        sum((dense(sent[rank]).astype(F32) for rank in ranks), np.zeros((N_ROWS, 5), F32))
        for ranks in hosts
    )
    for total in on_ranks(host_of, act):
        assert total.data.dtype == F16
        assert dense(total).tobytes() == np.asarray(expected).astype(F16).tobytes()


@pytest.mark.single
def test_only_rows_travel() -> None:
    """8 bytes for each number of rows; 8 bytes an index and 20 for 5 elements of a row."""

    def act(transport: ThreadTransport) -> int:
        rank = transport.topology.rank
        sum_rows(
            transport, order_of(((0, 1, 2),), tree=False), [own_rows(rank, F32, 7 * rank)], [F32]
        )
        return sum(transport.sent_bytes.values())

    assert on_ranks((0, 0, 0), act) == [2 * (8 + 7 * rank * 28) for rank in range(3)]
