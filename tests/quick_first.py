"""Cases of which the first few run always, and the rest where time is no matter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest


def quick_first(cases: Sequence[Any], n: int) -> list[Any]:
    """Mark all cases but the first n as long; a tuple is one case of several parameters."""
    marked = [
        pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.long)
        for case in cases[n:]
    ]
    return [*cases[:n], *marked]
