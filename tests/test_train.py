"""scripts/train.py as a person starts it: its curve, its files, its proof, and what it refuses."""

from __future__ import annotations

import functools
import itertools
import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from marks import needs
from mpi_job import Job, clean_environment

import kvcoll

pytestmark = [pytest.mark.jobs, pytest.mark.long, needs("train", "scripts/train.py")]

SCRIPT = Path(__file__).parents[1] / "scripts" / "train.py"
# The jobs use the kvcoll that the suite uses, be it installed or not.
PATHS = (SCRIPT.parent, Path(kvcoll.__file__).parents[1], os.environ.get("PYTHONPATH", ""))
ENVIRONMENT = {"PYTHONPATH": os.pathsep.join(map(str, PATHS))}
ANY_ACCURACY = ("--target-accuracy", "0")
Start = Callable[..., Job]


@pytest.fixture
def start(mpirun: Start) -> Start:
    """Return what starts Python with arguments on that many ranks."""
    return functools.partial(mpirun, env=ENVIRONMENT)


def start_alone(*arguments: str | Path, paths: str = ENVIRONMENT["PYTHONPATH"]) -> Job:
    """Start Python with arguments in one process, without mpirun."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=clean_environment() | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=40,
    )
    return Job(done.returncode, done.stdout, done.stderr, timed_out=False)


def train_alone(*options: str | Path) -> Job:
    """Run the script with a local store."""
    return start_alone(SCRIPT, "--kv-store", "local", *options)


def column(path: Path, name: str) -> list[float]:
    """Return one number of every epoch from what --json wrote."""
    return [epoch[name] for epoch in json.loads(path.read_text())["epochs"]]


@pytest.mark.limit(120)  # five runs, one after the other
def test_one_to_four_ranks_and_a_local_store_train_along_one_curve(
    start: Start, tmp_path: Path
) -> None:
    # 1,438 samples in batches of 50: the shares are uneven, and so is the last batch.
    options = ("--epochs", "4", "--batch-size", "50", *ANY_ACCURACY, "--json")
    local = tmp_path / "local.json"
    assert train_alone(*options, local).returncode == 0
    losses, accuracies = column(local, "loss"), column(local, "accuracy")
    assert all(later < 0.9 * earlier for earlier, later in itertools.pairwise(losses))
    for ranks in (1, 2, 3, 4):
        path = tmp_path / f"{ranks}.json"
        job = start(ranks, SCRIPT, *options, path)
        assert job.returncode == 0, job.stderr
        assert f"replicas: {ranks} of {ranks} the same bits (blake2b " in job.stdout
        assert job.stdout.count(f"store     dist_sync, {ranks} rank") == 1
        np.testing.assert_allclose(column(path, "loss"), losses, rtol=1e-4)
        np.testing.assert_allclose(column(path, "accuracy"), accuracies, atol=1.5 / 359)


def test_a_rank_whose_share_of_a_batch_is_empty_changes_nothing(
    start: Start, tmp_path: Path
) -> None:
    # 1,438 samples: of the second and last batch of each epoch rank 1 has none.
    options = ("--epochs", "3", "--batch-size", "1437", *ANY_ACCURACY, "--json")
    local, shared = tmp_path / "local.json", tmp_path / "shared.json"
    assert train_alone(*options, local).returncode == 0
    job = start(2, SCRIPT, *options, shared)
    assert job.returncode == 0, job.stderr
    assert column(local, "loss")[-1] < column(local, "loss")[0]
    np.testing.assert_allclose(column(shared, "loss"), column(local, "loss"), rtol=1e-4)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_two_ranks_reach_95_percent_as_they_come(
    start: Start, tmp_path: Path, optimizer: str
) -> None:
    path = tmp_path / "run.json"
    job = start(2, SCRIPT, "--optimizer", optimizer, "--json", path)
    assert job.returncode == 0, job.stderr
    assert column(path, "accuracy")[-1] >= 0.95
    assert 0 < sum(column(path, "store_s")) < sum(column(path, "train_s"))
    for word in ("samples/s", "% of the time in the store", "replicas: 2 of 2 the same bits"):
        assert word in job.stdout
    assert "missed" not in job.stdout
    assert "\r" not in job.stdout.replace("\r\n", "\n"), "there is a bar without a terminal"


def test_weights_start_another_run_on_two_ranks_where_the_first_ended(
    start: Start, tmp_path: Path
) -> None:
    weights, first, second = (tmp_path / name for name in ("digits.weights", "1.json", "2.json"))
    options = ("--epochs", "3", *ANY_ACCURACY)
    assert train_alone(*options, "--weights", weights, "--json", first).returncode == 0
    assert sorted(tmp_path.iterdir()) == [first, weights], "a temporary file is left"
    job = start(2, SCRIPT, "--start-from", weights, "--seed", "7", *options, "--json", second)
    assert job.returncode == 0, job.stderr
    assert column(second, "loss")[0] == pytest.approx(column(first, "loss")[-1], rel=1e-5)
    assert column(second, "loss")[-1] < column(first, "loss")[-1]


def test_weights_of_another_network_or_of_no_network_are_refused(tmp_path: Path) -> None:
    weights, foreign = tmp_path / "digits.safetensors", tmp_path / "foreign.safetensors"
    options = ("--epochs", "1", *ANY_ACCURACY)
    assert train_alone(*options, "--hidden", "8", "--weights", weights).returncode == 0
    foreign.write_bytes(b"these are no weights")
    wider = train_alone(*options, "--hidden", "9", "--start-from", weights)
    no_weights = train_alone(*options, "--start-from", foreign)
    assert [wider.returncode, no_weights.returncode] == [2, 2]
    assert "layer1_bias: expected float32[9], got float32[8]" in wider.stderr
    assert f"cannot start from {foreign}: " in no_weights.stderr


@pytest.mark.parametrize("module", ["safetensors", "sklearn", "tqdm"])
def test_a_package_that_is_not_there_is_named_with_the_cure(module: str) -> None:
    code = f"""
