"""Checkpoints of train.py: one after each epoch, and going on from the newest.

Rules of the file: every rank makes the same calls; what a run needs beside its store (which
epoch is next, what came of those before) goes with it as metadata. The order of the
samples follows from seed and epoch, so an epoch's number is the data position of all ranks.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, NoReturn

import kvcoll

KEPT = 2
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
        help=f"save after each epoch, beside the training; the last {KEPT} are kept",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on from the newest complete checkpoint in DIR, if there is one",
    )


def save(args: argparse.Namespace, kv: kvcoll.KVStore, epochs: list[dict[str, Any]]) -> None:
    """Save the store, and what came of the epochs so far."""
    if args.checkpoint is not None:
        options = {name: vars(args)[name] for name in OPTIONS}
        metadata = {"program": "train.py", "options": options}
        # Each rank has its own times; rank 0's will be those that are shown.
        kv.save(args.checkpoint, keep=KEPT, metadata=metadata, rank_metadata=epochs, wait=False)


def resume(args: argparse.Namespace, kv: kvcoll.KVStore) -> list[dict[str, Any]]:
    """Bring the store to the newest checkpoint; return what came of the epochs before it."""
    if not args.resume:
        return []
    try:
        found = kv.load(args.checkpoint)
    except kvcoll.errors.NoCheckpointError:
        if kv.rank == 0:
            print(f"no checkpoint in {args.checkpoint} yet: beginning anew", flush=True)
        return []
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
    epochs: list[dict[str, Any]] = found.rank_metadata[0]
    if kv.rank == 0:
        print(f"resumed   {found.path}, after epoch {epochs[-1]['number']}", flush=True)
    return epochs


def stop(args: argparse.Namespace, kv: kvcoll.KVStore, problem: str) -> NoReturn:
    """End this rank, as all others do; rank 0 says why."""
    if kv.rank == 0:
        print(f"train.py: error: cannot resume from {args.checkpoint}: {problem}", file=sys.stderr)
    sys.exit(2)
