"""Types of store that are one process's own, as parameters of fixtures and tests."""

from __future__ import annotations

import pytest

# Stores of one process are the same whatever ranks are beside it: one rank shows all of them.
LOCAL = pytest.param("local", marks=pytest.mark.ranks(exactly=1))
DEVICE = pytest.param("device", marks=pytest.mark.ranks(exactly=1))
