"""Messages among the doctor's ranks: JSON by MPI, and never waited for without a limit."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from typing import Any, final

from ..transport.mpi import import_mpi

_TAG = 1
_LONGEST_NAP_S = 2e-3


@final
class Talk:
    """Sends and receives on MPI.COMM_WORLD, which nobody else uses in this process."""

    def __init__(self) -> None:
        self._mpi = import_mpi()
        self.comm = self._mpi.COMM_WORLD
        self.rank: int = self.comm.rank
        self.size: int = self.comm.size
        self._sent: list[tuple[Any, bytes]] = []  # what MPI may still read

    def send(self, message: object, to: int) -> None:
        """Send, and do not wait."""
        data = json.dumps(message).encode()
        self._sent.append((self.comm.Isend([data, self._mpi.BYTE], to, _TAG), data))

    def receive(self, ranks: Iterable[int], limit_s: float) -> dict[int, Any]:
        """Receive a message of each of these ranks; who does not send in time is left out.

        Who waits sleeps, so that it takes no core from those who measure.
        """
        waiting, got = set(ranks), dict[int, Any]()
        end, nap_s, status = time.monotonic() + limit_s, 0.0, self._mpi.Status()
        while waiting and time.monotonic() < end:
            came = [rank for rank in waiting if self.comm.Iprobe(rank, _TAG, status)]
            for rank in came:
                self.comm.Probe(rank, _TAG, status)
                buffer = bytearray(status.Get_count(self._mpi.BYTE))
                self.comm.Recv([buffer, self._mpi.BYTE], rank, _TAG)
                got[rank] = json.loads(buffer)
            waiting -= set(came)
            nap_s = 0.0 if came else min(nap_s + 2e-5, _LONGEST_NAP_S)
            self._sent = [(request, data) for request, data in self._sent if not request.Test()]
            time.sleep(nap_s)
        return got

    def done(self, requests: list[Any], limit_s: float) -> bool:
        """Wait for requests of MPI; say whether they ended in time."""
        end = time.monotonic() + limit_s
        while not self._mpi.Request.Testall(requests):
            if time.monotonic() > end:
                return False
            time.sleep(0.0)
        return True
