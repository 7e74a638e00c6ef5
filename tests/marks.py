"""What marks tests: a missing extra, found without importing it, and time."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec
from typing import Any

import pytest

_PACKAGES = {"train": ("matplotlib", "safetensors", "sklearn", "tqdm"), "bench": ("matplotlib",)}


def needs(extra: str, script: str) -> pytest.MarkDecorator:
    """Mark tests that run a script which needs an extra: without it they are skipped.

    The extra is not imported to see that: it would take a second on each rank.
    """
    missing = [name for name in _PACKAGES[extra] if find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"{script} needs the extra {extra}")


def first_quick(values: Iterable[Any], n: int = 1) -> list[Any]:
    """Give values for `parametrize`, of which all but the first `n` are marked long."""
    rows = [value if isinstance(value, tuple) else (value,) for value in values]
    return [
        pytest.param(*row, marks=[pytest.mark.long] if k >= n else []) for k, row in enumerate(rows)
    ]
