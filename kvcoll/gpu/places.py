"""Which GPU is whose: plain data, decided alike on all ranks from what each of them sees.

Rules of the file: the same sights give the same places, or the same error, on every rank.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from ..errors import DeviceError
from ..topology import Topology

#: Sends and receives came with 2.7, NCCL's own last error with 2.13.
OLDEST_NCCL = (2, 13, 0)
#: From here on NCCL lets several ranks share a GPU, if it is told to.
SHARING_NCCL = (2, 30, 0)
SHARING_VARIABLE = "NCCL_MULTI_RANK_GPU_ENABLE"


@dataclass(frozen=True)
class Sight:
    """What one rank sees of GPUs.

    Attributes
    ----------
    uuids : tuple of str
        Of its GPUs, by number.
    nccl : tuple of int
        The version of its NCCL.
    may_share : bool
        Whether its environment allows that ranks share a GPU.
    """

    uuids: tuple[str, ...]
    nccl: tuple[int, ...]
    may_share: bool

    @classmethod
    def of(cls, uuids: Sequence[str], nccl: Sequence[int], environment: Mapping[str, str]) -> Sight:
        """Take it from a rank's GPUs, its NCCL and its environment."""
        return cls(tuple(uuids), tuple(nccl), environment.get(SHARING_VARIABLE) == "1")

    def written(self) -> str:
        """Write it for another rank."""
        return json.dumps(asdict(self))

    @classmethod
    def read(cls, text: str) -> Sight:
        """Read what `written` gave."""
        told = json.loads(text)
        return cls(tuple(told["uuids"]), tuple(told["nccl"]), told["may_share"])


def places_of(topology: Topology, sights: Sequence[Sight]) -> list[int]:
    """Say for each rank which of its GPUs is its home: the one of its local rank.

    Parameters
    ----------
    topology : Topology
        Of all ranks.
    sights : sequence of Sight
        By rank.

    Raises
    ------
    DeviceError
        A rank sees no GPU, or an NCCL that is too old or another one than its neighbours'; or
        two ranks would share a GPU, which NCCL must allow and the user must want.
    """
    places = [0] * topology.size
    for ranks in topology.hosts:
        for local_rank, rank in enumerate(ranks):
            sight = sights[rank]
            if not sight.uuids:
                raise DeviceError(
                    f"rank {rank} sees no GPU: nvidia-smi and CUDA_VISIBLE_DEVICES there say why; "
                    "'dist_sync' needs none"
                )
            _check_nccl(rank, sight, ranks, sights)
            places[rank] = local_rank % len(sight.uuids)
        _check_sharing(ranks, places, sights)
    return places


def check_age(who: str, nccl: Sequence[int]) -> None:
    """Refuse an NCCL that is too old for sums over several GPUs.

    Raises
    ------
    DeviceError
        It is older than `OLDEST_NCCL`.
    """
    if tuple(nccl) < OLDEST_NCCL:
        raise DeviceError(
            f"{who} has NCCL {_dotted(nccl)}, and {_dotted(OLDEST_NCCL)} or newer is "
            "needed: pip install --upgrade nvidia-nccl-cu12 (or -cu13, as your CuPy)"
        )


def _check_nccl(rank: int, sight: Sight, ranks: Sequence[int], sights: Sequence[Sight]) -> None:
    if len(ranks) == 1:
        return
    check_age(f"rank {rank}", sight.nccl)
    if sight.nccl != sights[ranks[0]].nccl:
        raise DeviceError(
            f"rank {rank} has NCCL {_dotted(sight.nccl)} and rank {ranks[0]} of the same host "
            f"{_dotted(sights[ranks[0]].nccl)}: start all ranks in one environment"
        )


def _check_sharing(ranks: Sequence[int], places: Sequence[int], sights: Sequence[Sight]) -> None:
    """Refuse two ranks on one GPU, unless NCCL can and was told to."""
    holder: dict[str, int] = {}
    for rank in ranks:
        uuid = sights[rank].uuids[places[rank]]
        other = holder.setdefault(uuid, rank)
        if other == rank:
            continue
        allowed = all(sights[k].may_share for k in (rank, other))
        if allowed and sights[rank].nccl >= SHARING_NCCL:
            continue
        n_gpus = len({uuid for k in ranks for uuid in sights[k].uuids})
        shown = f"{n_gpus} GPU{'s' if n_gpus > 1 else ''}"
        raise DeviceError(
            f"ranks {other} and {rank} are both on GPU {uuid}, as their host has {len(ranks)} "
            f"ranks and shows them {shown}: start as many ranks as GPUs; "
            f"or let them share it, with NCCL {_dotted(SHARING_NCCL)} or newer (here "
            f"{_dotted(sights[rank].nccl)}) and {SHARING_VARIABLE}=1 on all ranks"
        )


def _dotted(version: Sequence[int]) -> str:
    return ".".join(map(str, version))
