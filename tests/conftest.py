"""Loads the runner that makes one suite of all ranks; gives the store that most tests use."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import kvcoll

pytest_plugins = ("mpi_runner",)


@pytest.fixture(params=["local", "dist_sync", "dist_sync overlap"])
def kv(request: pytest.FixtureRequest) -> Iterator[kvcoll.KVStore]:
    """Give an empty store of one process, and two of all ranks; without MPI these skip."""
    name, *overlap = request.param.split()
    if name.startswith("dist"):
        request.getfixturevalue("comm")
    with kvcoll.create(name, overlap="always" if overlap else False) as store:
        yield store
