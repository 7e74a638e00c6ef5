"""The shell's part: whose Python and MPI a command or a job gets, and how ranks lie on cores."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
from mpi_job import clean_environment

pytestmark = pytest.mark.single

ROOT = Path(__file__).resolve().parents[1]
SOURCE = "source scripts/environment.sh && "
BINDING = "PRTE_MCA_hwloc_default_binding_policy"


def made(folder: Path, mpi: str) -> Path:
    """Make a folder that scripts/environment.sh takes for the environment it made for this MPI."""
    (folder / "bin").mkdir(parents=True)
    (folder / "bin/python").symlink_to(sys.executable)
    settings = b"".join((ROOT / name).read_bytes() for name in ("setup.cfg", "pyproject.toml"))
    version = f"{sys.version_info[:3]} {sys.base_prefix}"
    digest = hashlib.sha256(f"{ROOT}\n".encode() + settings).hexdigest()
    (folder / "kvcoll-stamp").write_text(f"{mpi} {folder} {version}\n{digest}  -\n")
    return folder


def said_by(script: str, **variables: str) -> str:
    """Run a script of bash in the repository's folder, and return the last line it prints."""
    env = clean_environment() | {"PYTHON": sys.executable} | variables
    command = ["bash", "-c", script]
    ran = subprocess.run(
        command, cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=60
    )
    assert ran.returncode == 0, ran
    return ran.stdout.splitlines()[-1]


def test_the_environment_that_was_sourced_last_comes_first(tmp_path: Path) -> None:
    one, other = made(tmp_path / "one", "openmpi"), made(tmp_path / "other", "mpich")
    first = f"KVCOLL_VENV={one} KVCOLL_MPI=openmpi; {SOURCE}"
    second = f"KVCOLL_VENV={other} KVCOLL_MPI=mpich; {SOURCE}"
    assert said_by(f"{first}{second}command -v python") == f"{other}/bin/python"
    assert said_by(f"{first}{second}{first}command -v python") == f"{one}/bin/python"


def test_an_environment_is_the_same_by_a_link_to_it(tmp_path: Path) -> None:
    venv, link = made(tmp_path / "venv", "openmpi"), tmp_path / "link"
    link.symlink_to(venv)
    variables = {"KVCOLL_VENV": str(link), "KVCOLL_MPI": "openmpi"}
    assert said_by(f"{SOURCE}command -v python", **variables) == f"{venv}/bin/python"
    assert (venv / "kvcoll-stamp").exists()


def test_mpirun_by_hand_binds_no_rank_to_a_core_unless_it_is_told_to(tmp_path: Path) -> None:
    venv = str(made(tmp_path / "venv", "openmpi"))
    said = f"{SOURCE}printenv {BINDING}"
    assert said_by(said, KVCOLL_VENV=venv, KVCOLL_MPI="openmpi") == "none"
    told = {BINDING: "core", "KVCOLL_VENV": venv, "KVCOLL_MPI": "openmpi"}
    assert said_by(said, **told) == "core"


def test_a_job_has_the_mpi_that_it_names_whichever_environment_is_active(tmp_path: Path) -> None:
    venv = made(tmp_path / "venv", "mpich")
    active = tmp_path / "active"
    active.mkdir()
    (active / "python").write_text("#!/bin/sh\n")  # finds all that it is asked to import
    (active / "python").chmod(0o755)
    script = f"PATH={active}:$PATH; source scripts/slurm.sh && command -v python"
    assert said_by(script, KVCOLL_VENV=str(venv), KVCOLL_MPI="") == f"{active}/python"
    assert said_by(script, KVCOLL_VENV=str(venv), KVCOLL_MPI="mpich") == f"{venv}/bin/python"


MPIRUN = """#!/bin/sh
[ "$1" = --version ] && echo 'mpirun (Open MPI) 5.0.11' && exit
[ -z "$KVCOLL_ENDED_FILE" ] || case "$*" in *"-x KVCOLL_ENDED_FILE"*) ;; *) exit 9 ;; esac
[ ! -e ended ] || echo ended >"$KVCOLL_ENDED_FILE"
exit "${ENDS_WITH:-0}"
"""
PYTHON = """#!/bin/sh
case "$2" in *get_vendor*) echo 'Open MPI' ;; esac
"""


@pytest.mark.parametrize(
    ("n_nodes", "has_ended", "ends_with", "code"),
    [(1, False, 0, 0), (2, True, 0, 0), (2, False, 0, 88), (2, False, 3, 3), (2, True, 1, 1)],
)
@pytest.mark.parametrize("elastic", ["", "yes"])
def test_a_job_over_nodes_of_which_mpirun_says_that_it_ended_well_has_if_rank_0_says_so(
    tmp_path: Path, elastic: str, n_nodes: int, has_ended: bool, ends_with: int, code: int
) -> None:
    if elastic and n_nodes == 1:
        code = 88  # under ULFM it is always looked at
    active = tmp_path / "active"
    active.mkdir()
    for name, text in (("mpirun", MPIRUN), ("python", PYTHON)):
        (active / name).write_text(text)
        (active / name).chmod(0o755)
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    if has_ended:
        (tmp_path / "ended").touch()
    env = clean_environment() | {
        "PATH": f"{active}:/usr/bin:/bin",
        "KVCOLL_MPI": "",
        "KVCOLL_LAUNCHER": "mpirun",
        "KVCOLL_ELASTIC": elastic,
        "SLURM_NTASKS": "2",
        "SLURM_NNODES": str(n_nodes),
        "ENDS_WITH": str(ends_with),
    }
    ran = subprocess.run(
        ["bash", "-c", "source scripts/slurm.sh && kvcoll_launch program.py"],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert ran.returncode == code, ran
    assert ("the job has not come to its end" in ran.stderr) == (code == 88)
    assert not list(tmp_path.glob(".kvcoll-ended*"))
