"""The launcher that a rank descends from: it may wait for ever for a host that is lost.

A launcher that was told of an abort waits for its daemons on all hosts, of which one does
not answer any more; so it is asked to end, and forced to, by a process of its own, as the ranks
may be gone by then. Nothing is done to a process that is no launcher of MPI.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Final

# Open MPI 5, Open MPI 4, MPICH; what SLURM starts ranks by, it sees to by itself.
_LAUNCHERS: Final = (
    *("prterun", "prted", "mpirun", "mpiexec", "orterun", "orted"),
    *("mpiexec.hydra", "hydra_pmi_proxy", "hydra_bstrap_pr"),
)
_SCRIPT: Final = """
alive() { [ "$(cat /proc/$1/comm 2>/dev/null)" = "$2" ] && kill -s "$3" "$1" 2>/dev/null; }
sleep 2; alive "$1" "$2" TERM && sleep 1 && alive "$1" "$2" TERM && sleep 1 && alive "$1" "$2" KILL
"""


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
    if found is None:
        return
    pid, name = found
    subprocess.Popen(
        ["/bin/sh", "-c", _SCRIPT, "sh", str(pid), name],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
