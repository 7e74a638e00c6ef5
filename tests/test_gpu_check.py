"""scripts/gpu_check.sh as far as it goes without a GPU: its arguments, its words, its steps.

A stand-in for Python says what a machine with GPUs would; what it is told to run it only names.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.single

SCRIPT = Path(__file__).parents[1] / "scripts" / "gpu_check.sh"
PYTHON = """#!/usr/bin/env bash
case $1 in
    -) [ -z "${ASKED_BY-}" ] || exec "$ASKED_BY" -
       cat >/dev/null; echo "a warning of some library"; echo "$FOUND"; exit "${FOUND_CODE:-0}" ;;
    -c) case " $LACKS " in *" ${2#import } "*) exit 1 ;; esac ;;
    -VV) echo "Python 3.12.0" ;;
    *) echo "ran $* with $NCCL_MULTI_RANK_GPU_ENABLE $KVCOLL_TEST_GPUS"
       case "$*" in *"$FAILS"*) exit 3 ;; esac ;;
esac
"""
MPIRUN = """#!/usr/bin/env bash
[ "$1" != --version ] || { echo "mpirun (Open MPI) 5.0"; exit; }
echo "mpirun $*"
while [ "${1#-}" != "$1" ] || [[ $1 =~ ^[0-9:]|^none$ ]]; do shift; done
"$@"
"""


class Check:
    """One run."""

    def __init__(self, folder: Path, **settings: str) -> None:
        bin_folder = folder / "bin"
        bin_folder.mkdir(exist_ok=True)
        for name, text in (("python3", PYTHON), ("mpirun", MPIRUN)):
            (bin_folder / name).write_text(text)
            (bin_folder / name).chmod(0o755)
        usual = {"FOUND": "2 23203", "FAILS": "nothing", "LACKS": ""}
        done = self.start(
            [str(folder / "out")],
            usual | settings | {"PYTHON": str(bin_folder / "python3")},
        )
        self.code, self.said, self.out = done.returncode, done.stdout, folder / "out"

    @staticmethod
    def start(arguments: list[str], settings: dict[str, str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", str(SCRIPT), *arguments],
            env=dict(os.environ) | settings,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def log(self, name: str) -> str:
        return (self.out / name).read_text()


def test_all_steps_run_and_are_summed_up(tmp_path: Path) -> None:
    check = Check(tmp_path)
    assert check.code == 0, check.said
    summary = check.log("summary.txt").splitlines()
    assert summary[0].startswith("on       2 GPU(s), NCCL 23203")
    assert [line.split(" (")[0] for line in summary[1:]] == [
        "passed   tests on one GPU or all of one process",
        "passed   benchmark of one GPU",
        "passed   tests over 2 ranks",
        "passed   benchmark over 2 ranks",
        "passed   training over 2 ranks",
    ]
    files = [
        f"tests/test_{name}.py" for name in ("gpu_store", "gpu_place", "gpu_torch", "cuda_names")
    ]
    assert f"{' '.join(files)} with  real" in check.log("tests.txt")
    assert f"scripts/gpu_bench.py --out {check.out} with" in check.log("bench.txt")
    ranks = check.log("bench_ranks.txt")
    assert "mpirun -n 2 --map-by :oversubscribe --bind-to none" in ranks
    assert "scripts/gpu_bench.py --ranks --out" in ranks
    train = check.log("train.txt")
    assert "scripts/train.py --kv-store dist_device_sync --epochs 10 with  real" in train
    assert (check.out / "about.txt").exists()


def test_one_gpu_is_shared_by_two_ranks_where_nccl_allows_it(tmp_path: Path) -> None:
    check = Check(tmp_path, FOUND="1 23000", KVCOLL_CHECK_QUICK="yes")
    assert check.code == 0, check.said
    assert "mpirun -n 2 " in check.log("tests_ranks.txt")
    assert "with 1 real" in check.log("tests_ranks.txt")
    assert "--quick" in check.log("bench.txt")


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"FOUND": "1 22907"}, "several ranks: one GPU, and an NCCL before 2.30"),
        ({"FOUND": "1 22907", "KVCOLL_CHECK_RANKS": "3"}, "3 ranks on 1 GPU(s) need NCCL 2.30"),
        ({"FOUND": "4 0"}, "several ranks: CuPy finds no NCCL"),
        ({"LACKS": "mpi4py"}, "several ranks: mpi4py is not installed"),
        ({"LACKS": "pytest"}, "the tests: pytest or ml_dtypes is not installed"),
        ({"LACKS": "tqdm"}, "the training: scikit-learn, safetensors or tqdm is not installed"),
    ],
)
def test_what_cannot_be_run_is_named_and_is_no_failure(
    tmp_path: Path, settings: dict[str, str], why: str
) -> None:
    check = Check(tmp_path, **settings)
    assert check.code == 0, check.said
    assert f"not run  {why}" in check.log("summary.txt") or why in check.log("summary.txt")
    assert "passed   benchmark of one GPU" in check.log("summary.txt")


def test_a_step_that_fails_is_named_and_the_others_go_on(tmp_path: Path) -> None:
    check = Check(tmp_path, FAILS="gpu_bench.py --out")
    assert check.code == 1
    assert f"FAILED   benchmark of one GPU: exit code 3; see {check.out}/bench.txt" in check.said
    assert "passed   training over 2 ranks" in check.said


def test_without_a_gpu_it_says_why_and_ends(tmp_path: Path) -> None:
    check = Check(tmp_path, FOUND="there is no NVIDIA driver here", FOUND_CODE="1")
    assert check.code == 2
    assert check.said == "nothing to check on: there is no NVIDIA driver here\n"
    assert [path.name for path in check.out.iterdir()] == ["summary.txt"]


CUPY = """
import fake_cupy
world = fake_cupy.install()
world.driver, world.no_devices_status = {}, {}
"""


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (CUPY.format(0, 35), "nothing to check on: there is no NVIDIA driver here"),
        (CUPY.format(13000, 100), "nothing to check on: CUDA shows no GPU here: nvidia-smi"),
        ("import no_such", "No module named 'no_such': pip install numpy 'cupy-cuda12x[ctk]' (or"),
        ("raise ImportError('CuPy failed\\nto load')", "CuPy failed to load: pip install numpy"),
        (CUPY.format(13000, 0), "on       2 GPU(s), NCCL 23003"),
    ],
)
def test_what_there_is_is_asked_of_cupy(tmp_path: Path, code: str, said: str) -> None:
    (tmp_path / "cupy.py").write_text(code)
    paths = f"{tmp_path}{os.pathsep}{Path(__file__).parent}"
    check = Check(tmp_path, ASKED_BY=sys.executable, PYTHONPATH=paths)
    assert check.code == (0 if "NCCL" in said else 2), check.said
    assert said in check.said.splitlines()[0]


def test_wrong_arguments_are_refused(tmp_path: Path) -> None:
    for arguments in ([], ["-x"], ["one", "two"]):
        done = Check.start(arguments, {})
        assert done.returncode == 2
        assert "takes one folder to write to" in done.stderr
    assert "Usage: scripts/gpu_check.sh FOLDER" in Check.start(["--help"], {}).stdout
    done = Check.start([str(tmp_path / "out")], {"PYTHON": "no-such-python"})
    assert done.returncode == 2
    assert "there is no 'no-such-python'" in done.stderr
