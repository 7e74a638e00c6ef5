"""Optimizers: how a stored value changes when the sum of a push comes in."""

from .adadelta import AdaDelta
from .adagrad import AdaGrad
from .adam import Adam
from .adamax import Adamax
from .adamw import AdamW
from .base import Optimizer
from .create import create
from .ftrl import Ftrl
from .lamb import LAMB
from .lars import LARS
from .nadam import Nadam
from .nag import NAG
from .plain import Test
from .rmsprop import RMSProp
from .sgd import SGD
from .signum import Signum

__all__ = [
    "LAMB",
    "LARS",
    "NAG",
    "SGD",
    "AdaDelta",
    "AdaGrad",
    "Adam",
    "AdamW",
    "Adamax",
    "Ftrl",
    "Nadam",
    "Optimizer",
    "RMSProp",
    "Signum",
    "Test",
    "create",
]
