"""Arrays in files of the safetensors format, every byte of which is checked."""

from .file import TensorFile, opened, write
from .header import Stored, dtype_named, is_storable

__all__ = ["Stored", "TensorFile", "dtype_named", "is_storable", "opened", "write"]
