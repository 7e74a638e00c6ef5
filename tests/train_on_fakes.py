"""Runs scripts/train.py on a store over fake GPUs; what CuPy computes, NumPy does.

mpirun -n 2 python train_on_fakes.py FOLDER [OPTION OF TRAIN.PY...]
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
from fake_gpu import FakeGpus
from fake_nccl import FakeNccl
from mpi4py import MPI

from kvcoll import on_gpus

SCRIPT = Path(__file__).parents[1] / "scripts" / "train.py"


def as_cupy(used: list[int]) -> ModuleType:
    """Give what train_arrays.py uses of CuPy, on arrays of the host."""
    finished: list[bool] = []

    def device(number: int) -> Any:
        return SimpleNamespace(
            use=lambda: used.append(number), synchronize=lambda: finished.append(True)
        )

    module = ModuleType("cupy")
    runtime = SimpleNamespace(getDeviceCount=lambda: 2)
    vars(module).update(
        asarray=np.array, asnumpy=np.array, cuda=SimpleNamespace(Device=device, runtime=runtime)
    )
    return module


def main() -> None:
    world = MPI.COMM_WORLD
    gpus = FakeGpus(2, [f"gpu-{k}" for k in range(2)])
    gpus.pump_in_background()
    nccl = FakeNccl(gpus, Path(sys.argv[1]))
    vars(on_gpus).update(find=lambda: (gpus, nccl), find_gpus=lambda: gpus)
    used: list[int] = []
    sys.modules["cupy"] = as_cupy(used)
    sys.argv = [str(SCRIPT), *sys.argv[2:]]
    try:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise
    gpus.finish()
    assert used == [world.rank % 2], used
    assert any(name.startswith("kvcoll_fused_") for name in gpus.launches)
    print(f"rank {world.rank} updated on fake GPU {used[0]}", flush=True)


if __name__ == "__main__":
    main()
