"""The port to GPUs: devices, streams, events, memory, copies and kernels.

Rules of the file: a call that takes a stream puts work on it and returns; work of one
stream is done in order, work of two streams in any order but where an event says which is
first. Nothing waits but `Event.synchronize` and `Stream.synchronize`. What a piece of work
reads or writes must stay as it is until the work is done, or be changed by later work only.
Memory that is exposed to a library of the host (MPI) is that library's until it is withdrawn:
before, the host has seen that the work on it is done; until then no work is put on a stream that
writes it, nor, where the library writes, any that reads it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from .array import DeviceArray
from .kernel import Kernel, KernelSource

HostArray: TypeAlias = npt.NDArray[Any]
DType: TypeAlias = "np.dtype[Any]"


class Event(ABC):
    """A place in the work of a stream."""

    @abstractmethod
    def done(self) -> bool:
        """Say whether the work before it is done; the host may then use its results.

        Raises
        ------
        DeviceError
            That work has failed on the device.
        """

    @abstractmethod
    def synchronize(self) -> None:
        """Wait on the host until it is `done`."""


class Stream(ABC):
    """Work of one device, done in order.

    Attributes
    ----------
    device : int
        The number of its GPU in this process.
    handle : int
        The ``cudaStream_t``, for libraries.
    """

    device: int
    handle: int

    @abstractmethod
    def record(self) -> Event:
        """Give an event after all work that is on the stream now."""

    @abstractmethod
    def wait(self, event: Event) -> None:
        """Let the work to come wait for an event, of whichever device; the host does not wait."""

    @abstractmethod
    def synchronize(self) -> None:
        """Wait on the host for all work that is on the stream now."""


class Exposed(ABC):
    """Memory of a GPU while a library of the host reads or writes it, by its address.

    Attributes
    ----------
    address, n_bytes : int
    """

    address: int
    n_bytes: int

    @abstractmethod
    def withdraw(self) -> None:
        """Say that the library is done with it."""


class Device(ABC):
    """One GPU of this process.

    Attributes
    ----------
    index : int
        Its number in this process.
    uuid : str
        As ``nvidia-smi -L`` shows it, without ``GPU-``; the same in all processes.
    name : str
    """

    index: int
    uuid: str
    name: str

    @abstractmethod
    def stream(self) -> Stream:
        """Make a stream that waits for no other by itself, also not for the default one."""

    @abstractmethod
    def current_stream(self) -> Stream:
        """Give the caller's current stream on this device, as CuPy has it."""

    @abstractmethod
    def empty(self, shape: tuple[int, ...] | int, dtype: npt.DTypeLike, on: Stream) -> DeviceArray:
        """Take memory of any contents.

        Parameters
        ----------
        shape : tuple of int or int
        dtype : numpy.dtype
        on : Stream
            After whose work the memory may be given to others once the array is gone: work
            that other streams do with it must be waited for by this one first.

        Raises
        ------
        MemoryError
            The GPU has no more.
        """

    @abstractmethod
    def plain(self, n_bytes: int) -> DeviceArray:
        """Take memory that libraries which know CUDA can be handed (cudaMalloc, and no pool).

        Returns
        -------
        DeviceArray, shape (n_bytes,)
            Of uint8, of any contents. Whoever lets go of it has seen that work on it is done.

        Raises
        ------
        MemoryError
            The GPU has no more.
        """

    @abstractmethod
    def here(self) -> AbstractContextManager[object]:
        """Make it the current one, for a library that is called with its memory."""

    @abstractmethod
    def use(self) -> None:
        """Make it the current one for good, in a thread that nobody else uses; twice is no more.

        In a new thread the first GPU counts as the current one, but is not ready for a library.
        """

    @abstractmethod
    def expose(self, array: DeviceArray, *, to_write: bool) -> Exposed:
        """Hand flat memory to a library of the host; inside of `here`.

        Parameters
        ----------
        array : DeviceArray
            Of which the host has seen that all work is done that writes it, and if it is to be
            written all that reads it, too.
        to_write : bool
            Whether the library writes it, or reads it only.
        """

    @abstractmethod
    def copy(self, source: DeviceArray, out: DeviceArray, on: Stream) -> None:
        """Copy as many bytes to `out`, which lies on this device, from whichever GPU.

        Parameters
        ----------
        source, out : DeviceArray
            Of equal numbers of bytes, not overlapping.
        on : Stream
            Of this device, also where the source lies on another (cudaMemcpyPeerAsync).
        """

    @abstractmethod
    def upload(self, source: HostArray, out: DeviceArray, on: Stream) -> None:
        """Copy from the host.

        Parameters
        ----------
        source : numpy.ndarray
            Contiguous, in memory that `Gpus.pinned` gave: others would be waited for.
        out : DeviceArray
            Of as many bytes.
        on : Stream
        """

    @abstractmethod
    def download(self, source: DeviceArray, out: HostArray, on: Stream) -> None:
        """Copy to the host, to contiguous memory that `Gpus.pinned` gave."""

    @abstractmethod
    def zero(self, out: DeviceArray, on: Stream) -> None:
        """Set all bytes to 0."""

    @abstractmethod
    def compile(self, source: KernelSource) -> Kernel:
        """Make a kernel for this device; the same one for an equal source.

        Raises
        ------
        DeviceError
            The source does not compile.
        """


