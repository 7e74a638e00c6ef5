"""Optimizers by name."""

from __future__ import annotations

from typing import Any

from ..errors import ArgumentError
from .adadelta import AdaDelta
from .adagrad import AdaGrad
from .adam import Adam
from .adamax import Adamax
from .adamw import AdamW
from .base import Optimizer
from .ftrl import Ftrl
from .lamb import LAMB
from .lars import LARS
from .nadam import Nadam
from .nag import NAG
from .plain import Test
from .rmsprop import RMSProp
from .sgd import SGD
from .signum import Signum

_BY_NAME: dict[str, type[Optimizer]] = {
    "adadelta": AdaDelta,
    "adagrad": AdaGrad,
    "adam": Adam,
    "adamax": Adamax,
    "adamw": AdamW,
    "ftrl": Ftrl,
    "lamb": LAMB,
    "lars": LARS,
    "nadam": Nadam,
    "nag": NAG,
    "rmsprop": RMSProp,
    "sgd": SGD,
    "signum": Signum,
    "test": Test,
}


def create(name: str, **kwargs: Any) -> Optimizer:
    """Make an optimizer.

    Parameters
    ----------
    name : str
        Its class's name, of any case: ``'sgd'``, ``'adam'``, ``'lamb'``.
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
