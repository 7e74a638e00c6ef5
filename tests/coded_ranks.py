"""Ranks that are threads on hosts that are made up, and a transport that counts their bytes."""

from __future__ import annotations

import threading
from collections import defaultdict, deque
from collections.abc import Callable, Mapping
from queue import SimpleQueue
from typing import Any, NoReturn, TypeAlias, TypeVar, final

import numpy as np
import numpy.typing as npt

from kvcoll.topology import Topology
from kvcoll.transport.contract import Exchange, Sink, Transport, Window

T = TypeVar("T")
Array: TypeAlias = npt.NDArray[Any]
Boxes: TypeAlias = "defaultdict[tuple[int, int], SimpleQueue[bytes]]"
LIMIT_S = 20.0


@final
class ThreadTransport(Transport):
    """Messages between threads: the first sent is the first received, as with MPI."""

    def __init__(self, boxes: Boxes, topology: Topology) -> None:
        self.topology = topology
        self.sent_bytes = {"own host": 0, "other hosts": 0}
        self._boxes = boxes
        self._awaited: defaultdict[int, deque[Array]] = defaultdict(deque)

    def start_all_to_all(
        self, sent: Mapping[int, Array], received: Mapping[int, Array]
    ) -> Exchange:
        own = self.topology
        for rank, message in sent.items():
            assert rank != own.rank
            assert message.dtype == np.uint8
            same = own.host_of[rank] == own.host
            self.sent_bytes["own host" if same else "other hosts"] += message.size
            if message.size:
                self._boxes[own.rank, rank].put(message.tobytes())
        wanted = {rank: to for rank, to in received.items() if to.size}
        for rank, to in wanted.items():
            self._awaited[rank].append(to)
        return _FromBoxes(self, wanted)

    def receive(self, rank: int, to: Array) -> None:
        """Take messages of a rank in the order in which they were asked for, up to one."""
        while any(to is other for other in self._awaited[rank]):
            first = self._awaited[rank].popleft()
            message = self._boxes[rank, self.topology.rank].get(timeout=LIMIT_S)
            assert len(message) == first.size
            first[:] = np.frombuffer(message, np.uint8)

    def all_reduce(self, source: Array, out: Array) -> NoReturn:
        raise AssertionError("sums of codes are not asked for floats")

    def all_reduce_pieces(self, source: Array, dtype: Any, sink: Sink) -> NoReturn:
        raise AssertionError("sums of codes are not asked for floats")

    def window(self, private: Array) -> Window:
        raise AssertionError("sums of codes take no window")

    def all_reduce_window(self, window: Window, start: int, stop: int, sink: Sink) -> NoReturn:
        raise AssertionError("sums of codes take no window")

    def broadcast(self, buffer: Array, root: int = 0) -> NoReturn:
        raise AssertionError("sums of codes are not broadcast")

    def abort(self, why: str) -> NoReturn:
        raise AssertionError(why)

    def close(self) -> None:
        pass


@final
class _FromBoxes(Exchange):
    def __init__(self, transport: ThreadTransport, wanted: Mapping[int, Array]) -> None:
        self._transport, self._wanted = transport, wanted

    def wait(self) -> None:
        for rank, to in self._wanted.items():
            self._transport.receive(rank, to)


def on_ranks(host_of: tuple[int, ...], act: Callable[[ThreadTransport], T]) -> list[T]:
    """Let each rank act in a thread of its own; give what each gave, by rank."""
    boxes: Boxes = defaultdict(SimpleQueue)
    size = len(host_of)
    for pair in np.ndindex(size, size):
        boxes[pair[0], pair[1]]  # made now: threads then only look them up
    results: dict[int, T] = {}
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            results[rank] = act(ThreadTransport(boxes, Topology(rank, host_of)))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * LIMIT_S)
    if errors:
        raise errors[0]
    return [results[rank] for rank in range(size)]
