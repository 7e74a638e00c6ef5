"""A key-value store for data-parallel training over MPI and NCCL.

MXNet's KVStore, rebuilt: ``create`` a store, ``init`` keys, ``push`` gradients, which
are summed over devices and ranks and update each rank's replica, and ``pull`` values.
"""

from . import errors, lr_scheduler, optimizer
from ._version import __version__
from .base import KVStoreBase
from .checkpoint import Checkpoint, load
from .create import create
from .sparse import RowSparse
from .stop import StopSignals
from .store import KVStore
from .watchdog import Watchdog

__all__ = [
    "Checkpoint",
    "KVStore",
    "KVStoreBase",
    "RowSparse",
    "StopSignals",
    "Watchdog",
    "__version__",
    "create",
    "errors",
    "load",
    "lr_scheduler",
    "optimizer",
]
