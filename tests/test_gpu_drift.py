"""Drift on GPUs is found, named and mended as on the host; faults on demand strike there, too."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from any_gpus import AnyGpus, check_closed, gpus_and_nccl, needs_kernels
from fake_nccl import mailbox
from raised_by_all import raised_by_all

import kvcoll
from kvcoll import KVStore, on_gpus
from kvcoll.errors import ArgumentError, ReplicasDifferError, ShapeMismatchError
from kvcoll.testing import Delay, Flip, Reshape, Skip, faults

pytestmark = [needs_kernels, pytest.mark.ranks(at_least=2)]

KEYS = ["half", "large", "none", "small"]
SHAPES = [(3, 4), (70_000,), (0,), (7,)]
DTYPES = [np.float16, np.float32, np.float32, np.float64]


@pytest.fixture
def gpus(comm: Any, host_of: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> Iterator[AnyGpus]:
    if len(set(host_of)) > 1:
        pytest.skip("fake GPUs of several processes find one another on one machine")
    with mailbox(comm) as folder:
        own, nccl = gpus_and_nccl(comm.size, folder)
        own.pump_in_background()
        monkeypatch.setattr(on_gpus, "find", lambda: (own, nccl))
        monkeypatch.setattr(on_gpus, "find_gpus", lambda: own)
        yield own
        check_closed(nccl)
    own.finish()


def begin(kv: KVStore) -> KVStore:
    values = [np.full(shape, 2, dtype) for shape, dtype in zip(SHAPES, DTYPES, strict=True)]
    kv.init(KEYS, values)
    kv.set_optimizer("sgd", learning_rate=0.25, momentum=0.5, multi_precision=True)
    return kv


def push(kv: KVStore, gpus: AnyGpus | None, n: int = 1) -> None:
    """Push gradients of this rank; on its GPU, where there is one."""
    for _ in range(n):
        by = kv.rank + 1
        values = [np.full(shape, by, dtype) for shape, dtype in zip(SHAPES, DTYPES, strict=True)]
        kv.push(KEYS, values if gpus is None else [gpus.array(v, kv.local_rank) for v in values])


def warns_on_rank_0(kv: KVStore) -> AbstractContextManager[Any]:
    return pytest.warns(RuntimeWarning, match="differ") if kv.rank == 0 else nullcontext()


def test_fingerprints_are_those_of_a_store_on_the_host_in_checkpoints_too(
    gpus: AnyGpus, comm: Any, tmp_path: Path
) -> None:
    folder = Path(comm.bcast(str(tmp_path)))
    with kvcoll.create("dist_device_sync") as kv, kvcoll.create("dist_sync") as host:
        for store, own in ((kv, gpus), (host, None)):
            push(begin(store), own, 2)
        expected = host.verify()
        found = kv.verify()
        for key in KEYS:  # which says more than a fingerprint, if it fails
            np.testing.assert_array_equal(kv.pull(key).get(), host.pull(key), f"key {key!r}")
        assert found == expected
        kv.save(folder / "gpu")
        host.save(folder / "host")
        push(kv, gpus)
        assert kv.verify() != expected
        assert kv.load(folder / "host").fingerprint == expected == kv.verify()
        assert host.load(folder / "gpu").fingerprint == expected == host.verify()


@pytest.mark.parametrize(
    ("what", "named"),
    {"replica": "key 'large'", "state": "state0 of the optimizer for key 'large'"}.items(),
)
def test_a_flipped_bit_on_a_gpu_is_named_on_every_rank_and_mended_there(
    gpus: AnyGpus, comm: Any, what: str, named: str
) -> None:
    with kvcoll.create("dist_device_sync", verify_every=3) as kv:
        push(begin(kv), gpus)
        before = kv.verify()
        with faults(Flip(rank=1, key="large", element=48, what=what)):
            push(kv, gpus)
            error = raised_by_all(comm, lambda: push(kv, gpus))
        assert type(error) is ReplicasDifferError
        assert f"rank 1: {named} is not" in str(error)
        assert "since push 3, whose sample shows it" in str(error)
        with warns_on_rank_0(kv):
            mended = kv.verify(repair="vote")
        assert mended == kv.verify() != before
        pulled = kv.pull("large").get()
        assert comm.allgather(pulled.tobytes()) == [pulled.tobytes()] * comm.size
        push(kv, gpus, 3)  # which are compared at the last


def test_faults_strike_gradients_on_a_gpu(gpus: AnyGpus, comm: Any) -> None:
    size = comm.size
    total = size * (size + 1) / 2
    with kvcoll.create("dist_device_sync") as kv:
        kv.init("w", gpus.array(np.zeros(5, np.float32), kv.local_rank))
        mine = gpus.array(np.full(5, kv.rank + 1, np.float32), kv.local_rank)
        # The sign of an element of rank 1's 2.
        with faults(Flip(rank=1, what="gradient", element=3, bit=31)) as left:
            kv.push("w", mine)
        assert not left or kv.rank != 1
        assert kv.pull("w").get().tolist() == [total] * 3 + [total - 4, total]
        assert mine.get().tolist() == [kv.rank + 1] * 5
        with faults(Reshape(rank=1)):
            error = raised_by_all(comm, lambda: kv.push("w", mine))
        assert type(error) is ShapeMismatchError
        with faults(Delay(rank=1, seconds=0.2)):
            began = time.monotonic()
            kv.push("w", mine)
            kv.wait()
            assert kv.rank != 1 or time.monotonic() - began >= 0.2
        with faults(Skip(rank=1)):
            for k in range(2 if kv.rank == 1 else 1):
                kv.push("w", gpus.array(np.full(5, 10 * kv.rank + k, np.float32), kv.local_rank))
        expected = sum(10 * rank + (rank == 1) for rank in range(size))
        assert kv.pull("w").get().tolist() == [expected] * 5
        with faults(Flip(rank=1, what="state")):
            if kv.rank == 1:
                with pytest.raises(ArgumentError, match="'w' has no state"):
                    kv.push("w", mine)
            else:
                kv.push("w", mine)
        assert kv.verify()
