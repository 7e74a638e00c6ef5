"""Notes that the ranks of a job leave for rank 0, for the case that MPI does not start.

They lie in a folder of the user's cache, which on most clusters all hosts see. Where
they do not, rank 0 sees those of its own host. No note is needed where MPI starts.

Rules of the file: nothing here fails a job; what cannot be written or read is not there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

from .facts import Facts

_PREFIX = "kvcoll-doctor-"
_OLD_S = 24 * 3600.0
_DEEPEST = 20


@final
class Notes:
    """The notes of one job.

    Parameters
    ----------
    job : str
        What all its ranks know and no other job has; ``''`` if there is nothing such.
    environ : mapping of str to str, optional
    """

    def __init__(self, job: str, environ: Mapping[str, str] = os.environ) -> None:
        cache = environ.get("XDG_CACHE_HOME", "")
        root = Path(cache) if cache else Path(environ.get("HOME", "/nonexistent")) / ".cache"
        name = hashlib.blake2b(job.encode(), digest_size=8).hexdigest()
        self._folder = root / f"{_PREFIX}{name}" if job else None

    @property
    def are_lost(self) -> bool:
        """Whether rank 0 cannot be left a note."""
        return self._folder is None

    def leave(self, facts: Facts) -> None:
        """Write this rank's note, in place of an earlier one."""
        if self._folder is None:
            return
        with contextlib.suppress(OSError):
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            beside = self._folder / f"{facts.rank}.part"
            beside.write_text(facts.to_json())
            beside.replace(self._folder / f"{facts.rank}.json")

    def leave_reached(self, rank: int, reached: list[dict[str, Any]]) -> None:
        """Write which hosts this rank's reaches, if there are still notes."""
        if self._folder is not None:
            with contextlib.suppress(OSError):
                beside = self._folder / f"{rank}.reached.part"
                beside.write_text(json.dumps(reached))
                beside.replace(self._folder / f"{rank}.reached")

    def read_reached(self) -> list[dict[str, Any]]:
        """Read what `leave_reached` of all ranks has left."""
        found: list[dict[str, Any]] = []
        if self._folder is not None:
            with contextlib.suppress(OSError, ValueError):
                for path in sorted(self._folder.glob("*.reached")):
                    found += json.loads(path.read_text())
        return found

    def read(self) -> dict[int, Facts]:
        """Read what the ranks have left, by rank."""
        found: dict[int, Facts] = {}
        if self._folder is None:
            return found
        with contextlib.suppress(OSError):
            for path in self._folder.glob("*.json"):
                with contextlib.suppress(OSError, ValueError, TypeError):
                    found[int(path.stem)] = Facts.from_json(path.read_text())
        return found

    def wait(self, size: int, limit_s: float) -> dict[int, Facts]:
        """Read until the notes of all ranks are there, or the time is over."""
        end = time.monotonic() + (limit_s if self._folder is not None else 0.0)
        while len(found := self.read()) < size and time.monotonic() < end:
            time.sleep(0.02)
        return found

    def remove(self, rank: int) -> None:
        """Take this rank's note away; rank 0 takes all, and those that old jobs have left."""
        if self._folder is None:
            return
        with contextlib.suppress(OSError):
            (self._folder / f"{rank}.json").unlink()
            self._folder.rmdir()
        if rank == 0:
            shutil.rmtree(self._folder, ignore_errors=True)
            for path in self._folder.parent.glob(f"{_PREFIX}*"):
                with contextlib.suppress(OSError):
                    if time.time() - path.stat().st_mtime > _OLD_S:
                        shutil.rmtree(path, ignore_errors=True)


def name_of_job(environ: Mapping[str, str] = os.environ) -> str:
    """Give what all ranks of this job know, and no other job has; ``''`` if there is nothing."""
    if "PMIX_NAMESPACE" in environ:
        return f"{environ['PMIX_NAMESPACE']} {environ.get('SLURM_JOB_ID', '')}"
    if "SLURM_STEP_ID" in environ and "HYDI_CONTROL_FD" not in environ:
        return f"{environ.get('SLURM_JOB_ID')}.{environ['SLURM_STEP_ID']}"
    return _port_of_hydra() if "PMI_RANK" in environ else ""


def _port_of_hydra() -> str:
    """Find the address of Hydra's mpirun in the command line of its proxy, an ancestor of ours."""
    pid = os.getppid()
    with contextlib.suppress(OSError, ValueError, IndexError):
        for _ in range(_DEEPEST):
            words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
            if "--control-port" in words:
                return words[words.index("--control-port") + 1]
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return ""
