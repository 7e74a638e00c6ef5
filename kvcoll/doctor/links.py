"""Measures the link between two ranks: latency, bandwidth each way, and their clocks.

Rules of the file: a link is first seen to be alive, with a limit; only then is it waited
for. Each direction is measured by its sender, the other one is quiet meanwhile.
"""

from __future__ import annotations

import statistics
import struct
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ..arrays import Array
from .talk import Talk

FIRST_ANSWER_S = 10.0
_FIRST_TAG = 100
_STAMP = struct.Struct("<d")
_ROUND_TRIPS = 200
_LATENCY_BUDGET_S = 0.2
_CHUNK_BYTES, _MOST_BYTES = 1 << 20, 64 << 20
_BUFFER_BYTES = 32 << 20  # more than most caches hold
_FIRST_BYTES = 64 << 10
_LONG_ENOUGH_S = 0.1
_SAMPLES = 2
_STOP = 0.0


def rounds_of(members: Sequence[int]) -> Iterator[list[tuple[int, int]]]:
    """Pair all with all, in rounds in which nobody has two partners (the circle method)."""
    circle: list[int | None] = [*members, *([None] if len(members) % 2 else [])]
    for _ in range(len(circle) - 1):
        half = len(circle) // 2
        pairs = zip(circle[:half], reversed(circle[half:]), strict=True)
        yield [(a, b) for a, b in pairs if a is not None and b is not None]
        circle = [circle[0], circle[-1], *circle[1:-1]]


def measure(talk: Talk, other: int, number: int) -> dict[str, Any]:
    """Measure the link to another rank, which calls this with the same number.

    Returns
    -------
    dict
        ``latency_s``: half a round trip of 8 bytes. ``clock_s``: how far the other's clock is
        ahead. ``bytes_per_s``: from here to there. Empty if no answer came.
    """
    tag = _FIRST_TAG + number
    if not _is_alive(talk, other, tag):
        return {}
    first = talk.rank < other
    told = _times(talk, other, tag) if first else _give_times(talk, other, tag)
    for sends in (first, not first):
        if sends:
            told["bytes_per_s"] = _send(talk, other, tag)
        else:
            _receive(talk, other, tag)
    return told


def _is_alive(talk: Talk, other: int, tag: int) -> bool:
    sent, got = bytearray(1), bytearray(1)
    requests = [talk.comm.Irecv(got, other, tag), talk.comm.Isend(sent, other, tag)]
    if talk.done(requests, FIRST_ANSWER_S):
        return True
    requests[0].Cancel()
    _kept.append((requests, sent, got))  # MPI may still use them
    return False


_kept: list[object] = []


def _times(talk: Talk, other: int, tag: int) -> dict[str, Any]:
    """Ask for the time again and again; the quickest answer tells it best (Cristian 1989)."""
    sent, got = bytearray(8), bytearray(8)
    trips: list[tuple[float, float]] = []
    end = time.perf_counter() + _LATENCY_BUDGET_S
    while len(trips) < _ROUND_TRIPS and (len(trips) < 5 or time.perf_counter() < end):
        clock_s, began_s = time.time(), time.perf_counter()
        _STAMP.pack_into(sent, 0, 1.0)
        talk.comm.Sendrecv(sent, other, tag, got, other, tag)
        took_s = time.perf_counter() - began_s
        trips.append((took_s, _STAMP.unpack(got)[0] - (clock_s + took_s / 2)))
    _STAMP.pack_into(sent, 0, _STOP)
    talk.comm.Send(sent, other, tag)
    return {
        "latency_s": statistics.median(took_s for took_s, _ in trips) / 2,
        "clock_s": min(trips)[1],
    }


def _give_times(talk: Talk, other: int, tag: int) -> dict[str, Any]:
    got = bytearray(8)
    while True:
        talk.comm.Recv(got, other, tag)
        if _STAMP.unpack(got)[0] == _STOP:
            return {}
        talk.comm.Send(_STAMP.pack(time.time()), other, tag)


def _send(talk: Talk, other: int, tag: int) -> float:
    """Send more and more until it takes long enough to be measured; the best of a few counts."""
    data, answer = np.zeros(_BUFFER_BYTES, np.uint8), bytearray(1)
    n_bytes, rates = _FIRST_BYTES, list[float]()
    while len(rates) < _SAMPLES:
        talk.comm.Send(_STAMP.pack(float(n_bytes)), other, tag)
        talk.comm.Recv(answer, other, tag)  # the other is ready
        began_s = time.perf_counter()
        requests = [talk.comm.Isend(part, other, tag) for part in _parts(data, n_bytes)]
        requests[0].Waitall(requests)
        talk.comm.Recv(answer, other, tag)  # it has all
        took_s = time.perf_counter() - began_s
        if took_s < _LONG_ENOUGH_S and n_bytes < _MOST_BYTES:
            n_bytes = min(_MOST_BYTES, n_bytes * 4)
        else:
            rates.append(n_bytes / took_s)
    talk.comm.Send(_STAMP.pack(_STOP), other, tag)
    return max(rates)


def _receive(talk: Talk, other: int, tag: int) -> None:
    data, told = np.empty(_BUFFER_BYTES, np.uint8), bytearray(8)
    while True:
        talk.comm.Recv(told, other, tag)
        n_bytes = int(_STAMP.unpack(told)[0])
        if not n_bytes:
            return
        talk.comm.Send(bytes(1), other, tag)
        for part in _parts(data, n_bytes):
            talk.comm.Recv(part, other, tag)
        talk.comm.Send(bytes(1), other, tag)


def _parts(data: Array, n_bytes: int) -> list[Array]:
    """Cut a message of so many bytes in chunks, which go through the buffer again and again."""
    parts = []
    for start in range(0, n_bytes, _CHUNK_BYTES):
        low = start % data.size
        parts.append(data[low : low + min(_CHUNK_BYTES, n_bytes - start)])
    return parts
