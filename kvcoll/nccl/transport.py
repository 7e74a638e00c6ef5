"""The transport of ranks that have a GPU each: arrays on it, sums over all ranks.

Within a host the ranks' segments go by NCCL and are added by a kernel; across hosts each
rank's segment goes by MPI (`crossing`). Rules of the file: arrays are `DeviceArray`, though the
contract says `Array`; all is put on the transport's stream in the order of the calls, on one
host without any wait; what a sink gets is valid for work that it puts on that stream.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, final

import numpy as np

from ..arrays import Array, DType, describe, wide
from ..errors import DeviceError
from ..gpu.array import DeviceArray, as_any, as_device
from ..gpu.device import Device, Event, Gpus, Stream
from ..mpi_takes import Way
from ..sums import Order
from ..transport.contract import Exchange, Sink, Transport, Window
from .crossing import Crossing
from .exchange import Bounds, Clique, Member, add
from .watch import Watch

# Up to how many bytes of all ranks of a host every rank adds everything: one call less.
SMALL_BYTES = 256 << 10
_STAGED_BYTES = 4 << 20
_QUIET_WITHIN_S = 10.0  # what NCCL's kernels have to end once they were aborted
_NAP_S = 1e-4


class _Round(NamedTuple):
    """What is under way of one round."""

    bounds: Bounds
    of_host: DeviceArray | None  # this rank's segment, added over the ranks of the host
    ready: Event


@final
class GpuTransport(Transport):
    """Sums over ranks with a GPU each.

    Parameters
    ----------
    beside : Transport
        Another one over all ranks, for arrays of the host.
    gpus : Gpus
    member : Member
        This rank in the clique of its host.
    clique : Clique
        Of the ranks of this host; as many lanes as the smallest host has ranks.
    order : int or tuple
        In which the ranks of a host are added, by their place on it.
    crossing : Crossing or None
        None where there is one host, or on a rank that carries no segment.
    watch : Watch
    way : Way
        How what crosses between hosts comes to MPI.
    small_bytes : int, optional

    Attributes
    ----------
    device : Device
    stream : Stream
        On which all its work is done, and that of its sinks.
    beside : Transport
    crossing : Crossing or None
    watch : Watch
    way : Way
    """

    def __init__(
        self,
        beside: Transport,
        gpus: Gpus,
        member: Member,
        clique: Clique,
        order: Order,
        crossing: Crossing | None,
        watch: Watch,
        *,
        way: Way,
        small_bytes: int = SMALL_BYTES,
    ) -> None:
        self.topology = beside.topology
        self.device: Device = member.device
        self.stream: Stream = member.stream
        self.beside, self._member, self._clique = beside, member, clique
        self._order, self.crossing, self.watch, self.way = order, crossing, watch, way
        self._is_one_host = self.topology.num_hosts == 1
        self._small_bytes = small_bytes
        # Of the longest round: the part that this rank adds, before other hosts' are added, and
        # the sum that a sink gets.
        self._n_rows = max(len(ranks) for ranks in self.topology.hosts)  # alike on all hosts
        n_bytes = clique.step(self._n_rows, 1)
        of_host_bytes = 0 if crossing is None else n_bytes // clique.lanes
        self._of_host = [self.device.empty(of_host_bytes, np.uint8, self.stream) for _ in range(2)]
        # Across hosts one sum is written while the last one's sink may still read.
        n_totals = 1 if self._is_one_host else 2
        self._totals = [self.device.empty(n_bytes, np.uint8, self.stream) for _ in range(n_totals)]
        self._staged = gpus.pinned(_STAGED_BYTES)
        self._is_open = True

    def all_reduce(self, source: Array, out: Array) -> None:
        """Sum in rounds; see `Transport.all_reduce`."""
        self._sum(as_device(source), as_device(out))

    def all_reduce_pieces(self, source: Array, dtype: DType, sink: Sink) -> None:
        """Sum in rounds, each of which the sink gets; see `Transport.all_reduce_pieces`."""
        own = as_device(source)
        step = self._step(own.dtype, dtype)
        parts = [slice(low, min(low + step, own.size)) for low in range(0, own.size, step)]

        def out_of(number: int) -> DeviceArray:
            n = parts[number].stop - parts[number].start
            return self._totals[number % len(self._totals)][: n * dtype.itemsize].view(dtype)

        def hand_over(number: int) -> None:
            sink(parts[number].start, parts[number].stop, as_any(out_of(number)))

        if len(parts) > 1:
            self.watch.check()
            self._in_rounds(own, parts, out_of, hand_over)
        elif parts:
            self._sum(own, out_of(0))
            hand_over(0)

    def window(self, private: Array) -> Window:
        """Give private memory: GPUs show one another nothing."""
        return Window((private,))

    def all_reduce_window(self, window: Window, start: int, stop: int, sink: Sink) -> None:
        """Sum it as any array."""
        self.all_reduce_pieces(window.own[start:stop], window.own.dtype, sink)

    def all_reduce_windows(self, source: Window, out: Window, start: int, stop: int) -> None:
        """Sum it as any array."""
        self.all_reduce(source.own[start:stop], out.own[start:stop])

    def broadcast(self, buffer: Array, root: int = 0) -> None:
        """Copy by NCCL on one host; across hosts by MPI, through the host of each rank."""
        own = as_device(buffer).reshape(-1)
        if own.nbytes == 0 or self.topology.size == 1:
            return
        comm = self._member.comm
        if self._is_one_host and comm is not None:
            self.watch.check()
            comm.broadcast(own, root, self.stream)
            self._expect("broadcast", own)
            return
        self._broadcast_by_host(own.view(np.uint8), root)

    def start_all_to_all(
        self, sent: Mapping[int, Array], received: Mapping[int, Array]
    ) -> Exchange:
        """Leave arrays of the host to the transport beside."""
        return self.beside.start_all_to_all(sent, received)

    def abort(self, why: str) -> None:
        """Leave it to the transport beside; once the alarm has sounded nobody waits any more."""
        if not self.watch.is_told:
            self.beside.abort(why)

    @property
    def for_host(self) -> Transport:
        """The transport beside."""
        return self.beside

    def close(self) -> None:
        """End NCCL's communicator once its work is done, then the transport beside.

        Raises
        ------
        CollectiveError
            Its work has failed, or does not end.
        """
        try:
            if self._is_open:
                self.watch.wait(self.stream.record())
        finally:
            self.end()
            self.beside.close()

    def end(self) -> None:
        """Let go of NCCL without the other ranks, as when the process ends: never waits long."""
        if not self._is_open:
            return
        self._is_open = False
        ended = self.watch.end()
        if self._member.comm is not None and not self.watch.failed:
            # What still runs may wait for a rank that has gone.
            (self._member.comm.destroy if ended else self._member.comm.abort)()

    def check(self) -> None:
        """Raise what has failed on the GPUs meanwhile.

        Raises
        ------
        CollectiveError
        """
        self.watch.check()

    def wait(self) -> None:
        """Wait on the host for all that is on the stream.

        Raises
        ------
        CollectiveError
            Its work has failed, or does not end.
        """
        self.watch.wait(self.stream.record())

    def was_cut(self) -> bool:
        """Wait until NCCL has let go of the stream; say if it was in the midst of something."""
        self.watch.give_up()
        event, end = self.stream.record(), time.monotonic() + _QUIET_WITHIN_S
        try:
            while not event.done():
                if time.monotonic() > end:
                    return True
                time.sleep(_NAP_S)
        except DeviceError:
            return True
        return self.watch.was_cut

    def _sum(self, source: DeviceArray, out: DeviceArray) -> None:
        """Sum arrays of any size."""
        if source.size == 0:
            return
        self.watch.check()
        if self._clique.size == 1 and self._is_one_host:
            self._copy(source, out)
            return
        if self._is_small(source):
            rows = self._clique.gather(self._member, source)
            add(self._member, self._order, rows, out)
        else:
            step = self._step(source.dtype, out.dtype)
            parts = [slice(low, low + step) for low in range(0, source.size, step)]
            self._in_rounds(source, parts, lambda number: out[parts[number]], _nothing)
            return
        self._expect_sum(source)

    def _in_rounds(
        self,
        source: DeviceArray,
        parts: Sequence[slice],
        out_of: Callable[[int], DeviceArray],
        then: Callable[[int], None],
    ) -> None:
        """Sum parts of which each is a round.

        Parameters
        ----------
        source : DeviceArray
        parts : sequence of slice
        out_of : callable
            Gives where the sum of a part goes: across hosts that of the part but one before it at
            the earliest.
        then : callable
            Gets the number of a part whose sum is there for work on the stream.
        """
        ahead = self._bring(source[parts[0]], out_of(0), 0)
        for number in range(len(parts)):
            now, after = ahead, number + 1
            # While one round crosses, the next one is added within the host.
            if after < len(parts) and not self._is_one_host:
                ahead = self._bring(source[parts[after]], out_of(after), after)
            self._finish(now, out_of(number))
            self._expect_sum(source)
            then(number)
            if after < len(parts) and self._is_one_host:
                ahead = self._bring(source[parts[after]], out_of(after), after)

    def _bring(self, source: DeviceArray, out: DeviceArray, number: int) -> _Round:
        """Add this rank's segment of a round over the ranks of the host."""
        clique, member = self._clique, self._member
        bounds = clique.bounds(source.size, source.itemsize)
        here = range(clique.size)
        rows = [source if k == member.rank else None for k in here]
        segments = clique.exchange(here, rows, bounds)
        of_host = None
        if member.rank in segments:
            low, high = bounds[member.rank]
            of_host = out[low:high]
            if self.crossing is not None:
                dtype = wide(out.dtype)
                place = self._of_host[number % 2]
                of_host = place[: of_host.size * dtype.itemsize].view(dtype)
            add(member, self._order, segments[member.rank], of_host)
        return _Round(bounds, of_host, self.stream.record())

    def _finish(self, now: _Round, out: DeviceArray) -> None:
        """Sum a round's segments over the hosts, and give them to all ranks."""
        rank = self._member.rank
        if self.crossing is not None and now.of_host is not None and now.of_host.size:
            low, high = now.bounds[rank]
            self.crossing.sum(now.of_host, out[low:high], now.ready, self.stream)
        self._clique.give({rank: out}, now.bounds)

    def _is_small(self, source: DeviceArray) -> bool:
        """Say whether every rank of the one host adds everything."""
        n_bytes = self._clique.size * source.nbytes
        fits = n_bytes <= self._small_bytes and self._clique.gathers(source.nbytes)
        return self._is_one_host and fits

    def _step(self, source: DType, out: DType) -> int:
        """Say how many elements a round has, on all hosts alike: all fits its memory."""
        itemsize = max(source.itemsize, wide(out).itemsize)
        return self._clique.step(self._n_rows, itemsize)

    def _copy(self, source: DeviceArray, out: DeviceArray) -> None:
        if source.dtype != out.dtype:
            add(self._member, 0, [source], out)
        elif source.address != out.address:
            self.device.copy(source, out, self.stream)

    def _broadcast_by_host(self, own: DeviceArray, root: int) -> None:
        is_root = self.topology.rank == root
        for low in range(0, own.size, _STAGED_BYTES):
            part = own[low : low + _STAGED_BYTES]
            host = self._staged[: part.size]
            if is_root:
                self.device.download(part, host, self.stream)
                self.watch.wait(self.stream.record())
            self.beside.broadcast(host, root)
            if not is_root:
                self.device.upload(host, part, self.stream)
                self.watch.wait(self.stream.record())

    def _expect_sum(self, source: DeviceArray) -> None:
        if self._clique.size > 1:
            self._expect("all_reduce", source)

    def _expect(self, what: str, array: DeviceArray) -> None:
        ranks = f"the GPUs of {self._clique.size} ranks"
        self.watch.expect(f"{what} of {describe(array)} among {ranks}", self.stream.record())


def _nothing(number: int) -> None:
    pass
