"""Collectives that give wrong results are found; launchers, and what exits leave behind."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pytest

from kvcoll import exiting
from kvcoll.errors import BrokenMPIError
from kvcoll.topology import Topology
from kvcoll.transport import ancestors, lifeline
from kvcoll.transport.ancestors import launcher
from kvcoll.transport.contract import Window
from kvcoll.transport.survivors import check_collectives

if TYPE_CHECKING:
    from mpi4py import MPI


class _Wrong:
    """A communicator of which one collective forgets the last rank's part."""

    def __init__(self, comm: MPI.Intracomm, call: str) -> None:
        self._comm, self._call = comm, call
        self.rank, self.size = comm.rank, comm.size

    def Allreduce(self, *given: Any) -> None:  # noqa: N802 - as MPI calls it
        self._comm.Allreduce(*given)
        if self._call == "Allreduce":
            given[1][:] -= self.size - 1

    def Allgather(self, sent: Any, received: Any) -> None:  # noqa: N802 - as MPI calls it
        self._comm.Allgather(sent, received)
        if self._call == "Allgather":
            received[-1] = 0

    def Bcast(self, buffer: Any, root: int) -> None:  # noqa: N802 - as MPI calls it
        self._comm.Bcast(buffer, root)
        if self._call == "Bcast":
            buffer[7] += 1


@pytest.mark.ranks(at_least=2)
@pytest.mark.parametrize("call", ["Allreduce", "Allgather", "Bcast"])
def test_a_collective_that_gives_wrong_results_is_found(comm: MPI.Intracomm, call: str) -> None:
    from mpi4py import MPI

    check_collectives(MPI, comm)
    with pytest.raises(BrokenMPIError, match="coll/han"):
        check_collectives(MPI, _Wrong(comm, call))


def test_of_a_window_the_rows_of_survivors_stay_where_they_are() -> None:
    rows = tuple(np.full(3, k) for k in range(4))
    left = Window(rows, 3, True).of_survivors((0, 3), 1)
    assert left.own is rows[3]
    assert left.rows[0] is rows[0]
    assert len(left.rows) == 2
    alone = Window((rows[2],))
    assert alone.of_survivors((0, 3), 1) is alone


@pytest.mark.single
def test_only_a_launcher_above_other_launchers_is_found(tmp_path: Path) -> None:
    family = {9: ("python", 7), 7: ("hydra_pmi_proxy", 5), 5: ("mpiexec.hydra", 3), 3: ("bash", 1)}
    for pid, (name, above) in family.items():
        (tmp_path / str(pid)).mkdir()
        (tmp_path / str(pid) / "comm").write_text(f"{name}\n")
        (tmp_path / str(pid) / "stat").write_text(f"{pid} ({name} of (x)) S {above} 0 0")
    assert launcher(7, tmp_path) == (5, "mpiexec.hydra")
    assert launcher(3, tmp_path) is None
    assert launcher(9, tmp_path) is None
    assert launcher(99, tmp_path) is None


GUARDED: Final = """
import os, signal, sys, time
from kvcoll.transport import ancestors

ancestors.guard(0.2)
print("guarded", flush=True)
how = sys.argv[1]
if how == "leaves":
    ancestors.leave()
elif how == "becomes another program":
    os.execv(sys.executable, [sys.executable, "-c", "import time; time.sleep(60)"])
elif how == "has a child" and os.fork() == 0:
    time.sleep(60)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.waits
@pytest.mark.parametrize(
    ("name", "how", "is_ended"),
    [
        ("prterun", "is killed", True),
        ("prterun", "has a child", True),
        ("prterun", "leaves", False),
        ("prterun", "becomes another program", False),
        ("prted", "is killed", False),
    ],
)
def test_a_launcher_that_outlives_a_killed_rank_is_ended(
    tmp_path: Path, name: str, how: str, *, is_ended: bool
) -> None:
    launcher = tmp_path / name
    shutil.copy("/bin/sh", launcher)
    starts_and_hangs = '"$@"; read -r word'
    process = subprocess.Popen(
        [launcher, "-c", starts_and_hangs, "sh", sys.executable, "-c", GUARDED, how],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"guarded\n"
        code = process.wait(30 if is_ended else 3)
    except subprocess.TimeoutExpired:
        code = None
    finally:
        with contextlib.suppress(ProcessLookupError):  # none of it is left
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    assert code == (-signal.SIGTERM if is_ended else None)


@pytest.mark.single
def test_where_no_process_can_be_started_the_launcher_is_left_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def no_more(*_: object, **__: object) -> None:
        raise BlockingIOError

    monkeypatch.setattr(subprocess, "Popen", no_more)
    monkeypatch.setattr(ancestors, "launcher", lambda _: (7, "prterun"))
    ancestors.guard()
    ancestors.see_it_end()
    ancestors.leave()


@pytest.mark.single
def test_a_step_that_hangs_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exiting, "_LIMIT_S", 0.05)
    assert exiting.within_limit(lambda: None)
    assert not exiting.within_limit(lambda: time.sleep(0.5))


@pytest.mark.single
def test_where_a_lost_host_is_looked_for_is_a_setting() -> None:
    assert lifeline.silence_s({}) == 8
    assert lifeline.silence_s({"KVCOLL_LOST_HOST_S": "30"}) == 30
    assert lifeline.silence_s({"KVCOLL_LOST_HOST_S": "0"}) == 0


@pytest.mark.ranks(at_least=2)
def test_the_end_of_a_process_is_told_to_all_unless_it_says_goodbye(comm: MPI.Intracomm) -> None:
    heard: list[str] = []
    # As if each rank were alone on its host; the last one goes without a word.
    topology = Topology(comm.rank, tuple(range(comm.size)))

    def tell(text: str) -> list[str]:
        return comm.allgather(text)

    polite, why = lifeline.open_lifeline(topology, tell, heard.append, survives=False)
    assert (polite is not None, why) == (True, "")
    assert polite is not None
    polite.close()
    comm.Barrier()
    rude, _ = lifeline.open_lifeline(topology, tell, heard.append, survives=False)
    assert rude is not None
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(lifeline, "_GRACE_S", 0.1)
        patched.setattr(lifeline, "see_it_end", lambda: None)
        comm.Barrier()
        if comm.rank == comm.size - 1:
            rude.hang_up()
        else:
            end_s = time.monotonic() + 20
            while not heard and time.monotonic() < end_s:
                time.sleep(0.01)
        comm.Barrier()
    if comm.rank < comm.size - 1:
        assert heard[0].startswith(f"rank {comm.size - 1}, on ")
        assert heard[0].endswith("has ended without a word")
    rude.close()
