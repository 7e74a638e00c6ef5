"""Which of kvcoll's extras are there, found without importing them: that takes a second a rank."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

_PACKAGES = {"train": ("matplotlib", "safetensors", "sklearn", "tqdm"), "bench": ("matplotlib",)}


def needs(extra: str, script: str) -> pytest.MarkDecorator:
    """Mark tests that run a script which needs an extra: without it they are skipped."""
    missing = [name for name in _PACKAGES[extra] if find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"{script} needs the extra {extra}")
