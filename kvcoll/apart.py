"""Runs what may crash, hang or load foreign libraries in a process of its own.

Rules of the file: whatever that process does, and those that it starts, this one goes on after
the time it was given.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

_SET_PARENT_DEATH_SIGNAL = 1  # prctl's PR_SET_PDEATHSIG
_FIRST_LINES, _LAST_LINES = 9, 3
_GONE_WITHIN_S = 5.0  # what a killed process has to go
# What a launcher tells its ranks; who inherits it takes itself for one of them.
_OF_A_LAUNCHER = ("OMPI_", "PMIX_", "PRTE_", "PMI_", "HYDI_", "MPI_LOCAL", "PALS_", "MV2_COMM_")
_OF_THE_USER = ("OMPI_MCA_", "OMPI_ALLOW_", "PMIX_MCA_", "PRTE_MCA_")


def command(module: str, *arguments: str) -> list[str]:
    """Write the command that runs ``main(*arguments)`` of a module of this same kvcoll."""
    code = (
        f"import sys; sys.path[:] = {sys.path!r}\n"
        f"from {module} import main\n"
        f"main(*{list(arguments)!r})"
    )
    return [sys.executable, "-c", code]


def ask(
    module: str, *arguments: str, limit_s: float, env: Mapping[str, str] | None = None
) -> tuple[dict[str, Any], str]:
    """Run a module; give the dict that it printed last, as JSON, or why there is none.

    Lines may follow it: a library may have something to say at the end of the process.

    Returns
    -------
    answer : dict
        Empty if the process did not come so far.
    why : str
        How it ended, and the last lines that it wrote; ``''`` if all went well.
    """
    child = subprocess.Popen(
        command(module, *arguments),
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # so that those which it starts can be ended with it
    )
    try:
        raw, _ = child.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        return {}, f"it did not end within {limit_s:g} s"
    finally:
        _end(child)
    said = raw.decode(errors="replace")
    answers = [line for line in said.splitlines() if line.startswith("{")]
    for line in reversed(answers if child.returncode == 0 else []):
        with contextlib.suppress(json.JSONDecodeError):
            return json.loads(line), ""
    return {}, how_it_ended(child.returncode, said)


def _end(child: subprocess.Popen[bytes]) -> None:
    """Kill a process and all of its session; not even one that a driver holds is waited for."""
    with contextlib.suppress(OSError):  # nobody is left
        os.killpg(child.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(_GONE_WITHIN_S)
    if child.stdout is not None:
        child.stdout.close()


def how_it_ended(returncode: int, said: str) -> str:
    """Tell in words how a process ended, with the first and the last lines that it wrote."""
    if returncode < 0:
        how = f"signal {-returncode} ({signal.Signals(-returncode).name})"
    else:
        how = f"exit code {returncode}"
    lines = [line.strip() for line in said.splitlines() if line.strip(" -=\t*")]
    if len(lines) > _FIRST_LINES + _LAST_LINES:
        lines = [*lines[:_FIRST_LINES], "...", *lines[-_LAST_LINES:]]
    return how + "".join(f"\n{line}" for line in lines)


def without_launcher(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Give the environment of a process that is no rank of this job."""
    return {
        name: value
        for name, value in environ.items()
        if not name.startswith(_OF_A_LAUNCHER) or name.startswith(_OF_THE_USER)
    }


def die_with_parent() -> None:
    """Let this process be killed when the one that started it ends."""
    ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
