"""Checks of GPUs, their driver and libraries; pure, and one line where there is none."""

from __future__ import annotations

from collections import Counter
from typing import Any

from ..gpu.places import OLDEST_NCCL, SHARING_VARIABLE
from .facts import Facts
from .findings import Finding, counted, listed, note, ok, problem
from .seen import Seen

_CUPY = "pip install 'kvcoll[gpu]' for drivers of CUDA 12, 'kvcoll[gpu13]' for CUDA 13"


def check_gpus(seen: Seen) -> list[Finding]:
    """Look at the GPUs of all ranks."""
    asked = {rank: one for rank, one in sorted(seen.facts.items()) if one.gpus}
    if not asked:
        return []
    first = asked[min(asked)]
    if not any(one.gpus.get("devices") or one.gpus.get("nodes") for one in asked.values()):
        return [_without(first)]
    found = [one for rank, facts in asked.items() for one in _of_rank(rank, facts)]
    found += [one for ranks in seen.hosts().values() for one in _of_host(seen, ranks)]
    found += _drivers(asked)
    return _once(found) or [_all_well(first)]


def _without(one: Facts) -> Finding:
    cupy = one.versions.get("CuPy", "")
    has = f"CuPy {cupy} is installed" if cupy else "no CuPy"
    driver = "a driver" if one.gpus.get("driver") else "no driver"
    if one.gpus.get("error"):
        driver = f"a driver that fails ({one.gpus['error']})"
    if one.gpus.get("cupy_error"):
        has += f", but does not import: {_first_line(one.gpus['cupy_error'])}"
    return ok("GPUs", f"none; {driver}, {has}: values of the CPU need neither")


def _of_rank(rank: int, one: Facts) -> list[Finding]:
    gpus, who = one.gpus, f"rank {rank} on {one.host}"
    devices: list[dict[str, Any]] = gpus.get("devices", [])
    visible = one.environ.get("CUDA_VISIBLE_DEVICES")
    if not devices:
        has = counted(len(gpus.get("nodes", [])), "device file")
        if visible is not None:
            what = f"{who} sees no GPU, though there is {has}: CUDA_VISIBLE_DEVICES={visible!r}"
            return [note("GPUs", what, "its arrays stay on the CPU", "unset it, or list some")]
        return [
            problem(
                "GPUs",
                f"{who} sees no GPU, though there is {has}: "
                f"{gpus.get('error') or 'libcuda.so.1 was not found'}",
                "driver and kernel module do not fit, or the container has no driver",
                "nvidia-smi; docker run --gpus all; restart after an update of the driver",
            )
        ]
    cupy, error = one.versions.get("CuPy", ""), gpus.get("cupy_error", "")
    if not cupy:
        what = f"{who} has {counted(len(devices), 'GPU')}, but no CuPy"
        return [note("GPUs", what, "arrays on a GPU cannot be pushed", _CUPY)]
    if error:
        what = f"{who}: CuPy {cupy} does not work: {_first_line(error)}"
        why = f"arrays on a GPU cannot be pushed; the driver is for CUDA {gpus.get('driver')}"
        return [problem("GPUs", what, why, _CUPY)]
    found = []
    # What pip has installed need not be what CuPy loads: CuPy itself was asked.
    version = gpus.get("nccl") or one.versions.get("NCCL", "")
    if not version:
        what, why = f"{who}: there is no NCCL", "'dist_device_sync' needs it for the GPUs of a host"
        found.append(note("GPUs", what, why, _CUPY))
    elif _numbers(version) < OLDEST_NCCL:
        what = f"{who}: NCCL is {version}"
        why = f"'dist_device_sync' needs {'.'.join(map(str, OLDEST_NCCL))} or newer"
        cure = "pip install --upgrade nvidia-nccl-cu12 (or -cu13, as your CuPy)"
        found.append(problem("GPUs", what, why, cure))
    return found


def _of_host(seen: Seen, ranks: list[int]) -> list[Finding]:
    host, own = seen.host_of(ranks[0]), {rank: _device_of(seen, rank, ranks) for rank in ranks}
    found = []
    for uuid, n in Counter(uuid for uuid in own.values() if uuid).items():
        if n > 1:
            those = [rank for rank, other in own.items() if other == uuid]
            is_wanted = all(seen.facts[k].environ.get(SHARING_VARIABLE) == "1" for k in those)
            found.append(
                (note if is_wanted else problem)(
                    "GPUs",
                    f"{listed(those)} on {host} use the same GPU ({uuid[:8]})",
                    "NCCL refuses it unless told otherwise; the GPU's time and memory are shared",
                    "start as many ranks as there are GPUs, and let each see all of its host, or "
                    f"its own; or set {SHARING_VARIABLE}=1, with NCCL 2.30 or newer",
                )
            )
    devices = seen.facts[ranks[0]].gpus.get("devices", [])
    apart = [(a, b) for a in range(len(devices)) for b in range(a) if b not in devices[a]["peers"]]
    if apart:
        pairs = ", ".join(f"{b} and {a}" for a, b in apart[:4])
        what = f"on {host} GPUs cannot read each other's memory: {pairs}"
        why = "NCCL copies through the CPU's memory"
        cure = "see nvidia-smi topo -m; in virtual machines and with IOMMU it may be off"
        found.append(note("GPUs", what, why, cure))
    return found


def _device_of(seen: Seen, rank: int, ranks: list[int]) -> str:
    """Give the GPU of a rank: the only one it sees, or that of its number on the host."""
    devices = seen.facts[rank].gpus.get("devices", [])
    return str(devices[ranks.index(rank) % len(devices)]["uuid"]) if devices else ""


def _drivers(asked: dict[int, Facts]) -> list[Finding]:
    drivers = {one.gpus.get("driver", ""): one.host for one in asked.values() if one.gpus}
    if len(drivers) < 2:
        return []
    told = ", ".join(f"{version or 'none'} on {host}" for version, host in sorted(drivers.items()))
    why = "what is built for the newer one fails on the older"
    return [note("GPUs", f"drivers differ: CUDA {told}", why, "install the same one everywhere")]


def _all_well(one: Facts) -> Finding:
    gpus, devices = one.gpus, one.gpus["devices"]
    names = Counter(device["name"] for device in devices)
    told = ", ".join(f"{n} x {name}" for name, n in names.items())
    nccl = gpus.get("nccl") or one.versions.get("NCCL")
    takes = "takes" if gpus.get("mpi_takes") == "yes" else "was not seen to take"
    return ok(
        "GPUs",
        f"{told}; driver for CUDA {gpus['driver']}, CuPy {one.versions['CuPy']}, NCCL {nccl}; "
        f"MPI {takes} GPU memory",
    )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:3] if part.isdecimal())


def _once(found: list[Finding]) -> list[Finding]:
    """Leave out what is said of another rank already, but for its name."""
    kept: dict[tuple[str, str], Finding] = {}
    for one in found:
        kept.setdefault((one.level, one.what.partition(": ")[2] or one.what), one)
    return list(kept.values())


def _first_line(text: str) -> str:
    return " ".join(text.split())[:160]
