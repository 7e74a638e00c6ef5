"""The job scripts train under a real SLURM, stop and go on; a wrong launcher is an error."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import fake_cupy
import pytest
from cluster.hosts import CHECKOUT, pretend_hosts
from cluster.slurm import Ended, Slurm, slurm_on
from mpi_job import is_open_mpi

import kvcoll

pytestmark = [pytest.mark.single, pytest.mark.limit(120), pytest.mark.long]

TRAIN: Final = "scripts/train.sbatch"
TRAIN_ON_GPUS: Final = "scripts/train_gpu.sbatch"
SHORT: Final = ("--epochs", "4")
COUNT_RANKS: Final = (
    "import kvcoll, sys; kv = kvcoll.create('dist_sync'); "
    "sys.stdout.write(f'rank {kv.rank} of {kv.num_workers} on {kv.num_hosts} hosts\\n')"
)


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    with pretend_hosts(3) as hosts, slurm_on(hosts, gpus=2) as started:
        yield started


def own_type() -> str:
    """Return what srun must speak with the MPI that this Python loads."""
    return "pmix" if is_open_mpi() else "pmi2"


def started_by(ended: Ended) -> str:
    """Return the name of the program that started the ranks."""
    command = ended.outputs[0].partition("+ ")[2].split()[0]
    return Path(command).name


def trained(slurm: Slurm, *arguments: str, launcher: str = "") -> tuple[Ended, dict[str, Any]]:
    """Submit a training, see that it reaches its accuracy, and return what it wrote."""
    wrote = slurm.hosts.folder / "curve.json"
    wrote.unlink(missing_ok=True)
    env = {"KVCOLL_LAUNCHER": launcher} if launcher else {}
    ended = slurm.sbatch(*arguments, *SHORT, "--json", wrote, env=env)
    assert ended.states == ["COMPLETED 0:0"], ended
    curve = json.loads(wrote.read_text())
    assert curve["epochs"][-1]["accuracy"] >= 0.95
    ranks = curve["ranks"]
    assert f"replicas: {ranks} of {ranks} the same bits" in ended.outputs[0]
    return ended, curve


@pytest.mark.parametrize("launcher", ["srun", "mpirun"])
def test_the_job_script_trains_by_either_launcher(slurm: Slurm, launcher: str) -> None:
    ended, curve = trained(slurm, TRAIN, launcher=launcher)
    assert (curve["ranks"], curve["hosts"]) == (4, 2)
    assert started_by(ended) == launcher


@pytest.mark.parametrize("launcher", ["srun", "mpirun"])
def test_nodes_may_have_different_numbers_of_tasks(slurm: Slurm, launcher: str) -> None:
    _, curve = trained(slurm, "--nodes=2", "--ntasks=3", TRAIN, launcher=launcher)
    assert (curve["ranks"], curve["hosts"]) == (3, 2)


def test_tasks_per_node_and_the_launcher_that_suits_the_mpi_by_default(slurm: Slurm) -> None:
    ended, curve = trained(slurm, "--nodes=3", "--ntasks-per-node=1", TRAIN)
    assert (curve["ranks"], curve["hosts"]) == (3, 3)
    assert started_by(ended) == ("srun" if is_open_mpi() else "mpirun")


def test_each_job_of_an_array_trains_with_a_seed_of_its_own(slurm: Slurm) -> None:
    ended = slurm.sbatch("--array=5,6", "--nodes=1", TRAIN, *SHORT)
    assert ended.states == ["COMPLETED 0:0"] * 2, ended
    for seed in (5, 6):
        assert sum(f"seed {seed}\n" in output for output in ended.outputs) == 1


def test_the_job_script_for_gpus_starts_a_rank_for_each(slurm: Slurm) -> None:
    # SLURM's GPUs are files here: so the store is one on the host.
    _, curve = trained(slurm, "--cpus-per-task=1", TRAIN_ON_GPUS, "--kv-store", "dist_sync")
    assert (curve["ranks"], curve["hosts"]) == (4, 2)
    refused = slurm.on_kv1("sbatch", "--gpus-per-node=3", "--cpus-per-task=1", TRAIN_ON_GPUS)
    assert refused.returncode != 0  # nodes have 2: so the GPUs are truly asked for


@pytest.mark.skipif(shutil.which("g++") is None, reason="kernels of a fake GPU are compiled by g++")
def test_the_job_script_and_mpirun_in_an_allocation_train_on_gpus(slurm: Slurm) -> None:
    folder = slurm.hosts.folder / "cupy"
    folder.mkdir()
    env = fake_cupy.environment(folder)
    ended = slurm.sbatch("--cpus-per-task=1", TRAIN_ON_GPUS, *SHORT, env=env)
    assert ended.states == ["COMPLETED 0:0"], ended
    nodes = ("--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2")
    by_hand = ("mpirun", "-np", "4", "python", "scripts/train.py", "--kv-store", "dist_device_sync")
    allocated = slurm.on_kv1("salloc", *nodes, *by_hand, *SHORT, env=env, timeout_s=60)
    assert allocated.returncode == 0, allocated
    for text in (ended.outputs[0], allocated.stdout):
        assert "store     dist_device_sync, 4 ranks on 2 hosts" in text
        assert "replicas: 4 of 4 the same bits" in text


def test_a_job_whose_training_fails_has_failed(slurm: Slurm) -> None:
    ended = slurm.sbatch("--nodes=1", TRAIN, "--epochs", "1", "--target-accuracy", "1")
    assert ended.states == ["FAILED 1:0"], ended
    assert "missed: test accuracy is below the target" in ended.outputs[0]


# Of 180 steps an epoch: long enough to be signalled in the midst of it.
MANY_STEPS: Final = ("--batch-size", "8", "--epochs", "5", "--optimizer", "adam")


@pytest.mark.limit(240)
@pytest.mark.parametrize("launcher", ["srun", "mpirun"])
def test_a_job_that_is_told_to_stop_saves_is_queued_again_and_ends_as_if_never_stopped(
    slurm: Slurm, launcher: str
) -> None:
    env = {"KVCOLL_LAUNCHER": launcher}
    whole = slurm.sbatch(TRAIN, *MANY_STEPS, env=env)
    job = slurm.submit(TRAIN, *MANY_STEPS, env=env)
    assert job.wait_for("\n    1  ", 40), job.texts()  # the line of the first epoch
    # As SLURM does for #SBATCH --signal=B:USR1@60, a minute before the end.
    signalled = slurm.on_kv1("scancel", "--batch", "--signal=USR1", job.number)
    assert signalled.returncode == 0, signalled
    ended = slurm.ended(job, 120)
    assert ended.states == ["COMPLETED 0:0"], ended
    (said,) = ended.outputs
    assert "queued again" in said
    assert re.search(r"resumed   \S+, after epoch [1-9] and \d+ steps\n", said), said
    found, expected = (re.search(r"blake2b \w+", text) for text in (said, whole.outputs[0]))
    assert found
    assert expected
    assert found[0] == expected[0]
    versions = [
        kvcoll.load(slurm.hosts.folder / "checkpoints" / number)[1].version
        for number in (str(int(job.number) - 1), job.number)
    ]
    assert versions == [5 * 180] * 2


def test_a_job_is_told_to_stop_before_its_time_limit_comes(slurm: Slurm) -> None:
    endless = ("--epochs", "1000000", "--target-accuracy", "0")
    job = slurm.submit("--nodes=1", "--time=1", TRAIN, *endless)
    try:
        assert job.wait_for("resumed   ", 100), job.texts()  # SLURM looks at limits each 30 s
    finally:
        slurm.on_kv1("scancel", job.number)
    slurm.ended(job)
    assert "stopped before its time limit: queued again" in job.texts()[0]


def test_a_launcher_that_is_not_known_is_named(slurm: Slurm) -> None:
    ended = slurm.sbatch("--nodes=1", TRAIN, env={"KVCOLL_LAUNCHER": "ssh"})
    assert ended.states == ["FAILED 2:0"], ended
    assert "KVCOLL_LAUNCHER is 'ssh': set it to srun or mpirun" in ended.outputs[0]


def test_a_job_submitted_from_another_folder_says_from_where(slurm: Slurm) -> None:
    ended = slurm.sbatch("--nodes=1", CHECKOUT / TRAIN, folder=Path("/var"))
    assert ended.states == ["FAILED 1:0"], ended
    assert "kvcoll: /var is not kvcoll's folder: submit the job from there" in ended.outputs[0]


def test_srun_starts_one_job_of_all_tasks(slurm: Slurm) -> None:
    netmod = {} if is_open_mpi() else {"MPIR_CVAR_CH4_NETMOD": "ofi"}
    srun = ("srun", "-K", "--nodes=2", "--ntasks=3", f"--mpi={own_type()}")
    job = slurm.on_kv1(*srun, "python", "-c", COUNT_RANKS, env=netmod)
    assert job.returncode == 0, job
    assert sorted(job.stdout.splitlines()) == [f"rank {k} of 3 on 2 hosts" for k in range(3)]


def own_words(mpi_type: str) -> str:
    """Return what must be said under srun --mpi=TYPE, which is not this MPI's."""
    from mpi4py import MPI

    if is_open_mpi() and MPI.get_vendor()[1] < (5, 0, 0):
        return "OMPI was not built with SLURM's PMI support"  # it ends the process by itself
    if mpi_type == "pmix":
        return "LaunchError: the launcher speaks PMIx (PMIX_NAMESPACE"
    variable = "PMI_SIZE" if mpi_type == "pmi2" else "SLURM_STEP_NUM_TASKS"
    return f"LaunchError: the launcher started 2 ranks ({variable}), but"


@pytest.mark.parametrize("mpi_type", ["none", "the other MPI's"])
def test_srun_that_does_not_speak_with_this_mpi_is_an_error_at_once(
    slurm: Slurm, mpi_type: str
) -> None:
    if mpi_type != "none":
        mpi_type = "pmi2" if is_open_mpi() else "pmix"
    srun = ("srun", "-K", "--ntasks=2", f"--mpi={mpi_type}")
    job = slurm.on_kv1(*srun, "python", "-c", COUNT_RANKS)
    assert not job.timed_out
    assert job.returncode != 0
    assert job.stdout == ""
    assert own_words(mpi_type) in job.stderr
    if "LaunchError" in job.stderr:
        assert f"srun --mpi={own_type()}" in job.stderr


def test_a_program_in_a_job_without_a_launcher_is_told_to_use_srun(slurm: Slurm) -> None:
    ended = slurm.sbatch("--ntasks=2", "--wrap", f'python -c "{COUNT_RANKS}"')
    assert ended.states == ["COMPLETED 0:0"], ended
    assert "rank 0 of 1 on 1 hosts" in ended.outputs[0]
    assert f"For several: srun --mpi={own_type()} python SCRIPT.py" in ended.outputs[0]
