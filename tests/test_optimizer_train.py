"""Every optimizer trains a network: scripts/train.py reaches its target with each."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from marks import needs
from mpi_job import clean_environment

import kvcoll

pytestmark = [pytest.mark.single, pytest.mark.long, needs("train", "scripts/train.py")]

SCRIPTS = Path(__file__).parents[1] / "scripts"
# In one process, since to import takes longer than to train.
CODE = """
import sys
import train

for name in train.LEARNING_RATES:
    sys.argv = ["train.py", "--kv-store", "local", "--optimizer", name, "--epochs", "10"]
    print(name, "has the code", train.main())
"""


@pytest.mark.limit(90)
def test_every_optimizer_reaches_95_percent_by_its_name() -> None:
    paths = f"{SCRIPTS}:{Path(kvcoll.__file__).parents[1]}"
    job = subprocess.run(
        [sys.executable, "-c", CODE],
        env=clean_environment() | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=80,
        check=False,
    )
    names = {name.lower() for name in kvcoll.optimizer.__all__} - {"create", "optimizer", "test"}
    codes = [line.split() for line in job.stdout.splitlines() if " has the code " in line]
    assert {words[0]: words[-1] for words in codes} == dict.fromkeys(names, "0"), job.stderr
