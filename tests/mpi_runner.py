"""The pytest plugin that runs one suite on all ranks of an MPI job, with one outcome per test.

Rules of this file
- All ranks run the same tests in the same order and meet after every phase of every test.
- A test that fails on any rank has failed on all; rank 0 alone prints, and alone writes the cache.
- Nothing may wait for ever: whatever the main thread does stands under the watchdog's limit.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Generator
from pathlib import Path
from typing import TYPE_CHECKING, Final, final

import pytest
from mpi_job import Job, run_job
from mpi_outcome import RankReports, State, account_of, merge, state_of
from mpi_watchdog import Watchdog
from mpi_world import DifferentPlacesError, World

if TYPE_CHECKING:
    from _pytest._code.code import ExceptionRepr
    from mpi4py import MPI

LIMIT_S: Final = float(os.environ.get("KVCOLL_TEST_LIMIT_S", "60"))
GRACE_S: Final = float(os.environ.get("KVCOLL_TEST_GRACE_S", "5"))
PART: Final = os.environ.get("KVCOLL_TEST_PART", "")  # "aside" or "others": only those tests
ALL_SINGLE: Final = re.compile(r"^pytestmark = \[?pytest\.mark\.(single|jobs)\b", re.MULTILINE)
ALL_JOBS: Final = re.compile(r"^pytestmark = \[?pytest\.mark\.jobs\b", re.MULTILINE)
ANY_ASIDE: Final = re.compile(r"\bmark\.(jobs|waits)\b")
COUNTS_FILE: Final = os.environ.get("KVCOLL_TEST_COUNTS")
WORLD: Final = pytest.StashKey[World]()
MARKERS: Final = (
    "ranks(at_least=1, exactly=None): the test is for this many ranks; it is left out elsewhere",
    "long: it takes some seconds; scripts/test.sh leaves it out unless KVCOLL_LONG_TESTS=yes",
    "single: the test is for one rank only, as ranks(exactly=1)",
    "jobs: the same, and it starts jobs of its own: scripts/test.sh runs others beside it",
    "waits: for one rank only, and it waits most of the time: it is run beside others, too",
    "limit(seconds): ends the run, with the stacks of all ranks, if the test takes longer",
)


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    world = config.stash[WORLD] = World()
    if world.rank > 0:
        # By this name pytest's cache and reports, and plugins, know a process that must not write.
        config.workerinput = {}  # type: ignore[attr-defined]
        if config.option.basetemp:
            config.option.basetemp = f"{config.option.basetemp}-rank{world.rank}"
    config.pluginmanager.register(RankRunner(config, world), "rank_runner")


@final
class RankRunner:
    """The hooks of one rank."""

    def __init__(self, config: pytest.Config, world: World) -> None:
        self._config = config
        self._world = world
        debugs = config.option.usepdb or config.option.trace
        self._limit_s = 0.0 if debugs else LIMIT_S
        self._left_out = 0
        self._collect_errors: list[tuple[str, str]] = []

    @pytest.hookimpl(trylast=True)
    def pytest_configure(self, config: pytest.Config) -> None:
        for marker in MARKERS:
            config.addinivalue_line("markers", marker)
        # All ranks end at once, and each removes what it finds of older runs: what one could not
        # remove, since another one just did, is no failure of any test.
        config.addinivalue_line("filterwarnings", r"ignore:\(rm_rf\):pytest.PytestWarning")
        self._watchdog = Watchdog(self._world)  # pytest does not capture just now
        self._watchdog.watch("the collection of the tests", self._limit_s)
        self._muted = open(os.devnull, "w") if self._world.rank else None  # noqa: SIM115
        if self._muted:
            config.get_terminal_writer()._file = self._muted

    def pytest_unconfigure(self) -> None:
        self._watchdog.close()
        if self._muted:
            self._muted.close()

    def pytest_ignore_collect(self, collection_path: Path) -> bool | None:
        """Leave out whole files whose tests are for another run: to collect them takes seconds."""
        if collection_path.suffix != ".py" or not collection_path.is_file():
            return None
        text = collection_path.read_text()
        if self._world.size > 1:
            is_for_another = ALL_SINGLE.search(text) is not None
        elif PART == "aside":
            is_test = collection_path.name.startswith("test_")
            is_for_another = is_test and ANY_ASIDE.search(text) is None
        else:
            is_for_another = PART == "others" and ALL_JOBS.search(text) is not None
        if not is_for_another:
            return None
        self._left_out += 1
        return True

    def pytest_report_header(self) -> str:
        return self._world.why_no_mpi or f"ranks: {self._world.size}"

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Leave out the tests that are for another number of ranks."""
        kept: list[pytest.Item] = []
        left_out: list[pytest.Item] = []
        for item in items:
            (kept if _wants(item, self._world.size) else left_out).append(item)
        if left_out:
            self._left_out += len(left_out)
            self._config.hook.pytest_deselected(items=left_out)
            items[:] = kept

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._collect_errors.append((report.nodeid, report.longreprtext))

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Make every rank fail if any could not collect, or collected other tests."""
        tests = [item.nodeid for item in session.items]
        self._meet("the end of the collection", State.PASSED)
        everyones = self._world.gather((tests, self._collect_errors))
        known = set(self._collect_errors)
        for nodeid, text in dict.fromkeys(error for _, errors in everyones for error in errors):
            if (nodeid, text) not in known:
                ranks = [r for r, (_, errors) in enumerate(everyones) if (nodeid, text) in errors]
                lines = [line[1:].strip() for line in text.splitlines() if line.startswith("E ")]
                texts = RankReports(
                    dict.fromkeys(ranks, text), len(everyones), (nodeid, 0), next(iter(lines), "")
                )
                self._fail_collection(nodeid, texts)
        lists = [tests for tests, _ in everyones]
        if not self._collect_errors and any(other != lists[0] for other in lists):
            self._fail_collection("the list of tests", _differences(lists))

    def _fail_collection(self, nodeid: str, longrepr: str | RankReports) -> None:
        report = pytest.CollectReport(nodeid, "failed", longrepr, [])
        self._config.hook.pytest_collectreport(report=report)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        marker = item.get_closest_marker("limit")
        limit_s = float(marker.args[0]) if marker and self._limit_s else self._limit_s
        self._watchdog.watch(item.nodeid, limit_s)
        try:
            return (yield)
        finally:
            self._watchdog.watch(f"what comes after {item.nodeid}", self._limit_s)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        state = state_of(report)
        states = self._meet(f"{call.when} of {item.nodeid}", state, report)
        if len(states) > 1 and (max(states) == State.FAILED or len(set(states)) > 1):
            merge(report, self._world.gather(account_of(report)))
        if report.failed:
            self._watchdog.failures.append(f"{item.nodeid} ({call.when})\n{report.longreprtext}")
        return report

    def _meet(self, where: str, state: State, report: pytest.TestReport | None = None) -> list[int]:
        """Wait until all ranks are at `where`; end the job if one of them cannot come."""

        def check_patience() -> None:
            if report and state is State.FAILED and self._watchdog.waited_s() > GRACE_S:
                self._watchdog.give_up_on_others(report.longreprtext)

        self._watchdog.waits_for_others(yes=True)
        try:
            return self._world.exchange(where, state, check_patience)
        except DifferentPlacesError as error:
            self._watchdog.end_job(str(error))
            raise
        finally:
            self._watchdog.waits_for_others(yes=False)

    def pytest_internalerror(self, excrepr: ExceptionRepr) -> None:
        if self._world.rank:  # rank 0's pytest prints its own
            self._watchdog.write(f"pytest itself failed:\n{excrepr}")

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Agree on the exit code, so that mpirun's does not depend on which rank ends first."""
        self._meet("the end of the run", State.PASSED)
        session.exitstatus = max(self._world.gather(int(session.exitstatus)))
        if session.exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and self._left_out:
            session.exitstatus = pytest.ExitCode.OK

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Leave the counts of the run where the test command asked for them."""
        if COUNTS_FILE and self._world.rank == 0:
            stats = terminalreporter.stats
            groups = (("passed", "xpassed"), ("failed", "error"), ("skipped", "xfailed"))
            counts = [sum(len(stats.get(name, [])) for name in group) for group in groups]
            Path(COUNTS_FILE).write_text("{} {} {}\n".format(*counts))


def _wants(item: pytest.Item, size: int) -> bool:
    """Tell whether a test is for a run of `size` ranks."""
    names = {marker.name for marker in item.iter_markers()}
    is_aside = not names.isdisjoint(("jobs", "waits"))
    is_single = is_aside or "single" in names
    if (is_single and size != 1) or (PART and is_aside != (PART == "aside")):
        return False

    def fits(at_least: int = 1, exactly: int | None = None) -> bool:
        return size >= at_least and exactly in (None, size)

    return all(fits(*marker.args, **marker.kwargs) for marker in item.iter_markers("ranks"))


def _differences(lists: list[list[str]]) -> str:
    """Say how each rank's list of tests differs from rank 0's."""
    lines = ["The ranks collected different tests, so that no run of all ranks is possible."]
    for rank, tests in enumerate(lists[1:], start=1):
        lines += [f"rank {rank} lacks {test}" for test in lists[0] if test not in set(tests)]
        lines += [f"rank {rank} alone has {test}" for test in tests if test not in set(lists[0])]
        if tests != lists[0] and sorted(tests) == sorted(lists[0]):
            pairs = zip(tests, lists[0], strict=True)
            here, there = next(pair for pair in pairs if pair[0] != pair[1])
            lines.append(f"rank {rank} has {here} where rank 0 has {there}")
    return "\n".join(lines)


@pytest.fixture(scope="session")
def comm(pytestconfig: pytest.Config) -> MPI.Intracomm:
    """COMM_WORLD; a test that asks for it is skipped where no MPI can be loaded."""
    world = pytestconfig.stash[WORLD]
    if world.comm is None:
        pytest.skip(world.why_no_mpi)
    return world.comm


@pytest.fixture(scope="session")
def rank(pytestconfig: pytest.Config) -> int:
    """This process's rank; 0 without MPI."""
    return pytestconfig.stash[WORLD].rank


@pytest.fixture(scope="session")
def size(pytestconfig: pytest.Config) -> int:
    """The number of ranks of this run; 1 without MPI."""
    return pytestconfig.stash[WORLD].size


@pytest.fixture
def shared_tmp_path(pytestconfig: pytest.Config, tmp_path: Path) -> Path:
    """An empty folder that is the same on all ranks: rank 0's `tmp_path`."""
    return pytestconfig.stash[WORLD].from_rank_0(tmp_path)


@pytest.fixture(scope="session")
def mpirun(comm: MPI.Intracomm) -> Callable[..., Job]:
    """`run_job`: starts a fresh MPI job of Python processes; for tests marked `single`."""
    if comm.size != 1:
        pytest.fail("a test that starts a job of its own must be marked with pytest.mark.single")
    return run_job
