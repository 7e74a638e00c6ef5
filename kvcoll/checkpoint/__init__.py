"""Checkpoints: all that a store is, in a folder, whole or not at all."""

from .checkpoints import Checkpoints
from .content import Contents
from .loading import Loaded
from .reading import Checkpoint, load

__all__ = ["Checkpoint", "Checkpoints", "Contents", "Loaded", "load"]
