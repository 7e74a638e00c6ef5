"""How a peer's process talks with scripts/bench.py: a line of JSON in, a line of JSON out.

Rules of the file: it runs in the peers' environments, so it imports nothing but the
standard library; standard output belongs to the replies, whatever a library prints.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
from collections.abc import Callable
from typing import Any, TypeAlias

# Takes a request; gives the seconds that a call took on this process.
Answer: TypeAlias = Callable[[dict[str, Any]], float]


def parse_arguments(doc: str) -> argparse.Namespace:
    """Read which of the peer's processes this is."""
    parser = argparse.ArgumentParser(description=doc)
    parser.add_argument("--role", choices=("worker", "server", "scheduler"), default="worker")
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--ranks", type=int, required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    return parser.parse_args()


def end_with_parent() -> None:
    """End this process when its standard input ends; for one that answers no requests."""

    def watch() -> None:
        while os.read(0, 1):
            pass
        os._exit(0)

    threading.Thread(target=watch, daemon=True).start()


def serve(begin: Callable[[], tuple[str, Answer]]) -> None:
    """Start the peer, say its version, and answer requests until there are no more.

    Parameters
    ----------
    begin : callable
        Gives the version and what answers a request.
    """
    with os.fdopen(os.dup(1), "w") as replies:
        os.dup2(2, 1)
        version, answer = begin()
        replies.write(json.dumps({"version": version}) + "\n")
        replies.flush()
        for line in sys.stdin:
            replies.write(json.dumps({"seconds": answer(json.loads(line))}) + "\n")
            replies.flush()
