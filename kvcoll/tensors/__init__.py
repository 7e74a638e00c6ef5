"""Arrays in files of the safetensors format, every byte of which is checked."""

from .file import TensorFile, opened, write
from .header import Stored

__all__ = ["Stored", "TensorFile", "opened", "write"]
