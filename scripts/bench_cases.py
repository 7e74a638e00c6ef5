"""What scripts/bench.py measures: each case's ways to do one job, kvcoll's and its peers'.

Rules of the file: memory is written before it is timed (a page that never was costs
nothing to read); what is summed in place holds zeros, so that it stays finite; kvcoll's
ways are checked against arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, TypeAlias, final

import numpy as np
from bench_clock import Job, OwnWay, PeerWay, Way
from bench_overlap import overlap
from bench_peer import Peer
from numpy.typing import NDArray

import kvcoll

if TYPE_CHECKING:
    from mpi4py import MPI

Floats: TypeAlias = NDArray[np.float32]

PLAIN, OWN = "kvcoll", "kvcoll, own arrays and views"
REPRODUCIBLE, OWN_REPRODUCIBLE = f"{PLAIN}, reproducible", f"{OWN}, reproducible"
LARGE = 4_000_000  # elements, from which on reproducible sums are held to a bar
IN_PLACE = "MPI_Allreduce in place"
HUNDRED, SMALL_KEY = 100, 1000
OVERLAP_ELEMENTS = 10_000_000
LEARNING_RATE, MOMENTUM = 0.1, 0.9
# MXNet is asked where the bars ask for it: its servers keep every key that they ever saw.
MXNET_SIZES = (1_000, 10_000_000)


def resnet50_shapes() -> list[tuple[int, ...]]:
    """Give the shapes of ResNet-50's 161 parameters (He et al. 2016), 25,557,032 elements."""
    shapes: list[tuple[int, ...]] = [(64, 3, 7, 7), (64,), (64,)]
    n_in = 64
    for n_blocks, width in ((3, 64), (4, 128), (6, 256), (3, 512)):
        for block in range(n_blocks):
            for shape in ((width, n_in, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)):
                shapes += [shape, shape[:1], shape[:1]]  # a convolution, its scale, its shift
            if block == 0:
                shapes += [(4 * width, n_in, 1, 1), (4 * width,), (4 * width,)]
            n_in = 4 * width
    return [*shapes, (1000, n_in), (1000,)]


