"""Sums over GPUs pass the contract of all transports, on fakes that enforce CUDA's rules.

With KVCOLL_TEST_GPUS=real they do on the GPUs of the machine.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
from any_gpus import ARE_REAL, check_closed, gpus_and_nccl, needs_kernels
from fake_nccl import mailbox
from on_host import OnHost
from transport_contract import TransportContract

from kvcoll import mpi_takes
from kvcoll.kernels.prelude import is_known
from kvcoll.nccl import setup
from kvcoll.topology import Topology
from kvcoll.transport import mpi
from kvcoll.transport.leg import LegSizes

if TYPE_CHECKING:
    from mpi4py import MPI


pytestmark = needs_kernels


@pytest.fixture(autouse=True)
def _known_dtypes(request: pytest.FixtureRequest) -> None:
    dtype = getattr(request.node, "callspec", None) and request.node.callspec.params.get("dtype")
    if dtype is not None and not is_known(dtype):
        pytest.skip(f"{dtype} is no dtype of a GPU's")


@pytest.fixture(scope="class")
def transport(
    request: pytest.FixtureRequest, comm: MPI.Intracomm, host_of: tuple[int, ...]
) -> Iterator[OnHost]:
    own = request.cls
    own.world = comm
    if ARE_REAL and own.mpi_gets == mpi_takes.DIRECT and mpi_takes.why_not(0):
        pytest.skip(f"this MPI takes no memory of GPUs: {mpi_takes.why_not(0)}")
    if len(set(host_of)) > 1:
        pytest.skip("fake GPUs of several processes find one another on one machine")
    topology = Topology(comm.rank, own.hosts.get(comm.size, (0,) * comm.size))
    own.groups = topology.hosts
    with mailbox(comm) as folder, pytest.MonkeyPatch.context() as patched:
        gpus, nccl = gpus_and_nccl(comm.size, folder)
        patched.setattr(LegSizes, "between_hosts", lambda *_: own.leg_sizes)
        patched.setattr(LegSizes, "on_gpus", lambda *_: own.leg_sizes)
        made = setup.transport_for(
            mpi.duplicate(comm, 30),
            topology,
            lambda: (gpus, nccl),
            tree=own.tree,
            limit_s=20,
            mpi_gets=own.mpi_gets,
            scratch_bytes=own.scratch_bytes,
            small_bytes=own.small_bytes,
        )
        if made.crossing is not None:
            assert made.crossing.direct == (own.mpi_gets == mpi_takes.DIRECT)
        yield OnHost(made, gpus)
        made.close()
        check_closed(nccl)
        gpus.finish()


class OverGpus(TransportContract):
    """What the classes below share: rounds of a few KiB, so that memory comes round many times."""

    hosts: dict[int, tuple[int, ...]] = {}  # noqa: RUF012  of each rank, by number of ranks
    leg_sizes = LegSizes(1 << 10, 300, 4, 500)
    scratch_bytes = 8 << 10
    small_bytes = 2 << 10
    edges_bytes: tuple[int, ...] = (12 << 10,)
    mpi_gets = mpi_takes.STAGED
    world: MPI.Intracomm

    def all_of(self, mine: bytes) -> list[bytes]:
        return self.world.allgather(mine)


@pytest.mark.ranks(exactly=1)
class TestOneRank(OverGpus):
    """There is nobody to talk to."""


@pytest.mark.ranks(exactly=2)
class TestOneHostOfTwo(OverGpus):
    """Both add one half of what is large, and all of what is small."""


@pytest.mark.long
@pytest.mark.ranks(exactly=3)
class TestOneHost(OverGpus):
    """Every rank with a GPU of its own."""


@pytest.mark.long
@pytest.mark.ranks(exactly=4)
class TestOneHostInATree(OverGpus):
    tree = True


@pytest.mark.long
@pytest.mark.ranks(exactly=3)
class TestAsAStoreUsesIt(OverGpus):
    scratch_bytes = 4 << 20
    small_bytes = 256 << 10
    edges_bytes = (128 << 10,)


@pytest.mark.long
@pytest.mark.ranks(exactly=3)
class TestHostsOfOneGpu(OverGpus):
    hosts = {3: (0, 1, 2)}  # noqa: RUF012


@pytest.mark.long
@pytest.mark.ranks(exactly=4)
class TestHostsOfTwo(OverGpus):
    hosts = {4: (0, 0, 1, 1)}  # noqa: RUF012


@pytest.mark.long
@pytest.mark.ranks(exactly=4)
class TestUnequalHosts(OverGpus):
    """3 + 1 ranks, placed in turns."""

    hosts = {4: (0, 1, 0, 0)}  # noqa: RUF012


@pytest.mark.long
@pytest.mark.ranks(exactly=4)
class TestHostsOfTwoInATree(OverGpus):
    hosts = {4: (0, 0, 1, 1)}  # noqa: RUF012
    tree = True


class WhereMpiTakesGpus(OverGpus):
    """MPI reads and writes the fakes' memory, which is the host's, under the rules of a GPU's."""

    mpi_gets = mpi_takes.DIRECT


@pytest.mark.ranks(exactly=2)
class TestHostsOfOneGpuThatMpiReads(WhereMpiTakesGpus):
    """Two peers send each other everything."""

    hosts = {2: (0, 1)}  # noqa: RUF012


@pytest.mark.long
@pytest.mark.ranks(exactly=3)
class TestThreeHostsThatMpiReads(WhereMpiTakesGpus):
    """What a peer has added goes from its GPU to the others'."""

    hosts = {3: (0, 1, 2)}  # noqa: RUF012


@pytest.mark.long
@pytest.mark.ranks(exactly=4)
class TestUnequalHostsThatMpiReads(WhereMpiTakesGpus):
    hosts = {4: (0, 1, 0, 0)}  # noqa: RUF012


@pytest.mark.long
@pytest.mark.ranks(exactly=4)
class TestHostsOfTwoInATreeThatMpiReads(WhereMpiTakesGpus):
    hosts = {4: (0, 0, 1, 1)}  # noqa: RUF012
    tree = True
