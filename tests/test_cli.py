"""The command line: its help, what it refuses, and the short commands env and bench."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path

import numpy as np
import pytest
from doctor_job import CHECKOUT, kvcoll
from mpi_job import clean_environment, run_job

import kvcoll as package
from kvcoll.cli import main

pytestmark = pytest.mark.jobs


def test_help_names_the_commands_and_what_each_is_for(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    said = capsys.readouterr().out
    for command in ("doctor", "env", "bench"):
        assert f"    {command} " in said


def test_help_of_the_doctor_shows_how_to_start_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["doctor", "--help"])
    said = capsys.readouterr().out
    for command in ("mpirun -n 4 python -m kvcoll doctor", "srun --mpi=pmix", "Exit code: 0"):
        assert command in said


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"kvcoll {package.__version__}\n"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "required: COMMAND"),
        (["doktor"], "invalid choice: 'doktor'"),
        (["doctor", "--limit", "0"], "a number of seconds above 0, got 0"),
        (["doctor", "--limit", "nan"], "a number of seconds above 0, got nan"),
        (["bench", "--sizes", "0"], "a number of elements above 0, got 0"),
        (["bench", "--sizes", "many"], "invalid"),
    ],
)
def test_a_mistake_in_the_command_is_told_with_exit_code_2(
    words: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(words)
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("variable", ["OMPI_COMM_WORLD", "PMI"])
def test_of_several_ranks_the_first_alone_tells_a_mistake(
    variable: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in set(os.environ) - set(clean_environment()):
        monkeypatch.delenv(name)
    monkeypatch.setenv(f"{variable}_RANK", "1")
    monkeypatch.setenv(f"{variable}_SIZE", "2")
    with pytest.raises(SystemExit, match="2"):
        main(["doktor"])
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", "")


def test_env_tells_versions_and_settings_and_no_secrets(tmp_path: Path) -> None:
    env = {"OMP_NUM_THREADS": "3", "KVCOLL_API_TOKEN": "hush"}
    job = kvcoll("env", folder=tmp_path, env=env)
    assert job.returncode == 0, job
    assert f"kvcoll      {package.__version__}, {CHECKOUT / 'kvcoll'}\n" in job.stdout
    assert f"NumPy       {np.__version__}\n" in job.stdout
    assert "OMP_NUM_THREADS=3" in job.stdout
    assert "hush" not in job.stdout


def test_env_as_json_has_the_same(tmp_path: Path) -> None:
    job = kvcoll("env", "--json", folder=tmp_path)
    told = json.loads(job.stdout)
    assert told["versions"]["Python"] == platform.python_version()
    assert told["source"]


def test_env_is_told_once_by_a_job_of_several_ranks(comm: object) -> None:
    job = run_job(2, "-m", "kvcoll", "env", env={"PYTHONPATH": str(CHECKOUT)})
    assert job.returncode == 0, job
    assert job.stdout.count("NumPy ") == 1
    assert ", 2 ranks" in job.stdout


def test_bench_times_each_size_that_was_asked_for(comm: object) -> None:
    words = ("-m", "kvcoll", "bench", "--sizes", "10", "2_000", "--json")
    job = run_job(2, *words, env={"PYTHONPATH": str(CHECKOUT)})
    assert job.returncode == 0, job
    told = json.loads(job.stdout)
    assert (told["ranks"], told["hosts"], told["kvcoll"]) == (2, 1, package.__version__)
    assert [row["n_elements"] for row in told["rows"]] == [10, 2000]
    for row in told["rows"]:
        assert min(row["push_pull_s"], row["own_arrays_s"], row["allreduce_s"]) > 0


def test_bench_prints_a_table_for_people(comm: object) -> None:
    job = run_job(1, "-m", "kvcoll", "bench", "--sizes", "5000", env={"PYTHONPATH": str(CHECKOUT)})
    assert job.returncode == 0, job
    title, header, row = job.stdout.splitlines()
    assert title.startswith(f"kvcoll {package.__version__}: 1 rank on 1 host, ")
    assert header.split("  ")[-1].strip() == "MPI_Allreduce"
    assert row.split()[0] == "5,000"
