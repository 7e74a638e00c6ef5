"""Checks of each host: cores, memory that is shared, limits; pure."""

from __future__ import annotations

from collections.abc import Sequence

from .facts import Facts
from .findings import Finding, counted, listed, note, ok, problem
from .seen import Seen
from .software import family

# What each library takes of /dev/shm, a rank (seen: Open MPI 5 asks for 16 MiB and goes on
# slower without; MPICH 5 takes 1 MiB and dies of SIGBUS).
_SHM_BYTES = {"Open MPI": 16 << 20, "MPICH": 2 << 20}
_SHM_OTHERWISE_BYTES = 16 << 20
_LEAST_FILES, _FILES_A_RANK = 128, 4
_LEAST_PROCESSES = 256
_LEAST_STACK_BYTES = 1 << 20


def check_cores(seen: Seen) -> list[Finding]:
    """Compare the ranks of each host with the cores that they may use."""
    found = [one for ranks in seen.hosts().values() for one in _cores_of(seen, ranks)]
    if found:
        return found
    told = []
    for host, ranks in seen.hosts().items():
        union = set().union(*(seen.facts[rank].cores for rank in ranks))
        told.append(f"{host}: {counted(len(ranks), 'rank')} on {counted(len(union), 'core')}")
    return [ok("cores", "; ".join(told[:8]) + ("; ..." if len(told) > 8 else ""))]


def _cores_of(seen: Seen, ranks: Sequence[int]) -> list[Finding]:
    """Look for ranks that must share a core, as far as their bindings show it."""
    one, host, n = seen.facts[ranks[0]], seen.host_of(ranks[0]), len(ranks)
    if n == 1:
        return []
    why = "ranks that wait spin, and take the core from those that work: many times slower"
    if n > one.n_cores:
        return [
            problem(
                "cores",
                f"{host} has {counted(one.n_cores, 'core')} for {n} ranks",
                why,
                f"start at most {one.n_cores} ranks there. If it must be, set "
                "OMPI_MCA_mpi_yield_when_idle=1 (Open MPI)",
            )
        ]
    bound = [frozenset(seen.facts[rank].cores) for rank in ranks]
    for cores in sorted(set(bound) | {frozenset().union(*bound)}, key=len):
        inside = [rank for rank, own in zip(ranks, bound, strict=True) if own <= cores]
        if cores and len(inside) > len(cores):
            few = ", ".join(map(str, sorted(cores)[:8]))
            return [
                problem(
                    "binding",
                    f"{listed(inside)} on {host} are bound to {counted(len(cores), 'core')} "
                    f"({few}) of its {one.n_cores}",
                    why,
                    "mpirun --bind-to core, or --bind-to none; under SLURM --cpus-per-task and "
                    "srun --cpu-bind=cores",
                )
            ]
    if one.core_quota is not None and n > one.core_quota:
        return [
            problem(
                "cores",
                f"the control group of {host} allows {one.core_quota:g} cores at a time, "
                f"and {n} ranks share them",
                why,
                "give the container or job more CPUs, or start fewer ranks",
            )
        ]
    return []