import runpy, sys
sys.modules[{module!r}] = None  # as if it were not installed
runpy.run_path({str(SCRIPT)!r}, run_name="__main__")"""
    job = start_alone("-c", code)
    assert job.returncode == 1
    assert job.stderr.startswith(f"train.py: there is no module '{module}")
    assert job.stderr.endswith(": pip install '.[train]' in kvcoll's folder\n")
    assert job.stderr.count("\n") == 1


def test_a_store_that_this_machine_cannot_have_is_an_error_without_a_traceback(
    start: Start,
) -> None:
    code = f"""
import runpy, sys
sys.modules["cupy"] = None
sys.argv = ["train.py", "--kv-store", "dist_device_sync"]
runpy.run_path({str(SCRIPT)!r}, run_name="__main__")"""
    job = start(2, "-c", code)
    assert (job.returncode, job.timed_out) == (1, False)
    assert job.stderr.count("train.py: error: rank 0: ") == 2
    assert "CuPy is not installed" in job.stderr
    assert "Traceback" not in job.stderr


def test_a_file_that_only_rank_0_misses_ends_all_ranks_with_one_message(start: Start) -> None:
    job = start(2, SCRIPT, "--start-from", "/nowhere/digits.safetensors")
    assert (job.returncode, job.timed_out) == (2, False)
    assert job.stderr.count("train.py: error: cannot start from /nowhere/digits") == 1
    assert "Traceback" not in job.stderr


def test_a_wrong_option_is_reported_once_by_all_ranks_together(start: Start) -> None:
    job = start(2, SCRIPT, "--epochs", "0")
    assert (job.returncode, job.timed_out) == (2, False)
    assert job.stderr.count("--epochs: expected a whole number >= 1, got '0'") == 1


def test_a_missed_target_is_said_and_is_exit_code_1() -> None:
    job = train_alone("--epochs", "1", "--target-accuracy", "1.01")
    assert job.returncode == 1
    assert "missed: test accuracy is below the target of 101 %" in job.stdout


def test_one_bit_that_differs_on_one_rank_is_found(start: Start) -> None:
    code = """
import sys
import numpy as np
import train
from mpi4py import MPI

def digest(params, honest=train.digest):
    if MPI.COMM_WORLD.rank == 1:
        params["layer2_bias"][3] = np.nextafter(params["layer2_bias"][3], np.float32(9))
    return honest(params)

train.digest = digest
sys.argv = ["train.py", "--epochs", "1", "--target-accuracy", "0"]
sys.exit(train.main())
"""
    job = start(2, "-c", code)
    assert "replicas: 1 of 2 the same bits" in job.stdout, job.stderr
    assert job.returncode == 1


def test_a_rank_that_raises_between_two_steps_ends_all_ranks_and_is_named(start: Start) -> None:
    code = """
import sys
import train
from mpi4py import MPI

steps = []

