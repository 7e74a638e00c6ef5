"""The benchmark of GPUs runs as a whole, here on fakes; on none it says so."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from any_gpus import ARE_REAL, gpus_and_nccl, needs_kernels

from kvcoll import on_gpus
from kvcoll.errors import DeviceError

pytestmark = [pytest.mark.single, needs_kernels]

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("gpu_bench")


@pytest.fixture
def tiny(bench: ModuleType) -> Any:
    return bench.Sizes(n_elements=3000, n_keys=4, key_elements=9, rounds=2, calls=2, sums=(5, 700))


def test_every_bar_of_the_project_is_measured_and_written(
    bench: ModuleType,
    tiny: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    gpus, _ = gpus_and_nccl(1)
    monkeypatch.setattr(on_gpus, "find_gpus", lambda: gpus)
    assert bench.main(["--out", str(tmp_path / "new")], tiny) == 0
    gpus.finish()
    told = json.loads((tmp_path / "new" / "gpu_bench.json").read_text())
    names = [row["name"] for row in told["rows"]]
    for part in ("copy", "sum of 4 x", "SGD with momentum", "Adam", "ResNet-50", "push of 4 keys"):
        assert any(part in name for name in names), (part, names)
    barred = [row for row in told["rows"] if row["bar"]]
    assert len(barred) == 6
    assert all(row["is_met"] in (True, False) and row["time_s"] > 0 for row in barred)
    copy, *others = told["rows"]
    rate = copy["n_bytes"] / copy["time_s"]
    shared = [row for row in others if row["share"] is not None]
    assert len(shared) == 5
    for row in shared:  # each against the copy of this run
        assert row["share"] == pytest.approx(row["n_bytes"] / row["time_s"] / rate)
        assert row["is_met"] == (row["share"] >= 0.8 if row["bar"] else None)
    n_bytes = {
        row["name"].split(",")[0].split(" x ")[0]: row["n_bytes"] / 4 / 3000 for row in shared
    }
    # What must be read and written: 4 and the sum; value and state twice, the gradient once.
    assert (n_bytes["sum of 4"], n_bytes["SGD with momentum"], n_bytes["Adam"]) == (5, 5, 7)
    resnet = next(row for row in told["rows"] if "ResNet-50" in row["name"])
    assert "2 launches for 1 bucket(s)" in resnet["value"]
    said = capsys.readouterr().out
    assert all(name in said for name in names)
    assert told["about"]["gpus"]
    if "matplotlib" in sys.modules:
        assert (tmp_path / "new" / "gpu_bench.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(ARE_REAL, reason="there is a GPU")
def test_without_a_gpu_it_says_why(
    bench: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def none() -> Any:
        raise DeviceError("there is no NVIDIA driver here")

    monkeypatch.setattr(on_gpus, "find_gpus", none)
    assert bench.main(["--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "gpu_bench.py: there is no NVIDIA driver here\n"
    assert not list(tmp_path.iterdir())


def test_a_wrong_option_is_refused(bench: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        bench.main(["--quick"])
    assert ended.value.code == 2
    assert "--out" in capsys.readouterr().err
