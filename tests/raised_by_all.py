"""An error that all ranks must raise alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from mpi4py import MPI


def raised_by_all(comm: MPI.Intracomm, call: Callable[[], object]) -> Exception:
    """Check that a call raises the same error on every rank."""
    with pytest.raises(Exception) as raised:  # noqa: PT011
        call()
    said = comm.allgather((type(raised.value).__name__, str(raised.value)))
    assert set(said) == {said[0]}
    return raised.value
