"""The runner's own tests: small suites, each run under mpirun in a job of its own."""

from __future__ import annotations

import functools
import re
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
from mpi_job import Job, run_job_through_mpirun
from mpi_watchdog import ABORT_CODE

pytestmark = [pytest.mark.jobs, pytest.mark.limit(90)]

Suite = Callable[..., Job]
SETTINGS = """
    [pytest]
    addopts = -ra --strict-markers -p mpi_runner
    filterwarnings = error
"""


MIXED = """
    def test_passes(comm, rank, size):
        assert comm.allreduce(rank + 5) == size * (size - 1) // 2 + size * 5

    def test_fails_on_rank_1(rank):
        print(f"said by {rank}")
        assert rank != 1, "only here"

    def test_differs(rank): assert rank == 1, f"text of {rank}"

    @pytest.fixture
    def broken(rank):
        if rank == 2:
            raise ValueError("no ground here")

    def test_needs_broken(broken, comm): comm.Barrier()

    @pytest.fixture
    def messy(rank):
        yield
        assert rank != 1, "left a mess"

    def test_leaves_mess(messy, comm): comm.Barrier()

    def test_skips(rank):
        if rank:
            pytest.skip("not here")

    @pytest.mark.xfail(strict=True)
    def test_expected(rank): assert rank != 1

    def test_after(comm): comm.Barrier()
"""


def run_suite(folder: Path, ranks: int, code: str, *options: str) -> Job:
    """Run a suite of one file, with short limits; none may be ended from outside.

    What it says comes through mpirun, as people see it, and the end of it must not be lost.
    """
    (folder / "pytest.ini").write_text(textwrap.dedent(SETTINGS))
    (folder / "test_small.py").write_text("import pytest\n" + textwrap.dedent(code))
    env = {
        "COLUMNS": "200",
        "PYTHONPATH": f"{folder}:{Path(__file__).parent}",
        "KVCOLL_TEST_LIMIT_S": "20",
        "KVCOLL_TEST_GRACE_S": "1",
        "KVCOLL_TEST_COUNTS": str(folder / "counts"),
        "KVCOLL_TEST_PART": "",
    }
    arguments = ("--color=no", f"--rootdir={folder}", *options)
    job = run_job_through_mpirun(ranks, "-m", "pytest", *arguments, folder, env=env)
    print(job.stdout, job.stderr, sep="\n")
    assert not job.timed_out
    return job


@pytest.fixture
def suite(comm: object, tmp_path: Path) -> Suite:
    return functools.partial(run_suite, tmp_path)


@pytest.fixture(scope="module")
def mixed(comm: object, tmp_path_factory: pytest.TempPathFactory) -> Job:
    return run_suite(tmp_path_factory.mktemp("mixed"), 3, MIXED)


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_suite_that_passes_is_reported_once_and_counted(
    suite: Suite, tmp_path: Path, ranks: int
) -> None:
    job = suite(
        ranks,
        """
        @pytest.mark.parametrize("addend", [1, 2])
        def test_sum(comm, rank, size, addend):
            assert comm.allreduce(rank + addend) == size * (size - 1) // 2 + size * addend

        def test_folder(comm, rank, shared_tmp_path):
            (shared_tmp_path / str(rank)).touch()
            comm.Barrier()
            assert len(list(shared_tmp_path.iterdir())) == comm.size

        @pytest.mark.single
        def test_alone(): assert False

        @pytest.mark.ranks(at_least=4)
        def test_of_four(): assert False

        def test_skipped(): pytest.skip("not today")
        """,
    )
    assert job.returncode == 0
    assert job.stdout.count("3 passed, 1 skipped, 2 deselected") == 1
    assert job.stdout.count("test session starts") == 1
    assert (tmp_path / "counts").read_text() == "3 0 1\n"


def test_a_failure_on_rank_1_fails_the_test_once_and_names_the_rank(mixed: Job) -> None:
    assert mixed.returncode == 1
    assert "2 failed, 3 passed, 1 skipped, 1 xfailed, 2 errors" in mixed.stdout
    assert "test_fails_on_rank_1 - rank 1 of 3: AssertionError: only here" in mixed.stdout
    assert len(re.findall("E +AssertionError: only here", mixed.stdout)) == 1
    assert all(f"said by {rank}" in mixed.stdout for rank in range(3))
    assert "AssertionError" not in mixed.stderr


