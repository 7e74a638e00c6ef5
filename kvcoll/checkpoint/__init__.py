"""Checkpoints: all that a store is, in a folder, whole or not at all."""

from .checkpoints import Checkpoints
from .content import Contents
from .reading import Checkpoint, load

__all__ = ["Checkpoint", "Checkpoints", "Contents", "load"]
