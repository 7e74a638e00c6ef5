"""scripts/bench.py: what it writes and refuses, and its arithmetic; no time is asserted."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from marks import needs
from mpi_job import Job as MpiJob

import kvcoll

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

from bench_bars import Bar, bars_of
from bench_cases import IN_PLACE, OWN, PLAIN, REPRODUCIBLE, resnet50_shapes
from bench_clock import Job, Result
from bench_memory import Memory
from bench_overlap import ALONE, COMPUTE, IN_LINE, OVERLAPPED
from bench_report import ratios, show_s
from bench_wire import Wire

pytestmark = [pytest.mark.jobs, pytest.mark.long, needs("bench", "scripts/bench.py")]

SCRIPTS = Path(__file__).parents[1] / "scripts"
SCRIPT = SCRIPTS / "bench.py"
PATHS = (SCRIPTS, Path(kvcoll.__file__).parents[1], os.environ.get("PYTHONPATH", ""))
ENVIRONMENT = {"PYTHONPATH": os.pathsep.join(map(str, PATHS)), "MPLBACKEND": "agg"}
TORCH_DEFAULTS = "torch DDP gloo + SGD, defaults"
Start = Callable[..., MpiJob]

# Stands in for a peer's Python: every call takes a second.
ANSWERS = """#!{python}
import sys
print('{{"version": "9.9"}}', flush=True)
for line in sys.stdin:
    print('{{"seconds": 1.0}}', flush=True)
"""
ENDS = """#!{python}
import sys
sys.exit("no gloo here")
"""


def program(path: Path, text: str) -> Path:
    """Write a program of this Python's."""
    path.write_text(text.format(python=sys.executable))
    path.chmod(0o755)
    return path


def result(case: str, n: int, way: str, role: str, *samples_s: float) -> Result:
    """Make a result up."""
    return Result(Job(case, case, 1, n), way, role, 4, 1, samples_s)


def test_a_quick_run_prints_a_table_and_writes_json_and_pictures(
    mpirun: Start, tmp_path: Path
) -> None:
    peer = program(tmp_path / "peer", ANSWERS)
    options = ("--quick", "--cases", "barrier", "sizes", "keys", "--sizes", "100", "3000")
    job = mpirun(2, SCRIPT, *options, "--torch", peer, "--out", tmp_path / "out", env=ENVIRONMENT)
    assert job.returncode == 0, job.stderr
    assert "1 key of 3,000" in job.stdout
    assert "quartiles" in job.stdout

    written = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert set(written) >= {"command", "date", "mpi", "versions", "machine", "results", "bars"}
    assert (written["ranks"], written["hosts"]) == (2, 1)
    assert written["versions"]["torch"] == "9.9"
    assert written["machine"]["cores"] == os.cpu_count()
    found = {(r["case"], r["n_elements"], r["way"]): r for r in written["results"]}
    assert {(case, n) for case, n, _ in found} == {
        ("barrier", 0),
        ("key", 100),
        ("key", 3000),
        ("keys", 100_000),
    }
    for way in (PLAIN, OWN, IN_PLACE, "MPI_Allreduce, copy out", "torch gloo all_reduce"):
        one = found["key", 3000, way]
        assert (one["bytes"], one["dtype"], one["ranks"]) == (12_000, "float32", 2)
        assert len(one["samples_s"]) == one["rounds"] >= 3
        low_s, high_s = one["quartiles_s"]
        assert 0 < low_s <= one["median_s"] <= high_s
        assert set(one["ratios"]) == {"raw", "by hand", "torch"}
    assert found["key", 100, "torch gloo all_reduce"]["median_s"] == 1.0
    for name in ("sizes.png", "keys.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")


def test_a_peer_that_ends_ends_the_run_with_its_last_words(mpirun: Start, tmp_path: Path) -> None:
    peer = program(tmp_path / "peer", ENDS)
    job = mpirun(
        2, SCRIPT, "--quick", "--cases", "keys", "--torch", peer, "--no-plots", env=ENVIRONMENT
    )
    assert job.returncode == 1
    assert "bench.py: error: bench_torch.py failed or was late: no gloo here" in job.stdout


def test_a_wrong_option_is_told_once(mpirun: Start) -> None:
    job = mpirun(2, SCRIPT, "--torch", "/no/such/python", env=ENVIRONMENT)
    assert job.returncode == 2
    assert job.stderr.count("there is no program /no/such/python") == 1


def test_resnet_50_has_its_161_parameters() -> None:
    shapes = resnet50_shapes()
    assert len(shapes) == 161
    assert sum(map(math.prod, shapes)) == 25_557_032


