"""Whether hosts reach each other by name and by address (TCP)."""

from __future__ import annotations

import contextlib
import secrets
import socket
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from .facts import Facts

_LIMIT_S = 3.0
_TOKEN_BYTES = 16
_AT_ONCE = 32


def listen() -> tuple[int, str]:
    """Answer whoever connects with a token, until the process ends.

    Returns
    -------
    port : int
        0 where no socket may listen.
    token : str
        By it the caller knows that it was this process, and not one of the same address on
        another network.
    """
    token = secrets.token_hex(_TOKEN_BYTES // 2)
    try:
        server = socket.create_server(("", 0), backlog=128)
    except OSError:
        return 0, ""
    threading.Thread(target=_answer, args=(server, token.encode()), daemon=True).start()
    return int(server.getsockname()[1]), token


def try_all(me: Facts, others: Iterable[Facts]) -> list[dict[str, Any]]:
    """Connect to each other host by its name and by each of its addresses.

    Returns
    -------
    list of dict
        Of each other host: ``origin`` and ``target`` (ranks), ``name`` (``''`` if it was reached by
        name, else why not), ``addresses`` (of each the same).
    """
    others = [other for other in others if other.rank != me.rank and other.port]
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return list(pool.map(lambda other: _try_one(me, other), others))


def _try_one(me: Facts, other: Facts) -> dict[str, Any]:
    found = {
        address: _connect(address, other) for address in dict.fromkeys(other.addresses.values())
    }
    return {
        "origin": me.rank,
        "target": other.rank,
        "name": _connect(other.host, other),
        "addresses": found,
    }


def _connect(where: str, other: Facts) -> str:
    """Say why the process that listens there is not reached, or is another one."""
    try:
        with socket.create_connection((where, other.port), timeout=_LIMIT_S) as one:
            one.settimeout(_LIMIT_S)
            got = one.recv(_TOKEN_BYTES, socket.MSG_WAITALL)
    except socket.gaierror:
        return "the name is not known"
    except TimeoutError:
        return f"no answer within {_LIMIT_S:g} s"
    except OSError as error:
        return error.strerror or str(error)
    return "" if got.decode(errors="replace") == other.token else "another machine answers"


def _answer(server: socket.socket, token: bytes) -> None:
    while True:
        one, _ = server.accept()
        with one, contextlib.suppress(OSError):
            one.sendall(token)
