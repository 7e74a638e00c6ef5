"""Stores on GPUs: which one a store lives on, and how its ranks' GPUs sum.

Rules of the file: CuPy is loaded only once a store needs it; what is missing is said by `cuda`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING

from .arrays import is_on_cuda
from .errors import DeviceError
from .topology import Topology

if TYPE_CHECKING:
    from mpi4py import MPI

    from .gpu.device import Gpus
    from .gpu.nccl import Nccl
    from .gpu.patience import Patience
    from .gpu_border import GpuBorder
    from .gpu_place import GpuPlace
    from .nccl.transport import GpuTransport
    from .transport.losses import Losses

_open: weakref.WeakSet[GpuTransport] = weakref.WeakSet()
_ends: list[Callable[[], None]] = []  # of sums over the GPUs of this process


def find_gpus() -> Gpus:
    """Give the GPUs that this process sees; for what it raises see `cuda.find.find_gpus`."""
    from .cuda import find as by_cupy

    return by_cupy.find_gpus()


def find() -> tuple[Gpus, Nccl]:
    """Give the GPUs that this process sees, and NCCL; see `cuda.find.find`."""
    from .cuda import find as by_cupy

    return by_cupy.find()


def border_of(value: object) -> GpuBorder | None:
    """Give the border of the GPU on which a first value of `init` lies; None on the host.

    Parameters
    ----------
    value : array, or list
        The first array in it counts.
    """
    from .gpu_border import GpuBorder

    first = _first(value)
    if not is_on_cuda(first):
        return None
    return GpuBorder(_place(find_gpus(), first))


def border_with_nccl(value: object) -> GpuBorder:
    """Give the border of a store that is on a GPU in any case: the first value's, or the first.

    Lists of large values on several GPUs are summed by NCCL.

    Raises
    ------
    MissingDependencyError, DeviceError
        There is no GPU, or no CuPy.
    """
    from .gpu_border import GpuBorder
    from .nccl.own import OwnGpus
    from .nccl.setup import LIMIT_S
    from .nccl.watch import Watch

    gpus, nccl = find()
    watch = Watch([], LIMIT_S, "rank 0 of 1")
    place = _place(gpus, _first(value), watch)
    place.sums = own = OwnGpus(gpus, nccl, place.device, place.stream, watch)
    border = GpuBorder(place)

    def let_go() -> None:
        if let_go in _ends:
            _ends.remove(let_go)
            own.end(ended=watch.end())

    _ends.append(let_go)
    border.let_go = let_go
    return border


def join(
    comm: MPI.Intracomm, topology: Topology, losses: Losses, *, tree: bool
) -> tuple[GpuTransport, GpuBorder]:
    """Make the transport over the ranks' GPUs, and this rank's border; collective.

    Parameters
    ----------
    comm, topology, losses, tree
        As for `nccl.setup.transport_for`, which says what this raises: on all ranks the same.
    """
    from .gpu_border import GpuBorder
    from .gpu_place import GpuPlace
    from .nccl import setup

    transport = setup.transport_for(comm, topology, find, losses, tree=tree)
    _open.add(transport)
    return transport, GpuBorder(
        GpuPlace(find_gpus(), transport.device, transport.stream, transport.watch)
    )


def end_all() -> None:
    """Let go of NCCL where stores are still open as the process ends; never waits long."""
    for transport in list(_open):
        transport.end()
    for let_go in list(_ends):
        let_go()


def _place(gpus: Gpus, first: object, patience: Patience | None = None) -> GpuPlace:
    from .gpu_place import GpuPlace

    if not gpus.devices:
        raise DeviceError("this process sees no GPU: nvidia-smi and CUDA_VISIBLE_DEVICES say why")
    number = 0
    if gpus.is_on_gpu(first):
        own = gpus.devices[0].stream()
        number = gpus.adopt(first, own).device
    return GpuPlace(gpus, gpus.devices[number], patience=patience)


def _first(value: object) -> object:
    while isinstance(value, (list, tuple)) and value:
        value = value[0]
    return value
