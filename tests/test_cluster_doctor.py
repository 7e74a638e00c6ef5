"""The doctor on several hosts: cables that are cut, slow, or slower one way."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cluster.hosts import Hosts, pretend_hosts
from cluster.slurm import slurm_on
from doctor_job import Examined, read
from mpi_job import Job, is_open_mpi

pytestmark = [pytest.mark.single, pytest.mark.limit(120), pytest.mark.long]

NOWHERE = "02:00:00:00:00:99"


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    with pretend_hosts(3) as made:
        yield made


def run(hosts: Hosts, ranks_on: tuple[int, ...], *options: str) -> Job:
    env = {"XDG_CACHE_HOME": str(hosts.folder / "cache")}
    return hosts.mpirun(ranks_on, "-m", "kvcoll", "doctor", *options, env=env)


def examine(hosts: Hosts, ranks_on: tuple[int, ...], *options: str) -> Examined:
    return read(run(hosts, ranks_on, "--json", *options))


def about(examined: Examined, word: str) -> list[dict[str, Any]]:
    return [one for one in examined.told["findings"] if one["about"] == word]


def test_sound_hosts_are_measured_pair_by_pair(hosts: Hosts) -> None:
    examined = examine(hosts, (2, 1, 1), "--quick")
    assert examined.told["hosts"] == {"kv1": [0, 1], "kv2": [2], "kv3": [3]}
    assert {(one["a"], one["b"]) for one in examined.told["links"]} == {
        (0, 1),
        *((0, 2), (0, 3), (2, 3)),
    }
    levels = examined.levels()
    for word in ("addresses", "clocks", "links", "shared memory", "versions"):
        assert levels[word] == "ok", examined.told["findings"]
    assert "problem" not in levels.values()
    assert examined.job.returncode == 0


def test_the_page_tells_each_link_and_what_it_allows(hosts: Hosts) -> None:
    for host in ("kv1", "kv2"):
        hosts.limit_rate(host, 800)
    try:
        job = run(hosts, (1, 1))
    finally:
        for host in ("kv1", "kv2"):
            hosts.limit_rate(host, 0)
    found = re.search(r"kv1 - kv2: .*s, (\d+) Mbit/s there, (\d+) Mbit/s back", job.stdout)
    assert found, job
    assert all(400 < int(rate) <= 850 for rate in found.groups())
    # 100 MB, half of it once as parts and once as sums, at most 800 Mbit/s.
    assert re.search(r"the slowest link between hosts allows (1\.\d|\d) s", job.stdout), job
    assert max(map(len, job.stdout.splitlines())) <= 100


def test_a_link_that_is_slower_one_way_is_found(hosts: Hosts) -> None:
    limit = ("tbf", "rate", "20mbit", "burst", "64kb", "latency", "50ms")
    assert hosts.on("kv2", "tc", "qdisc", "add", "dev", "eth0", "root", *limit).returncode == 0
    try:
        examined = examine(hosts, (1, 1), "--quick")
    finally:
        hosts.on("kv2", "tc", "qdisc", "del", "dev", "eth0", "root")
    (found,) = about(examined, "links")
    assert found["level"] == "problem"
    assert re.match(r"kv2 to kv1 carries [12]\d(\.\d)? Mbit/s, kv1 to kv2 \d", found["what"])
    assert examined.job.returncode != 0


def test_a_slow_cable_is_found_among_quick_ones(hosts: Hosts) -> None:
    hosts.limit_rate("kv3", 20)
    try:
        examined = examine(hosts, (1, 1, 1), "--quick")
    finally:
        hosts.limit_rate("kv3", 0)
    slow = {
        (one["a"], one["b"])
        for one in examined.told["links"]
        if one["there_bytes_per_s"] < 4e6 and one["back_bytes_per_s"] < 4e6
    }
    assert slow == {(0, 2), (1, 2)}
    (found,) = about(examined, "links")
    assert re.match(r"kv3 carries [12]\d(\.\d)? Mbit/s at most; most hosts \d", found["what"])


def test_two_hosts_that_do_not_reach_each_other_are_named(hosts: Hosts) -> None:
    lost = ("lladdr", NOWHERE, "dev", "eth0", "nud", "permanent")
    cut = [("kv2", "10.78.0.3"), ("kv3", "10.78.0.2")]
    for host, address in cut:
        assert hosts.on(host, "ip", "neigh", "replace", address, *lost).returncode == 0
    try:
        examined = examine(hosts, (1, 1, 1), "--quick", "--limit", "12")
    finally:
        for host, address in cut:
            hosts.on(host, "ip", "neigh", "del", address, "dev", "eth0")
    names = [one["what"] for one in about(examined, "host names")]
    assert any("kv2 does not reach kv3 by its name: no answer" in what for what in names)
    if is_open_mpi():  # MPICH does not come out of MPI_Init
        (found,) = about(examined, "links")
        assert found["what"] == "no message of MPI came through between kv2 and kv3"
    assert examined.job.returncode != 0


def test_a_rank_on_another_host_that_does_not_come_is_named(hosts: Hosts, tmp_path: Path) -> None:
    env = {"XDG_CACHE_HOME": str(hosts.folder / "cache")}
    late = (
        "import os, socket, sys, time\n"
        "if socket.gethostname() == 'kv2': time.sleep(9)\n"
        "sys.argv = ['kvcoll', 'doctor', '--json', '--limit', '2']\n"
        "from kvcoll.cli import main\n"
        "sys.exit(main())"
    )
    examined = read(hosts.mpirun((1, 1), "-c", late, env=env))
    assert examined.told["missing"] == [1]
    assert examined.job.returncode != 0


def test_under_srun_the_tasks_are_counted_and_a_wrong_kind_is_an_error(hosts: Hosts) -> None:
    right, wrong = ("pmix", "pmi2") if is_open_mpi() else ("pmi2", "pmix")
    doctor = (sys.executable, "-m", "kvcoll", "doctor", "--json", "--quick")
    # MPICH's other way to the network may abort in MPI_Init under SLURM.
    env = {"MPIR_CVAR_CH4_NETMOD": "ofi", "XDG_CACHE_HOME": str(hosts.folder / "cache")}
    where = ("srun", "-K", "-N", "2", "-n", "2", "--overcommit")
    with slurm_on(hosts, gpus=0) as slurm:
        sound = read(slurm.on_kv1(*where, f"--mpi={right}", *doctor, env=env))
        broken = read(slurm.on_kv1(*where, f"--mpi={wrong}", *doctor, env=env))
    assert sound.found("SLURM")["what"].endswith("has 2 tasks, as many as there are ranks")
    assert sound.found("ranks")["what"] == "2 ranks, started by srun"
    assert sound.job.returncode == 0
    assert f"srun --mpi={right}" in broken.found("launcher")["cure"]
    assert broken.job.returncode != 0