def test_quartiles_and_ratios_to_the_best_way_of_each_peer() -> None:
    ours = result("key", 1000, PLAIN, "kvcoll", 3.0, 1.0, 2.0, 5.0, 4.0)
    slow = result("key", 1000, "one", "by hand", 9.0)
    quick = result("key", 1000, "another", "by hand", 6.0)
    assert ours.quartiles_s == (2.0, 3.0, 4.0)
    assert ratios(ours, [ours, slow, quick]) == {"by hand": 0.5}


def test_bars_say_what_is_met_and_by_how_much_what_is_missed() -> None:
    results = [
        result("key", 10_000_000, PLAIN, "kvcoll", 0.0625),
        result("key", 10_000_000, "one", "by hand", 0.2),
        result("key", 10_000_000, "another", "by hand", 0.1),
        result("key", 10_000_000, "MXNet dist_sync", "MXNet", 0.3125),
        result("key", 1000, PLAIN, "kvcoll", 14e-6),
        result("key", 1000, IN_PLACE, "raw", 3e-6),
        result("resnet50", 25_557_032, OWN, "kvcoll", 0.07),
        result("resnet50", 25_557_032, TORCH_DEFAULTS, "torch", 0.1),
    ]
    memory = [Memory(PLAIN, 400 << 20, 100 << 20, 100 << 20, 0)]
    bars = {bar.name: bar for bar in bars_of(results, memory, ranks=2, hosts=1, link_mbit=None)}
    assert {name: bar.met for name, bar in bars.items()} == {
        "P1": True,
        "P3": False,
        "P4": True,
        "latency": True,
        "P5": False,
        "P9": False,
    }
    assert bars["P1"].value == pytest.approx(0.625)
    assert bars["P3"].margin == pytest.approx(-1.0)
    assert bars["P4"].limit == pytest.approx(16)
    assert bars["P5"].margin == pytest.approx(-0.5)
    assert bars["P9"].value == 200


def test_the_wire_is_held_against_its_floor_and_the_bars_of_one_machine_are_not() -> None:
    results = [
        result("key", 10_000_000, PLAIN, "kvcoll", 0.36),
        result("key", 10_000_000, "one", "by hand", 0.1),
    ]
    bars = bars_of(results, [], ranks=2, hosts=2, link_mbit=1000)
    what = f"1 key of 10,000,000: {PLAIN} / the link's floor of 320 ms"
    assert bars == [Bar("P6", what, "x", 1.125, 1.15)]


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(1.234e-6, "1.23 us"), (0.000999, "999 us"), (0.0123, "12.3 ms"), (2.5, "2.5 s")],
)
def test_times_are_shown_with_three_digits(seconds: float, shown: str) -> None:
    assert show_s(seconds) == shown


def test_what_overlap_hides_and_what_reproducible_costs_are_held_to_their_bars() -> None:
    n = 10_000_000
    results = [
        result("overlap", n, ALONE, "kvcoll", 0.2),
        result("overlap", n, COMPUTE, "kvcoll", 0.2),
        result("overlap", n, IN_LINE, "kvcoll", 0.4),
        result("overlap", n, OVERLAPPED, "kvcoll", 0.23),
        result("key", n, PLAIN, "kvcoll", 0.1),
        result("key", n, REPRODUCIBLE, "kvcoll", 0.12),
    ]
    bars = bars_of(results, [], ranks=2, hosts=2, link_mbit=None)
    assert [(bar.name, bar.met) for bar in bars] == [("tree", False), ("P7", True), ("P7", True)]
    assert [bar.value for bar in bars] == pytest.approx([1.2, 0.85, 0.575])
    on_one_host = bars_of(results, [], ranks=4, hosts=1, link_mbit=None)
    assert [bar.name for bar in on_one_host] == ["tree", "P7"]


def test_a_step_beside_computing_is_measured_in_all_its_ways(mpirun: Start, tmp_path: Path) -> None:
    options = ("--quick", "--cases", "overlap", "--no-plots", "--out", tmp_path)
    job = mpirun(2, SCRIPT, *options, env=ENVIRONMENT)
    assert job.returncode == 0, job.stderr
    written = json.loads((tmp_path / "bench.json").read_text())
    ways = [ALONE, COMPUTE, IN_LINE, OVERLAPPED]
    assert [one["way"] for one in written["results"]] == ways


def test_bytes_on_the_wire_are_held_to_the_floor_and_to_float32() -> None:
    sent = {"float32": 20.8e6, "fp16": 10.4e6, "bf16": 12.48e6, "2bit": 1.248e6, "1bit": 1e6}
    wire = [Wire(way, 5_000_000, n_bytes) for way, n_bytes in sent.items()]
    bars = bars_of([], [], wire, ranks=2, hosts=2, link_mbit=None)
    assert [bar.met for bar in bars] == [True, True, False, True]
    assert [bar.value for bar in bars] == pytest.approx([1.04, 0.5, 0.6, 0.06])
    more_ranks = bars_of([], [], wire, ranks=4, hosts=2, link_mbit=None)
    assert [bar.name for bar in more_ranks] == ["P8"]
