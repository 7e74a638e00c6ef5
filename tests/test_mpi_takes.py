"""Whether MPI takes memory of a GPU: asked, then tried once; no way to fail is an error."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvcoll import apart, mpi_takes
from kvcoll.errors import ArgumentError

single = pytest.mark.single  # but not what MPI itself is asked: that is for each MPI


@pytest.fixture(autouse=True)
def _found_out_anew() -> Iterator[None]:
    mpi_takes.why_not.cache_clear()
    yield
    mpi_takes.why_not.cache_clear()


@single
@pytest.mark.parametrize(
    ("said", "way"),
    [
        (None, "auto"),
        ("", "auto"),
        ("Auto", "auto"),
        (" staged ", "staged"),
        ("DIRECT", "direct"),
    ],
)
def test_the_environment_says_how_mpi_gets_what_crosses(said: str | None, way: str) -> None:
    assert mpi_takes.wanted({} if said is None else {"KVCOLL_GPU_MPI": said}) == way


@single
def test_another_word_is_named() -> None:
    with pytest.raises(ArgumentError, match="KVCOLL_GPU_MPI is auto, staged or direct, got 'yes'"):
        mpi_takes.wanted({"KVCOLL_GPU_MPI": "yes"})


def test_an_mpi_that_says_no_is_not_tried(comm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mpi_takes, "tried", lambda device: pytest.fail("it was tried"))
    assert mpi_takes.why_not(0).endswith("says that it does not")  # no MPI of PyPI's has CUDA
    assert "\n" not in mpi_takes.why_not(0)


@single
@pytest.mark.parametrize("word", [True, None])
def test_what_an_mpi_says_that_it_takes_is_tried_once(
    comm: Any, monkeypatch: pytest.MonkeyPatch, word: bool | None
) -> None:
    tried: list[int] = []

    def once(device: int) -> str:
        tried.append(device)
        return "signal 11"

    monkeypatch.setattr(mpi_takes, "_says", lambda extension: word)
    monkeypatch.setattr(mpi_takes, "tried", once)
    assert [mpi_takes.why_not(3) for _ in range(4)] == ["signal 11"] * 4
    assert tried == [3]


@single
def test_a_library_without_the_question_has_no_answer(tmp_path: Path) -> None:
    assert mpi_takes._says(str(tmp_path / "libmpi.so")) is None
    assert mpi_takes._says("libc.so.6") is None


@pytest.mark.waits
@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("import os; os.kill(os.getpid(), 11)", "signal 11 (SIGSEGV)"),
        ("import time; time.sleep(60)", "it did not end within 2 s"),
        ("print('{}')", "it gave no answer"),
        ("print('{not JSON')", "exit code 0\n{not JSON"),
        ("print('x'); print('{\"why_not\": \"of 4 bytes\"}')", "of 4 bytes"),
        ("print('x'); print('{\"why_not\": \"\"}')", ""),
        ("print('{\"why_not\": \"\"}'); print('MPI_Finalize: so long'); print('{')", ""),
    ],
)
def test_whatever_a_trial_comes_to_is_a_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, why: str
) -> None:
    (tmp_path / "trial_of_mpi.py").write_text(f"def main(device):\n    {code}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    ask = apart.ask
    monkeypatch.setattr(mpi_takes, "_LIMIT_S", 2.0)
    monkeypatch.setattr(
        apart, "ask", lambda module, *arguments, **how: ask("trial_of_mpi", *arguments, **how)
    )
    assert mpi_takes.tried(0) == why


@single
def test_a_trial_that_cannot_begin_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(*_: Any, **__: Any) -> Any:
        raise OSError("no process more")

    monkeypatch.setattr(apart, "ask", ask)
    assert mpi_takes.tried(0) == "it could not be tried: no process more"
