"""What a rank says before it aborts is waited for until somebody has read it, but not for ever."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import kvcoll
from kvcoll.last_words import unread_bytes

pytestmark = pytest.mark.single

SAYS = "from kvcoll import last_words; last_words.LONGEST_WAIT_S = {}; last_words.say_last('ends')"


def started(longest_wait_s: float) -> subprocess.Popen[bytes]:
    """Start a program that says its last words, and wait until it has said them."""
    process = subprocess.Popen(
        [sys.executable, "-c", SAYS.format(longest_wait_s)],
        env=os.environ | {"PYTHONPATH": str(Path(kvcoll.__file__).parents[1])},
        stderr=subprocess.PIPE,
    )
    assert process.stderr is not None
    while not unread_bytes(process.stderr.fileno()):
        assert process.poll() is None
        time.sleep(0.01)
    return process


def test_a_rank_waits_until_its_last_words_are_read() -> None:
    process = started(1000)
    time.sleep(0.3)
    assert process.poll() is None
    assert process.communicate(timeout=30)[1] == b"ends\n"
    assert process.returncode == 0


def test_a_rank_whose_last_words_nobody_reads_ends_all_the_same() -> None:
    process = started(0.1)
    assert process.wait(timeout=30) == 0
    assert process.communicate()[1] == b"ends\n"


def test_words_into_a_file_are_not_waited_for(tmp_path: Path) -> None:
    with open(tmp_path / "said", "wb") as file:
        subprocess.run(
            [sys.executable, "-c", SAYS.format(1000)],
            env=os.environ | {"PYTHONPATH": str(Path(kvcoll.__file__).parents[1])},
            stderr=file,
            timeout=30,
            check=True,
        )
    assert (tmp_path / "said").read_text() == "ends\n"
