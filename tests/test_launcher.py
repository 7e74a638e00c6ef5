"""A launcher of another MPI is found out, no rightful one is accused, and none is missed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from mpi_job import Job, clean_environment

from kvcoll.errors import LaunchError
from kvcoll.transport import launcher
from kvcoll.transport.launcher import (
    check_before_start,
    check_launcher,
    must_check_before_start,
    name_of_library,
    say_if_alone,
)

pytestmark = pytest.mark.single

FINE: list[tuple[int, dict[str, str]]] = [
    (1, {}),
    (1, {"OMPI_COMM_WORLD_SIZE": "1"}),
    (1, {"PMI_SIZE": "1"}),
    (1, {"SLURM_STEP_NUM_TASKS": "1"}),
    (4, {"OMPI_COMM_WORLD_SIZE": "4"}),
    (4, {"PMI_SIZE": "4"}),
    (2, {"OMPI_COMM_WORLD_SIZE": "4"}),  # a part of the job, spawned or split off
    (1, {"OMPI_COMM_WORLD_SIZE": ""}),
    (1, {"PMI_SIZE": "four"}),
    (1, {"PMI_SIZE": "-4"}),
    # An mpirun of one rank in a step whose tasks are its daemons.
    (1, {"OMPI_COMM_WORLD_SIZE": "1", "SLURM_STEP_NUM_TASKS": "8"}),
    (1, {"SLURM_STEP_NUM_TASKS": "many"}),
    (1, {"SLURM_NTASKS": "8"}),  # salloc's: no step was started
]
WRONG: list[tuple[dict[str, str], str, str]] = [
    ({"OMPI_COMM_WORLD_SIZE": "2"}, "2", "OMPI_COMM_WORLD_SIZE"),
    ({"PMI_SIZE": "16"}, "16", "PMI_SIZE"),
    ({"MV2_COMM_WORLD_SIZE": "3"}, "3", "MV2_COMM_WORLD_SIZE"),
    ({"SLURM_STEP_NUM_TASKS": "4"}, "4", "SLURM_STEP_NUM_TASKS"),
    ({"OMPI_COMM_WORLD_SIZE": "", "SLURM_STEP_NUM_TASKS": "4"}, "4", "SLURM_STEP_NUM_TASKS"),
    ({"OMPI_COMM_WORLD_SIZE": "1", "PMI_SIZE": "5"}, "5", "PMI_SIZE"),
]
LIBRARIES = [("MPICH 5.0.2", "pmi2"), ("Open MPI v5.0.11", "pmix")]
MPICH = "MPICH Version:      5.0.2\nMPICH Device:       ch4\nMPICH configure:    --with-pm=hydra"


@pytest.mark.parametrize(("world_size", "environ"), FINE, ids=str)
def test_a_launcher_that_belongs_to_the_mpi_passes(
    world_size: int, environ: dict[str, str]
) -> None:
    check_launcher(world_size, "MPICH 5.0.2", environ)


@pytest.mark.parametrize(("library", "kind"), LIBRARIES)
@pytest.mark.parametrize(("environ", "ranks", "variable"), WRONG, ids=str)
def test_a_launcher_of_another_mpi_is_named_with_the_cure(
    environ: dict[str, str], ranks: str, variable: str, library: str, kind: str
) -> None:
    with pytest.raises(LaunchError) as raised:
        check_launcher(1, library, environ)
    assert str(raised.value) == (
        f"the launcher started {ranks} ranks ({variable}), but {library} sees one: the launcher "
        "belongs to another MPI. Use the mpirun of the environment that holds this library, or "
        f"under SLURM srun --mpi={kind}"
    )


def test_the_environment_of_the_process_is_what_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "7")
    with pytest.raises(LaunchError, match=r"started 7 ranks \(OMPI_COMM_WORLD_SIZE\)"):
        check_launcher(1, "MPICH 5.0.2")


@pytest.mark.parametrize(
    ("version", "name"),
    [
        (MPICH, "MPICH 5.0.2"),
        (
            "Open MPI v5.0.11, package: Open MPI root@host Distribution, ident: 5",
            "Open MPI v5.0.11",
        ),
        ("Intel(R) MPI Library 2021.13\n", "Intel(R) MPI Library 2021.13"),
        ("", "MPI"),
    ],
)
def test_a_library_is_named_in_few_words(version: str, name: str) -> None:
    assert name_of_library(version) == name


@pytest.mark.parametrize(
    ("environ", "must"),
    [
        ({"PMIX_NAMESPACE": "slurm.pmix.1.0"}, True),  # srun --mpi=pmix
        ({"PMIX_NAMESPACE": "prterun-1", "OMPI_COMM_WORLD_SIZE": "2"}, False),
        ({"PMIX_NAMESPACE": "x", "PMI_SIZE": "2"}, False),  # a launcher that speaks both
        ({"PMI_SIZE": "2"}, False),
        ({}, False),
    ],
)
def test_only_under_a_launcher_of_pmix_alone_a_library_is_asked_before_it_starts(
    environ: dict[str, str], must: bool
) -> None:
    assert must_check_before_start(environ) is must


def test_an_mpich_without_pmix_is_refused_before_it_ends_the_process() -> None:
    with pytest.raises(LaunchError) as raised:
        check_before_start(MPICH)
    assert str(raised.value) == (
        "the launcher speaks PMIx (PMIX_NAMESPACE, as by srun --mpi=pmix), but MPICH 5.0.2 was "
        "built without it and cannot start. Use the mpirun of the environment that holds this "
        "library, or under SLURM srun --mpi=pmi2"
    )


@pytest.mark.parametrize("version", [MPICH + " --with-pmix=/usr", "Open MPI v5.0.11, package"])
def test_a_library_that_knows_pmix_is_let_start(version: str) -> None:
    check_before_start(version)


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    monkeypatch.setattr(launcher, "_alone_was_said", False)

    def say(
        environ: dict[str, str], size: int = 1, script: str = "a/train.py", mpi: str = "MPICH 5.0.2"
    ) -> str:
        say_if_alone(size, mpi, environ, [script, "--lr", "1"])
        return capsys.readouterr().err

    return say


def test_a_rank_that_nobody_launched_is_told_once_what_to_type(
    said: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))  # no mpirun is beside it
    assert said({}) == (
        "kvcoll: this distributed store has one rank, because no launcher started the program. "
        "For several: mpirun -n 4 python a/train.py\n"
    )
    assert said({}) == ""


@pytest.mark.parametrize("script", ["", "-c", "-m", "/usr/bin/ipython"])
def test_without_a_script_the_command_has_a_place_for_one(
    said: Callable[..., str], script: str
) -> None:
    assert said({}, script=script).endswith("mpirun -n 4 python SCRIPT.py\n")


@pytest.mark.parametrize(("library", "kind"), LIBRARIES)
def test_in_a_slurm_job_the_command_is_srun(
    said: Callable[..., str], library: str, kind: str
) -> None:
    told = said({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"}, mpi=library)
    assert told.endswith(f"For several: srun --mpi={kind} python a/train.py\n")


def test_the_mpirun_beside_python_is_named_by_its_path_where_another_would_be_found(
    said: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    own = tmp_path / "mpirun"
    own.touch(mode=0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", "/nowhere")
    assert f"For several: {own} -n 4 python" in said({})
    monkeypatch.setattr(launcher, "_alone_was_said", False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "For several: mpirun -n 4 python" in said({})


@pytest.mark.parametrize(
    ("environ", "size"),
    [
        ({}, 2),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, 1),
        ({"PMI_SIZE": "1"}, 1),
        ({"SLURM_STEP_NUM_TASKS": "1"}, 1),
        ({"PMIX_NAMESPACE": "slurm.pmix.1.0"}, 1),
    ],
)
def test_a_rank_that_was_launched_is_told_nothing(
    said: Callable[..., str], environ: dict[str, str], size: int
) -> None:
    assert said(environ, size) == ""


TWO_STORES = """
import sys, kvcoll
with kvcoll.create('dist_sync') as a, kvcoll.create('dist_sync') as b:
    sys.stdout.write(f'{a.num_workers} {b.num_workers}\\n')
