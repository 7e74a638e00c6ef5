"""Jobs over several hosts by ssh: placement, sums, and the bytes that cross the wire."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import fake_cupy
import numpy as np
import pytest
from cluster.hosts import CHECKOUT, Hosts, pretend_hosts

pytestmark = [pytest.mark.single, pytest.mark.limit(120), pytest.mark.long]

PUSH: Final = CHECKOUT / "tests/cluster/push.py"
TRAIN: Final = CHECKOUT / "scripts/train.py"
NO_TORCH: Final = "torch is not installed"
N_ELEMENTS: Final = 4 << 20
PLACED: Final = {
    "2x2": ((2, 2), [0, 0, 1, 1], [0, 1, 0, 1]),
    "4x1": ((1, 1, 1, 1), [0, 1, 2, 3], [0, 0, 0, 0]),
    "3+1": ((3, 1), [0, 0, 0, 1], [0, 1, 2, 0]),
    "2x2 in turn": ((2, 2), [0, 1, 0, 1], [0, 0, 1, 1]),
}


# Fake GPUs of several processes find one another by files.
OF_ONE_MACHINE = [f"--ignore-glob=*/test_{what}_*.py" for what in ("fake", "gpu", "nccl")]


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    with pretend_hosts(4) as made:
        yield made


def push(hosts: Hosts, ranks_on: tuple[int, ...], *, in_turn: bool = False) -> list[dict[str, Any]]:
    """Push from all ranks; return their reports, by rank, with the sum that each got."""
    folder = hosts.folder / "pushed"
    folder.mkdir(exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    job = hosts.mpirun(ranks_on, PUSH, folder, str(N_ELEMENTS), in_turn=in_turn)
    assert job.returncode == 0, job
    assert len(list(folder.glob("*.json"))) == sum(ranks_on)
    reports = []
    for rank in range(sum(ranks_on)):
        report = json.loads((folder / f"{rank}.json").read_text())
        reports.append(report | {"sum": np.load(folder / f"{rank}.npy")})
    return reports


@pytest.mark.parametrize("placed", PLACED)
def test_a_push_knows_its_hosts_sums_over_them_and_sends_no_byte_twice(
    hosts: Hosts, placed: str
) -> None:
    ranks_on, host_of, local_rank_of = PLACED[placed]
    reports = push(hosts, ranks_on, in_turn="turn" in placed)

    assert [report["host"] for report in reports] == [f"kv{host + 1}" for host in host_of]
    assert [report["local_rank"] for report in reports] == local_rank_of
    assert {report["num_hosts"] for report in reports} == {len(ranks_on)}
    assert {report["num_workers"] for report in reports} == {4}

    expected = 4 * (np.arange(N_ELEMENTS) % 1000) + 1000 * (0 + 1 + 2 + 3)
    for report in reports:
        assert report["sum"].dtype == np.float32
        assert (report["sum"] == expected).all()

    # No all-reduce sends less from a host; headers, and the answers of TCP, come on top.
    must_send = 2 * (len(ranks_on) - 1) / len(ranks_on) * 4 * N_ELEMENTS
    for report in reports:
        for crossed in report["crossed_bytes"]:
            assert must_send <= crossed <= 1.15 * must_send


def test_a_push_on_one_host_keeps_off_the_wire(hosts: Hosts) -> None:
    for report in push(hosts, (4,)):
        assert report["num_hosts"] == 1
        assert max(report["crossed_bytes"]) < 1000


def test_a_slow_cable_is_waited_for_and_no_longer(hosts: Hosts) -> None:
    hosts.limit_rate("kv2", 200)
    try:
        reports = push(hosts, (1, 1))
    finally:
        hosts.limit_rate("kv2", 0)
    at_least_s = 8 * 4 * N_ELEMENTS / 200e6  # each way: half of it once as parts, once as sums
    for report in reports:
        assert 0.9 * at_least_s <= report["push_s"] <= 3 * at_least_s


def test_a_cut_cable_loses_all_until_it_is_mended(hosts: Hosts) -> None:
    greet = ("ssh", "-o", "ConnectTimeout=1", "kv3", "hostname")
    hosts.cut("kv3")
    try:
        assert hosts.on("kv1", *greet).returncode == 255
    finally:
        hosts.mend("kv3")
    assert hosts.on("kv1", *greet).stdout == "kv3\n"


def test_the_training_reaches_its_accuracy_on_two_hosts(hosts: Hosts) -> None:
    wrote = hosts.folder / "curve.json"
    job = hosts.mpirun((2, 2), TRAIN, "--json", wrote, timeout_s=100)
    assert job.returncode == 0, job
    curve = json.loads(Path(wrote).read_text())
    assert (curve["ranks"], curve["hosts"]) == (4, 2)
    assert curve["epochs"][-1]["accuracy"] >= 0.97
    assert "replicas: 4 of 4 the same bits" in job.stdout


def test_the_training_on_gpus_reaches_its_accuracy_on_two_hosts_of_two(hosts: Hosts) -> None:
    if shutil.which("g++") is None:
        pytest.skip("kernels of a fake GPU are compiled by g++, and there is none")
    folder, wrote = hosts.folder / "gpus", hosts.folder / "gpus.json"
    folder.mkdir()
    env = fake_cupy.environment(folder)
    command = (TRAIN, "--kv-store", "dist_device_sync", "--json", wrote)
    job = hosts.mpirun((2, 2), *command, timeout_s=100, env=env)
    assert job.returncode == 0, job
    assert json.loads(wrote.read_text())["epochs"][-1]["accuracy"] >= 0.97
    assert "store     dist_device_sync, 4 ranks on 2 hosts" in job.stdout
    assert "replicas: 4 of 4 the same bits" in job.stdout


@pytest.mark.limit(400)
def test_the_whole_suite_passes_on_two_hosts_of_two_ranks(hosts: Hosts) -> None:
    counts = hosts.folder / "counts"
    job = hosts.mpirun(
        (2, 2),
        *("-m", "pytest", "-q", "-p", "no:cacheprovider", f"--basetemp={hosts.folder}/tmp"),
        *OF_ONE_MACHINE,
        CHECKOUT / "tests",
        timeout_s=380,
        env={"KVCOLL_TEST_COUNTS": str(counts), "PY_COLORS": "0"},
    )
    assert job.returncode == 0, job
    passed, failed, skipped = map(int, counts.read_text().split())
    assert failed == 0
    assert passed > 1000
    # What shares memory with all ranks is tested on one host; all else runs here.
    why = re.findall(r"^SKIPPED \[(\d+)\] \S+: (.*)$", job.stdout, re.MULTILINE)
    assert sum(int(number) for number, _ in why) == skipped
    for _, reason in why:
        assert reason in ("ranks that are to share memory here are on several hosts", NO_TORCH)
