"""Loads the runner that makes one suite of all ranks; gives the store that most tests use."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
from one_process import LOCAL

import kvcoll

if TYPE_CHECKING:
    from mpi4py import MPI

pytest_plugins = ("mpi_runner",)


@pytest.fixture(params=[LOCAL, "dist_sync", "dist_sync overlap"])
def kv(request: pytest.FixtureRequest) -> Iterator[kvcoll.KVStore]:
    """Give an empty store of one process, and two of all ranks; without MPI these skip."""
    name, *overlap = request.param.split()
    if name.startswith("dist"):
        request.getfixturevalue("comm")
    with kvcoll.create(name, overlap="always" if overlap else False) as store:
        yield store


@pytest.fixture(scope="session")
def host_of(comm: MPI.Intracomm) -> tuple[int, ...]:
    """For each rank the number of its host, by the names that the hosts give themselves."""
    names = comm.allgather(socket.gethostname())
    in_order = list(dict.fromkeys(names))
    return tuple(in_order.index(name) for name in names)
