"""Stores on GPUs: which one a store lives on, and how its ranks' GPUs sum.

Rules of the file: CuPy is loaded only once a store needs it; what is missing is said by `cuda`.
"""

from __future__ import annotations

import math
import os
import weakref
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, final

from . import mpi_takes
from .arrays import gpu_of
from .errors import ArgumentError, DeviceError
from .topology import Topology

if TYPE_CHECKING:
    from mpi4py import MPI

    from .gpu.device import Device, Gpus, Stream
    from .gpu.nccl import Nccl
    from .gpu.patience import Patience
    from .gpu_border import GpuBorder
    from .gpu_place import GpuPlace
    from .nccl.transport import GpuTransport
    from .transport.contract import Transport
    from .transport.losses import Losses
    from .watchdog import Watchdog

#: For how many seconds a transfer among GPUs may make no way.
STALL_VARIABLE = "KVCOLL_NCCL_LIMIT_S"
_STALL_LIMIT_S = 300.0

_CONTRADICTED = (
    "MPI says that it takes memory of GPUs, but a trial came to nothing {}. What crosses between "
    f"hosts is copied through the host: mend MPI, or set {mpi_takes.VARIABLE}="
    f"{mpi_takes.STAGED} and this is not said any more"
)
# Those whose memory MPI gets: at most one, the home of all stores over ranks.
_given_to_mpi: set[Device] = set()
_open: weakref.WeakSet[GpuTransport] = weakref.WeakSet()
_ends: list[Callable[[], None]] = []  # of sums over the GPUs of this process


def ready_for_mpi() -> None:
    """Make the GPU whose memory MPI gets current in this thread, which only we use.

    Whatever thread calls MPI may move on what another one has begun.
    """
    for device in list(_given_to_mpi):
        device.use()


def find_gpus() -> Gpus:
    """Give the GPUs that this process sees; for what it raises see `cuda.find.find_gpus`."""
    from .cuda import find as by_cupy

    return by_cupy.find_gpus()


def find() -> tuple[Gpus, Nccl]:
    """Give the GPUs that this process sees, and NCCL; see `cuda.find.find`."""
    from .cuda import find as by_cupy

    return by_cupy.find()


def stall_limit_s(environ: Mapping[str, str], watchdog: Watchdog | None) -> float:
    """Say how long a transfer among GPUs may make no way before it is aborted and named.

    Parameters
    ----------
    environ : mapping of str to str
        ``KVCOLL_NCCL_LIMIT_S`` counts for more than all else: seconds, or ``off`` for ever.
    watchdog : Watchdog or None
        Of the store: its `limit_s`. Without one it is 300 s.

    Raises
    ------
    ArgumentError
        The variable is no number of seconds above 0.
    """
    said = environ.get(STALL_VARIABLE, "").strip().lower()
    if not said:
        of_watchdog = _STALL_LIMIT_S if watchdog is None else watchdog.limit_s
        return math.inf if of_watchdog is None else of_watchdog
    try:
        seconds = math.inf if said == "off" else float(said)
    except ValueError:
        seconds = 0.0
    if not seconds > 0:  # NaN is not, either
        raise ArgumentError(
            f"{STALL_VARIABLE} is a number of seconds above 0, or off, got {said!r}"
        )
    return seconds


def border_of(value: object) -> GpuBorder | None:
    """Give the border of the GPU on which a first value of `init` lies; None on the host.

    Parameters
    ----------
    value : array, or list
        The first array in it counts.
    """
    from .gpu_border import GpuBorder

    first = _first(value)
    if gpu_of(first) is None:
        return None
    return GpuBorder(_place(find_gpus(), first))


def border_with_nccl(value: object) -> GpuBorder:
    """Give the border of a store that is on a GPU in any case: the first value's, or the first.

    Lists of large values on several GPUs are summed by NCCL.

    Raises
    ------
    MissingDependencyError, DeviceError
        There is no GPU, or no CuPy, or there are several and NCCL is too old.
    """
    from .gpu.places import check_age
    from .gpu_border import GpuBorder
    from .nccl.own import OwnGpus
    from .nccl.watch import Watch

    gpus, nccl = find()
    if len(gpus.devices) > 1:
        check_age("this process", nccl.version)
    watch = Watch([], stall_limit_s(os.environ, None), "rank 0 of 1")
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


