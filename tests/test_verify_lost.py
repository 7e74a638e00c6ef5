"""Replicas are compared after a recovery, too, by the ranks that are left."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from mpi_job import Job, why_no_ft

import kvcoll

pytestmark = [pytest.mark.jobs, pytest.mark.long, pytest.mark.limit(60)]

PROGRAM = """
import sys
import numpy as np
import kvcoll
from kvcoll.testing import Flip, faults

with kvcoll.create("dist_sync", elastic=True, verify_every=3) as kv:
    kv.init(["v", "w"], [np.zeros(5), np.zeros(20_000, np.float32)])
    kv.set_optimizer("sgd", learning_rate=1.0, momentum=0.5, rescale_grad=-1)
    share = [np.ones(5), np.ones(20_000, np.float32)]
    while kv.version < 8:
        try:
            kv.push(["v", "w"], share)
        except kvcoll.errors.RankLostError:
            kv.recover()
    own = kv.verify()
    with faults(Flip(rank=2, key="w", element=19_999)):  # as it was numbered before the loss
        kv.push(["v", "w"], share)
    try:
        kv.push(["v", "w"], share)
        kv.verify()
    except kvcoll.errors.ReplicasDifferError as error:
        sys.stdout.write(f"[{kv.rank}] {kv.num_workers} {error}\\n")
        sys.stdout.flush()
"""


def test_a_flipped_bit_is_named_by_the_ranks_as_they_are_now(mpirun: Callable[..., Job]) -> None:
    if why := why_no_ft():
        pytest.skip(why)
    root = str(Path(kvcoll.__file__).parents[1])
    env = {"KVCOLL_FAULTS": "rank=1 push=5 kill", "PYTHONPATH": root}
    job = mpirun(3, "-c", PROGRAM, timeout_s=30, env=env, with_ft=True)
    assert not job.timed_out
    said = sorted(line for line in job.stdout.splitlines() if line.startswith("["))
    assert [line[:6] for line in said] == ["[0] 2 ", "[1] 2 "], job.stdout + job.stderr
    assert said[0][6:] == said[1][6:]
    assert "differ, since push 10: rank 1: key 'w' is not that of rank 0" in said[0]
