"""Optimizers: how a stored value changes when the sum of a push comes in."""

from .adam import Adam
from .base import Optimizer
from .create import create
from .plain import Test
from .sgd import SGD

__all__ = ["SGD", "Adam", "Optimizer", "Test", "create"]
