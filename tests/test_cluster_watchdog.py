"""The watchdog over several hosts: a rank that does not answer is looked at from its own host."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
from cluster.hosts import Hosts, pretend_hosts

from kvcoll.watchdog import EXIT_CODE

pytestmark = [pytest.mark.single, pytest.mark.limit(120), pytest.mark.long]

PROGRAM: Final = """
import ctypes, subprocess, time
import numpy as np
import kvcoll
settings = kvcoll.Watchdog(floor_s=0.4, ceiling_s=0.8, limit_s=12, held_stacks=True)
kv = kvcoll.create("dist_sync", watchdog=settings)
kv.init(["a", "b"], [np.ones(4, np.float32)] * 2)

def wait_for_a_file():
    time.sleep(3)

def hold_the_lock():
    with subprocess.Popen(["sleep", "40"], stdout=subprocess.PIPE) as sleep:
        ctypes.PyDLL(None).read(sleep.stdout.fileno(), ctypes.create_string_buffer(1), 1)

if kv.rank == 2:
    wait_for_a_file()
kv.push("a", np.ones(4, np.float32))
if kv.rank == 3:
    hold_the_lock()
kv.push("b", np.ones(4, np.float32))
"""


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    with pretend_hosts(2) as made:
        yield made


def test_late_ranks_of_another_host_are_named_with_what_they_do(hosts: Hosts) -> None:
    program = Path(hosts.folder) / "late.py"
    program.write_text(PROGRAM)
    job = hosts.mpirun((2, 2), program)
    said = job.stdout + job.stderr
    assert "ranks 0, 1, 3 have waited" in said, job
    assert "push number 1, push('a' float32[4]): rank 2 is late" in said
    assert "on kv2) has made 0 pushes" in said
    assert "in wait_for_a_file\n      time.sleep(3)" in said
    assert "kvcoll: the wait for rank 2 is over" in said
    assert "push number 2, push('b' float32[4]): rank 3 is late" in said
    assert "on kv2) does not answer: it sleeps" in said
    assert " in hold_the_lock\n" in said
    assert job.returncode == EXIT_CODE
