"""Parts of the doctor: probes that die, notes, tokens, rounds of pairs, a GPU that is none."""

from __future__ import annotations

import itertools
import os
import sys
import time
from pathlib import Path

import pytest
from doctor_job import CHECKOUT

from kvcoll import apart, mpi_takes
from kvcoll.doctor import gpus, push, reach, software
from kvcoll.doctor.facts import Facts
from kvcoll.doctor.links import rounds_of
from kvcoll.doctor.notes import Notes, name_of_job

pytestmark = pytest.mark.single

# CuPy as far as the probes use it, on the CPU; WHERE is what MPI is told of its memory.
FAKE_CUPY = """
import numpy
from . import cuda
__version__ = "99.1"
float32 = numpy.float32
class Array:
    def __init__(self, host): self.host = host
    def __add__(self, other): return Array(self.host + other)
    def sum(self): return Array(self.host.sum())
    def get(self): return self.host
    @property
    def data(self):
        where = WHERE
        return Pointer(self.host.ctypes.data if where is None else where)
class Pointer:
    def __init__(self, ptr): self.ptr = ptr
def asarray(host): return Array(host.copy())
def arange(n, dtype=None): return Array(numpy.arange(n, dtype=dtype))
def zeros(n, dtype=None): return Array(numpy.zeros(n, dtype))
"""
FAKE_CUDA = """
from . import nccl
class Stream:
    def synchronize(self): pass
import threading
class Device:
    def __init__(self, number): self.number = number
    def use(self):
        assert self.number == 1
        with open(THREADS, "a") as file: print(threading.get_native_id(), file=file)
def get_current_stream(): return Stream()
def is_available(): return True
"""


def fake_cupy(folder: Path, where: str) -> None:
    """Write a CuPy whose arrays lie in host memory."""
    cuda = folder / "cupy" / "cuda"
    cuda.mkdir(parents=True)
    (cuda.parent / "__init__.py").write_text(FAKE_CUPY.replace("WHERE", where))
    (cuda / "__init__.py").write_text(FAKE_CUDA.replace("THREADS", repr(str(folder / "threads"))))
    (cuda / "nccl.py").write_text("available = True\ndef get_version(): return 23203\n")


def test_what_cupy_says_of_itself_and_of_nccl_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_cupy(tmp_path, "None")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = gpus.facts(has_cupy=True, try_mpi=False)
    assert (found["cupy"], found["nccl"]) == ("99.1", "2.32.3")
    assert found["mpi_takes"] == "not tried"


@pytest.mark.jobs
@pytest.mark.parametrize(("where", "takes"), [("None", True), ("8", False)])
def test_whether_mpi_takes_device_memory_is_tried_in_a_process_that_may_die_of_it(
    comm: object,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
    takes: bool,
) -> None:
    fake_cupy(tmp_path, where)
    monkeypatch.syspath_prepend(str(tmp_path))
    why = mpi_takes.tried(1)
    assert why == "" if takes else why.startswith(("signal", "exit code"))
    if takes:  # its GPU is the current one in both threads that call MPI
        assert len({*(tmp_path / "threads").read_text().split()}) == 2


def test_without_a_gpu_nothing_of_it_is_tried() -> None:
    found = gpus.facts(has_cupy=False, try_mpi=True)
    if found["devices"]:
        pytest.skip("there is a GPU")
    assert found["mpi_takes"].startswith("not tried")
    assert "cupy" not in found


