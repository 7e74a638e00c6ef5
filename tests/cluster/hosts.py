"""Pretend hosts for a test, and MPI jobs on them; hosts.sh does the work.

Rules of the file: a test that cannot have hosts skips and says why, and fails instead
where KVCOLL_REQUIRE_CLUSTER is set; hosts end with the process that made them, even if
it is killed, and two test runs at once do not meet.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final, final

import pytest
from mpi_job import TO_END_S, Job, clean_environment, is_open_mpi, own_mpirun

CHECKOUT: Final = Path(__file__).parents[2]
SCRIPT: Final = CHECKOUT / "tests/cluster/hosts.sh"
REQUIRED: Final = os.environ.get("KVCOLL_REQUIRE_CLUSTER", "") not in ("", "0")
TOOLS: Final = ("ip", "sshd", "ssh", "ssh-keygen", "unshare", "nsenter")
# Where Debian's root finds what its users do not.
PATH: Final = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
# Every host takes the cores for its own, and each rank would spin on one of them.
OF_CROWDED_CORES: Final = {
    "OMPI_MCA_mpi_yield_when_idle": "1",
    "PRTE_MCA_hwloc_default_binding_policy": "none",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}


@final
class Hosts:
    """Hosts kv1, kv2 and so on.

    Attributes
    ----------
    folder : Path
        Seen by all hosts under this path; their own files are in it, too.
    number : int
        How many there are.
    """

    def __init__(self, folder: Path, number: int) -> None:
        self.folder = folder
        self.number = number

    def on(
        self,
        host: str,
        *command: str | Path,
        timeout_s: float = 60.0,
        env: dict[str, str] | None = None,
    ) -> Job:
        """Run a command on a host; end it when late."""
        return self._script("on", host, *map(str, command), timeout_s=timeout_s, env=env)

    def mpirun(
        self,
        ranks_on: Sequence[int],
        *arguments: str | Path,
        in_turn: bool = False,
        timeout_s: float = 60.0,
        env: dict[str, str] | None = None,
    ) -> Job:
        """Run `python arguments...` on kv1 and others by the MPI of this Python, over ssh.

        Parameters
        ----------
        ranks_on : sequence of int
            How many ranks each host gets.
        *arguments : str or Path
        in_turn : bool, default False
            Deal out the ranks one by one, and not host by host.
        timeout_s : float
        env : dict, optional
            Added to the environment of all ranks.
        """
        env = {"PYTHONPATH": str(CHECKOUT)} | OF_CROWDED_CORES | (env or {})
        command = [own_mpirun(), *self._placed(ranks_on, in_turn=in_turn)]
        if is_open_mpi():  # which forwards its own variables alone
            command += [word for name in env for word in ("-x", name)]
        job = self.on("kv1", *command, sys.executable, *arguments, timeout_s=timeout_s, env=env)
        if job.timed_out:
            for host in range(1, self.number + 1):
                self.on(f"kv{host}", "bash", "-c", "kill -9 -1")  # all but sshd, its process 1
        return job

    def _placed(self, ranks_on: Sequence[int], *, in_turn: bool) -> list[str]:
        """Give the options of mpirun for this placement; write the list of hosts."""
        ranks, hosts = sum(ranks_on), enumerate(ranks_on, start=1)
        listed = self.folder / "listed"
        if is_open_mpi():
            listed.write_text("".join(f"kv{host} slots={n}\n" for host, n in hosts))
            mapping = ["--map-by", "node"] if in_turn else []
            return ["--hostfile", str(listed), "-n", str(ranks), "--bind-to", "none", *mapping]
        # MPICH starts again at the first host when it has come to the end of the list.
        listed.write_text("".join(f"kv{host}:{1 if in_turn else n}\n" for host, n in hosts))
        return ["-f", str(listed), "-n", str(ranks)]

    def bytes(self, host: str) -> tuple[int, int]:
        """Return how many bytes a host's network card has received and sent."""
        received, sent = self._checked("bytes", host).split()
        return int(received), int(sent)

    def limit_rate(self, host: str, mbit: int) -> None:
        """Limit a host's cable to so many Mbit/s each way; 0 takes the limit off."""
        self._checked("rate", host, str(mbit))

    def cut(self, host: str) -> None:
        """Pull a host's cable: every frame is lost, and nobody is told."""
        self._checked("cut", host)

    def mend(self, host: str) -> None:
        """Put a cable back."""
        self._checked("mend", host)

    def _checked(self, *arguments: str) -> str:
        job = self._script(*arguments, timeout_s=20.0)
        assert job.returncode == 0, job.stderr
        return job.stdout

    def _script(self, *arguments: str, timeout_s: float, env: dict[str, str] | None = None) -> Job:
        return run(
            [str(SCRIPT), *arguments],
            env=clean_environment() | environment_of(self.folder) | (env or {}),
            timeout_s=timeout_s,
        )


def environment_of(folder: Path) -> dict[str, str]:
    """Return what tells hosts.sh which hosts are meant, and what they share."""
    shared = " ".join({str(CHECKOUT), sys.prefix, sys.base_prefix})
    return {"KVCOLL_CLUSTER": str(folder), "KVCOLL_CLUSTER_SHARED": shared, "PATH": PATH}


def run(command: Sequence[str], *, env: dict[str, str], timeout_s: float) -> Job:
    """Run a command; when late ask it and all that it started to end, then force them."""
    process = subprocess.Popen(
        command,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        return Job(*_end_of(process, timeout_s), timed_out=False)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGTERM)
    try:
        return Job(*_end_of(process, TO_END_S), timed_out=True)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return Job(*_end_of(process, TO_END_S), timed_out=True)


def _end_of(process: subprocess.Popen[str], timeout_s: float) -> tuple[int, str, str]:
    stdout, stderr = process.communicate(timeout=timeout_s)
    return process.returncode, stdout, stderr


def skip_or_fail(why: str) -> None:
    """Skip the test for want of something; fail it where that must be there."""
    if REQUIRED:
        pytest.fail(f"{why} (KVCOLL_REQUIRE_CLUSTER is set)", pytrace=False)
    pytest.skip(why)


def missing(tools: Sequence[str]) -> list[str]:
    """Return those of the programs that are not installed."""
    return [tool for tool in tools if shutil.which(tool, path=PATH) is None]


@contextmanager
def pretend_hosts(number: int) -> Iterator[Hosts]:
    """Make hosts kv1 and so on; remove them at the end."""
    if os.geteuid() != 0:
        skip_or_fail("pretend hosts need root")
    if missing(TOOLS):
        lacking = ", ".join(missing(TOOLS))
        skip_or_fail(f"pretend hosts need {lacking}: apt-get install iproute2 openssh-server")
    # /var/tmp: it is one folder for all hosts, while each has a /tmp of its own.
    folder = Path(tempfile.mkdtemp(prefix="kvcoll-cluster-", dir="/var/tmp"))
    holder = subprocess.Popen(
        [str(SCRIPT), "hold", str(number)],
        env=os.environ | environment_of(folder),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        assert holder.stdout is not None
        line = holder.stdout.readline()
        if not line.startswith("up:"):
            said = line + "".join(path.read_text() for path in sorted(folder.glob("*out")))
            skip_or_fail(f"pretend hosts cannot be made here: {said.strip()}")
        yield Hosts(folder, number)
    finally:
        holder.communicate(timeout=20)  # closes its input, and the hosts end with it
