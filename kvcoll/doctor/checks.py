"""All checks, in the order of the page."""

from __future__ import annotations

from . import checks_gpu, checks_host, checks_net, checks_start
from .findings import Finding
from .seen import Seen


def before_start(seen: Seen) -> list[Finding]:
    """Check what can be known before MPI is started."""
    start, host = checks_start, checks_host
    return [
        finding
        for check in (
            start.check_packages,
            start.check_family,
            start.check_trial,
            start.check_mpirun,
            start.check_slurm,
            start.check_versions,
            host.check_cores,
            host.check_math_threads,
            host.check_shm,
            host.check_limits,
        )
        for finding in check(seen)
    ]


def all_of(seen: Seen) -> list[Finding]:
    """Check everything."""
    first = checks_start.check_launch(seen) + checks_start.check_failure(seen)
    after = [
        finding
        for check in (
            checks_start.check_threads,
            checks_host.check_shared_memory,
            checks_net.check_names,
            checks_net.check_reached,
            checks_net.check_clocks,
            checks_net.check_links,
            checks_net.check_push,
            checks_gpu.check_gpus,
        )
        for finding in check(seen)
    ]
    return first + before_start(seen) + after
