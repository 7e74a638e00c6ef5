"""Sums of codes over MPI and shared memory, on hosts that are made up, have the same bits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from coded_sums import F32, F64, IN_PIECES, KINDS, PLACES, USUAL, expected, sum_codes
from marks import first_quick

from kvcoll import reduction
from kvcoll.topology import Topology
from kvcoll.transport import mpi

if TYPE_CHECKING:
    from mpi4py import MPI

SIZES: list[tuple[int, np.dtype[Any]]] = [(1, F32), (1003, F64), (5001, F32)]


@pytest.mark.parametrize("kind", KINDS)
def test_sums_are_those_of_the_formulae_wherever_the_ranks_are(
    comm: MPI.Intracomm, rank: int, size: int, kind: str
) -> None:
    for host_of in PLACES[size]:
        transport = reduction.transport_for(mpi.duplicate(comm, 30), Topology(rank, host_of))
        for settings in (USUAL, IN_PIECES):
            for n, dtype in SIZES:
                out = sum_codes(transport, kind, n, dtype, settings)
                right = expected(kind, size, n, dtype)
                assert out.tobytes() == right.tobytes(), (host_of, n)
        transport.close()


@pytest.mark.parametrize("kind", first_quick(KINDS))
def test_large_arrays_go_in_pieces(comm: MPI.Intracomm, rank: int, size: int, kind: str) -> None:
    transport = reduction.transport_for(mpi.duplicate(comm, 30), Topology(rank, (0,) * size))
    n = (1 << 19) * size + 100_003
    out = sum_codes(transport, kind, n)
    np.testing.assert_array_equal(out, expected(kind, size, n))
    transport.close()
