"""Kernels as plain data: one C++ body for an index, from which both CUDA and a host loop are made.

Rules of the file: a body is C++ that nvrtc and g++ both take and that computes element `i`
from what it reads, with no other state, so that a loop over `i` on the host is the same
function; numbers that change come as arguments, never in the source.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from .array import DeviceArray

if TYPE_CHECKING:
    from .device import Stream


class Access(Enum):
    """What a kernel does with an argument."""

    READ = "read"
    WRITE = "write"
    UPDATE = "update"  # reads and writes
    VALUE = "value"  # a number, not an array


@dataclass(frozen=True)
class Parameter:
    """One parameter of a kernel.

    Attributes
    ----------
    c_type : str
        Of an element, or of the number: ``'float'``, ``'unsigned short'``.
    name : str
        In the body.
    access : Access
    """

    c_type: str
    name: str
    access: Access

    def __str__(self) -> str:
        if self.access is Access.VALUE:
            return f"{self.c_type} {self.name}"
        constant = "const " if self.access is Access.READ else ""
        return f"{constant}{self.c_type} *{self.name}"


@dataclass(frozen=True)
class KernelSource:
    """A kernel that is compiled on first use.

    Attributes
    ----------
    name : str
        A C identifier, shown by profilers.
    parameters : tuple of Parameter
    body : str
        Statements for element ``i``, of type ``long long``, of ``n``.
    prelude : str
        Functions that the body calls; ``KVCOLL_FUNCTION`` stands before each.
    """

    name: str
    parameters: tuple[Parameter, ...]
    body: str
    prelude: str = ""

    def for_cuda(self) -> str:
        """Write it as a ``__global__`` function of ``(long long n, parameters...)``."""
        start = "(long long)blockIdx.x * blockDim.x + threadIdx.x"
        step = "(long long)gridDim.x * blockDim.x"
        loop = f"for (long long i = {start}; i < n; i += {step})"
        return self._written('extern "C" __global__ void', "static __device__ inline", loop)

    def for_host(self) -> str:
        """Write it as a function of the host with the same parameters."""
        loop = "for (long long i = 0; i < n; ++i)"
        return self._written('extern "C" void', "static inline", loop)

    def _written(self, kind: str, function: str, loop: str) -> str:
        listed = ", ".join(["long long n", *map(str, self.parameters)])
        return (
            f"#define KVCOLL_FUNCTION {function}\n{self.prelude}\n"
            f"{kind} {self.name}({listed}) {{\n  {loop} {{\n{self.body}\n  }}\n}}\n"
        )


#: What a kernel is called with: an array for a pointer, a number of its exact dtype for a value.
Argument: TypeAlias = "DeviceArray | np.generic"


class Kernel(ABC):
    """A compiled kernel of one device.

    Notes
    -----
    It is compiled without contraction of a product and a sum (``--fmad=false``), with IEEE
    division, square root and denormals, so that its bits are those of the same C++ and of
    NumPy on the host.
    """

    @abstractmethod
    def launch(
        self,
        n: int,
        arguments: Sequence[Argument],
        on: Stream,
        *,
        reads: Sequence[DeviceArray] = (),
        writes: Sequence[DeviceArray] = (),
    ) -> None:
        """Put it on a stream, for elements 0 to n; nothing happens where n is 0.

        Parameters
        ----------
        n : int
        arguments : sequence of DeviceArray or numpy.generic
            As the source's parameters.
        on : Stream
            Of the kernel's device.
        reads, writes : sequence of DeviceArray
            What else it reads or writes, by addresses that lie in an argument's memory.
        """
