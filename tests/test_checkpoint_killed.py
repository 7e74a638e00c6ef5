"""A process that is killed while it saves leaves a checkpoint that can be loaded."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from mpi_job import Job

import kvcoll

pytestmark = [pytest.mark.jobs, pytest.mark.limit(60), pytest.mark.long]

# Has two checkpoints and saves a third, again and again; is killed at its n-th call of the system.
KILLED = """
import os, shutil, signal, sys
import numpy as np
import kvcoll
from kvcoll.checkpoint import shares
shares.PART_BYTES, shares.CUT_BYTES = 64, 100
path, wait, kill, fork, waitpid = sys.argv[1], sys.argv[2] == "wait", os.kill, os.fork, os.waitpid
CALLS = ("makedirs", "mkdir", "listdir", "open", "write", "fchmod", "fsync", "replace", "unlink")
CALLS += ("close", "rmdir", "lseek")
def dying(call):
    def called(*args, **kwargs):
        global left
        if left == 0:
            kill(os.getpid(), signal.SIGKILL)
        left -= 1
        return call(*args, **kwargs)
    return called
def store():
    kv = kvcoll.create("local")
    kv.init("a", np.zeros(2000, np.float32))
    kv.set_optimizer("sgd", learning_rate=1.0, momentum=0.5, rescale_grad=-1)
    return kv
def save(kv):
    kv.push("a", np.ones(2000, np.float32))
    kv.save(path, keep=2, metadata=kv.version, wait=wait)
    kv.wait_saved()
def third(kv):
    for name in CALLS:
        setattr(os, name, dying(getattr(os, name)))
    save(kv)
    os._exit(0)
for left in range(500):
    shutil.rmtree(path, ignore_errors=True)
    kv = store()
    save(kv)
    save(kv)
    child = fork() or third(kv)
    status = waitpid(child, 0)[1]
    names = sorted(os.listdir(path))
    values, about = kvcoll.load(path)
    resumed = kvcoll.create("local")
    assert resumed.load(path) == about
    assert resumed.pull("a").tobytes() == values["a"].tobytes()
    save(resumed)
    after = sorted(os.listdir(path))
    print(left, status, about.version, values["a"][0], len(names), len(after), resumed.version)
    if status == 0:
        break
"""
VALUES = {2: 1 + 1.5, 3: 1 + 1.5 + 1.75}


@pytest.mark.parametrize("wait", ["wait", "beside"])
def test_a_process_killed_at_any_call_of_the_system_leaves_the_old_one_or_the_new(
    tmp_path: Path, wait: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "run"), wait],
        timeout=50,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    assert len(rows) > 40  # so many calls there are, and one more run that is not killed
    assert [int(row[1]) for row in rows] == [signal.SIGKILL] * (len(rows) - 1) + [0]
    found = [int(row[2]) for row in rows]
    renamed = found.index(3)
    assert found == [2] * renamed + [3] * (len(rows) - renamed)
    assert 20 < renamed < len(rows) - 5  # kills before the manifest is there, and after
    for (_, _, version, value, before, after, resumed), number in zip(rows, found, strict=True):
        assert float(value) == VALUES[int(version)]
        assert 2 <= int(before) <= 3
        assert int(after) == 2  # the next save has removed what was left
        assert int(resumed) == number + 1


# Rank 1 is killed when its part is half written, or just before or after it is renamed.
ONE_DIES = """
import os, signal, sys
import numpy as np
import kvcoll
from kvcoll.checkpoint import shares
shares.PART_BYTES, shares.CUT_BYTES = 64, 100
path, call, victim = sys.argv[1], sys.argv[2], int(sys.argv[3])
kv = kvcoll.create("dist_sync")
kv.init("a", np.zeros(2000, np.float32))
kv.push("a", np.ones(2000, np.float32))
kv.save(path)
def die(*args, **kwargs):
    if call != "replace" or "part-" in args[1]:
        os.kill(os.getpid(), signal.SIGKILL)
    return honest(*args, **kwargs)
if kv.rank == victim:
    honest = getattr(os, call)
    setattr(os, call, die)
kv.push("a", np.full(2000, 2, np.float32))
kv.save(path, wait=False)
kv.wait_saved()
"""


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("call", ["write", "replace"])
def test_a_rank_that_is_killed_leaves_the_checkpoint_before(
    mpirun: Callable[..., Job], tmp_path: Path, call: str, victim: int
) -> None:
    job = mpirun(2, "-c", ONE_DIES, tmp_path, call, str(victim), env=_paths())
    assert job.returncode != 0
    assert not job.timed_out
    assert "00000002" in os.listdir(tmp_path), job
    values, about = kvcoll.load(tmp_path)
    assert about.num_workers == 2
    assert about.path.endswith("00000001")
    np.testing.assert_array_equal(values["a"], np.full(2000, 2, np.float32))


ENDS = """
import sys, os
import numpy as np
import kvcoll
from kvcoll import files
from kvcoll.checkpoint import shares
shares.PART_BYTES, shares.CUT_BYTES = 64, 100
path, how = sys.argv[1:]
kv = kvcoll.create("dist_sync")
kv.init("a", np.arange(1 << 20, dtype=np.float32))
if how == "fails" and kv.rank == 1:
    def fail(*args):
        raise OSError(28, os.strerror(28))
    os.fsync = fail
kv.save(path, wait=False)
kv.push("a", np.ones(1 << 20, np.float32))
if how == "raises":
    raise SystemExit(3)
"""


@pytest.mark.parametrize("how", ["ends", "raises", "fails"])
def test_a_process_that_ends_completes_what_it_saves_or_says_why_not(
    mpirun: Callable[..., Job], tmp_path: Path, how: str
) -> None:
    job = mpirun(2, "-c", ENDS, tmp_path, how, env=_paths())
    assert not job.timed_out
    if how == "fails":
        assert (
            job.stderr.count(f"kvcoll: the checkpoint {str(tmp_path / '00000001')!r} was not ") == 2
        )
        assert "(No space left on device)" in job.stderr
        assert "other ranks have not written their parts" in job.stderr
        with pytest.raises(kvcoll.errors.NoCheckpointError):
            kvcoll.load(tmp_path)
        return
    assert job.returncode == (3 if how == "raises" else 0), job.stderr
    values, _ = kvcoll.load(tmp_path)
    np.testing.assert_array_equal(values["a"], np.arange(1 << 20, dtype=np.float32))


def test_what_is_written_is_private_until_it_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes: list[int] = []
    honest = os.write

    def seen(descriptor: int, data: memoryview) -> int:
        modes.append(stat.S_IMODE(os.fstat(descriptor).st_mode))
        return honest(descriptor, data)

    monkeypatch.setattr("kvcoll.files.os.write", seen)
    with kvcoll.create("local") as kv:
        kv.init("a", np.zeros(3))
        kv.save(tmp_path)
    assert set(modes) == {0o600}
    assert len(modes) >= 4


def _paths() -> dict[str, str]:
    return {"PYTHONPATH": str(Path(kvcoll.__file__).parents[1])}
