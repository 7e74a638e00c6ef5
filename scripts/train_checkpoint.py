"""Checkpoints of train.py: one after each epoch, one at a signal to stop, and going on.

Rules of the file: every rank makes the same calls; what a run needs beside its store (how far
it has come, and what came of the epochs before) goes with it as metadata. The order of the
samples follows from seed and epoch, so epoch and step are the data position of all ranks.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any, NoReturn

import kvcoll

KEPT = 2
STOPPED = 75  # the exit code EX_TEMPFAIL of sysexits.h: to be tried again
ASYNC_ASKS_EVERY = 10  # steps: to ask is to wait for pushes that are late on purpose
# What must be as it was, or the run would be another one.
OPTIONS = (
    *("seed", "batch_size", "hidden", "optimizer", "lr", "momentum", "wd"),
    *("compression", "threshold"),
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this file."""
    parser.add_argument(
        "--checkpoint",
        type=Path,
        metavar="DIR",
        help=f"save after each epoch, beside the training, and when a signal (SIGTERM or "
        f"SIGUSR1) asks to stop; the last {KEPT} are kept",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on from the newest complete checkpoint in DIR, if there is one",
    )


@dataclasses.dataclass
class Progress:
    """How far a run has come: whole epochs, and steps of the one that is under way.

    Of this epoch's `train_s` so far, `store_s` were spent in the store.
    """

    epochs: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    steps: int = 0
    train_s: float = 0.0
    store_s: float = 0.0


class Stop:
    """Whether the ranks have agreed to stop, since a signal came to one of them."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.agreed = False
        # Where nothing can be saved, a signal ends the program as any other.
        self._may = args.checkpoint is not None
        self._signals = kvcoll.StopSignals() if self._may else kvcoll.StopSignals(())

    def __enter__(self) -> Stop:
        self._signals.__enter__()
        return self

    def __exit__(self, *failure: Any) -> None:
        self._signals.__exit__(*failure)

    def agree(self, kv: kvcoll.KVStore, step: int) -> bool:
        """Ask all ranks at the end of a step; each gets the same answer."""
        every = ASYNC_ASKS_EVERY if "async" in kv.type else 1
        if self._may and step % every == 0:
            self.agreed = kv.any_rank(self._signals.came)
        return self.agreed

    def describe(self, args: argparse.Namespace) -> str:
        """Say what has happened."""
        signal = self._signals.name or "a signal to another rank"
        return f"stopped by {signal}: go on with --checkpoint {args.checkpoint} --resume"


def save(args: argparse.Namespace, kv: kvcoll.KVStore, progress: Progress, *, wait: bool) -> None:
    """Save the store, and how far the run has come."""
    if args.checkpoint is not None:
        options = {name: vars(args)[name] for name in OPTIONS}
        metadata = {"program": "train.py", "options": options}
        # Each rank has its own times; rank 0's will be those that are shown.
        mine = dataclasses.asdict(progress)
        kv.save(args.checkpoint, keep=KEPT, metadata=metadata, rank_metadata=mine, wait=wait)


def resume(args: argparse.Namespace, kv: kvcoll.KVStore) -> Progress:
    """Bring the store to the newest checkpoint; return how far the run had come."""
    if not args.resume:
        return Progress()
    try:
        found = kv.load(args.checkpoint)
    except kvcoll.errors.NoCheckpointError:
        if kv.rank == 0:
            print(f"no checkpoint in {args.checkpoint} yet: beginning anew", flush=True)
        return Progress()
    except kvcoll.errors.KVCollError as error:
        stop(args, kv, str(error))
    said = found.metadata
    if not isinstance(said, dict) or said.get("program") != "train.py":
        stop(args, kv, f"{found.path} was not saved by train.py")
    for name in OPTIONS:
        if said["options"][name] != vars(args)[name]:
            was, now = said["options"][name], vars(args)[name]
            option = name.replace("_", "-")
            stop(args, kv, f"it was trained with --{option} {was}, and not {now}")
    progress = Progress(**found.rank_metadata[0])
    if kv.rank == 0:
        steps = f" and {progress.steps} steps" if progress.steps else ""
        after = progress.epochs[-1]["number"]
        print(f"resumed   {found.path}, after epoch {after}{steps}", flush=True)
    return progress


def stop(args: argparse.Namespace, kv: kvcoll.KVStore, problem: str) -> NoReturn:
    """End this rank, as all others do; rank 0 says why."""
    if kv.rank == 0:
        print(f"train.py: error: cannot resume from {args.checkpoint}: {problem}", file=sys.stderr)
    sys.exit(2)
