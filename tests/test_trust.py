"""What comes from a file or from a peer cannot run, and what is written is the user's alone."""

from __future__ import annotations

import ast
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import kvcoll
from kvcoll.transport import memory

PACKAGE = Path(kvcoll.__file__).parent
# What turns bytes into objects or code, whoever wrote them.
MODULES = {
    *("pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"),
    *("copyreg", "code", "codeop", "runpy", "imp", "xmlrpc", "yaml", "multiprocessing"),
}
BUILTINS = {"eval", "exec", "compile", "__import__"}
NUMPYS = {"load", "loads", "save", "savez", "savez_compressed", "frompyfunc", "fromfile", "memmap"}
# mpi4py's methods in lower case pickle; those in upper case send memory as it is. Some of the names
# are others' methods, too: of sockets, of NumPy's functions, of our own classes.
OF_COMMUNICATORS = {
    *("bcast", "allgather", "alltoall", "allreduce", "sendrecv", "isend", "irecv", "ssend"),
    *("issend", "bsend", "ibsend", "exscan", "mprobe", "improbe", "py2f"),
}
ALSO_OF_OTHERS = {"send", "recv", "reduce", "gather", "scatter", "scan", "pack"}
COMMUNICATORS = ("comm", "world", "host")  # how they are named here
# Their communicators are NCCL's, which move memory as it is, and mpi4py is imported elsewhere.
OF_NCCL = {"cuda/nccl.py", "nccl/exchange.py"}

FILES = {str(path.relative_to(PACKAGE)): path for path in sorted(PACKAGE.rglob("*.py"))}


def suspects(tree: ast.AST) -> Iterator[str]:
    """Give what a file does that could run, or unpickle, what others wrote."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.split(".")[0] in MODULES)
        elif isinstance(node, ast.ImportFrom):
            if not node.level and (node.module or "").split(".")[0] in MODULES:
                yield str(node.module)
        elif isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            yield "allow_pickle="
        elif isinstance(node, ast.Name) and node.id in BUILTINS:
            yield node.id
        elif isinstance(node, ast.Attribute):
            owner = node.value
            of = owner.id if isinstance(owner, ast.Name) else getattr(owner, "attr", "")
            named = any(part in of.lower() for part in COMMUNICATORS)
            if (
                node.attr in OF_COMMUNICATORS
                or (of in ("np", "numpy") and node.attr in NUMPYS)
                or (node.attr in ALSO_OF_OTHERS and named)
            ):
                yield f"{of}.{node.attr}"


@pytest.mark.single
@pytest.mark.parametrize("name", FILES)
def test_no_file_unpickles_or_runs_what_others_wrote(name: str) -> None:
    found = list(suspects(ast.parse(FILES[name].read_text())))
    of_nccl = ("comm.send", "comm.recv") if name in OF_NCCL else ()
    assert [one for one in found if one.lstrip("_") not in of_nccl] == []


HOSTILE = [
    "import pickle",
    "from pickle import loads",
    "import multiprocessing.connection",
    "np.load(path)",
    "numpy.load(path, mmap_mode='r')",
    "read(path, allow_pickle=True)",
    "eval(text)",
    "x = exec",
    "comm.bcast(x)",
    "self._comm.allgather(x)",
    "comm.send(x, 1)",
    "request = comm.irecv(source=1)",
    "self.comm.gather(x)",
    "np.fromfile(path)",
    "comm.pack(x)",
]


@pytest.mark.single
@pytest.mark.parametrize("code", HOSTILE)
def test_what_is_forbidden_is_seen(code: str) -> None:
    assert list(suspects(ast.parse(code)))


@pytest.mark.single
@pytest.mark.parametrize(
    "code", ["comm.Bcast(x)", "_HEAD.pack(1)", "json.loads(raw)", "path.load()", "re.compile('a')"]
)
def test_what_is_allowed_is_not_taken_for_it(code: str) -> None:
    assert list(suspects(ast.parse(code))) == []


@pytest.mark.single
def test_memory_that_ranks_share_is_the_users_alone() -> None:
    modes = []

    def look(told: bytes) -> bytes:
        pid, number, _ = memory._WHERE.unpack(told)
        assert pid == os.getpid()
        modes.append(stat.S_IMODE(os.fstat(number).st_mode))
        return told

    shared = memory.share(0, 4096, look, lambda mine: mine)
    assert shared is not None
    assert modes == [0o600]


@pytest.mark.single
@pytest.mark.parametrize(
    ("umask", "folder", "file"), [(0o077, 0o700, 0o600), (0o027, 0o750, 0o640)]
)
def test_what_is_saved_is_as_open_as_the_users_umask_says(
    tmp_path: Path, umask: int, folder: int, file: int
) -> None:
    before = os.umask(umask)
    try:
        with kvcoll.create("local") as kv:
            kv.init("w", np.zeros(3))
            kv.set_optimizer("adam")
            kv.save(tmp_path / "run")
            kv.save_optimizer_states(tmp_path / "states")
    finally:
        os.umask(before)
    modes: dict[str, int] = {
        str(path.relative_to(tmp_path)): stat.S_IMODE(path.stat().st_mode)
        for path in sorted(tmp_path.rglob("*"))
    }
    assert modes.pop("run") == modes.pop("run/00000001") == folder
    assert set(modes.values()) == {file}
    assert len(modes) == 3


@pytest.mark.single
def test_a_checkpoint_of_a_strangers_making_is_no_way_out_of_its_folder(tmp_path: Path) -> None:
    with kvcoll.create("local") as kv:
        kv.init("w", np.zeros(3))
        folder = Path(kv.save(tmp_path / "run"))
        (tmp_path / "precious").write_text("mine")
        (folder / "other.txt").symlink_to(tmp_path / "precious")
        (tmp_path / "run" / "00000000").symlink_to(tmp_path / "elsewhere")
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "elsewhere" / "manifest.json").write_text("mine, too")
        kv.save(tmp_path / "run", keep=1)
    assert (tmp_path / "precious").read_text() == "mine"
    assert (tmp_path / "elsewhere" / "manifest.json").read_text() == "mine, too"
