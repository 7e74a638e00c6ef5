"""Where the soak's jobs run: on this machine, or on pretend hosts of it.

Rules of the file: every job has a limit, after which it and all that it started is ended.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final, NamedTuple, final

CHECKOUT: Final = Path(__file__).resolve().parent.parent
_SCRIPT: Final = CHECKOUT / "tests" / "cluster" / "hosts.sh"
_TO_END_S: Final = 3.0
_CROWDED: Final = {
    "OMPI_MCA_btl": "^ofi",
    "OMPI_MCA_mpi_yield_when_idle": "1",
    "PRTE_MCA_hwloc_default_binding_policy": "none",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "PYTHONPATH": str(CHECKOUT),
}


class Ended(NamedTuple):
    """What became of a job."""

    code: int
    output: str
    seconds: float
    hung: bool


@final
class World:
    """Starts jobs of so many ranks on so many hosts.

    Parameters
    ----------
    ranks, hosts : int
    folder : Path
        Of the hosts, if there are several.
    """

    def __init__(self, ranks: int, hosts: int, folder: Path | None) -> None:
        self.ranks, self.hosts = ranks, hosts
        self._folder = folder
        said = subprocess.run(
            [_mpirun(), "--version"], capture_output=True, text=True, check=True, env=_environment()
        ).stdout
        self.is_open_mpi = "Open MPI" in said or "Open RTE" in said
        lines = [" ".join(line.split()) for line in said.splitlines()]
        of_mpich = [f"MPICH {line[9:]}" for line in lines if line.startswith("Version: ")]
        self.mpi = (lines if self.is_open_mpi else of_mpich)[0]

    @property
    def survives(self) -> bool:
        """Whether the MPI can go on without a rank."""
        return self.is_open_mpi

    def run(
        self, *arguments: str | Path, limit_s: float, faults: str = "", survives: bool = False
    ) -> Ended:
        """Run `python arguments...` on all ranks.

        Parameters
        ----------
        *arguments : str or Path
        limit_s : float
        faults : str
            For `KVCOLL_FAULTS`.
        survives : bool
            Whether the job shall go on if a rank is lost.
        """
        env = _CROWDED | ({"KVCOLL_FAULTS": faults} if faults else {})
        command = [_mpirun(), "-n", str(self.ranks), *self._placed()]
        if self.is_open_mpi:
            command += ["--bind-to", "none"]
            command += ["--with-ft", "ulfm", "--mca", "coll", "^han"] if survives else []
            if self._folder is not None:
                command += [word for name in env for word in ("-x", name)]
        command += [sys.executable, *map(str, arguments)]
        if self._folder is not None:
            command = [str(_SCRIPT), "on", "kv1", *command]
            env = env | environment_of(self._folder)
        return _run(command, _environment() | env, limit_s)

    def mend(self) -> None:
        """Put cables back, and end what a job has left on hosts that could not be reached."""
        for host in range(1, self.hosts + 1):
            for command in (
                ["mend", f"kv{host}"],
                ["on", f"kv{host}", "ip", "link", "set", "eth0", "up"],
                ["on", f"kv{host}", "bash", "-c", "kill -9 -1"],  # all but its first process
            ):
                env = _environment() | environment_of(self._folder or Path())
                subprocess.run([str(_SCRIPT), *command], env=env, capture_output=True, check=False)

    def _placed(self) -> list[str]:
        if self._folder is None:
            return ["--map-by", ":oversubscribe"] if self.is_open_mpi else []
        shares = [(self.ranks + host) // self.hosts for host in range(self.hosts)][::-1]
        mark = " slots=" if self.is_open_mpi else ":"
        listed = self._folder / "listed"
        lines = [f"kv{host}{mark}{n}\n" for host, n in enumerate(shares, start=1)]
        listed.write_text("".join(lines))
        return ["--hostfile" if self.is_open_mpi else "-f", str(listed)]


@contextmanager
def world(ranks: int, hosts: int) -> Iterator[tuple[World, str]]:
    """Give where jobs run, on pretend hosts if there can be some; and why not, if not."""
    if hosts == 1:
        yield World(ranks, 1, None), ""
        return
    # /var/tmp: it is one folder for all hosts, while each has a /tmp of its own.
    folder = Path(tempfile.mkdtemp(prefix="kvcoll-soak-", dir="/var/tmp"))
    holder = subprocess.Popen(
        [str(_SCRIPT), "hold", str(hosts)],
        env=_environment() | environment_of(folder),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        assert holder.stdout is not None
        said = holder.stdout.readline().strip()
        if said.startswith("up:"):
            yield World(ranks, hosts, folder), ""
        else:
            yield World(ranks, 1, None), f"no pretend hosts, one machine: {said}"
    finally:
        holder.communicate(timeout=20)  # closes its input, and the hosts end with it
        shutil.rmtree(folder, ignore_errors=True)


def environment_of(folder: Path) -> dict[str, str]:
    """Give what tells hosts.sh which hosts are meant, and what they share."""
    shared = " ".join(sorted({str(CHECKOUT), sys.prefix, sys.base_prefix}))
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    return {"KVCOLL_CLUSTER": str(folder), "KVCOLL_CLUSTER_SHARED": shared, "PATH": path}


def _environment() -> dict[str, str]:
    env = {name: text for name, text in os.environ.items() if name != "KVCOLL_FAULTS"}
    if os.geteuid() == 0:
        env |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return env


def _mpirun() -> str:
    beside = Path(sys.executable).parent / "mpirun"
    found = str(beside) if beside.exists() else shutil.which("mpirun")
    if found is None:
        sys.exit("soak.py: there is no mpirun: source scripts/environment.sh")
    return found


def _run(command: Sequence[str], env: dict[str, str], limit_s: float) -> Ended:
    """Run a command; it has ended when its first process has, whatever of it is left then."""
    began = time.monotonic()
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            command,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        hung = not _ends(process, limit_s)
        seconds = time.monotonic() - began
        for number in (signal.SIGTERM, signal.SIGKILL):
            for pid in _session_of(process.pid):
                _signal(pid, number)
            if _ends(process, _TO_END_S):
                break
        said.seek(0)
        output = said.read().decode(errors="replace")
    return Ended(process.returncode, output, seconds, hung)


def _ends(process: subprocess.Popen[bytes], limit_s: float) -> bool:
    try:
        process.wait(limit_s)
    except subprocess.TimeoutExpired:
        return False
    return True


def _session_of(leader: int) -> list[int]:
    """List the processes of a session: mpirun gives its ranks process groups of their own."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            after_name = stat.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(after_name[3]) == leader:
            found.append(int(stat.parent.name))
    return found


def _signal(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return
