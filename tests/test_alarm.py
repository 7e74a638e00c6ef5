"""What ends a rank's waiting: the alarm, what looks at it, and what errors of MPI mean then."""

from __future__ import annotations

import gc
import threading
import time
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from kvcoll.errors import LateRankError, RankFailedError, RankLostError, rebuild
from kvcoll.transport.alarm import Alarm
from kvcoll.transport.host import Counters
from kvcoll.transport.leg import post
from kvcoll.transport.losses import (
    Losses,
    leave_out_han,
    let_launchers_name_losses,
    survives_losses,
    uses_han,
)
from kvcoll.transport.waiting import Waiting


def test_the_first_error_counts_and_each_check_raises_a_copy_with_its_ranks() -> None:
    alarm = Alarm()
    alarm.check()
    assert alarm.sound(RankLostError("rank 3 was lost", [3]))
    assert not alarm.sound(LateRankError("rank 1 is late", [1]))
    raised = []
    for _ in range(2):
        with pytest.raises(RankLostError, match=r"^rank 3 was lost$") as caught:
            alarm.check()
        assert caught.value.ranks == (3,)
        raised.append(caught.value)
    assert raised[0] is not raised[1]


def test_followers_are_called_once_also_those_that_come_late() -> None:
    alarm, called = Alarm(), []
    alarm.on_sound(lambda: called.append("early"))
    assert called == []
    alarm.sound(RankLostError("a rank was lost"))
    alarm.sound(RankLostError("a rank was lost"))
    alarm.on_sound(lambda: called.append("late"))
    assert called == ["early", "late"]


def test_who_waits_looks_now_and_then_and_raises_what_the_look_finds() -> None:
    alarm, looks = Alarm(), [0]

    def look() -> None:
        looks[0] += 1
        if looks[0] == 3:
            alarm.sound(RankLostError("rank 0 was lost", [0]))

    alarm.look_by(look)
    began_s = time.monotonic()
    with pytest.raises(RankLostError, match="rank 0"):
        Waiting(looks=10, alarm=alarm).until(lambda: False)
    assert looks[0] == 3
    assert time.monotonic() - began_s >= 2 * 0.005


@pytest.mark.parametrize("kind", ["quick", "patient", "restless"])
def test_a_wait_for_a_counter_of_another_rank_ends_when_another_thread_sounds(kind: str) -> None:
    alarm = Alarm()
    waiting = {
        "quick": Waiting(alarm=alarm),
        "patient": Waiting.patient(alarm),
        "restless": Waiting.restless(alarm),
    }[kind]
    counters = Counters(np.zeros(2 * 64, np.uint8), 0, waiting, spins=5)
    counters.raise_one()
    timer = threading.Timer(0.05, alarm.sound, [LateRankError("rank 1 is late", [1])])
    timer.start()
    with pytest.raises(LateRankError, match="rank 1 is late"):
        counters.await_all()
    timer.join()


def test_errors_of_lost_and_late_ranks_are_rebuilt_from_their_names() -> None:
    for kind in (RankLostError, LateRankError):
        made = rebuild(kind.__name__, "rank 2")
        assert type(made) is kind
        assert isinstance(made, RankFailedError)
        assert (str(made), made.ranks) == ("rank 2", ())


class _Mpi:
    """As much of mpi4py.MPI as says which MPI it is."""

    Exception = OSError

    def __init__(self, name: str, version: tuple[int, ...]) -> None:
        self._vendor = name, version

    def get_vendor(self) -> tuple[str, tuple[int, ...]]:
        return self._vendor


@pytest.mark.parametrize(
    ("name", "version", "switch", "expected"),
    [
        ("Open MPI", (5, 0, 11), "1", True),
        ("Open MPI", (5, 0, 11), " True ", True),
        ("Open MPI", (5, 0, 11), "0", False),
        ("Open MPI", (5, 0, 11), None, False),
        ("Open MPI", (4, 1, 4), "1", False),
        ("MPICH", (5, 0, 2), "1", False),
    ],
)
def test_only_open_mpi_5_that_was_told_so_survives_a_loss(
    name: str, version: tuple[int, ...], switch: str | None, *, expected: bool
) -> None:
    environ = {} if switch is None else {"OMPI_MCA_mpi_ft_enable": switch}
    assert survives_losses(_Mpi(name, version), environ) is expected


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("^han", False),
        ("^tuned,han", False),
        ("tuned,basic", False),
        ("^tuned", True),
        ("han,basic", True),
        (None, True),
    ],
)
def test_it_is_known_whether_collectives_that_give_wrong_sums_are_left_out(
    said: str | None, *, expected: bool
) -> None:
    assert uses_han({} if said is None else {"OMPI_MCA_coll": said}) is expected


def test_collectives_are_left_out_only_where_losses_are_to_be_survived() -> None:
    plain: dict[str, str] = {}
    leave_out_han(plain)
    assert plain == {}
    for given, expected in ((None, "^han"), ("^tuned", "^tuned")):
        environ = {"OMPI_MCA_mpi_ft_enable": "1"} | ({"OMPI_MCA_coll": given} if given else {})
        leave_out_han(environ)
        assert environ["OMPI_MCA_coll"] == expected


def test_ranks_abort_late_only_on_several_hosts_where_losses_end_the_job() -> None:
    for here, ft, expected in (("2", "0", "1"), ("4", "0", None), ("2", "1", None)):
        environ = {"OMPI_COMM_WORLD_LOCAL_SIZE": here, "OMPI_COMM_WORLD_SIZE": "4"}
        environ["OMPI_MCA_mpi_ft_enable"] = ft
        let_launchers_name_losses(environ)
        assert environ.get("OMPI_MCA_opal_abort_delay") == expected
    unknown: dict[str, str] = {}
    let_launchers_name_losses(unknown)
    assert unknown == {}


class _Request:
    """One that tells when it is let go of."""

    def __init__(self, gone: list[str], name: str) -> None:
        self._gone, self._name = gone, name

    def __del__(self) -> None:
        self._gone.append(self._name)


class _Comm:
    """Begins three receives, and cannot begin a fourth."""

    def __init__(self) -> None:
        self.gone: list[str] = []
        self._begun = 0

    def Irecv(self, *message: object) -> _Request:  # noqa: N802
        self._begun += 1
        if self._begun == 4:
            raise OSError("a peer has failed")
        return _Request(self.gone, f"receive {self._begun}")

    def Isend(self, *message: object) -> _Request:  # noqa: N802
        raise AssertionError("nothing is sent")


def test_messages_that_had_begun_when_one_could_not_keep_their_memory() -> None:
    comm: Any = _Comm()
    losses = Losses(_Mpi("MPICH", (5,)), cast("Any", SimpleNamespace(size=2)), Alarm())
    with pytest.raises(OSError, match="a peer has failed"):
        post(comm, cast("Any", None), [(1, np.zeros(50))], [], 0, 100, losses)
    gc.collect()
    assert comm.gone == []
