"""The README's tutorial prints what the README says."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"


def _blocks(heading: str) -> list[tuple[str, str]]:
    """Give language and text of the code blocks under a heading."""
    section = README.read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return re.findall(r"```(\w+)\n(.*?)```", section, re.DOTALL)


@pytest.mark.single
def test_the_tutorial_prints_what_the_readme_says() -> None:
    (language, program), (_, expected) = _blocks("The tutorial")
    assert language == "python"
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(program, "README.md", "exec"), {})
    assert printed.getvalue() == expected


@pytest.mark.single
def test_the_first_two_commands_are_the_two_scripts() -> None:
    language, commands = _blocks("Two commands")[0]
    assert language == "sh"
    first, second = commands.splitlines()
    assert first.split()[0] == "scripts/train.sh"
    assert second.split()[0] == "scripts/test.sh"