def test_failures_that_differ_by_rank_are_all_shown(mixed: Job) -> None:
    assert "test_differs - ranks 0, 2 of 3" in mixed.stdout
    assert set(re.findall(r"E +AssertionError: text of (\d)", mixed.stdout)) == {"0", "2"}


def test_a_fixture_that_fails_on_one_rank_fails_the_test_on_all(mixed: Job) -> None:
    assert "test_needs_broken - rank 2 of 3: ValueError: no ground here" in mixed.stdout
    assert "test_leaves_mess - rank 1 of 3: AssertionError: left a mess" in mixed.stdout


def test_a_skip_or_an_expected_failure_of_some_ranks_is_said_for_all(mixed: Job) -> None:
    assert "not here (only on ranks 1, 2 of 3)" in mixed.stdout
    assert "test_expected - only on rank 1 of 3" in mixed.stdout


def test_x_stops_all_ranks_and_lf_runs_the_same_test_on_all(suite: Suite) -> None:
    code = """
        def test_first(): pass
        def test_fails(rank): assert rank != 1
    """
    stopped = suite(2, code, "-x")
    assert stopped.returncode == 1
    assert "1 failed, 1 passed" in stopped.stdout
    again = suite(2, code, "--lf")
    assert again.returncode == 1
    assert "rerun previous 1 failure" in again.stdout
    assert "passed" not in again.stdout


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (
            '@pytest.mark.parametrize("x", range(RANK + 1))',
            "rank 1 alone has test_small.py::test[1]",
        ),
        (
            '@pytest.mark.parametrize("x", [RANK, 1 - RANK])',
            "has test_small.py::test[1] where rank 0",
        ),
        ("assert RANK == 0, 'no such file here'", "rank 1 of 2: AssertionError: no such file here"),
    ],
    ids=["other tests", "other order", "error on one rank"],
)
def test_a_collection_that_differs_between_ranks_fails_on_all(
    suite: Suite, code: str, said: str
) -> None:
    lines = ["from mpi4py import MPI", "RANK = MPI.COMM_WORLD.rank", code, "def test(x): pass"]
    job = suite(2, "\n".join(lines))
    assert job.returncode == 2
    assert said in job.stdout


@pytest.mark.parametrize(
    "stall",
    ["comm.recv(source=comm.size - 1, tag=99)", "time.sleep(1000)"],
    ids=["in MPI", "in Python"],
)
def test_a_stall_ends_with_the_stacks_of_all_ranks_and_what_had_failed(
    suite: Suite, stall: str
) -> None:
    job = suite(
        3,
        f"""
        import time

        def test_failed_before(): assert False, "an earlier failure"

        @pytest.mark.limit(1)
        def test_stalls(comm, rank):
            if rank == 0:
                {stall}
        """,
    )
    assert job.returncode == ABORT_CODE
    for rank in range(3):
        assert f"[rank {rank} of 3] test_small.py::test_stalls" in job.stderr
    assert "test_stalls reached its limit of 1 s" in job.stderr
    assert job.stderr.count(stall) == 1
    assert job.stderr.count("has waited") >= 2
    assert "an earlier failure" in job.stderr


@pytest.mark.long
def test_the_last_words_wait_for_an_mpirun_that_is_busy(suite: Suite) -> None:
    # What started the ranks is stopped until after the time at which they would abort.
    job = suite(
        2,
        """
        import os, signal, subprocess, time

        def test_failed_before(): assert False, "an earlier failure" + "." * 20_000 + "told whole"

        @pytest.mark.limit(1)
        def test_stalls(comm, rank):
            if rank == 0:
                os.kill(os.getppid(), signal.SIGSTOP)
                subprocess.Popen(["sh", "-c", f"sleep 3.4; kill -CONT {os.getppid()}"])
            time.sleep(1000)
        """,
    )
    assert job.returncode == ABORT_CODE
    for rank in range(2):
        assert f"[rank {rank} of 2] test_small.py::test_stalls" in job.stderr
    assert "an earlier failure" in job.stderr
    assert "told whole" in job.stderr
    assert "The job ends here: test_small.py::test_stalls reached its limit of 1 s" in job.stderr


