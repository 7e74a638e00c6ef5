#!/usr/bin/env python3
"""One job of the soak: trains on numbers whose sums are exact, and copes with what goes wrong.

    mpirun -n 4 python scripts/soak_job.py round.json

Rules of the file: every gradient is a whole number, and a step's is shared among the ranks that
there are; so the values after a step are the same bits on any number of ranks, whoever was lost or
late on the way. What a rank has seen it writes to a file of its own, as ranks share their output.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

import kvcoll
from kvcoll import KVStore, RowSparse

Array = npt.NDArray[Any]

SHAPES: Final[dict[str, tuple[str, tuple[int, ...]]]] = {
    "bias": ("float32", (33,)),
    "half": ("float16", (40, 25)),
    "weight": ("float32", (300, 200)),
    "wide": ("float64", (9, 1001)),
}
ROWS: Final = "rows"
ROWS_SHAPE: Final = (500, 8)
KEYS: Final = [*SHAPES, ROWS]
_SAMPLES = 12  # of a batch
_KEPT = 3


@dataclass(frozen=True)
class Settings:
    """What a round trains, and how.

    Attributes
    ----------
    seed : int
    name : str
        Of the store's type.
    options : dict
        For `kvcoll.create`.
    optimizer : dict
        For `KVStore.set_optimizer`.
    pushes : int
        How many there are in all.
    save_every : int
        After how many a checkpoint is saved.
    repairs : bool
        Whether replicas that differ are repaired, and not loaded anew.
    counts : bool
        Whether a rank counts its pushes itself, so that one that leaves a push out is out of step.
    folder : str
        For checkpoints and reports; seen by all ranks.
    """

    seed: int
    name: str
    options: dict[str, Any]
    optimizer: dict[str, Any]
    pushes: int
    save_every: int
    repairs: bool
    counts: bool
    folder: str


@dataclass
class Report:
    """What a rank has seen.

    Attributes
    ----------
    errors : list of str
        The names of the errors that it went on after, in order.
    end : str
        ``'done'``, or the name of the error that ended it.
    text : str
        Of that error.
    version, num_workers : int
    fingerprint : str
        Of the values and states at the end.
    """

    errors: list[str] = field(default_factory=list)
    end: str = ""
    text: str = ""
    version: int = 0
    num_workers: int = 0
    fingerprint: str = ""


def first_values() -> list[Array | RowSparse]:
    """Give what each key begins with."""
    values: list[Array | RowSparse] = [
        np.arange(np.prod(shape)).reshape(shape).astype(dtype) % 17
        for dtype, shape in SHAPES.values()
    ]
    return [*values, RowSparse.empty(ROWS_SHAPE, np.dtype(np.float32))]


def gradients(seed: int, step: int, rank: int, size: int) -> list[Array | RowSparse]:
    """Give a rank's share of a step's gradients: small whole numbers."""
    generator = np.random.default_rng((seed, step))
    weights = generator.integers(-3, 4, _SAMPLES)
    mine = int(weights[rank::size].sum())
    shares: list[Array | RowSparse] = [
        (generator.integers(-3, 4, shape) * mine).astype(dtype) for dtype, shape in SHAPES.values()
    ]
    indices = np.sort(generator.choice(ROWS_SHAPE[0], 20, replace=False))
    data = generator.integers(-3, 4, (20, ROWS_SHAPE[1])) * mine
    return [*shares, RowSparse(data.astype(np.float32), indices, ROWS_SHAPE)]


def beginning(kv: KVStore, settings: Settings, *, resumes: bool) -> list[Callable[[], bool | None]]:
    """Give what is to be done before the training; nothing of it is left after one that is true."""
    steps: list[Callable[[], bool | None]] = [
        partial(kv.init, KEYS, first_values()),
        partial(kv.set_optimizer, **settings.optimizer),
    ]
    return [partial(go_back, kv, settings), *steps] if resumes else steps


def go_back(kv: KVStore, settings: Settings) -> bool:
    """Load the newest checkpoint that is sound; say whether there is one."""
    path = Path(settings.folder) / "run"
    names = sorted(os.listdir(path), reverse=True) if path.is_dir() else []
    for name in [name for name in names if name.isdigit()]:
        try:
            kv.load(path / name)
        except (kvcoll.errors.NoCheckpointError, kvcoll.errors.FileFormatError):
            continue  # it was never complete; or saved by replicas that differed, as it says
        return True
    return False


def train(kv: KVStore, settings: Settings, report: Report) -> None:
    """Push until all pushes are made, and save now and then."""
    made = saved = kv.version
    while made < settings.pushes:
        kv.push(KEYS, gradients(settings.seed, made, kv.rank, kv.num_workers))
        made = made + 1 if settings.counts else kv.version
        if made % settings.save_every == 0 and made != saved:
            saved = made
            save(kv, settings, report)
    kv.barrier()


def save(kv: KVStore, settings: Settings, report: Report) -> None:
    """Save a checkpoint, each second one beside the training; go on if the disk is full."""
    is_second = kv.version // settings.save_every % 2 == 0
    try:
        kv.save(Path(settings.folder) / "run", keep=_KEPT, wait=not is_second)
    except kvcoll.errors.FileError as error:
        report.errors.append(type(error).__name__)


def finish(kv: KVStore, report: Report) -> None:
    """Compare the replicas, and take note of what they hold."""
    try:
        kv.wait_saved()
    except kvcoll.errors.FileError as error:
        report.errors.append(type(error).__name__)
    report.fingerprint = kv.verify()
    report.version, report.num_workers = kv.version, kv.num_workers


def run(kv: KVStore, settings: Settings, report: Report, *, resumes: bool) -> None:
    """Train to the end, going on after every error after which a store can be used on."""
    is_elastic = bool(settings.options.get("elastic"))
    before = beginning(kv, settings, resumes=resumes)
    goes_on = True
    while goes_on:
        try:
            while before:
                before[:] = [] if before[0]() else before[1:]
            train(kv, settings, report)
            finish(kv, report)
            goes_on = False
        except kvcoll.errors.RankLostError as error:
            report.errors.append(type(error).__name__)
            if not is_elastic:
                raise
            recover(kv)
        except kvcoll.errors.ShapeMismatchError as error:
            report.errors.append(type(error).__name__)
            if kv.closed:  # where pushes are late an error ends the store
                raise
        except kvcoll.errors.ReplicasDifferError as error:
            report.errors.append(type(error).__name__)
            if settings.repairs:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    kv.verify(repair="vote")
            elif not go_back(kv, settings):
                raise


def recover(kv: KVStore) -> None:
    """Go on without lost ranks, though more are lost meanwhile."""
    while True:
        try:
            kv.recover()
        except kvcoll.errors.RankLostError:
            continue
        return


def main() -> int:
    """Run one job; the exit code is 0 if this rank has come to the end."""
    described = json.loads(Path(sys.argv[1]).read_text())
    settings, launch = Settings(**described["settings"]), described["launch"]
    report, kv = Report(), None
    faulthandler.dump_traceback_later(described["stacks_after_s"])
    try:
        kv = kvcoll.create(settings.name, **settings.options)
        place = Path(settings.folder) / f"{launch}-{kv.rank}.json"
        with kv:
            run(kv, settings, report, resumes=described["resumes"])
        report.end = "done"
    except Exception as error:
        report.end, report.text = type(error).__name__, str(error)
        raise
    finally:
        if kv is not None:
            place.write_text(json.dumps(asdict(report)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
