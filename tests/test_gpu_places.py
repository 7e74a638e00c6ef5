"""Each rank's GPU is that of its local rank; what cannot be is the same error on all ranks."""

from __future__ import annotations

import pytest

from kvcoll.errors import DeviceError
from kvcoll.gpu.places import Sight, places_of
from kvcoll.topology import Topology

pytestmark = pytest.mark.single

NEW, OLD = (2, 30, 3), (2, 21, 5)
ALLOWED = {"NCCL_MULTI_RANK_GPU_ENABLE": "1"}


def sights(*uuids: tuple[str, ...], nccl: tuple[int, ...] = NEW) -> list[Sight]:
    return [Sight.of(own, nccl, {}) for own in uuids]


def test_gpus_go_by_local_rank_on_every_host() -> None:
    host = ("a", "b"), ("a", "b")
    other = ("c", "d"), ("c", "d")
    topology = Topology(0, (0, 1, 0, 1))
    mixed = sights(host[0], other[0], host[1], other[1])
    assert places_of(topology, mixed) == [0, 0, 1, 1]


def test_ranks_that_see_one_gpu_each_take_it() -> None:
    assert places_of(Topology(1, (0, 0, 0)), sights(("a",), ("b",), ("c",))) == [0, 0, 0]


def test_equal_uuids_on_two_hosts_are_no_clash() -> None:
    # As containers may be numbered alike: only the GPUs of one host are compared.
    assert places_of(Topology(0, (0, 1)), sights(("a",), ("a",))) == [0, 0]


def test_two_ranks_on_one_gpu_are_an_error_that_says_how_to_allow_it() -> None:
    expected = (
        r"ranks 0 and 2 are both on GPU a, as their host has 3 ranks and shows them 2 GPUs: start "
        r"as many ranks as GPUs; or let them share it, with NCCL 2\.30\.0 or newer "
        r"\(here 2\.30\.3\) and NCCL_MULTI_RANK_GPU_ENABLE=1 on all ranks"
    )
    both = ("a", "b")
    with pytest.raises(DeviceError, match=expected):
        places_of(Topology(1, (0, 0, 0)), sights(both, both, both))


def test_ranks_share_a_gpu_where_all_of_them_allow_it_and_nccl_can() -> None:
    topology = Topology(0, (0, 0))
    allowed = Sight.of(("a",), NEW, ALLOWED)
    assert places_of(topology, [allowed, allowed]) == [0, 0]
    for other in (Sight.of(("a",), NEW, {}), Sight.of(("a",), NEW, dict.fromkeys(ALLOWED, "0"))):
        with pytest.raises(DeviceError, match="both on GPU a"):
            places_of(topology, [allowed, other])
    too_old = Sight.of(("a",), OLD, ALLOWED)
    with pytest.raises(DeviceError, match=r"here 2\.21\.5"):
        places_of(topology, [too_old, too_old])


def test_a_rank_without_a_gpu_is_named() -> None:
    with pytest.raises(DeviceError, match="rank 1 sees no GPU: nvidia-smi"):
        places_of(Topology(0, (0, 0)), sights(("a",), ()))


def test_an_old_nccl_and_one_that_differs_are_named() -> None:
    pair = ("a",), ("b",)
    with pytest.raises(DeviceError, match=r"rank 0 has NCCL 2\.7\.8, and 2\.13\.0 or newer"):
        places_of(Topology(0, (0, 0)), sights(*pair, nccl=(2, 7, 8)))
    mixed = [Sight.of(("a",), NEW, {}), Sight.of(("b",), OLD, {})]
    with pytest.raises(DeviceError, match=r"rank 1 has NCCL 2\.21\.5 and rank 0 .* 2\.30\.3"):
        places_of(Topology(0, (0, 0)), mixed)


def test_a_host_of_one_rank_needs_no_nccl_of_any_age() -> None:
    assert places_of(Topology(0, (0, 1)), sights(("a",), ("b",), nccl=(2, 7, 8))) == [0, 0]


def test_a_sight_is_read_as_it_was_written() -> None:
    sight = Sight.of(("a", "b"), OLD, ALLOWED)
    assert Sight.read(sight.written()) == sight
