"""Gathers the facts of this rank."""

from __future__ import annotations

import dataclasses
import os
import platform
import socket
import sys

from ..transport.addresses import addresses
from . import gpus, machine, software
from .facts import Facts, Place

_TRIAL_FAILED = "MPI cannot be started by one process alone"


def gather(place: Place, *, port: int = 0, token: str = "") -> Facts:
    """Find out all that can be known before MPI is started; takes a second or two.

    Parameters
    ----------
    place : Place
        The first rank of each host does what need be done once only: it asks for
        mpirun and, in a job of several ranks, sees whether MPI starts at all.
    port, token : int, str
        Where this rank listens.
    """
    leads = place.local_rank == 0
    versions = software.versions()
    facts = Facts(
        rank=place.rank,
        size=place.size,
        local_rank=place.local_rank,
        launcher=place.launcher,
        host=socket.gethostname(),
        boot=machine.boot(),
        machine=platform.machine(),
        system=machine.system(),
        executable=sys.executable,
        folder=str(software.FOLDER),
        source=software.source_digest(),
        environ=software.environ(os.environ),
        versions=versions,
        mpi_packages=software.mpi_packages(),
        mpirun=software.mpirun() if leads else {},
        cores=machine.cores(),
        n_cores=os.cpu_count() or 1,
        core_quota=machine.core_quota(),
        memory_bytes=machine.memory_bytes(),
        limits=machine.limits(),
        shm_free_bytes=machine.shm_free_bytes(),
        memfd=machine.memfd(),
        addresses=addresses(),
        port=port,
        token=token,
        fabrics=machine.fabrics(),
        gpus=gpus.facts(has_cupy=bool(versions["CuPy"]), try_mpi=leads),
    )
    return with_library(facts, start=leads and place.size > 1)


def with_library(facts: Facts, *, start: bool) -> Facts:
    """Add what the MPI library says of itself, if this rank is to ask it."""
    if not (start or facts.size == 1):
        return facts
    answer, why = software.library(start=start)
    if "error" in answer:
        return dataclasses.replace(facts, trial=answer["error"])
    if why and start:  # its name may be known all the same
        answer = software.library(start=False)[0]
    return dataclasses.replace(
        facts,
        library=answer.get("library", ""),
        libmpi=answer.get("libmpi", ""),
        trial=f"{_TRIAL_FAILED}: {why}" if why else "",
    )
