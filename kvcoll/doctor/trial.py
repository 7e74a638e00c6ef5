"""Loads the MPI library, and starts it if asked; in a process that may die of it."""

from __future__ import annotations

import json
from pathlib import Path

from ..errors import KVCollError
from ..transport.mpi import import_mpi


def main(how: str) -> None:
    """Print what there is.

    Parameters
    ----------
    how : {'load', 'start'}
        With MPI4PY_RC_INITIALIZE=0 in the environment.
    """
    try:
        mpi = import_mpi()
    except KVCollError as error:
        print(json.dumps({"error": str(error)}))
        return
    told = {"library": mpi.Get_library_version().strip("\0"), "libmpi": loaded_file()}
    if how == "start":
        mpi.Init_thread()
        mpi.Finalize()
    print(f"\n{json.dumps(told)}")


def loaded_file() -> str:
    """Give the path of the MPI library that this process has loaded."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        path = Path(line.split(maxsplit=5)[-1])
        if path.name.startswith(("libmpi.so", "libmpich.so")):
            return str(path)
    return ""
