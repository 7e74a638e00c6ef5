"""The doctor's page for people, and the same as JSON for machines."""

from __future__ import annotations

import dataclasses
import json
import textwrap
from typing import Any

from ..transport.launcher import name_of_library
from .checks_net import mbit, micro, milli, push_floor_s
from .findings import Finding, counted
from .push import FULL_BYTES
from .seen import Link, Seen

WIDTH = 100
_LEVELS = {"ok": "ok", "note": "note", "problem": "PROBLEM"}
_FIRST, _SECOND = 9, 15
_SHOWN_LINKS = 12


def as_text(seen: Seen, found: list[Finding]) -> str:
    """Write the page, at most 100 columns wide."""
    hosts = len(seen.hosts())
    library = f", {name_of_library(seen.library)}" if seen.library else ""
    version = seen.own.versions.get("kvcoll", "")
    job = f"{counted(seen.size, 'rank')} on {counted(hosts, 'host')}"
    title = f"kvcoll {version} doctor: {job}{library}"
    lines = [title, ""]
    for one in found:
        lines += _lines(one)
    measured = _measured(seen)
    if measured:
        lines += ["", "measured", *measured]
    return "\n".join([*lines, "", _verdict(found)])


def as_json(seen: Seen, found: list[Finding]) -> str:
    """Write all that was seen and found."""
    told: dict[str, Any] = {
        "ok": not any(one.level == "problem" for one in found),
        "size": seen.size,
        "hosts": seen.hosts(),
        "library": seen.library,
        "findings": [dataclasses.asdict(one) for one in found],
        "missing": seen.missing,
        "failure": seen.failure,
        "ranks": {rank: dataclasses.asdict(one) for rank, one in sorted(seen.facts.items())},
        "links": [dataclasses.asdict(link) for link in seen.links],
        "reached": seen.reached,
        "push": seen.pushes.get(0, {}),
    }
    return json.dumps(told, indent=1)


def _lines(one: Finding) -> list[str]:
    head = f"{_LEVELS[one.level]:{_FIRST}}{one.about:{_SECOND}}"
    what, *said = one.what.splitlines() or [""]
    lines = _wrapped(head, what)
    blank = " " * (_FIRST + _SECOND)
    for text in said:
        lines += _wrapped(f"{blank}| ", text)
    if one.why:
        lines += _wrapped(f"{blank}why:  ", one.why)
    if one.cure:
        lines += _wrapped(f"{blank}cure: ", one.cure)
    return lines


def _wrapped(head: str, text: str) -> list[str]:
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=head,
        subsequent_indent=" " * len(head),
        break_long_words=False,
        break_on_hyphens=False,
    ) or [head]


def _measured(seen: Seen) -> list[str]:
    within = [one for one in seen.links if not seen.is_between_hosts(one)]
    between = [one for one in seen.links if seen.is_between_hosts(one)]
    lines = []
    for kind, links in (("within a host", within), ("between hosts", between)):
        for link in links[:_SHOWN_LINKS]:
            lines += _wrapped(f"  {kind:{_FIRST + _SECOND - 2}}", _link(seen, link))
            kind = ""
        if len(links) > _SHOWN_LINKS:
            lines += _wrapped(" " * (_FIRST + _SECOND), _rest(links))
    return lines + _push(seen)


def _link(seen: Seen, link: Link) -> str:
    a, b = seen.host_of(link.a), seen.host_of(link.b)
    ends = f"{a} - {b}" if a != b else f"{a}"
    if link.latency_s is None:
        return f"{ends}: no answer"
    there, back = link.there_bytes_per_s or 0.0, link.back_bytes_per_s or 0.0
    if a == b:
        return f"{ends}: {micro(link.latency_s)}, {max(there, back) / 1e9:.1f} GB/s by MPI"
    return f"{ends}: {micro(link.latency_s)}, {mbit(there)} there, {mbit(back)} back"


def _rest(links: list[Link]) -> str:
    rates = [
        rate for one in links for rate in (one.there_bytes_per_s, one.back_bytes_per_s) if rate
    ]
    most = f", {mbit(min(rates))} to {mbit(max(rates))}" if rates else ""
    return f"... of {len(links)} in all{most}"


def _push(seen: Seen) -> list[str]:
    told = seen.pushes.get(0, {})
    if "push_s" not in told:
        return []
    n_bytes = told["n_bytes"]
    share = FULL_BYTES / n_bytes
    about = "" if share == 1 else f" (of {n_bytes / 1e6:.0f} MB, times {share:.1f})"
    floor_s = push_floor_s(seen, FULL_BYTES)
    large = (
        f"{milli(told['push_s'] * share)}{about}; MPI_Allreduce "
        f"{milli(told['allreduce_s'] * share)}"
    )
    head = _FIRST + _SECOND - 2
    floor = f"the slowest link between hosts allows {milli(floor_s)}"
    return [
        *_wrapped(f"  {'push of 100 MB':{head}}", large),
        *(_wrapped(" " * (head + 2), floor) if floor_s else []),
        *_wrapped(f"  {'pull of 100 MB':{head}}", milli(told["pull_s"] * share)),
        *_wrapped(f"  {'push of 1,000 floats':{head}}", micro(told["small_s"])),
    ]


def _verdict(found: list[Finding]) -> str:
    n = {level: sum(one.level == level for one in found) for level in ("problem", "note")}
    notes = f", {counted(n['note'], 'note')}" if n["note"] else ""
    return f"{counted(n['problem'], 'problem')}{notes}" if n["problem"] else f"all is well{notes}"
