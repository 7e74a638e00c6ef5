"""Loads the runner that makes one suite of all ranks; gives the store that most tests use."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import kvcoll

pytest_plugins = ("mpi_runner",)


@pytest.fixture(params=["local", "dist_sync"])
def kv(request: pytest.FixtureRequest) -> Iterator[kvcoll.KVStore]:
    """Give an empty store of one process, and one of all ranks; without MPI the latter skips."""
    if request.param.startswith("dist"):
        request.getfixturevalue("comm")
    with kvcoll.create(request.param) as store:
        yield store
