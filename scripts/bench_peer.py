"""The programs that kvcoll is compared with: processes of their own, which rank 0 starts and asks.

Rules of the file: every rank makes the same calls; while rank 0 waits for a peer the
other ranks sleep, so that the peer has their cores; what fails on rank 0 fails on all.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, final

if TYPE_CHECKING:
    from mpi4py import MPI

# What a launcher tells its ranks: a child that inherits it takes itself for one of them.
_OF_A_LAUNCHER = ("OMPI_", "PMIX_", "PRTE_", "PMI_", "HYDRA_", "HYDI_", "MPI_LOCAL", "PALS_")
# What is meant for this environment's Python, or for its number of ranks.
_OF_THIS_PYTHON = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "OMP_", "OPENBLAS_", "MKL_")
_NAP_S = 2e-3
_START_LIMIT_S = 120.0
_ANSWER_LIMIT_S = 120.0
_END_LIMIT_S = 5.0


class PeerError(RuntimeError):
    """A peer's process failed."""


@final
class Peer:
    """A program for which the benchmark's ranks step aside; a context manager.

    Parameters
    ----------
    comm : mpi4py.MPI.Intracomm
        All ranks; they must be on one host.
    python : str
        The Python of the peer's environment.
    script : str
        The name of the script that it runs, beside this file.
    extra_roles : tuple of str
        Further processes that the peer needs, besides one worker a rank.

    Attributes
    ----------
    version : str

    Raises
    ------
    PeerError
        On every rank: the peer did not start.
    """

    def __init__(
        self, comm: MPI.Intracomm, python: str, script: str, extra_roles: tuple[str, ...] = ()
    ) -> None:
        self._comm = comm
        self._script = script
        self._workers: list[subprocess.Popen[str]] = []
        self._others: list[subprocess.Popen[str]] = []
        self._log: IO[str] | None = None
        cores = comm.gather(os.sched_getaffinity(0))
        self.version: str = self._on_rank_0(lambda: self._start(python, extra_roles, cores or []))

    def time(self, request: dict[str, Any]) -> float:
        """Let the peer's workers do a thing at once; collective.

        Parameters
        ----------
        request : dict
            What to do, in the words of the peer's script.

        Returns
        -------
        float
            Seconds a call on the slowest worker, on every rank.

        Raises
        ------
        PeerError
            On every rank: a worker has ended, or did not answer in time.
        """
        seconds: float = self._on_rank_0(
            lambda: max(r["seconds"] for r in self._ask(json.dumps(request), _ANSWER_LIMIT_S))
        )
        return seconds

    def __enter__(self) -> Peer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        processes = self._workers + self._others
        for process in processes:
            if process.stdin is not None:
                process.stdin.close()
        for process in processes:
            try:
                process.wait(_END_LIMIT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            if process.stdout is not None:
                process.stdout.close()
        if self._log is not None:
            self._log.close()

    def _on_rank_0(self, work: Callable[[], Any]) -> Any:
        """Run on rank 0 while the others sleep; give its result, or raise, on every rank."""
        result, failure = None, ""
        if self._comm.rank == 0:
            try:
                result = work()
            except (PeerError, OSError) as error:
                failure = str(error)
        request = self._comm.Ibarrier()
        while not request.Test():
            time.sleep(_NAP_S)
        result, failure = self._comm.bcast((result, failure))
        if failure:
            raise PeerError(failure)
        return result

    def _start(self, python: str, extra_roles: tuple[str, ...], cores: list[set[int]]) -> str:
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        script = str(Path(__file__).with_name(self._script))
        ranks, all_cores = len(cores), set[int]().union(*cores)
        threads = max(len(all_cores) // ranks, 1)
        options = [f"--ranks={ranks}", f"--port={_free_port()}", f"--threads={threads}"]
        command = [python, script, *options]
        self._others = [
            self._spawn([*command, f"--role={role}"], all_cores) for role in extra_roles
        ]
        self._workers = [
            self._spawn([*command, f"--rank={rank}"], cores[rank]) for rank in range(ranks)
        ]
        return str(self._replies(_START_LIMIT_S)[0]["version"])

    def _spawn(self, command: list[str], cores: set[int]) -> subprocess.Popen[str]:
        drop = _OF_A_LAUNCHER + _OF_THIS_PYTHON
        return subprocess.Popen(
            command,
            env={name: value for name, value in os.environ.items() if not name.startswith(drop)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            preexec_fn=lambda: os.sched_setaffinity(0, cores),
        )

    def _ask(self, request: str, limit_s: float) -> list[dict[str, Any]]:
        for worker in self._workers:
            assert worker.stdin is not None
            worker.stdin.write(request + "\n")
            worker.stdin.flush()
        return self._replies(limit_s)

    def _replies(self, limit_s: float) -> list[dict[str, Any]]:
        """Read a line of each worker; end them all if one is late, so that no read can hang."""

        def end_all() -> None:
            for worker in self._workers:
                worker.kill()

        late = threading.Timer(limit_s, end_all)
        late.start()
        try:
            lines = [worker.stdout.readline() for worker in self._workers if worker.stdout]
        finally:
            late.cancel()
        if not all(lines):
            raise PeerError(f"{self._script} failed or was late: {self._last_words()}")
        return [json.loads(line) for line in lines]

    def _last_words(self) -> str:
        if self._log is None:
            return ""
        self._log.seek(0)
        return " | ".join(self._log.read().splitlines()[-8:]) or "it said nothing"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