"""
LOCAL = "import kvcoll; kvcoll.create('local'); print('ok')"
OF_A_PART = "import kvcoll; from mpi4py import MPI; kvcoll.create('dist', comm=MPI.COMM_SELF)"


def run_alone(code: str) -> Job:
    """Run Python code without a launcher."""
    of_slurm = [name for name in clean_environment() if name.startswith("SLURM_")]
    env = {name: value for name, value in clean_environment().items() if name not in of_slurm}
    ended = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=40
    )
    return Job(ended.returncode, ended.stdout, ended.stderr, timed_out=False)


def test_a_program_started_without_a_launcher_runs_and_says_so_once(comm: object) -> None:
    job = run_alone(TWO_STORES)
    assert (job.returncode, job.stdout) == (0, "1 1\n")
    assert job.stderr.count("kvcoll: this distributed store has one rank") == 1


@pytest.mark.parametrize("code", [LOCAL, OF_A_PART])
def test_a_store_that_is_meant_to_have_one_rank_says_nothing(comm: object, code: str) -> None:
    job = run_alone(code)
    assert job.returncode == 0
    assert "kvcoll" not in job.stderr


@pytest.mark.jobs
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_program_started_by_mpirun_is_told_nothing(
    mpirun: Callable[..., Job], ranks: int
) -> None:
    job = mpirun(ranks, "-c", TWO_STORES)
    assert job.returncode == 0
    assert job.stdout == f"{ranks} {ranks}\n" * ranks
    assert "kvcoll" not in job.stderr
