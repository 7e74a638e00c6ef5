"""The launcher that a rank descends from: it may wait for ever, though the job has ended.

A launcher that was told of an abort waits for its daemons on all hosts, of which a lost one does
not answer any more; and Open MPI 5.0.11's waits for ever once in some fifty times when a rank
is killed just as ranks on another host abort. So it is asked to end, and forced to, by a process
of its own, as the ranks may be gone by then. Nothing is done to a process that is no launcher
of MPI.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from pathlib import Path
from typing import Final

# Open MPI 5, Open MPI 4, MPICH; what SLURM starts ranks by, it sees to by itself.
_OF_ONE_JOB: Final = ("prterun", "mpirun", "mpiexec", "orterun", "mpiexec.hydra")
_LAUNCHERS: Final = (*_OF_ONE_JOB, "prted", "orted", "hydra_pmi_proxy", "hydra_bstrap_pr")
_SOON_S: Final = 2.0
_LATER_S: Final = 7.0  # by when a launcher has ended that can
_BYE: Final = b"bye"
_ENDING: Final = """
alive() { [ "$(cat /proc/$1/comm 2>/dev/null)" = "$2" ] && kill -s "$3" "$1" 2>/dev/null; }
sleep "$3"
alive "$1" "$2" TERM && sleep 1 && alive "$1" "$2" TERM && sleep 1 && alive "$1" "$2" KILL
"""
# The other end of what it reads from closes with the process that holds it, however that ends; or
# as that becomes another program (exec), which is let be.
_GUARDING: Final = f"""
read -r word
[ "$word" = {_BYE.decode()} ] && exit
sleep 1
grep -qs '^State:[[:space:]]*[^Z[:space:]]' "/proc/$4/status" && exit
{_ENDING}"""

_guard: subprocess.Popen[bytes] | None = None


def launcher(pid: int, proc: Path = Path("/proc")) -> tuple[int, str] | None:
    """Find the first of the launchers that a process descends from.

    Parameters
    ----------
    pid : int
        Of the process's parent.
    proc : Path, optional

    Returns
    -------
    tuple of int and str, or None
        Its number and its name.
    """
    found = None
    while pid > 1:
        try:
            name = (proc / str(pid) / "comm").read_text().strip()
            above = (proc / str(pid) / "stat").read_text().rpartition(")")[2].split()[1]
        except OSError:
            break
        if name not in _LAUNCHERS:
            break
        found, pid = (pid, name), int(above)
    return found


def see_it_end() -> None:
    """Have this rank's launcher end within some seconds, whatever becomes of this process."""
    found = launcher(os.getppid())
    if found is not None:
        _start(_ENDING, *found, _SOON_S, subprocess.DEVNULL)


def guard(after_s: float = _LATER_S) -> None:
    """Have this rank's launcher end some seconds after this process, if it has not by then.

    Only a launcher whose end is that of its job; a daemon may serve others, too. Whoever ends
    in peace calls `leave` first.

    Parameters
    ----------
    after_s : float
        How many seconds it is given.
    """
    global _guard
    found = launcher(os.getppid())
    if _guard is None and found is not None and found[1] in _OF_ONE_JOB:
        _guard = _start(_GUARDING, *found, after_s, subprocess.PIPE)


def leave() -> None:
    """Let the launcher be, whenever this process ends."""
    global _guard
    if _guard is None:
        return
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        _guard.communicate(_BYE + b"\n", timeout=1.0)
    _guard = None


def _start(
    script: str, pid: int, name: str, after_s: float, stdin: int
) -> subprocess.Popen[bytes] | None:
    """Start a shell; None where there can be no more processes: the launcher is left alone."""
    try:
        return subprocess.Popen(
            ["/bin/sh", "-c", script, "sh", str(pid), name, str(after_s), str(os.getpid())],
            bufsize=0,
            stdin=stdin,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    except OSError:
        return None


def _forget() -> None:
    """Hold nothing of a parent's: its guard waits for the end of the parent alone."""
    global _guard
    if _guard is not None and _guard.stdin is not None:
        _guard.stdin.close()
        _guard = None


os.register_at_fork(after_in_child=_forget)
