"""What the programs have in common in which ranks are killed; not a test."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn

import numpy as np

import kvcoll
from kvcoll.errors import RankLostError

N = 30_000  # large enough that sums go in pieces, through shared memory


def die() -> NoReturn:
    """Be killed."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("SIGKILL was survived")


def die_in(seconds: float) -> None:
    """Be killed soon, wherever that is."""
    timer = threading.Timer(seconds, die)
    timer.daemon = True
    timer.start()


def say(*words: object) -> None:
    """Write one line, so that the lines of several ranks do not mix."""
    sys.stdout.write(" ".join(map(str, words)) + "\n")
    sys.stdout.flush()


def until_lost(call: Callable[[], Any], limit_s: float = 8.0) -> tuple[RankLostError, float]:
    """Call over and over; give the error, and for how long the call took that raised it."""
    end_s = time.monotonic() + limit_s
    while time.monotonic() < end_s:
        began_s = time.monotonic()
        try:
            call()
        except RankLostError as error:
            return error, time.monotonic() - began_s
    raise AssertionError(f"no rank was lost within {limit_s} s")


def same_bits(kv: kvcoll.KVStore, keys: list[str], check: kvcoll.KVStore) -> None:
    """Raise unless all ranks hold the same values; compares by sums of exact integers."""
    for key in keys:
        words = np.frombuffer(kv.pull(key).tobytes(), np.uint8).astype(np.int64)
        total = words * (1 + np.arange(words.size) % 97)
        mine = np.array([total.sum(), (total % 1009).sum()])
        everyone = mine.copy()
        check.pushpull("check", everyone)
        assert (everyone == mine * kv.num_workers).all(), f"{key} differs between ranks"
