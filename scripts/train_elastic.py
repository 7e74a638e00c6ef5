"""Going on in train.py when a rank is lost, with those that are left.

Rules of the file: what a run needs to go on is the store's version, which says what batch is
next, and the epochs that are done, of which all ranks that are left must have the same.
"""

from __future__ import annotations

import argparse

import numpy as np

import kvcoll

_DONE = "epochs done"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the option of this file."""
    parser.add_argument(
        "--elastic",
        action="store_true",
        help="go on with the other ranks if one is lost (Open MPI 5, mpirun --with-ft ulfm)",
    )


def prepare(args: argparse.Namespace, sums: kvcoll.KVStore) -> None:
    """Make what `go_on` needs: then there may be ranks that cannot make it any more."""
    if args.elastic:
        sums.init(_DONE, np.zeros(sums.num_workers))


def go_on(kv: kvcoll.KVStore, sums: kvcoll.KVStore, n_epochs: int, why: Exception) -> int:
    """Leave lost ranks behind; return how many epochs are done on all that are left.

    Parameters
    ----------
    kv, sums : kvcoll.KVStore
        Of the same ranks: both go on.
    n_epochs : int
        How many are done on this rank.
    why : Exception
        What told of the loss.
    """
    while True:
        try:
            version = kv.recover()
            done = sums.view(_DONE).copy() * 0
            done[sums.rank] = n_epochs
            sums.pushpull(_DONE, done)
        except kvcoll.errors.RankLostError as another:
            why = another
            continue
        if kv.rank == 0:
            reason = str(why).split(" (")[0]
            print(f"{reason}: {kv.num_workers} go on from push {version}", flush=True)
        return int(done[: sums.num_workers].min())
