"""NCCL by CuPy: bytes as ncclUint8, errors with what NCCL itself says last.

Rules of the file: no call that waits for other ranks is made with the interpreter's lock held
where it can be helped: ncclCommInitAll alone does, and its members are all here.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, final

from ..errors import CollectiveError
from ..gpu.array import DeviceArray
from ..gpu.device import Device, Stream
from ..gpu.door import import_cupy, import_nccl
from ..gpu.nccl import Communicator, Nccl

_LIBRARY = "libnccl.so.2"
_IN_PROGRESS = 7  # ncclInProgress: no error; CuPy has no text for it and raises KeyError


@final
class CupyNccl(Nccl):
    """The NCCL that CuPy has loaded.

    Raises
    ------
    MissingDependencyError
        CuPy is not installed, or finds no NCCL.
    """

    def __init__(self) -> None:
        self._cupy = import_cupy()
        self._nccl: Any = import_nccl()
        number = self._nccl.get_version()
        self.version = number // 10000, number % 10000 // 100, number % 100

    def unique_id(self) -> bytes:
        """Ask NCCL (ncclGetUniqueId)."""
        with self._named("ncclGetUniqueId"):
            made = self._nccl.get_unique_id()
        return bytes(number & 0xFF for number in made)

    def init_rank(self, size: int, unique_id: bytes, rank: int, device: Device) -> Communicator:
        """Become a member (ncclCommInitRank); other threads go on meanwhile."""
        with self._named("ncclCommInitRank"), self._cupy.cuda.Device(device.index):
            try:
                comm = self._nccl.NcclCommunicator(size, unique_id, rank)
            except TypeError:  # CuPy 13 takes a tuple of signed numbers
                signed = struct.unpack(f"{len(unique_id)}b", unique_id)
                comm = self._nccl.NcclCommunicator(size, signed, rank)
        return CupyCommunicator(self, comm, rank, size, device.index)

    def init_all(self, devices: Sequence[Device]) -> list[Communicator]:
        """Make all members (ncclCommInitAll)."""
        with self._named("ncclCommInitAll"):
            comms = self._nccl.NcclCommunicator.initAll([device.index for device in devices])
        size = len(devices)
        return [
            CupyCommunicator(self, comm, rank, size, devices[rank].index)
            for rank, comm in enumerate(comms)
        ]

    @contextmanager
    def group(self) -> Iterator[None]:
        """Group calls (ncclGroupStart, ncclGroupEnd)."""
        with self._named("ncclGroupStart"):
            self._nccl.groupStart()
        try:
            yield
        except BaseException:
            self._end_after_error()
            raise
        with self._named("ncclGroupEnd"):
            self._nccl.groupEnd()

    @contextmanager
    def _named(self, what: str) -> Iterator[None]:
        """Turn what CuPy raises for a call of NCCL's into an error that says all that is known."""
        try:
            yield
        except (self._nccl.NcclError, KeyError) as error:
            # KeyError: a result code that is newer than CuPy.
            raise CollectiveError(f"{what}: {error}{_last_error()}") from error

    def _end_after_error(self) -> None:
        try:
            self._nccl.groupEnd()
        except (self._nccl.NcclError, KeyError):
            return  # the error that ended the block is the one to be told


@final
class CupyCommunicator(Communicator):
    """A ``cupy.cuda.nccl.NcclCommunicator``."""

    def __init__(self, nccl: CupyNccl, comm: Any, rank: int, size: int, device: int) -> None:
        self.rank, self.size, self.device = rank, size, device
        self._owner, self._comm = nccl, comm
        self._byte: int = nccl._nccl.NCCL_UINT8

    def send(self, source: DeviceArray, peer: int, on: Stream) -> None:
        """Send (ncclSend)."""
        with self._owner._named("ncclSend"), self._here():
            self._comm.send(source.address, source.nbytes, self._byte, peer, on.handle)

    def receive(self, out: DeviceArray, peer: int, on: Stream) -> None:
        """Receive (ncclRecv)."""
        with self._owner._named("ncclRecv"), self._here():
            self._comm.recv(out.address, out.nbytes, self._byte, peer, on.handle)

    def all_gather(self, source: DeviceArray, out: DeviceArray, on: Stream) -> None:
        """Gather (ncclAllGather)."""
        with self._owner._named("ncclAllGather"), self._here():
            self._comm.allGather(source.address, out.address, source.nbytes, self._byte, on.handle)

    def broadcast(self, buffer: DeviceArray, root: int, on: Stream) -> None:
        """Copy in place (ncclBroadcast)."""
        with self._owner._named("ncclBroadcast"), self._here():
            address = buffer.address
            self._comm.broadcast(address, address, buffer.nbytes, self._byte, root, on.handle)

    def check(self) -> None:
        """Ask for errors (ncclCommGetAsyncError); see `Communicator.check`."""
        try:
            self._comm.check_async_error()
        except KeyError as error:
            if error.args != (_IN_PROGRESS,):
                raise CollectiveError(f"NCCL: result {error.args[0]}{_last_error()}") from error
        except self._owner._nccl.NcclError as error:
            raise CollectiveError(f"NCCL: {error}{_last_error()}") from error

    def abort(self) -> None:
        """End it at once (ncclCommAbort)."""
        try:
            self._comm.abort()
        except (self._owner._nccl.NcclError, KeyError):
            return  # it is of no use any more, whatever NCCL says; why it is aborted is told

    def destroy(self) -> None:
        """End it (ncclCommDestroy)."""
        with self._here():
            self._comm.destroy()

    def _here(self) -> Any:
        return self._owner._cupy.cuda.Device(self.device)


def _last_error() -> str:
    """Ask NCCL for its last error in words (ncclGetLastError), of the library that is loaded."""
    try:
        ask = ctypes.CDLL(_LIBRARY).ncclGetLastError
    except (OSError, AttributeError):
        return ""
    ask.restype, ask.argtypes = ctypes.c_char_p, [ctypes.c_void_p]
    said: bytes | None = ask(None)
    text = (said or b"").decode(errors="replace").strip()
    return f" ({text})" if text else ""
