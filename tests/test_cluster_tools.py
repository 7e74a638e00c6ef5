"""The tools that make pretend hosts: nothing stays behind, nobody is in another's way."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest
from cluster import hosts as tool
from cluster.hosts import SCRIPT, environment_of, pretend_hosts, run
from mpi_job import clean_environment

pytestmark = [pytest.mark.single, pytest.mark.long]

OWNER: Final = """
import time
from cluster.hosts import pretend_hosts
with pretend_hosts(2) as hosts:
    print(hosts.folder, flush=True)
    time.sleep(60)
"""


def processes_of(folder: Path) -> list[str]:
    """Return the command lines in which a folder is named."""
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            lines.append(path.read_text().replace("\0", " "))
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has ended by now
    return [line for line in lines if str(folder) in line]


def comes_true(condition: Callable[[], bool], within_s: float = 10.0) -> bool:
    end_s = time.monotonic() + within_s
    while not condition() and time.monotonic() < end_s:
        time.sleep(0.05)
    return condition()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_hosts_end_with_their_owner_whatever_ends_it(how: signal.Signals) -> None:
    with pretend_hosts(1):
        pass  # or else this test is skipped: what follows would have to fail
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER],
        cwd=Path(__file__).parent,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert owner.stdout is not None
    folder = Path(owner.stdout.readline().strip())
    assert len(processes_of(folder)) >= 2  # an sshd each
    owner.send_signal(how)
    owner.communicate()
    assert comes_true(lambda: not folder.exists() and not processes_of(folder))


def test_two_owners_have_hosts_of_their_own() -> None:
    with pretend_hosts(1) as first:
        (first.folder / "mark").touch()
        with pretend_hosts(2) as second:
            assert second.on("kv1", "ssh", "kv2", "hostname").stdout == "kv2\n"
            assert not (second.folder / "mark").exists()
            second.cut("kv1")
            assert first.bytes("kv1")[1] > 0
        assert not second.folder.exists()
        assert first.on("kv1", "ssh", "kv1", "hostname").stdout == "kv1\n"


def test_a_host_is_another_machine_to_its_programs() -> None:
    with pretend_hosts(2) as hosts:
        for place in ("/tmp", "/dev/shm", "/run"):
            assert hosts.on("kv1", "touch", f"{place}/mark").returncode == 0
            assert not Path(place, "mark").exists()
            assert hosts.on("kv2", "test", "-e", f"{place}/mark").returncode == 1
        listed = hosts.on("kv2", "ps", "-e", "-o", "args=").stdout
        assert listed.startswith("sshd")
        assert str(os.getpid()) not in hosts.on("kv2", "ls", "/proc").stdout.split()


def test_up_and_down_can_be_said_twice(tmp_path: Path) -> None:
    with pretend_hosts(1):
        pass
    folder = Path("/var/tmp") / f"kvcoll-twice-{os.getpid()}"
    env = clean_environment() | environment_of(folder)

    def say(*words: str) -> int:
        return run([str(SCRIPT), *words], env=env, timeout_s=20).returncode

    try:
        assert [say("up", "1"), say("up", "1")] == [0, 0]
        assert say("on", "kv1", "true") == 0
        assert say("on", "kv2", "true") == 1
        assert say("up", "2") == 1  # others are up
    finally:
        assert [say("down"), say("down")] == [0, 0]
    assert not folder.exists()
    assert say("on", "kv1", "true") == 1
    assert comes_true(lambda: not processes_of(folder))


def test_a_folder_that_holds_other_things_is_not_emptied(tmp_path: Path) -> None:
    (tmp_path / "precious").touch()
    env = clean_environment() | environment_of(tmp_path)
    assert run([str(SCRIPT), "down"], env=env, timeout_s=20).returncode == 1
    assert (tmp_path / "precious").exists()


@pytest.mark.parametrize(
    ("user", "tools", "why"),
    [
        (1000, ("sh",), "pretend hosts need root"),
        (0, ("sh", "no-such-tool"), "pretend hosts need no-such-tool: apt-get install"),
    ],
)
def test_without_what_they_need_tests_skip_or_where_required_fail(
    monkeypatch: pytest.MonkeyPatch, user: int, tools: tuple[str, ...], why: str
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: user)
    monkeypatch.setattr(tool, "TOOLS", tools)
    monkeypatch.setattr(tool, "REQUIRED", False)
    with pytest.raises(pytest.skip.Exception, match=why), pretend_hosts(1):
        pass
    monkeypatch.setattr(tool, "REQUIRED", True)
    with pytest.raises(pytest.fail.Exception, match=why), pretend_hosts(1):
        pass
