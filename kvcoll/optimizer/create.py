"""Optimizers by name."""

from __future__ import annotations

from typing import Any

from ..errors import ArgumentError
from .adam import Adam
from .base import Optimizer
from .plain import Test
from .sgd import SGD

_BY_NAME: dict[str, type[Optimizer]] = {"adam": Adam, "sgd": SGD, "test": Test}


def create(name: str, **kwargs: Any) -> Optimizer:
    """Make an optimizer.

    Parameters
    ----------
    name : str
        Of any case: ``'sgd'``, ``'adam'``, ``'test'``.
    **kwargs
        The optimizer's own settings.

    Raises
    ------
    TypeError
        `name` is no str, or a setting is not known.
    ArgumentError
        The name is not known.
    """
    if not isinstance(name, str):
        raise TypeError(f"an optimizer's name is a str, got {type(name).__name__}")
    if name.lower() not in _BY_NAME:
        raise ArgumentError(f"unknown optimizer {name!r}: known are {', '.join(_BY_NAME)}")
    return _BY_NAME[name.lower()](**kwargs)
