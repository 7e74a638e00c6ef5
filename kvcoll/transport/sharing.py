"""What the transports have in common whose ranks of a host share memory.

Windows lie in that memory; what is not a sum is left to another transport, beside.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import final

from ..arrays import Array
from ..topology import Topology
from .contract import Exchange, Transport, Window
from .memory import SharedMemory

LINE_BYTES = 64  # of a cache: what two ranks write lies on two of them


class SharingTransport(Transport):
    """A transport over ranks that see the memory of others on their host.

    Parameters
    ----------
    topology : Topology
        Of all ranks.
    beside : Transport
        Another transport over all ranks.
    share : callable
        Gives that many bytes of further shared memory, or None, on all ranks alike.
    """

    def __init__(
        self,
        topology: Topology,
        beside: Transport,
        share: Callable[[int], SharedMemory | None],
    ) -> None:
        self.topology = topology
        here = topology.ranks_on(topology.host)
        self._rank, self._size = here.index(topology.rank), len(here)
        self._beside, self._share = beside, share

    @final
    def window(self, private: Array) -> Window:
        """Give memory that all ranks of the host see; see `Transport.window`."""
        row_bytes = -(-private.nbytes // LINE_BYTES) * LINE_BYTES
        memory = self._share(max(row_bytes * self._size, LINE_BYTES))
        if memory is None:
            return Window((private,))
        rows = memory.raw[: row_bytes * self._size].reshape(self._size, row_bytes)
        shown = tuple(row[: private.nbytes].view(private.dtype) for row in rows)
        return Window(shown, self._rank, True)

    @final
    def broadcast(self, buffer: Array, root: int = 0) -> None:
        """Leave it to the transport beside."""
        self._beside.broadcast(buffer, root)

    @final
    def start_all_to_all(
        self, sent: Mapping[int, Array], received: Mapping[int, Array]
    ) -> Exchange:
        """Leave it to the transport beside."""
        return self._beside.start_all_to_all(sent, received)

    @final
    def abort(self, why: str) -> None:
        """Leave it to the transport beside."""
        self._beside.abort(why)

    @final
    def close(self) -> None:
        """Close the transport beside; the memory goes when its last array does."""
        self._beside.close()