@final
class Cases:
    """Makes the ways of each case; what they hold is let go with the stack.

    Parameters
    ----------
    comm : mpi4py.MPI.Intracomm
    torch, mxnet : Peer or None
    """

    def __init__(self, comm: MPI.Intracomm, torch: Peer | None, mxnet: Peer | None) -> None:
        from mpi4py import MPI

        self._comm, self._in_place = comm, MPI.IN_PLACE
        self._torch, self._mxnet = torch, mxnet
        self._mine = comm.rank + 1  # what this rank pushes; all ranks' sum is the triangular number
        self._total = comm.size * (comm.size + 1) // 2

    def barrier(self, stack: ExitStack) -> tuple[Job, list[Way]]:
        """Agreement alone, beside MPI's barrier."""
        kv = self._store(stack)
        return Job("barrier", "barrier", 0, 0), [
            OwnWay("kvcoll", "kvcoll", kv.barrier),
            OwnWay("MPI_Barrier", "raw", self._comm.Barrier),
        ]

    def key(self, stack: ExitStack, n: int) -> tuple[Job, list[Way]]:
        """Push and pull of one key."""
        ways: list[Way] = [self._plain_key(stack, n), self._own_key(stack, n)]
        if n >= LARGE:
            ways.append(self._plain_key(stack, n, reproducible=True))
            ways.append(self._own_key(stack, n, reproducible=True))
        buffer = _full(n, 0)
        ways.append(OwnWay(IN_PLACE, "raw", lambda: self._all_reduce(buffer)))
        ways += self._key_by_hand(n)
        if self._torch:
            request = {"what": "all_reduce", "elements": n, "keys": 1}
            ways.append(self._peer_way(stack, "torch gloo all_reduce", self._torch, request))
        if self._mxnet and n in MXNET_SIZES:
            ways.append(self._mxnet_way(stack, self._mxnet, 1, n))
        return Job("key", f"1 key of {n:,}", 1, n), ways

    def hundred_keys(self, stack: ExitStack) -> tuple[Job, list[Way]]:
        """Push and pull of a list of small keys."""
        shapes: list[tuple[int, ...]] = [(SMALL_KEY,)] * HUNDRED
        keys = [f"w{number}" for number in range(HUNDRED)]
        grads, outs = new_arrays(shapes, self._mine), new_arrays(shapes, 0)
        kv, own_kv = self._store(stack), self._store(stack)
        kv.init(keys, outs)
        own, views = self._own_arrays(own_kv, keys, outs)

        def plain() -> None:
            kv.push(keys, grads)
            kv.pull(keys, out=outs)

        in_place, hand_outs = new_arrays(shapes, 0), new_arrays(shapes, 0)
        packed = _full(HUNDRED * SMALL_KEY, 0)

        def a_key_at_a_time() -> None:
            for buffer in in_place:
                self._all_reduce(buffer)

        def packs() -> None:
            np.concatenate(grads, out=packed)
            self._all_reduce(packed)
            _unpack(packed, hand_outs)

        ways: list[Way] = [
            OwnWay(PLAIN, "kvcoll", plain, self._all_hold(outs, self._total)),
            OwnWay(
                OWN, "kvcoll", lambda: own_kv.push(keys, own), self._all_hold(views, self._total)
            ),
            OwnWay("MPI_Allreduce in place, key by key", "raw", a_key_at_a_time),
            OwnWay("pack, MPI_Allreduce, unpack", "by hand", packs),
        ]
        if self._torch:
            request = {"what": "all_reduce", "elements": SMALL_KEY, "keys": HUNDRED}
            name = "torch gloo all_reduce, key by key"
            ways.append(self._peer_way(stack, name, self._torch, request))
        if self._mxnet:
            ways.append(self._mxnet_way(stack, self._mxnet, HUNDRED, SMALL_KEY))
        title = f"{HUNDRED} keys of {SMALL_KEY:,}"
        return Job("keys", title, HUNDRED, HUNDRED * SMALL_KEY), ways

    def resnet50(self, stack: ExitStack) -> tuple[Job, list[Way]]:
        """Gradients of all of ResNet-50's parameters, SGD with momentum, and the new values."""
        shapes = resnet50_shapes()
        keys = [f"p{number}" for number in range(len(shapes))]
        grads = new_arrays(shapes, self._mine)
        params = new_arrays(shapes, 1)
        after_one = 1 - np.float32(LEARNING_RATE) * np.float32(self._total)
        kv, own_kv = self._store(stack), self._store(stack)
        own, views = self._own_arrays(own_kv, keys, params)
        kv.init(keys, params)
        for store in (kv, own_kv):
            store.set_optimizer("sgd", learning_rate=LEARNING_RATE, momentum=MOMENTUM)

        def plain() -> None:
            kv.push(keys, grads)
            kv.pull(keys, out=params)

        ways: list[Way] = [
            OwnWay(PLAIN, "kvcoll", plain, self._all_hold(params, after_one)),
            OwnWay(OWN, "kvcoll", lambda: own_kv.push(keys, own), self._all_hold(views, after_one)),
            *self._resnet50_by_hand(shapes, grads, after_one),
        ]
        if self._torch:
            for name, tuned in (("defaults", False), ("bucket views, fused SGD", True)):
                request = {"what": "ddp", "shapes": shapes, "tuned": tuned}
                way = f"torch DDP gloo + SGD, {name}"
                ways.append(self._peer_way(stack, way, self._torch, request))
        title = f"ResNet-50, {len(shapes)} keys, SGD"
        return Job("resnet50", title, len(shapes), sum(p.size for p in params)), ways

    def overlap(self, stack: ExitStack, n: int = OVERLAP_ELEMENTS) -> tuple[Job, list[Way]]:
        """Push and pull beside computing."""
        return overlap(self._comm, stack, n)

    def _plain_key(self, stack: ExitStack, n: int, *, reproducible: bool = False) -> Way:
        kv = self._store(stack, reproducible=reproducible)
        value, out = _full(n, self._mine), _full(n, 0)
        kv.init("w", out)

        def call() -> None:
            kv.push("w", value)
            kv.pull("w", out=out)

        name = REPRODUCIBLE if reproducible else PLAIN
        return OwnWay(name, "kvcoll", call, self._all_hold([out], self._total))

    def _own_key(self, stack: ExitStack, n: int, *, reproducible: bool = False) -> Way:
        kv = self._store(stack, reproducible=reproducible)
        [own], views = self._own_arrays(kv, ["w"], [_full(n, 0)])
        name = OWN_REPRODUCIBLE if reproducible else OWN
        return OwnWay(name, "kvcoll", lambda: kv.push("w", own), self._all_hold(views, self._total))

    def _key_by_hand(self, n: int) -> list[Way]:
        """Do what the store does, in the two ways in which one would write it."""
        value, stored, out = _full(n, self._mine), _full(n, 0), _full(n, 0)

        def into_stored() -> None:
            self._comm.Allreduce(value, stored)
            np.copyto(out, stored)

        def copied() -> None:
            np.copyto(stored, value)
            self._all_reduce(stored)
            np.copyto(out, stored)

        return [
            OwnWay("MPI_Allreduce, copy out", "by hand", into_stored),
            OwnWay("copy in, MPI_Allreduce in place, copy out", "by hand", copied),
        ]

    def _resnet50_by_hand(
        self, shapes: list[tuple[int, ...]], grads: list[Floats], after_one: np.float32
    ) -> list[Way]:
        sums, weights, momenta = new_arrays(shapes, 0), new_arrays(shapes, 1), new_arrays(shapes, 0)
        packed = _full(sum(grad.size for grad in grads), 0)
        flat_grads = [grad.reshape(-1) for grad in grads]
        scratch = _full(max(grad.size for grad in grads), 0)

        def step() -> None:
            for weight, momentum, total in zip(weights, momenta, sums, strict=True):
                scaled = scratch[: total.size].reshape(total.shape)
                np.multiply(total, LEARNING_RATE, out=scaled)
                np.multiply(momentum, MOMENTUM, out=momentum)
                np.subtract(momentum, scaled, out=momentum)
                np.add(weight, momentum, out=weight)

        def a_key_at_a_time() -> None:
            for grad, total in zip(grads, sums, strict=True):
                self._comm.Allreduce(grad, total)
            step()

        def packs() -> None:
            np.concatenate(flat_grads, out=packed)
            self._all_reduce(packed)
            _unpack(packed, sums)
            step()

        right = self._all_hold(weights, after_one)
        return [
            OwnWay("MPI_Allreduce key by key, NumPy SGD", "raw", a_key_at_a_time, right),
            OwnWay("pack, MPI_Allreduce, unpack, NumPy SGD", "by hand", packs),
        ]

    def _store(self, stack: ExitStack, *, reproducible: bool = False) -> kvcoll.KVStore:
        store = kvcoll.create("dist_sync", comm=self._comm, reproducible=reproducible)
        return stack.enter_context(store)

    def _own_arrays(
        self, kv: kvcoll.KVStore, keys: list[str], values: list[Floats]
    ) -> tuple[list[Floats], list[Floats]]:
        """Init keys; give the store's arrays, filled with what this rank pushes, and its views."""
        kv.init(keys, values)
        own: list[Floats] = kv.empty(keys)
        for array in own:
            array.fill(self._mine)
        views: list[Floats] = kv.view(keys)
        return own, views

    def _all_reduce(self, buffer: Floats) -> None:
        self._comm.Allreduce(self._in_place, buffer)

    def _all_hold(self, arrays: list[Floats], value: float | np.float32) -> Callable[[], bool]:
        def is_right() -> bool:
            return all(np.allclose(array, value, rtol=1e-5) for array in arrays)

        return is_right

    def _mxnet_way(self, stack: ExitStack, peer: Peer, n_keys: int, n: int) -> Way:
        request = {"what": "push_pull", "keys": n_keys, "elements": n}
        return self._peer_way(stack, "MXNet dist_sync", peer, request)

    def _peer_way(
        self, stack: ExitStack, name: str, peer: Peer, request: dict[str, Any]
    ) -> PeerWay:
        stack.callback(peer.time, {"what": "forget"})
        return PeerWay(name, name.split()[0], peer, request)


def _full(n: int, value: float) -> Floats:
    return np.full(n, value, np.float32)


def new_arrays(shapes: list[tuple[int, ...]], value: float) -> list[Floats]:
    """Make an array a shape, each full of one value."""
    return [np.full(shape, value, np.float32) for shape in shapes]


def _unpack(packed: Floats, outs: list[Floats]) -> None:
    start = 0
    for out in outs:
        np.copyto(out, packed[start : start + out.size].reshape(out.shape))
        start += out.size
