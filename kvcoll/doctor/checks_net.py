"""Checks of what lies between ranks and hosts: names, addresses, clocks, links, sums; pure."""

from __future__ import annotations

import statistics

from .findings import Finding, note, ok, problem
from .seen import Link, Seen

_SKEW_S, _GRAVE_SKEW_S = 0.5, 60.0
_ASYMMETRIC = 3.0  # the quicker direction over the slower
_SLOW = 1 / 3  # of the median of all links
_LATE = 10.0  # times the median latency
_SLOW_NETWORK_BYTES_PER_S = 50e6  # less than half of what Gigabit Ethernet carries
# What a push may take beside the wire's time, which is all of it on a slow network.
_FAR_FROM_FLOOR, _WITHOUT_WIRE_S_PER_BYTE = 3.0, 5e-9
_SHOWN = 4


def check_names(seen: Seen) -> list[Finding]:
    """Look for hosts that have one name."""
    names: dict[str, set[str]] = {}
    for one in seen.facts.values():
        names.setdefault(one.host, set()).add(one.boot)
    for name, boots in names.items():
        if len(boots) > 1:
            return [
                problem(
                    "host names",
                    f"{len(boots)} hosts are all called {name!r}",
                    "an MPI that knows hosts by their names takes them for one, and their ranks "
                    "for neighbours in memory",
                    "give each a name of its own: hostnamectl set-hostname, docker run --hostname",
                )
            ]
    return []


def check_reached(seen: Seen) -> list[Finding]:
    """Look whether each host reaches each other by its name and its addresses."""
    found: list[Finding] = []
    for one in seen.reached:
        origin, target = seen.host_of(one["origin"]), seen.host_of(one["target"])
        addresses = {address: why for address, why in one["addresses"].items() if why}
        some = len(addresses) < len(one["addresses"])
        if one["name"]:
            level = note if some else problem
            found.append(
                level(
                    "host names",
                    f"{origin} does not reach {target} by its name: {one['name']}",
                    "mpirun, srun and MPI connect by names that hosts give themselves",
                    f"enter {target} in DNS, or in /etc/hosts on {origin}, with an address that "
                    "it can reach; see to the firewall",
                )
            )
        if addresses and some:
            listed = ", ".join(f"{address} ({why})" for address, why in addresses.items())
            found.append(
                note(
                    "addresses",
                    f"{origin} does not reach {target} at {listed}",
                    "an MPI that tries this network first waits, or hangs",
                    _which_network(seen, one["target"], set(addresses)),
                )
            )
        elif addresses and not one["name"]:
            found.append(
                note("addresses", f"{origin} reaches {target} by its name, but at no address")
            )
    if found:
        return _few(found)
    return [ok("addresses", "every host reaches every other by name and address")] * bool(
        seen.reached
    )


def _which_network(seen: Seen, rank: int, bad: set[str]) -> str:
    good = [i for i, address in seen.facts[rank].addresses.items() if address not in bad]
    name = good[0] if good else "eth0"
    return f"name the network: OMPI_MCA_btl_tcp_if_include={name} (Open MPI), FI_TCP_IFACE={name}"


def check_clocks(seen: Seen) -> list[Finding]:
    """Compare the clocks of hosts with that of rank 0's."""
    skews = {
        seen.host_of(link.b if link.a == 0 else link.a): link.clock_s * (1 if link.a == 0 else -1)
        for link in seen.links
        if 0 in (link.a, link.b) and link.clock_s is not None and seen.is_between_hosts(link)
    }
    if not skews:
        return []
    host, worst_s = max(skews.items(), key=lambda item: abs(item[1]))
    if abs(worst_s) < _SKEW_S:
        return [ok("clocks", f"within {max(abs(worst_s), 1e-3) * 1e3:.0f} ms of each other")]
    way = "ahead of" if worst_s > 0 else "behind"
    what = f"the clock of {host} is {abs(worst_s):.1f} s {way} that of {seen.host_of(0)}"
    why = "times in logs and of files mislead"
    cure = "let all hosts keep one time: systemctl enable --now chrony"
    if abs(worst_s) < _GRAVE_SKEW_S:
        return [note("clocks", what, why, cure)]
    return [problem("clocks", what, f"{why}; SLURM's munge refuses what is 300 s old", cure)]


def check_links(seen: Seen) -> list[Finding]:
    """Look for links that are cut, slow, late or slower one way; those between hosts."""
    found = []
    for link in seen.links:
        if link.latency_s is None:
            a, b = _ends(seen, link)
            found.append(
                problem(
                    "links",
                    f"no message of MPI came through between {a} and {b}",
                    "a push would hang",
                    f"see whether {a} and {b} reach each other (ping), and the firewall; MPI may "
                    "have chosen a network that does not join them",
                )
            )
    between = [link for link in seen.links if link.latency_s and seen.is_between_hosts(link)]
    best = _best_of_hosts(seen, between)
    usual = statistics.median(best.values()) if best else 0.0
    lates = [link.latency_s for link in between if link.latency_s]
    usual_s = statistics.median(lates) if lates else 0.0
    slow = {host for host, rate in best.items() if rate < _SLOW * usual}
    for host in sorted(slow):
        what = f"{host} carries {mbit(best[host])} at most; most hosts {mbit(usual)}"
        found.append(problem("links", what, "a push is as slow as the slowest host", _LOOK))
    for link in between:
        if not slow & set(_ends(seen, link)):
            found += _of_link(seen, link, usual, usual_s)
    if found:
        return _few(found)
    if usual and max(best.values()) < _SLOW_NETWORK_BYTES_PER_S:
        what = f"the network between the hosts carries {mbit(usual)} at most"
        return [note("links", what, "a push of 100 MB takes seconds: see below", _FASTER)]
    return [ok("links", "none is cut, slow, or slower one way")] * bool(seen.links)