def backward(*arguments, honest=train.backward):
    steps.append(1)
    if MPI.COMM_WORLD.rank == 1 and len(steps) == 30:
        raise ZeroDivisionError("a mistake in step 30")
    return honest(*arguments)

train.backward = backward
sys.argv = ["train.py"]
sys.exit(train.main())
"""
    job = start(2, "-c", code)
    assert not job.timed_out
    assert job.returncode != 0
    assert "rank 1 left the store (ZeroDivisionError: a mistake in step 30)" in job.stderr


def test_gradients_are_the_slopes_of_the_summed_loss() -> None:
    code = """
import numpy as np
import train

rng = np.random.default_rng(5)
params = {k: v.astype(np.float64) for k, v in train.init_params([6, 5, 4, 10], 3).items()}
pixels, digits = rng.normal(size=(7, 6)), rng.integers(0, 10, 7)
targets = np.eye(10)[digits]

def loss():
    log_p = train.log_softmax(train.forward(params, pixels)[-1])
    return -log_p[np.arange(7), digits].sum()

gradients = train.backward(params, pixels, targets)
for name, value in params.items():
    for at in np.ndindex(value.shape):
        old, sides = value[at], []
        for step in (1e-6, -1e-6):
            value[at] = old + step
            sides.append(loss())
        value[at] = old
        slope = (sides[0] - sides[1]) / 2e-6
        assert abs(gradients[name][at] - slope) < 1e-5, (name, at, gradients[name][at], slope)
empty = train.backward(params, pixels[:0], targets[:0])
assert all(empty[name].shape == params[name].shape and not empty[name].any() for name in params)
print("checked")
"""
    job = start_alone("-c", code)
    assert job.stdout == "checked\n", job.stderr


def test_the_curve_is_drawn_as_a_png_of_a_readable_size(tmp_path: Path) -> None:
    path = tmp_path / "curve.png"
    job = train_alone("--epochs", "2", *ANY_ACCURACY, "--plot", path)
    assert job.returncode == 0, job.stderr
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", head[16:])
    assert 800 <= width <= 2000
    assert 600 <= height <= 1500


def test_a_local_store_trains_where_mpi4py_cannot_be_imported(tmp_path: Path) -> None:
    (tmp_path / "mpi4py.py").write_text("raise ImportError('mpi4py is not there')\n")
    paths = f"{tmp_path}{os.pathsep}{ENVIRONMENT['PYTHONPATH']}"
    job = start_alone(SCRIPT, "--kv-store", "local", paths=paths)
    assert job.returncode == 0, job.stderr
    assert "replicas: 1 of 1 the same bits" in job.stdout


@pytest.mark.limit(120)
@pytest.mark.parametrize(
    "options",
    [
        ("--kv-store", "dist_async"),
        ("--compression", "2bit"),
        ("--compression", "1bit"),
        ("--compression", "fp16"),
        ("--compression", "bf16", "--overlap"),
    ],
    ids=" ".join,
)
def test_late_and_compressed_pushes_train_to_the_target(
    start: Start, options: tuple[str, ...]
) -> None:
    job = start(2, SCRIPT, "--epochs", "12", "--target-accuracy", "0.95", *options)
    assert job.returncode == 0, job.stdout + job.stderr
    assert "replicas: 2 of 2 the same bits" in job.stdout


@pytest.mark.limit(60)
def test_training_on_gpus_follows_the_curve_of_the_host(start: Start, tmp_path: Path) -> None:
    pytest.importorskip("ml_dtypes")
    if shutil.which("g++") is None:
        pytest.skip("kernels of a fake GPU are compiled by g++, and there is none")
    options = ("--epochs", "2", "--optimizer", "adam", *ANY_ACCURACY, "--json")
    host, device, folder = tmp_path / "host.json", tmp_path / "gpu.json", tmp_path / "nccl"
    folder.mkdir()
    job = start(2, SCRIPT, *options, host)
    assert job.returncode == 0, job.stderr
    on_fakes = Path(__file__).with_name("train_on_fakes.py")
    store = ("--kv-store", "dist_device_sync")
    job = start(2, on_fakes, folder, *store, *options, device)
    assert job.returncode == 0, job.stderr
    assert "store     dist_device_sync, 2 ranks on 1 host" in job.stdout
    assert "replicas: 2 of 2 the same bits (blake2b " in job.stdout
    for rank in range(2):
        assert f"rank {rank} updated on fake GPU {rank}" in job.stdout
    assert column(device, "loss") == column(host, "loss")  # the same bits
