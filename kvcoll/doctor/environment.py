"""Versions and settings, to paste into a report of a bug."""

from __future__ import annotations

import dataclasses
import json
import sys

from ..transport.launcher import name_of_library
from . import checks_gpu
from .facts import Facts, place_in
from .gather import gather
from .seen import Seen

_WIDTH = 12


def report(*, as_json: bool) -> int:
    """Print them, on rank 0 of a job; starts no MPI.

    Returns
    -------
    int
        The exit code, 0.
    """
    place = place_in()
    if place.rank == 0:
        # As of one rank, so that the library is asked for its name, and no more.
        facts = gather(dataclasses.replace(place, size=1, local_rank=0))
        facts = dataclasses.replace(facts, size=place.size)
        print(json.dumps(dataclasses.asdict(facts), indent=1) if as_json else as_text(facts))
        sys.stdout.flush()
    return 0


def as_text(facts: Facts) -> str:
    """Write it for people: a line each."""
    library = name_of_library(facts.library) if facts.library else facts.trial or "none"
    started = f"{facts.launcher}, {facts.size} ranks" if facts.launcher else "without a launcher"
    mpirun = " ".join(filter(None, (facts.mpirun.get("version"), facts.mpirun.get("path"))))
    quota = f", {facts.core_quota:g} at a time" if facts.core_quota is not None else ""
    shm = "none" if facts.shm_free_bytes is None else f"{facts.shm_free_bytes / 2**30:.1f} GiB free"
    limits = ", ".join(
        f"{name} {'unlimited' if value is None else value}" for name, value in facts.limits.items()
    )
    rows = {name: version or "not installed" for name, version in facts.versions.items()}
    rows["kvcoll"] += f", {facts.folder}"
    rows["Python"] += f", {facts.executable}"
    rows |= {
        "MPI": " ".join(filter(None, (library, facts.libmpi))),
        "mpirun": mpirun or "not on PATH",
        "started": started,
        "system": f"{facts.system}, {facts.machine}",
        "cores": f"{len(facts.cores)} of {facts.n_cores}{quota}",
        "memory": f"{facts.memory_bytes / 2**30:.1f} GiB available",
        "/dev/shm": shm,
        "memfd": facts.memfd or "works",
        "limits": limits,
        "networks": ", ".join(f"{name} {ip}" for name, ip in facts.addresses.items()) or "none",
        "GPUs": "; ".join(one.what for one in checks_gpu.check_gpus(Seen({0: facts}))),
    }
    lines = [f"{name:{_WIDTH}}{value}" for name, value in rows.items()]
    settings = [f"{'':{_WIDTH}}{name}={value}" for name, value in facts.environ.items()]
    return "\n".join([*lines, "settings", *settings] if settings else lines)
