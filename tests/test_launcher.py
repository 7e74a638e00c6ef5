"""A launcher of another MPI is found out, and no rightful one is accused."""

from __future__ import annotations

import pytest

from kvcoll.errors import LaunchError
from kvcoll.transport.launcher import check_launcher

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


@pytest.mark.parametrize(("world_size", "environ"), FINE, ids=str)
def test_a_launcher_that_belongs_to_the_mpi_passes(
    world_size: int, environ: dict[str, str]
) -> None:
    check_launcher(world_size, "MPICH 5.0.2", environ)


@pytest.mark.parametrize(("environ", "ranks", "variable"), WRONG, ids=str)
def test_a_launcher_of_another_mpi_is_named_with_the_cure(
    environ: dict[str, str], ranks: str, variable: str
) -> None:
    with pytest.raises(LaunchError) as raised:
        check_launcher(1, "MPICH 5.0.2", environ)
    assert str(raised.value) == (
        f"the launcher started {ranks} ranks ({variable}), but MPICH 5.0.2 sees one: the launcher "
        "belongs to another MPI. Use the mpirun of the environment that holds this library, or "
        "under SLURM srun --mpi=pmix for Open MPI and srun --mpi=pmi2 for MPICH"
    )


def test_the_environment_of_the_process_is_what_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "7")
    with pytest.raises(LaunchError, match=r"started 7 ranks \(OMPI_COMM_WORLD_SIZE\)"):
        check_launcher(1, "MPICH 5.0.2")