@pytest.mark.waits
@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("import os; os.abort()", "signal 6 (SIGABRT)"),
        ("print('so it is'); raise SystemExit(3)", "exit code 3\nso it is"),
        ("import time; time.sleep(30)", "it did not end within 2 s"),
        ("print('no JSON')", "exit code 0\nno JSON"),
    ],
)
def test_how_a_probe_ended_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, words: str
) -> None:
    (tmp_path / "dying.py").write_text(f"def main():\n    {code}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert apart.ask("dying", limit_s=2) == ({}, words)


@pytest.mark.waits
def test_those_that_a_probe_has_started_end_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "parent.py").write_text(
        "import subprocess, sys, time\n"
        "def main(path):\n"
        "    own = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "    open(path, 'w').write(str(own.pid))\n"
        "    time.sleep(60)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    path, began = tmp_path / "pid", time.monotonic()
    assert apart.ask("parent", str(path), limit_s=5) == ({}, "it did not end within 5 s")
    assert time.monotonic() - began < 40
    stat = Path(f"/proc/{path.read_text()}/stat")
    for _ in range(100):  # it is gone, or waits for whoever inherits it to take note
        if not stat.exists() or stat.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            return
        time.sleep(0.1)
    pytest.fail("it goes on")


def test_a_probe_is_no_rank_of_the_job() -> None:
    told = {"PMI_RANK": "1", "OMPI_COMM_WORLD_RANK": "1", "OMPI_MCA_btl": "self", "HOME": "/"}
    assert apart.without_launcher(told) == {"OMPI_MCA_btl": "self", "HOME": "/"}


def test_notes_are_read_by_others_and_leave_nothing(tmp_path: Path) -> None:
    environ = {"XDG_CACHE_HOME": str(tmp_path)}
    first, second = Notes("job 1", environ), Notes("job 1", environ)
    first.leave(Facts(rank=0, host="a"))
    second.leave(Facts(rank=1, host="b", failure="no"))
    assert {k: one.host for k, one in first.read().items()} == {0: "a", 1: "b"}
    assert first.wait(2, 5.0)[1].failure == "no"
    assert Notes("job 2", environ).read() == {}
    second.leave_reached(1, [{"origin": 1, "target": 0}])
    assert first.read_reached() == [{"origin": 1, "target": 0}]
    second.remove(1)
    first.remove(0)
    assert list(tmp_path.iterdir()) == []


def test_notes_that_cannot_be_written_are_not_there() -> None:
    notes = Notes("job", {"XDG_CACHE_HOME": "/proc/nowhere"})
    notes.leave(Facts())
    notes.leave_reached(0, [])
    assert notes.wait(1, 0.1) == {}
    assert Notes("", {"HOME": "/"}).are_lost


@pytest.mark.parametrize(
    ("environ", "name"),
    [
        ({"PMIX_NAMESPACE": "prterun-a-1@1", "PMIX_RANK": "1"}, "prterun-a-1@1 "),
        ({"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "2", "PMI_RANK": "0"}, "7.2"),
        ({}, ""),
    ],
)
def test_a_job_has_a_name_that_its_ranks_know(environ: dict[str, str], name: str) -> None:
    assert name_of_job(environ) == name


def test_facts_of_another_version_are_read_as_far_as_they_are_known() -> None:
    assert Facts.from_json('{"host": "a", "colour": "red"}') == Facts(host="a")
    own = Facts(rank=3, limits={"as": None}, gpus={"devices": []})
    assert Facts.from_json(own.to_json()) == own


def test_a_host_is_reached_by_the_process_that_is_meant_only() -> None:
    port, token = reach.listen()
    addresses = {"lo": "127.0.0.1"}
    me = Facts(rank=0)
    right = Facts(rank=1, host="localhost", addresses=addresses, port=port, token=token)
    wrong = Facts(rank=2, host="no-such-host.invalid", addresses=addresses, port=port, token="x")
    first, second = reach.try_all(me, [me, right, wrong])
    assert (first["name"], first["addresses"]) == ("", {"127.0.0.1": ""})
    assert second["name"] == "the name is not known"
    assert second["addresses"] == {"127.0.0.1": "another machine answers"}


@pytest.mark.parametrize("n", range(9))
def test_all_pairs_come_once_and_nobody_has_two_partners_at_a_time(n: int) -> None:
    members = [10 * k for k in range(n)]
    rounds = list(rounds_of(members))
    pairs = [frozenset(pair) for pairs in rounds for pair in pairs]
    assert sorted(map(sorted, pairs)) == sorted(map(list, itertools.combinations(members, 2)))
    for one in rounds:
        busy = [rank for pair in one for rank in pair]
        assert len(busy) == len(set(busy))


def test_a_push_is_as_large_as_the_memory_allows() -> None:
    assert push.bytes_for(1 << 40, 8) == 100_000_000
    small = push.bytes_for(1 << 30, 4)
    assert 1_000_000 <= small < 100_000_000
    assert small % 4 == 0


@pytest.mark.parametrize(
    ("said", "family"),
    [
        ("mpirun (Open MPI) 5.0.11", "Open MPI"),
        ("HYDRA build details:\n    Version: 5.0.2", "MPICH"),
        ("Intel(R) MPI Library for Linux* OS", "Intel MPI"),
        ("something", ""),
    ],
)
def test_families_of_mpi_are_known_by_their_words(said: str, family: str) -> None:
    assert software.family(said) == family


def test_secrets_of_the_environment_are_not_shown() -> None:
    told = {"NCCL_DEBUG": "INFO", "SLURM_JWT_TOKEN": "x", "AWS_SECRET": "x", "HOME": "/"}
    assert software.environ(told) == {"NCCL_DEBUG": "INFO"}


def test_a_probe_runs_the_kvcoll_of_this_process() -> None:
    assert str(CHECKOUT) in apart.command("kvcoll.doctor.trial", "load")[2]
    assert apart.command("x")[0] == sys.executable
    assert os.path.samefile(software.FOLDER, CHECKOUT / "kvcoll")