@pytest.mark.long
def test_a_rank_that_sleeps_with_the_lock_of_python_held_ends_too(suite: Suite) -> None:
    job = suite(
        2,
        """
        import ctypes

        @pytest.mark.limit(1)
        def test_holds(rank):
            if rank == 1:
                ctypes.PyDLL(None).sleep(1000)
        """,
    )
    assert job.returncode != 0
    assert "test_holds reached its limit" in job.stderr
    assert "in test_holds" in job.stderr


def test_a_raise_while_others_wait_in_mpi_shows_the_failure_and_their_stacks(suite: Suite) -> None:
    job = suite(
        3,
        """
        def test_raises(comm, rank):
            if rank == 1:
                raise ValueError("the cause")
            comm.Barrier()
        """,
    )
    assert job.returncode == ABORT_CODE
    assert "[rank 1 of 3] test_small.py::test_raises failed here" in job.stderr
    assert re.search("E +ValueError: the cause", job.stderr)
    assert job.stderr.count("comm.Barrier()") == 2  # once in the stack of each other rank


def test_a_rank_that_is_killed_ends_the_run(suite: Suite) -> None:
    job = suite(
        3,
        """
        import os, signal

        def test_dies(comm, rank):
            if rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            comm.Barrier()
        """,
    )
    assert job.returncode != 0


def test_a_rank_that_leaves_the_suite_alone_is_named(suite: Suite) -> None:
    job = suite(
        2,
        """
        def test_leaves(rank):
            if rank == 1:
                pytest.exit("enough")
        """,
    )
    assert job.returncode == ABORT_CODE
    assert "rank 1: the end of the run" in job.stderr


def test_old_folders_of_pytests_that_several_runs_remove_at_once_fail_no_run(
    suite: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTEST_DEBUG_TEMPROOT", str(tmp_path))
    job = suite(
        2,
        """
        import errno, os
        from pathlib import Path

        def test_makes_a_folder(tmp_path, monkeypatch):
            for number in range(9):  # those of this run among the first
                (tmp_path.parents[1] / f"pytest-{number}").mkdir(exist_ok=True)

        def rmdir(path, *args, real=os.rmdir, **options):
            if "garbage-" in str(path):  # as where another process puts its lock there
                Path(os.environ["PYTEST_DEBUG_TEMPROOT"], "refused").touch()
                raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(path))
            real(path, *args, **options)

        os.rmdir = rmdir
        """,
    )
    assert (tmp_path / "refused").exists()
    assert job.returncode == 0
    assert "1 passed" in job.stdout
    assert "Warning" not in job.stdout + job.stderr


def test_without_mpi_the_suite_runs_on_one_rank_and_says_what_is_missing(
    suite: Suite, tmp_path: Path
) -> None:
    (tmp_path / "mpi4py").mkdir()
    (tmp_path / "mpi4py" / "__init__.py").touch()  # the package without its module MPI
    job = suite(
        1,
        """
        def test_of_any_size(size): assert size == 1
        def test_of_mpi(comm): assert False
        @pytest.mark.ranks(2)
        def test_of_two(): assert False
        """,
    )
    assert job.returncode == 0
    assert "1 passed, 1 skipped, 1 deselected" in job.stdout
    assert "no MPI can be loaded" in job.stdout


def test_a_job_that_does_not_end_is_ended_with_all_its_processes(
    mpirun: Callable[..., Job], tmp_path: Path
) -> None:
    code = f"import os, time; open('{tmp_path}/' + str(os.getpid()), 'w'); time.sleep(1000)"
    job = mpirun(2, "-c", code, timeout_s=3)
    assert job.timed_out
    pids = [path.name for path in tmp_path.iterdir()]
    assert len(pids) == 2
    assert not any(Path("/proc", pid, "exe").exists() for pid in pids)
