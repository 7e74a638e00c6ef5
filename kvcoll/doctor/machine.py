"""What a process can find out about its host: cores, memory, limits, addresses."""

from __future__ import annotations

import os
import platform
import resource
from pathlib import Path

_LIMITS = {
    "memlock": resource.RLIMIT_MEMLOCK,
    "nofile": resource.RLIMIT_NOFILE,
    "nproc": resource.RLIMIT_NPROC,
    "stack": resource.RLIMIT_STACK,
    "as": resource.RLIMIT_AS,
}
_GROUPS = Path("/sys/fs/cgroup")


def cores() -> list[int]:
    """List the cores that this process may use (sched_getaffinity)."""
    return sorted(os.sched_getaffinity(0))


def core_quota() -> float | None:
    """Say how many cores the control group allows at a time, if it limits them."""
    quotas = []
    for folder in _own_groups():
        words = _read(folder / "cpu.max").split()
        if len(words) == 2 and words[0].isdecimal():
            quotas.append(int(words[0]) / int(words[1]))
    quota, period = (
        _read(_GROUPS / "cpu" / f"cpu.cfs_{n}_us").strip() for n in ("quota", "period")
    )
    if quota.isdecimal() and period.isdecimal():  # version 1; -1 is no limit
        quotas.append(int(quota) / int(period))
    return min(quotas, default=None)


def memory_bytes() -> int:
    """Say how much memory is available to this process."""
    told = dict(line.split(":", 1) for line in _read(Path("/proc/meminfo")).splitlines())
    free = [int(told.get("MemAvailable", "0 kB").split()[0]) << 10]
    for folder in _own_groups():
        most, used = (_read(folder / f"memory.{name}").strip() for name in ("max", "current"))
        if most.isdecimal() and used.isdecimal():
            free.append(max(0, int(most) - int(used)))
    return min(free)


def limits() -> dict[str, int | None]:
    """Give the soft limits by the names of `ulimit`, in bytes or numbers; None is no limit."""
    soft = {name: resource.getrlimit(which)[0] for name, which in _LIMITS.items()}
    return {name: None if v == resource.RLIM_INFINITY else v for name, v in soft.items()}


def shm_free_bytes() -> int | None:
    """Say how much of /dev/shm is free; None if there is none."""
    try:
        told = os.statvfs("/dev/shm")
    except OSError:
        return None
    return told.f_bavail * told.f_frsize


def memfd() -> str:
    """Try what `transport.memory` does, as far as one process can; say why it fails."""
    try:
        descriptor = os.memfd_create("kvcoll", os.MFD_CLOEXEC)
    except OSError as error:
        return f"memfd_create: {error.strerror}"
    try:
        os.ftruncate(descriptor, 4096)
        os.close(os.open(f"/proc/{os.getpid()}/fd/{descriptor}", os.O_RDWR))
    except OSError as error:
        return f"/proc/<pid>/fd: {error.strerror}"
    finally:
        os.close(descriptor)
    return ""


def fabrics() -> list[str]:
    """List the network devices that pin memory (InfiniBand, RoCE)."""
    folder = Path("/sys/class/infiniband")
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def boot() -> str:
    """Give what tells this run of the host's kernel from all others."""
    return _read(Path("/proc/sys/kernel/random/boot_id")).strip()


def system() -> str:
    """Name the system: ``Linux 6.1.0 (Debian GNU/Linux 12)``."""
    told = dict(
        line.split("=", 1) for line in _read(Path("/etc/os-release")).splitlines() if "=" in line
    )
    pretty = told.get("PRETTY_NAME", "").strip('"')
    return f"{platform.system()} {platform.release()}" + (f" ({pretty})" if pretty else "")


def _own_groups() -> list[Path]:
    """List this process's control group (version 2), and those above it."""
    for line in _read(Path("/proc/self/cgroup")).splitlines():
        if line.startswith("0::/"):
            own = _GROUPS / line[4:]
            return [own, *(parent for parent in own.parents if parent.is_relative_to(_GROUPS))]
    return []


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