def check_math_threads(seen: Seen) -> list[Finding]:
    """Look whether each rank's BLAS would take the cores of the others."""
    for host, ranks in seen.hosts().items():
        one = seen.facts[ranks[0]]
        share = max(1, len(set().union(*(seen.facts[r].cores for r in ranks))) // len(ranks))
        told = next((one.environ[n] for n in _THREADS if one.environ.get(n, "").isdecimal()), "")
        threads = int(told) if told else len(one.cores)
        if len(ranks) > 1 and threads > share:
            how = f"OMP_NUM_THREADS={told}" if told else "OMP_NUM_THREADS is not set"
            return [
                note(
                    "BLAS threads",
                    f"{how}: on {host} each of {len(ranks)} ranks may compute with {threads} "
                    f"threads, and has {counted(share, 'core')} for itself",
                    "the ranks' threads take each other's cores",
                    f"export OMP_NUM_THREADS={share}",
                )
            ]
    return []


_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def check_shm(seen: Seen) -> list[Finding]:
    """Compare what is free in /dev/shm with what the MPI library takes."""
    kind = family(seen.library)
    needs = _SHM_BYTES.get(kind, _SHM_OTHERWISE_BYTES)
    told = []
    for host, ranks in seen.hosts().items():
        one, n_bytes = seen.facts[ranks[0]], needs * len(ranks)
        free = one.shm_free_bytes
        if len(ranks) > 1 and (free is None or free < n_bytes):
            has = "no /dev/shm" if free is None else f"{_mb(free)} free in /dev/shm"
            then = "MPICH ends with a bus error" if kind == "MPICH" else "MPI is slower, or ends"
            return [
                problem(
                    "/dev/shm",
                    f"{host} has {has}; {kind or 'MPI'} takes {_mb(n_bytes)} for its "
                    f"{len(ranks)} ranks",
                    f"{then} (kvcoll's own shared memory does not lie there)",
                    "docker run --shm-size=1g; else look for what jobs that crashed have left "
                    "there: ls -l /dev/shm",
                    stops=kind == "MPICH",
                )
            ]
        told.append(f"{host} {'none' if free is None else _mb(free)}")
    return [ok("/dev/shm", "free: " + ", ".join(told[:8]))]


def check_shared_memory(seen: Seen) -> list[Finding]:
    """Look whether the ranks of each host share memory, as quick sums need."""
    for rank, one in sorted(seen.facts.items()):
        if one.memfd:
            return [_not_shared(f"rank {rank} on {one.host}: {one.memfd}")]
    several = {host: ranks for host, ranks in seen.hosts().items() if len(ranks) > 1}
    for host, ranks in several.items():
        if not all(seen.shared.get(rank, True) for rank in ranks):
            apart = listed(rank for rank in ranks if not seen.shared.get(rank, True))
            return [_not_shared(f"{apart} on {host} cannot map each other's memory")]
    if any(seen.shared.get(ranks[0]) for ranks in several.values()):
        return [ok("shared memory", "the ranks of each host share memory (memfd)")]
    return []


def _not_shared(what: str) -> Finding:
    return problem(
        "shared memory",
        what,
        "sums within the host take MPI, which is slower for large arrays",
        "allow memfd_create and /proc/<pid>/fd among the ranks: one container and one process "
        "table for all ranks of a host, with the default seccomp profile",
    )


def check_limits(seen: Seen) -> list[Finding]:
    """Look at the limits (ulimit) that MPI, threads and pinned memory meet."""
    for rank, one in sorted(seen.facts.items()):
        found = _limits_of(one, seen.size)
        if found:
            what, why, cure = found
            return [problem("limits", f"rank {rank} on {one.host}: {what}", why, cure)]
    return [ok("limits", "open files, processes, stack and locked memory suffice")]


def _limits_of(one: Facts, size: int) -> tuple[str, str, str] | None:
    files, processes, stack, locked, space = (
        one.limits.get(name) for name in ("nofile", "nproc", "stack", "memlock", "as")
    )
    need = _LEAST_FILES + _FILES_A_RANK * size
    if files is not None and files < need:
        why = "MPI opens a connection to each rank, and kvcoll memory that is shared"
        return f"{files} open files (ulimit -n)", why, f"ulimit -n {max(need, 4096)}"
    if processes is not None and processes < _LEAST_PROCESSES:
        why = "each rank has threads of MPI, of BLAS and of kvcoll, which count as processes"
        return f"{processes} processes (ulimit -u)", why, "ulimit -u 4096"
    if stack is not None and stack < _LEAST_STACK_BYTES:
        why = "BLAS and MPI end with a segmentation fault when a stack is full"
        return f"a stack of {stack >> 10} KiB (ulimit -s)", why, "ulimit -s 8192"
    if one.fabrics and locked is not None:
        why = f"{one.fabrics[0]} pins the memory that it sends, and fails or is slow without"
        cure = "memlock unlimited in /etc/security/limits.conf, LimitMEMLOCK=infinity for slurmd"
        return f"{_mb(locked)} of locked memory (ulimit -l)", why, cure
    if space is not None:
        why = "memory that ranks share counts for each of them, and allocations fail early"
        return f"an address space of {_mb(space)} (ulimit -v)", why, "ulimit -v unlimited"
    return None


def _mb(n_bytes: int) -> str:
    return f"{n_bytes / 2**30:.1f} GiB" if n_bytes >= 2**30 else f"{n_bytes / 2**20:.0f} MiB"
