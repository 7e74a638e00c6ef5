"""Whether the other hosts are still there, where MPI does not tell: one is down, or cut off.

Each rank holds a TCP connection to the first rank of its host, and that one to rank 0. The kernels
at both ends see whether the other one answers (keepalive), so that nothing need be sent, no
core's time is taken, and a rank that is busy or stopped is not taken for lost. Rules of the
file: whoever hears of a loss tells all others to which it is connected, and ends its process.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Final, NamedTuple, final

from ..topology import Topology
from .addresses import addresses
from .ancestors import guard, see_it_end

LOST_CODE: Final = 88  # with which the job ends
_SETTING: Final = "KVCOLL_LOST_HOST_S"
_SILENCE_S: Final = 8
_CONNECT_S: Final = 3.0
_GRACE_S: Final = 2.0  # a job that just ends, or that its launcher ends, needs none of this
_SILENT: Final = (errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH)
_BYE: Final = b"bye"
_TOKEN_BYTES: Final = 16


class _Host(NamedTuple):
    """What the first rank of a host says of itself."""

    name: str
    addresses: list[str]
    port: int
    token: str


def silence_s(environ: dict[str, str] | os._Environ[str] = os.environ) -> int:
    """Say for how many seconds a host may be silent; 0 for ever, as KVCOLL_LOST_HOST_S says."""
    said = environ.get(_SETTING, "")
    return int(said) if said.isdecimal() else _SILENCE_S


def open_lifeline(
    topology: Topology,
    tell: Callable[[str], list[str]],
    end: Callable[[str], None],
    *,
    survives: bool,
) -> tuple[Lifeline | None, str]:
    """Connect the ranks of several hosts; called by all.

    Parameters
    ----------
    topology : Topology
    tell : callable
        Gives every rank's text, by rank.
    end : callable
        Ends the job, given the cause.
    survives : bool
        Whether MPI tells of processes that end, and goes on: then only silent hosts count.

    Returns
    -------
    Lifeline or None
        None on all ranks if some could not be connected, or it is turned off.
    str
        Why not.
    """
    if topology.num_hosts == 1 or not silence_s():
        return None, ""
    made = Lifeline(topology, end, survives=survives)
    hosts = [_Host(*json.loads(text)) if text else None for text in tell(made.listen())]
    problem = made.connect(hosts)
    problems = [text for text in tell(problem or made.await_all()) if text]
    if problems:
        made.close()
        return None, problems[0]
    made.start()
    return made, ""


@final
class Lifeline:
    """One rank's connections, and the thread that waits at them.

    Parameters
    ----------
    topology : Topology
    end : callable
    survives : bool
        See `open_lifeline`.
    """

    def __init__(self, topology: Topology, end: Callable[[str], None], *, survives: bool) -> None:
        self._topology, self._end, self._survives = topology, end, survives
        self._rank = topology.rank
        here = topology.ranks_on(topology.host)
        leaders = [ranks[0] for ranks in topology.hosts]
        self._is_first = topology.rank == here[0]
        self._parent = here[0]
        self._expected: set[int] = set()
        if self._is_first:
            self._parent = leaders[0]
            self._expected = set(here[1:])
            if self._rank == leaders[0]:
                self._expected |= set(leaders[1:])
        self._server: socket.socket | None = None
        self._token = secrets.token_hex(_TOKEN_BYTES // 2)
        self._peers: dict[socket.socket, int] = {}
        self._names: list[str] = []
        self._selector = selectors.DefaultSelector()
        self._closing = False
        self._thread: threading.Thread | None = None
        self._launcher = os.getppid()

    def listen(self) -> str:
        """Await connections, if others are to connect to this rank; say in JSON where."""
        if not self._is_first:
            return ""
        try:
            self._server = socket.create_server(("", 0), backlog=128)
        except OSError:
            return json.dumps(_Host(socket.gethostname(), [], 0, ""))
        port = self._server.getsockname()[1]
        where = list(addresses().values())
        return json.dumps(_Host(socket.gethostname(), where, port, self._token))

    def connect(self, hosts: list[_Host | None]) -> str:
        """Connect to the rank above this one; say why that fails, or ``''``."""
        topology = self._topology
        by_host = [hosts[ranks[0]] for ranks in topology.hosts]
        self._names = [host.name if host else "?" for host in by_host]
        if self._parent == self._rank:
            return ""
        above = hosts[self._parent]
        assert above is not None
        is_local = topology.host_of[self._parent] == topology.host
        for address in ["127.0.0.1"] if is_local else above.addresses:
            try:
                one = socket.create_connection((address, above.port), timeout=_CONNECT_S)
                one.sendall(f"{above.token}{self._rank:08d}".encode())
                if one.recv(_TOKEN_BYTES, socket.MSG_WAITALL) != above.token.encode():
                    one.close()
                    continue
            except OSError:
                continue
            self._keep(one, self._parent)
            return ""
        where = ", ".join(above.addresses)
        return f"{socket.gethostname()} does not reach {above.name} by TCP ({where})"

    def await_all(self) -> str:
        """Take the connections of all ranks below; say which have not come, or ``''``."""
        end_s = time.monotonic() + 2 * _CONNECT_S
        while self._expected - set(self._peers.values()):
            server = self._server
            left_s = end_s - time.monotonic()
            if server is None or left_s <= 0:
                return f"not all ranks reach {socket.gethostname()} by TCP"
            server.settimeout(left_s)
            try:
                one, _ = server.accept()
                one.settimeout(_CONNECT_S)
                said = one.recv(_TOKEN_BYTES + 8, socket.MSG_WAITALL).decode(errors="replace")
                if said[:_TOKEN_BYTES] != self._token:
                    one.close()
                    continue
                one.sendall(self._token.encode())
            except OSError:
                continue
            self._keep(one, int(said[_TOKEN_BYTES:]))
        return ""

    def start(self) -> None:
        """Wait at the connections from now on, in a thread."""
        if self._server is not None:
            self._server.close()
        self._thread = threading.Thread(target=self._watch, name="kvcoll-lifeline", daemon=True)
        self._thread.start()
        if self._is_first and not self._survives:
            guard()

    def close(self) -> None:
        """Say good-bye, so that the end of this process is nobody's loss."""
        self._say(_BYE)
        self.hang_up()

    def hang_up(self) -> None:
        """Cut all connections without a word, as the end of a process does."""
        self._closing = True
        if self._server is not None:
            self._server.close()
        if self._thread is None:
            for one in self._peers:
                one.close()
            return
        for one in list(self._peers):
            with contextlib.suppress(OSError):  # it has ended already
                one.shutdown(socket.SHUT_RDWR)  # which the thread hears of
        if self._thread is not threading.current_thread():
            self._thread.join(_CONNECT_S)

    def _keep(self, one: socket.socket, rank: int) -> None:
        """Have the kernel see whether the other host answers (tcp(7))."""
        silence = silence_s()
        one.settimeout(None)
        one.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        one.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 1)
        one.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1)
        one.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, max(1, silence - 1))
        one.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * silence)
        self._peers[one] = rank
        self._selector.register(one, selectors.EVENT_READ)

    def _say(self, text: bytes) -> None:
        for one in list(self._peers):
            try:
                one.send(text + b"\n", socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
            except OSError:
                continue  # that one is gone, too

    def _watch(self) -> None:
        while self._peers:
            for key, _ in self._selector.select():
                one = key.fileobj
                if isinstance(one, socket.socket):
                    self._hear(one)
        self._selector.close()

    def _hear(self, one: socket.socket) -> None:
        rank, cause = self._peers[one], ""
        try:
            said = one.recv(4096).split(b"\n")[0]
        except OSError as error:
            said = b""
            cause = self._silent(rank) if error.errno in _SILENT else ""
        self._selector.unregister(one)
        del self._peers[one]
        one.close()
        if self._closing or said == _BYE:
            return
        if said:
            self._lost(said.decode(errors="replace"))
        elif cause:
            self._lost(cause)
        else:
            time.sleep(_GRACE_S)
            if not self._closing and not self._is_told():
                self._lost(f"rank {rank}, on {self._name(rank)}, has ended without a word")

    def _is_told(self) -> bool:
        """Say whether MPI tells of the end of processes, as long as its launcher is there."""
        return self._survives and os.getppid() == self._launcher

    def _silent(self, rank: int) -> str:
        ranks = ", ".join(map(str, self._topology.ranks_on(self._topology.host_of[rank])))
        return (
            f"host {self._name(rank)}, with ranks {ranks}, has not been heard of for "
            f"{silence_s()} s: it is down, or cut off"
        )

    def _name(self, rank: int) -> str:
        return self._names[self._topology.host_of[rank]]

    def _lost(self, cause: str) -> None:
        self._say(cause.encode())
        if self._is_first:
            where = f"rank {self._rank} of {self._topology.size}"
            print(
                f"kvcoll: {where}: {cause}: the job ends; go on from the last checkpoint",
                file=sys.stderr,
                flush=True,
            )
            see_it_end()
        self._end(cause)
