"""Each check of the doctor, with facts that were made up."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from kvcoll.doctor import checks, checks_gpu, checks_host, checks_net, checks_start
from kvcoll.doctor.facts import Facts, place_in
from kvcoll.doctor.findings import Finding, listed
from kvcoll.doctor.page import as_text
from kvcoll.doctor.seen import Link, Seen

pytestmark = pytest.mark.single

SOUND = Facts(
    size=4,
    launcher="Open MPI's mpirun",
    boot="b",
    cores=[0, 1, 2, 3],
    n_cores=4,
    versions={"kvcoll": "1.0", "NumPy": "2.0", "Python": "3.11"},
    limits={"nofile": 4096, "nproc": None, "stack": 8 << 20, "memlock": 65536, "as": None},
    shm_free_bytes=1 << 30,
    library="Open MPI v5.0.11, package",
    environ={"OMP_NUM_THREADS": "1"},
    threads="multiple",
)
MPICH = "MPICH Version:      5.0.2\nMPICH Device:       ch4"
TWO_GPUS = [
    {"uuid": "aaaaaaaa-1", "name": "H200", "peers": [1]},
    {"uuid": "bbbbbbbb-2", "name": "H200", "peers": [0]},
]
WITH_CUPY = {"kvcoll": "1.0", "CuPy": "13.0", "NCCL": "2.30.1"}


def job(*, per_host: int = 2, **changes: Any) -> Seen:
    """Give a sound job of 4 ranks, with some facts of all of them changed."""
    ranks = {
        k: replace(SOUND, rank=k, host=f"n{k // per_host}", **changes) for k in range(SOUND.size)
    }
    return Seen(ranks, size=SOUND.size, limit_s=60.0)


def change(seen: Seen, rank: int, **changes: Any) -> Seen:
    seen.facts[rank] = replace(seen.facts[rank], **changes)
    return seen


def worst(found: list[Finding]) -> Finding:
    return max(found, key=lambda one: ["ok", "note", "problem"].index(one.level))


def test_a_sound_job_has_no_problem() -> None:
    found = checks.all_of(job())
    assert {one.level for one in found} == {"ok"}
    assert as_text(job(), found).splitlines()[-1] == "all is well"


@pytest.mark.parametrize(
    ("ranks", "words"),
    [
        ([1], "rank 1"),
        ([0, 1, 2], "ranks 0-2"),
        ([0, 2, 3, 7], "ranks 0, 2-3, 7"),
        ([0, 9], "ranks 0, 9"),
    ],
)
def test_ranks_are_named_briefly(ranks: list[int], words: str) -> None:
    assert listed(ranks) == words


@pytest.mark.parametrize(
    ("environ", "place"),
    [
        ({}, ("", 0, 1, 0)),
        (
            {
                "OMPI_COMM_WORLD_RANK": "3",
                "OMPI_COMM_WORLD_SIZE": "4",
                "OMPI_COMM_WORLD_LOCAL_RANK": "1",
            },
            ("Open MPI's mpirun", 3, 4, 1),
        ),
        (
            {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "0", "HYDI_CONTROL_FD": "8"},
            ("Hydra's mpirun", 1, 2, 0),
        ),
        (
            {"PMI_RANK": "1", "PMI_SIZE": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "1"},
            ("srun", 1, 2, 1),
        ),
        (
            {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "2"},
            ("srun", 5, 8, 2),
        ),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, ("", 0, 1, 0)),  # a batch script
    ],
    ids=str,
)
def test_a_process_knows_its_launcher(
    environ: dict[str, str], place: tuple[str, int, int, int]
) -> None:
    found = place_in(environ)
    assert (found.launcher, found.rank, found.size, found.local_rank) == place


@pytest.mark.parametrize(
    ("launcher", "library", "wrong"),
    [
        ("Open MPI's mpirun", MPICH, True),
        ("Hydra's mpirun", "Open MPI v5.0.11", True),
        ("Open MPI's mpirun", MPICH + " --with-pmix=/usr", False),
        ("Hydra's mpirun", "Intel(R) MPI Library 2021.13", False),
        ("srun", MPICH, False),
        ("", MPICH, False),
    ],
)
def test_a_launcher_that_the_library_does_not_understand_stops_the_start(
    launcher: str, library: str, wrong: bool
) -> None:
    found = checks_start.check_family(job(launcher=launcher, library=library))
    assert [one.stops for one in found] == [True] * wrong


def test_versions_that_differ_are_told_by_rank() -> None:
    seen = change(job(), 2, versions={"kvcoll": "1.0", "NumPy": "1.26", "Python": "3.10"})
    found = checks_start.check_versions(seen)
    assert [(one.level, one.what) for one in found] == [
        (
            "problem",
            "the ranks have different versions of NumPy: 1.26 on rank 2, 2.0 on ranks 0-1, 3",
        ),
        (
            "note",
            "the ranks have different versions of Python: 3.10 on rank 2, 3.11 on ranks 0-1, 3",
        ),
    ]
    assert "on n1" in found[0].cure


def test_other_mpi_and_other_nccl_count_as_versions() -> None:
    seen = change(job(), 3, library=MPICH, gpus={"nccl": "2.31.0"})
    found = checks_start.check_versions(seen)
    assert [one.what.split(":")[0].split()[-1] for one in found] == ["MPI", "NCCL"]


def test_another_copy_of_the_same_version_is_found() -> None:
    (found,) = checks_start.check_versions(change(job(), 3, source="other", folder="/old/kvcoll"))
    assert found.level == "problem"
    assert (
        "rank 3 run another copy of kvcoll than rank 0: other files, in /old/kvcoll" in found.what
    )


def test_a_rank_that_came_from_slurm_alone_is_told_to_use_srun() -> None:
    seen = job(environ={"SLURM_JOB_ID": "9", "SLURM_NTASKS": "16"})
    (found,) = checks_start.check_slurm(seen)
    assert (found.level, "srun --mpi=pmix" in found.cure) == ("problem", True)
    assert (
        checks_start.check_slurm(job(environ={"SLURM_JOB_ID": "9", "SLURM_NTASKS": "4"}))[0].level
        == "ok"
    )


@pytest.mark.parametrize(
    ("cores", "words"),
    [
        ([[0, 1], [0, 1], [0, 1], [0, 1]], None),
        ([[0], [1], [0], [1]], None),
        ([[0], [0], [0], [1]], "ranks 0-1 on n0 are bound to 1 core (0) of its 4"),
        ([[0, 1], [0, 1], [3], [3]], "ranks 2-3 on n1 are bound to 1 core (3) of its 4"),
    ],
)
def test_ranks_on_one_core_are_found(cores: list[list[int]], words: str | None) -> None:
    seen = job()
    for rank, own in enumerate(cores):
        change(seen, rank, cores=own)
    found = worst(checks_host.check_cores(seen))
    assert found.what == words if words else found.level == "ok"


def test_nested_bindings_are_counted_together() -> None:
    seen = job(per_host=4)
    for rank, own in enumerate([[0], [0, 1], [0, 1], [0, 1, 2, 3]]):
        change(seen, rank, cores=own)
    assert "ranks 0-2 on n0 are bound to 2 cores (0, 1)" in checks_host.check_cores(seen)[0].what


def test_a_quota_of_the_control_group_counts_as_cores() -> None:
    (found,) = checks_host.check_cores(job(core_quota=1.5, per_host=4))
    assert "allows 1.5 cores at a time, and 4 ranks share them" in found.what


@pytest.mark.parametrize(
    ("library", "free", "level", "stops"),
    [
        ("Open MPI v5", 31 << 20, "problem", False),
        ("Open MPI v5", 33 << 20, "ok", False),
        (MPICH, 3 << 20, "problem", True),
        (MPICH, 5 << 20, "ok", False),
        ("Open MPI v5", None, "problem", False),
    ],
)
def test_dev_shm_is_measured_by_what_the_library_takes(
    library: str, free: int | None, level: str, stops: bool
) -> None:
    (found,) = checks_host.check_shm(job(library=library, shm_free_bytes=free))
    assert (found.level, found.stops) == (level, stops)


def test_a_single_rank_a_host_needs_no_dev_shm() -> None:
    assert checks_host.check_shm(job(per_host=1, shm_free_bytes=0))[0].level == "ok"


@pytest.mark.parametrize(
    ("limit", "value", "fabrics", "words"),
    [
        ("nofile", 64, [], "64 open files (ulimit -n)"),
        ("nproc", 100, [], "100 processes (ulimit -u)"),
        ("stack", 65536, [], "a stack of 64 KiB (ulimit -s)"),
        ("memlock", 65536, ["mlx5_0"], "0 MiB of locked memory (ulimit -l)"),
        ("memlock", 65536, [], None),  # nothing pins memory
        ("as", 4 << 30, [], "an address space of 4.0 GiB (ulimit -v)"),
    ],
)
def test_limits_that_matter_are_found(
    limit: str, value: int, fabrics: list[str], words: str | None
) -> None:
    limits = {**SOUND.limits, limit: value}
    (found,) = checks_host.check_limits(change(job(), 1, limits=limits, fabrics=fabrics))
    assert found.level == ("problem" if words else "ok")
    assert words is None or found.what == f"rank 1 on n0: {words}"


def test_memory_that_is_not_shared_is_told_by_host() -> None:
    seen = job()
    seen.shared = {0: True, 1: True, 2: False, 3: False}
    assert "ranks 2-3 on n1" in worst(checks_host.check_shared_memory(seen)).what
    (found,) = checks_host.check_shared_memory(change(job(), 0, memfd="memfd_create: no"))
    assert found.what == "rank 0 on n0: memfd_create: no"


def test_machines_of_one_name_are_told_apart() -> None:
    seen = change(job(per_host=4), 3, boot="another")
    assert "2 hosts are all called 'n0'" in checks_net.check_names(seen)[0].what
    assert seen.hosts() == {"n0": [0, 1, 2], "n0 (rank 3)": [3]}


def reached(name: str, **addresses: str) -> Seen:
    seen = job()
    told = {address.replace("_", "."): why for address, why in addresses.items()}
    seen.reached = [{"origin": 0, "target": 2, "name": name, "addresses": told}]
    return seen


@pytest.mark.parametrize(
    ("seen", "levels"),
    [
        (reached("", a="", b=""), ["ok"]),
        (reached("the name is not known", a=""), ["note"]),
        (reached("the name is not known", a="no answer"), ["problem"]),
        (reached("", docker="another machine answers", a=""), ["note"]),
        (reached("", a="no answer"), ["note"]),
    ],
)
def test_names_and_addresses_that_are_not_reached(seen: Seen, levels: list[str]) -> None:
    assert [one.level for one in checks_net.check_reached(seen)] == levels


@pytest.mark.parametrize(
    ("clock_s", "level"), [(0.002, "ok"), (-3.0, "note"), (3.0, "note"), (-90.0, "problem")]
)
def test_clocks_may_differ_a_little(clock_s: float, level: str) -> None:
    seen = job()
    seen.links = [Link(0, 2, 1e-5, clock_s, 1e9, 1e9)]
    (found,) = checks_net.check_clocks(seen)
    assert found.level == level
    assert level == "ok" or ("ahead of" if clock_s > 0 else "behind") in found.what


FAST = {"latency_s": 2e-5, "there_bytes_per_s": 1e9, "back_bytes_per_s": 1e9}


@pytest.mark.parametrize(
    ("changes", "level", "words"),
    [
        ({}, "ok", "none is cut"),
        ({"latency_s": None}, "problem", "no message of MPI came through between n0 and n3"),
        ({"back_bytes_per_s": 1e8}, "problem", "n3 to n0 carries 800 Mbit/s, n0 to n3 8.0 Gbit/s"),
        (
            {"there_bytes_per_s": 1e8, "back_bytes_per_s": 1e8},
            "problem",
            "n0 and n3 carry 800 Mbit/s; most hosts 8.0 Gbit/s",
        ),
        ({"latency_s": 5e-3}, "note", "n0 and n3 take 5 ms a message; most links 20 µs"),
    ],
)
def test_one_bad_link_among_sound_ones_is_named(
    changes: dict[str, Any], level: str, words: str
) -> None:
    seen = job(per_host=1)
    pairs = [(a, b) for b in range(4) for a in range(b)]
    seen.links = [Link(a, b, **(FAST | (changes if (a, b) == (0, 3) else {}))) for a, b in pairs]
    (found,) = checks_net.check_links(seen)
    assert found.level == level
    assert words in found.what


def test_a_host_that_is_slow_with_all_others_is_named_once() -> None:
    seen = job(per_host=1)
    slow = {"there_bytes_per_s": 1e8, "back_bytes_per_s": 1e8}
    pairs = [(a, b) for b in range(3) for a in range(b)]
    seen.links = [Link(a, b, **(FAST | (slow if 2 in (a, b) else {}))) for a, b in pairs]
    (found,) = checks_net.check_links(seen)
    assert found.what == "n2 carries 800 Mbit/s at most; most hosts 8.0 Gbit/s"
    assert found.level == "problem"


def test_the_floor_of_a_push_is_that_of_the_slowest_link() -> None:
    seen = job()
    seen.links = [Link(0, 2, 1e-5, 0.0, 2e8, 1e8), Link(0, 1, 1e-6, 0.0, 1e3, 1e3)]
    # 2 hosts: each byte crosses once each way, half as parts and half as sums.
    assert checks_net.push_floor_s(seen, 100_000_000) == pytest.approx(1.0)
    seen.pushes = {0: {"n_bytes": 100_000_000, "push_s": 9.0}}
    assert checks_net.check_push(seen)[0].level == "note"


def gpus(**of_rank: Any) -> dict[str, Any]:
    return {"nodes": ["/dev/nvidia0"], "driver": "12.4", "devices": TWO_GPUS[:1]} | of_rank


def test_without_a_gpu_one_line_says_so() -> None:
    (found,) = checks_gpu.check_gpus(job(gpus={"nodes": [], "driver": "", "devices": []}))
    assert (found.level, found.what[:5]) == ("ok", "none;")


@pytest.mark.parametrize(
    ("changes", "level", "words"),
    [
        ({"gpus": gpus(devices=[])}, "problem", "libcuda.so.1 was not found"),
        ({"gpus": gpus(devices=[], error="error 803")}, "problem", "error 803"),
        (
            {"gpus": gpus(devices=[]), "environ": {"CUDA_VISIBLE_DEVICES": ""}},
            "note",
            "CUDA_VISIBLE_DEVICES=''",
        ),
        ({"gpus": gpus()}, "note", "but no CuPy"),
        (
            {"gpus": gpus(cupy_error="driver is too old"), "versions": WITH_CUPY},
            "problem",
            "CuPy 13.0 does not work: driver is too old",
        ),
        (
            {"gpus": gpus(mpi_takes="signal 11 (SIGSEGV)"), "versions": WITH_CUPY},
            "ok",  # it need not
            "MPI was not seen to take GPU memory",
        ),
        ({"gpus": gpus(nccl="2.9.8"), "versions": WITH_CUPY}, "problem", "NCCL is 2.9.8"),
        ({"gpus": gpus(mpi_takes="yes"), "versions": WITH_CUPY}, "ok", "MPI takes GPU memory"),
    ],
)
def test_what_lacks_on_a_rank_with_a_gpu(changes: dict[str, Any], level: str, words: str) -> None:
    seen = change(Seen({0: replace(SOUND, size=1)}), 0, **changes)
    (found,) = checks_gpu.check_gpus(seen)
    assert found.level == level
    assert words in found.what


def test_two_ranks_on_one_gpu_are_found_and_two_gpus_are_not() -> None:
    one = job(gpus=gpus(mpi_takes="yes"), versions=WITH_CUPY)
    assert worst(checks_gpu.check_gpus(one)).what == ("ranks 0-1 on n0 use the same GPU (aaaaaaaa)")
    wanted = {"NCCL_MULTI_RANK_GPU_ENABLE": "1"}
    shared = job(gpus=gpus(mpi_takes="yes"), versions=WITH_CUPY, environ=wanted)
    assert worst(checks_gpu.check_gpus(shared)).level == "note"
    both = job(gpus=gpus(devices=TWO_GPUS, mpi_takes="yes"), versions=WITH_CUPY)
    assert [found.level for found in checks_gpu.check_gpus(both)] == ["ok"]


def test_gpus_without_peer_access_and_drivers_that_differ_are_notes() -> None:
    apart = [{**device, "peers": []} for device in TWO_GPUS]
    seen = job(gpus=gpus(devices=apart), versions=WITH_CUPY)
    change(seen, 3, gpus=gpus(devices=apart, driver="11.8"))
    found = checks_gpu.check_gpus(seen)
    assert {one.level for one in found} == {"note"}
    assert any("cannot read each other's memory: 0 and 1" in one.what for one in found)
    assert any("drivers differ: CUDA 11.8 on n1, 12.4 on n1" in one.what for one in found)
