"""Stores on GPUs: which one a store lives on, and how its ranks' GPUs sum.

Rules of the file: CuPy is loaded only once a store needs it; what is missing is said by `cuda`.
"""

from __future__ import annotations

import weakref
from functools import cache
from typing import TYPE_CHECKING

from .arrays import is_on_cuda
from .errors import DeviceError
from .topology import Topology

if TYPE_CHECKING:
    from mpi4py import MPI

    from .gpu.device import Gpus
    from .gpu.nccl import Nccl
    from .gpu_border import GpuBorder
    from .nccl.transport import GpuTransport

_open: weakref.WeakSet[GpuTransport] = weakref.WeakSet()


@cache
def find() -> tuple[Gpus, Nccl]:
    """Give the GPUs that this process sees, and NCCL: always the same objects.

    Raises
    ------
    MissingDependencyError, DeviceError
        As `cuda.find.find`.
    """
    from .cuda.find import find as find_by_cupy

    return find_by_cupy()


def border_of(value: object) -> GpuBorder | None:
    """Give the border of the GPU on which a first value of `init` lies; None on the host.

    Parameters
    ----------
    value : array, or list
        The first array in it counts.
    """
    first = _first(value)
    if not is_on_cuda(first):
        return None
    return _border(find()[0], first)


def border_of_one_process(value: object) -> GpuBorder:
    """Give the border of a store that is on a GPU in any case: the first value's, or the first.

    Raises
    ------
    MissingDependencyError, DeviceError
        There is no GPU, or no CuPy.
    """
    return _border(find()[0], _first(value))


def join(comm: MPI.Intracomm, topology: Topology, *, tree: bool) -> tuple[GpuTransport, GpuBorder]:
    """Make the transport over the ranks' GPUs, and this rank's border; collective.

    Parameters
    ----------
    comm, topology, tree
        As for `nccl.setup.transport_for`, which says what this raises: on all ranks the same.
    """
    from .gpu_border import GpuBorder
    from .gpu_place import GpuPlace
    from .nccl import setup

    transport = setup.transport_for(comm, topology, find, tree=tree)
    _open.add(transport)
    place = GpuPlace(find()[0], transport.device, transport.stream)
    return transport, GpuBorder(place)


def end_all() -> None:
    """Let go of NCCL where stores are still open as the process ends; never waits long."""
    for transport in list(_open):
        transport.end()


def _border(gpus: Gpus, first: object) -> GpuBorder:
    from .gpu_border import GpuBorder
    from .gpu_place import GpuPlace

    if not gpus.devices:
        raise DeviceError("this process sees no GPU: nvidia-smi and CUDA_VISIBLE_DEVICES say why")
    number = 0
    if gpus.is_on_gpu(first):
        own = gpus.devices[0].stream()
        number = gpus.adopt(first, own).device
    return GpuBorder(GpuPlace(gpus, gpus.devices[number]))


def _first(value: object) -> object:
    while isinstance(value, (list, tuple)) and value:
        value = value[0]
    return value