@final
class Joining:
    """Joins the GPUs of the ranks of one store: when it is made, and after each loss of ranks.

    Parameters
    ----------
    tree : bool
        As for `nccl.setup.transport_for`.
    limit_s : float
        How long a transfer may make no way.
    mpi_gets : str
        How what crosses between hosts comes to MPI, as `mpi_takes.wanted` says; how it came
        when they were first joined counts from then on.

    Attributes
    ----------
    transport : GpuTransport
        Once they were joined.
    border : GpuBorder
    warning : str
        What the user should hear of it from this rank, or ``''``.
    """

    transport: GpuTransport
    border: GpuBorder
    warning: str

    def __init__(self, *, tree: bool, limit_s: float, mpi_gets: str) -> None:
        self._tree, self._limit_s, self._mpi_gets = tree, limit_s, mpi_gets
        # Kept until it takes over, or the alarm of an attempt that comes to nothing aborts it.
        self._tried: GpuTransport | None = None

    def join(self, comm: MPI.Intracomm, topology: Topology, losses: Losses) -> None:
        """Make the transport over the ranks' GPUs, and this rank's border; collective.

        Parameters
        ----------
        comm, topology, losses
            As for `nccl.setup.transport_for`, which says what this raises: on all ranks the same.
        """
        from .gpu_border import GpuBorder
        from .gpu_place import GpuPlace

        self.transport = made = self._made(comm, topology, losses, None)
        self.border = GpuBorder(GpuPlace(find_gpus(), made.device, made.stream, made.watch))
        # Ranks that are left after a loss have no time to try MPI once more.
        self._mpi_gets = mpi_takes.DIRECT if made.way.direct else mpi_takes.STAGED
        told = made.way.contradicted if topology.rank == 0 else ""
        self.warning = _CONTRADICTED.format(told) if told else ""

    def again(
        self, comm: MPI.Intracomm, topology: Topology, losses: Losses
    ) -> tuple[Transport, Callable[[], None]]:
        """Make the transport over those of the ranks that are left; collective.

        Values stay on their GPUs, and work on the stream that they were changed on.

        Returns
        -------
        transport : Transport
        take_over : callable
            Lets it take the place of the one of before.
        """
        home = self.transport.device, self.transport.stream
        made = self._tried = self._made(comm, topology, losses, home)

        def take_over() -> None:
            self.transport.end()
            self.transport, self._tried = made, None
            self.border.place.follow(made.watch)

        return made, take_over

    def _made(
        self,
        comm: MPI.Intracomm,
        topology: Topology,
        losses: Losses,
        home: tuple[Device, Stream] | None,
    ) -> GpuTransport:
        from .nccl import setup

        made = setup.transport_for(
            comm,
            topology,
            find,
            losses,
            tree=self._tree,
            home=home,
            limit_s=self._limit_s,
            mpi_gets=self._mpi_gets,
        )
        if made.crossing is not None and made.crossing.direct:
            _given_to_mpi.add(made.device)
        _open.add(made)
        return made


def end_joined() -> None:
    """Let go of NCCL between ranks where stores are open as MPI ends; never waits long."""
    for transport in list(_open):
        transport.end()


def end_own() -> None:
    """Let go of NCCL among the GPUs of this process where stores are open as it ends."""
    for let_go in list(_ends):
        let_go()


def forget() -> None:
    """Have no stores: in a child made by fork they are its parent's."""
    _open.clear()
    _ends.clear()


def _place(gpus: Gpus, first: object, patience: Patience | None = None) -> GpuPlace:
    from .gpu_place import GpuPlace

    if not gpus.devices:
        raise DeviceError("this process sees no GPU: nvidia-smi and CUDA_VISIBLE_DEVICES say why")
    return GpuPlace(gpus, gpus.devices[gpu_of(first) or 0], patience=patience)


def _first(value: object) -> object:
    while isinstance(value, (list, tuple)) and value:
        value = value[0]
    return value