class Gpus(ABC):
    """The GPUs that this process sees.

    Attributes
    ----------
    devices : sequence of Device
        By number.
    driver_version : int
        The newest CUDA that the driver knows: 12040 is 12.4.
    """

    devices: Sequence[Device]
    driver_version: int

    @abstractmethod
    def pinned(self, n_bytes: int) -> HostArray:
        """Take memory of the host that copies to and from GPUs run beside other work with.

        Returns
        -------
        numpy.ndarray, shape (n_bytes,)
            Of uint8, of any contents (cudaHostAlloc).

        Raises
        ------
        MemoryError
            There is no more.
        """

    @abstractmethod
    def is_on_gpu(self, value: object) -> bool:
        """Say whether a value of the user's is an array on a GPU, of whichever library."""

    @abstractmethod
    def adopt(self, value: object, on: Stream, *, to_write: bool = False) -> DeviceArray:
        """View an array of the user's that lies on a GPU.

        Parameters
        ----------
        value : array
            Of CuPy, or of any library that speaks DLPack and keeps it on a GPU.
        on : Stream
            Work that is put on it from now on comes after all that the array's library has
            put on its current stream.
        to_write : bool, default False
            Whether it will be written to, so that a copy is not enough.

        Returns
        -------
        DeviceArray
            The same memory; a copy where it is not contiguous. It keeps the user's alive.

        Raises
        ------
        ArrayError
            It cannot be read; or, if it is to be written to, it is not contiguous or read-only.
        """

    @abstractmethod
    def addresses(
        self,
        values: Sequence[object],
        device: int,
        shapes: Sequence[tuple[int, ...]],
        dtypes: Sequence[DType],
        on: Stream,
    ) -> list[int] | None:
        """Give where many arrays lie, if that needs no look at each of them.

        Parameters
        ----------
        values : sequence of array
        device : int
            On which GPU.
        shapes, dtypes : sequence
            Of the arrays.
        on : Stream
            As for `adopt`.

        Returns
        -------
        list of int or None
            None where one of them is not of the library that `lend` gives, not contiguous, or not
            just so: then `adopt` says what is wrong with it, or takes it.
        """

    @abstractmethod
    def give_back(self, value: object, on: Stream) -> None:
        """Let what the user does next with an array come after the work that is on a stream.

        Of a library whose current stream is not known, the host waits for the work.
        """

    @abstractmethod
    def lend(self, array: DeviceArray) -> Any:
        """Give an array of the library that users' updaters work with (CuPy), on the same memory.

        Raises
        ------
        DTypeMismatchError
            That library does not know the dtype.
        """