_FASTER = "name a faster network if there is one (OMPI_MCA_btl_tcp_if_include, FI_TCP_IFACE)"


_LOOK = "look at cable, port and driver of the slower host: ethtool, ip -s link"


def _best_of_hosts(seen: Seen, between: list[Link]) -> dict[str, float]:
    """Give of each host the quickest rate that it has with any other."""
    best: dict[str, float] = {}
    for link in between:
        for host in _ends(seen, link):
            best[host] = max([best.get(host, 0.0), *_rates(link)])
    return best


def _of_link(seen: Seen, link: Link, usual: float, usual_s: float) -> list[Finding]:
    a, b = _ends(seen, link)
    there, back = link.there_bytes_per_s, link.back_bytes_per_s
    if there and back and max(there, back) > _ASYMMETRIC * min(there, back):
        slow, quick = ((a, b), (b, a)) if there < back else ((b, a), (a, b))
        what = (
            f"{slow[0]} to {slow[1]} carries {mbit(min(there, back))}, "
            f"{quick[0]} to {quick[1]} {mbit(max(there, back))}"
        )
        return [problem("links", what, "a push is as slow as the slower direction", _LOOK)]
    if min(_rates(link), default=usual) < _SLOW * usual:
        what = f"{a} and {b} carry {mbit(min(_rates(link)))}; most hosts {mbit(usual)}"
        return [problem("links", what, "a push is as slow as the slowest link", _LOOK)]
    if link.latency_s and link.latency_s > max(_LATE * usual_s, 1e-4):
        what = f"{a} and {b} take {micro(link.latency_s)} a message; most links {micro(usual_s)}"
        return [note("links", what, "small pushes wait for it", _LOOK)]
    return []


def check_push(seen: Seen) -> list[Finding]:
    """Compare a push with what the links allow."""
    if not seen.pushes:
        return []
    told = seen.pushes[min(seen.pushes)]
    if "error" in told:
        return [
            problem(
                "push",
                f"a push by all ranks failed: {told['error']}",
                "no training would run",
                "cure what else is found here",
            )
        ]
    floor_s = push_floor_s(seen, told["n_bytes"])
    allowed_s = _FAR_FROM_FLOOR * floor_s + _WITHOUT_WIRE_S_PER_BYTE * told["n_bytes"]
    if floor_s and told["push_s"] > allowed_s:
        what = f"a push took {milli(told['push_s'])}; the links allow {milli(floor_s)}"
        why = "ranks are held up by something else than the wire: cores, other jobs, memory"
        return [note("push", what, why, "look at the load of each host: uptime")]
    return []


def push_floor_s(seen: Seen, n_bytes: int) -> float:
    """Say how long a push takes at least by the slowest link between hosts; 0 on one host."""
    hosts = len(seen.hosts())
    rates = [rate for one in seen.links if seen.is_between_hosts(one) for rate in _rates(one)]
    return 2 * (hosts - 1) / hosts * n_bytes / min(rates) if rates else 0.0


def mbit(bytes_per_s: float) -> str:
    """Write a rate as people speak of networks: ``940 Mbit/s``, ``12.1 Gbit/s``."""
    rate = bytes_per_s * 8 / 1e6
    return f"{rate / 1e3:.1f} Gbit/s" if rate >= 1e3 else f"{rate:.3g} Mbit/s"


def micro(seconds: float) -> str:
    """Write a short time: ``1.2 µs``, ``35 µs``, ``2.1 ms``."""
    if seconds >= 1e-3:
        return milli(seconds)
    return f"{seconds * 1e6:.1f} µs" if seconds < 1e-5 else f"{seconds * 1e6:.0f} µs"


def milli(seconds: float) -> str:
    """Write a longer one: ``9.3 ms``, ``43 ms``, ``1.2 s``."""
    if seconds >= 1:
        return f"{seconds:.2g} s"
    return f"{seconds * 1e3:.2g} ms" if seconds < 0.01 else f"{seconds * 1e3:.0f} ms"


def _rates(link: Link) -> list[float]:
    return [rate for rate in (link.there_bytes_per_s, link.back_bytes_per_s) if rate]


def _ends(seen: Seen, link: Link) -> tuple[str, str]:
    a, b = seen.host_of(link.a), seen.host_of(link.b)
    return (a, b) if a != b else (f"rank {link.a}", f"rank {link.b} on {b}")


def _few(found: list[Finding]) -> list[Finding]:
    """Show a few of many; problems first."""
    found = sorted(found, key=lambda one: one.level != "problem")
    rest = found[_SHOWN:]
    if not rest:
        return found
    what = f"and {len(rest)} more of this kind, all in --json"
    return [*found[:_SHOWN], Finding(rest[0].level, rest[0].about, what)]
