"""Imports go strictly down, and each foreign library comes in at one door."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import kvcoll

pytestmark = pytest.mark.single

PACKAGE = Path(kvcoll.__file__).parent
# A module imports from lower floors only, or from its own folder.
FLOORS = {
    "_version": 0,
    "apart": 0,
    "errors": 0,
    "faults": 0,
    "last_words": 0,
    "topology": 0,
    "base": 1,
    "dlpack": 1,
    "files": 1,
    "gpu": 1,
    "lr_scheduler": 1,
    "stop": 1,
    "arrays": 2,
    "cuda": 3,
    "schema": 3,
    "sums": 3,
    "sparse": 3,
    "place": 3,
    "slots": 3,
    "tensors": 3,
    "words": 3,
    "fingerprint": 3,
    "replica": 4,
    "optimizer": 4,
    "transport": 4,
    "codes": 4,
    "reduction": 5,
    "bucket": 5,
    "rows": 5,
    "row_pull": 5,
    "outputs": 5,
    "backlog": 5,
    "agreement": 5,
    "mpi_takes": 5,
    "packing": 6,
    "coded": 5,
    "kernels": 5,
    "nccl": 6,
    "compression": 5,
    "gpu_place": 6,
    "updater": 6,
    "residual": 6,
    "compressor": 7,
    "gpu_border": 7,
    "on_gpus": 8,
    "states": 7,
    "history": 7,
    "farewell": 7,
    "engine": 8,
    "checkpoint": 8,
    "guard": 8,
    "verify": 8,
    "watchdog": 8,
    "exiting": 0,
    "recovery": 9,
    "by_rows": 9,
    "launch": 9,
    "store": 10,
    "teststore": 10,
    "testing": 10,
    "watching": 10,
    "create": 11,
    "__init__": 12,
    "doctor": 12,
    "cli": 13,
    "__main__": 14,
}
# The doctor asks CuPy in a process that may die of it, and never in its own.
DOORS = {
    "mpi4py": {"transport/mpi.py"},
    "cupy": {"gpu/door.py", "doctor/gpu_probe.py"},
    "torch": set[str](),
}


def room(path: Path) -> str:
    """Give the name in `FLOORS`: a folder is one room."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported(path: Path) -> Iterator[str]:
    """Give the full names of all that a file imports when it runs, wherever in it."""
    parts = ["kvcoll", *path.relative_to(PACKAGE).parent.parts]
    tree = ast.parse(path.read_text())
    for_types = [
        n for n in ast.walk(tree) if isinstance(n, ast.If) and "TYPE_C" in ast.dump(n.test)
    ]
    left_out = {child for block in for_types for part in block.body for child in ast.walk(part)}
    for node in set(ast.walk(tree)) - left_out:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = parts[: len(parts) + 1 - node.level] if node.level else []
            origin = [*base, *([node.module] if node.module else [])]
            yield from (".".join([*origin, alias.name]) for alias in node.names)


FILES = {str(path.relative_to(PACKAGE)): path for path in sorted(PACKAGE.rglob("*.py"))}


def test_every_module_has_a_floor() -> None:
    assert {room(path) for path in FILES.values()} == set(FLOORS)


def test_the_architecture_page_shows_these_floors() -> None:
    page = (PACKAGE.parent / "ARCHITECTURE.md").read_text()
    rows = re.findall(r"^\| (\d+) \| `(\w+)/?` \|", page, re.MULTILINE)
    shown = {name: int(floor) for floor, name in rows}
    assert shown == {name: floor for name, floor in FLOORS.items() if name[0] != "_"}


@pytest.mark.parametrize("name", FILES)
def test_imports_go_strictly_down(name: str) -> None:
    own = room(FILES[name])
    of_package = [full.split(".")[1] for full in imported(FILES[name]) if full[:7] == "kvcoll."]
    for other in of_package:
        lower = FLOORS[other if other in FLOORS else "__init__"] < FLOORS[own]
        assert lower or (other == own and own not in FILES), f"{own} imports {other}"


@pytest.mark.parametrize("library", DOORS)
def test_a_library_is_imported_in_one_place(library: str) -> None:
    importers = {
        n for n, path in FILES.items() for i in imported(path) if i.split(".")[0] == library
    }
    assert importers == DOORS[library]
