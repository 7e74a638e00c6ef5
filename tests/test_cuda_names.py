"""What `kvcoll/cuda` calls of CuPy exists in the CuPy that is installed, with as many parameters.

No GPU is needed: names and signatures are read, and kernels compiled. Where CuPy is not
installed, or nvrtc for the kernels, the tests skip.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import kvcoll
from kvcoll import optimizer as optimizers
from kvcoll.arrays import is_small_float, wide
from kvcoll.cuda import device as cuda_device
from kvcoll.errors import DeviceError
from kvcoll.gpu.kernel import KernelSource
from kvcoll.kernels.adding import added_rows
from kvcoll.kernels.fused import kernel_of
from kvcoll.kernels.moves import added, moved
from kvcoll.kernels.norms import folding, summing, trusting, walking
from kvcoll.kernels.steps import trace_measure, trace_step, trace_trust
from kvcoll.optimizer.layerwise import LayerWise
from kvcoll.optimizer.step import Step

pytestmark = pytest.mark.single

OPTIMIZERS = (
    *("sgd", "nag", "adam", "adamw", "lamb", "lars", "rmsprop", "adagrad", "adadelta"),
    *("adamax", "nadam", "ftrl", "signum", "test"),
)
FILES = sorted((Path(kvcoll.__file__).parent / "cuda").glob("*.py"))
# What the code's own names stand for.
STANDS_FOR = {
    "cupy": "",
    "self._cupy": "",
    "self._owner._cupy": "",
    "self._runtime": "cuda.runtime",
    "runtime": "cuda.runtime",
    "compiler": "cuda.compiler",
    "cuda": "cuda",
    "self._nccl": "cuda.nccl",
    "self._owner._nccl": "cuda.nccl",
    "nccl._nccl": "cuda.nccl",
    "self._comm": "cuda.nccl.NcclCommunicator",
    "self.stream": "cuda.Stream",
    "on.stream": "cuda.Stream",
    "self.event": "cuda.Event",
    "event": "cuda.Event",
    "event.event": "cuda.Event",
    "self._module": "cuda.function.Module",
}
SET_BY_INIT = {"ptr"}  # attributes of instances, which a class does not show


@pytest.fixture(scope="module")
def cupy() -> Any:
    found = pytest.importorskip("cupy")
    pytest.importorskip("cupy.cuda.nccl")  # it is no part of cupy.cuda until it is imported
    return found


def chains(tree: ast.AST) -> Iterator[tuple[str, ast.Call | None]]:
    """Give each attribute that is asked for, as ``cuda.Event.record``, and its call, if any."""
    called = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            text = ast.unparse(node)
            for own, meant in sorted(STANDS_FOR.items(), key=lambda pair: -len(pair[0])):
                rest = text.removeprefix(own + ".")
                if rest != text and re.fullmatch(r"[\w.]+", rest) and text not in STANDS_FOR:
                    yield f"{meant}.{rest}".lstrip("."), called.get(id(node))
                    break


def parameters_of(function: Any) -> list[str] | None:
    """Read a Cython function's parameters in the first line of its text; None if not there."""
    first = (getattr(function, "__doc__", "") or "").strip().split("\n", 1)[0]
    found = re.fullmatch(r"[\w.]+\((.*)\)(?: -> .*)?", first)
    if found is None:
        return None
    return [part for part in found.group(1).split(", ") if part and part not in ("*", "self")]


def names_in_files() -> list[tuple[str, ast.Call | None]]:
    return [pair for path in FILES for pair in chains(ast.parse(path.read_text()))]


def test_the_files_are_read_as_they_are_written() -> None:
    names = {name for name, _ in names_in_files()}
    assert {
        "cuda.runtime.memcpyPeerAsync",
        "cuda.nccl.NcclCommunicator.allGather",
        "cuda.nccl.groupEnd",
        "cuda.Event.record",
        "cuda.alloc_pinned_memory",
        "cuda.compiler.compile_using_nvrtc",
        "cuda.function.Module.get_function",
    } <= names


def test_every_name_of_cupys_that_is_used_is_there(cupy: Any) -> None:
    for name, _ in names_in_files():
        if name.startswith("cuda.nccl.") and not cupy.cuda.nccl.available:
            continue  # without the library CuPy's module is all but empty
        found: Any = cupy
        for part in name.split("."):
            if part in SET_BY_INIT:
                break
            assert hasattr(found, part), f"CuPy {cupy.__version__} has no {name}"
            found = getattr(found, part)


def test_calls_have_as_many_arguments_as_cupys_functions_take(cupy: Any) -> None:
    checked = set()
    for name, call in names_in_files():
        found: Any = cupy
        for part in name.split("."):
            found = getattr(found, part, None)
        parameters = parameters_of(found)
        if call is None or parameters is None or any(isinstance(a, ast.Starred) for a in call.args):
            continue
        needed = [p for p in parameters if "=" not in p]
        given = len(call.args) + len(call.keywords)
        assert len(needed) <= given <= len(parameters), f"{name} takes {parameters}, gets {given}"
        checked.add(name.rsplit(".", 1)[-1])
    assert {"memcpyAsync", "memcpyPeerAsync", "memsetAsync", "eventQuery"} <= checked
    if cupy.cuda.nccl.available:
        assert {"send", "recv", "allGather", "broadcast", "abort", "destroy"} <= checked


def test_ids_and_last_errors_of_nccl_are_what_the_code_takes_them_for(cupy: Any) -> None:
    if not cupy.cuda.nccl.available:
        pytest.skip("NCCL is not installed")
    from kvcoll.cuda import nccl

    made = nccl.CupyNccl()
    assert made.version >= (2, 13, 0)
    unique_id = made.unique_id()
    assert len(unique_id) == 128
    assert unique_id != made.unique_id()
    assert isinstance(nccl._last_error(), str)


def test_without_a_gpu_it_is_said_what_is_missing(cupy: Any) -> None:
    from kvcoll.cuda import find

    why, n_gpus = "", 0
    try:
        n_gpus = len(find.find_gpus().devices)
    except DeviceError as error:
        why = str(error)
    assert n_gpus or re.search(r"no NVIDIA driver|no GPU|driver knows CUDA", why)


def sources() -> list[KernelSource]:
    """Give one kernel of each kind and dtype."""
    known = ("?", "i1", "u2", "i4", "u8", "f2", "f4", "f8", "c8", "c16")
    dtypes = [*map(np.dtype, known), np.dtype(ml_dtypes.bfloat16)]
    made = [added_rows(((0, 1), 2), dtype, dtype) for dtype in dtypes]
    made += [added_rows((0, 1), np.dtype("f4"), dtype) for dtype in dtypes if dtype.itemsize == 2]
    made += [added(dtype, mixed=mixed) for dtype in dtypes for mixed in (False, True)]
    made += [moved(np.dtype("f4"), dtype) for dtype in dtypes]
    return made + [kernel for name in OPTIMIZERS for kernel in updates(name, dtypes)]


def updates(name: str, dtypes: Sequence[np.dtype[Any]]) -> Iterator[KernelSource]:
    """Give the kernels of an optimizer for keys of these dtypes, if they are floats."""
    optimizer = optimizers.create(name, wd=0.01, clip_gradient=0.5)
    for dtype in dtypes:
        if dtype.kind == "f" or is_small_float(dtype):
            step = Step(0.1, 0.01, 3, trust=0.5)
            yield kernel_of(trace_step(optimizer, dtype, step).program)
            if isinstance(optimizer, LayerWise):
                program, _, sums = trace_measure(optimizer, dtype, step)
                yield from (summing(program), folding(program), walking(program))
                first, second = (own.place for own in sums)
                trust = trace_trust(optimizer, step).program
                yield trusting(trust, wide(dtype), (first, second))


def test_kernels_compile_with_the_options_that_keep_every_bit(cupy: Any) -> None:
    nvrtc = cupy.cuda.nvrtc
    try:
        nvrtc.getVersion()
    except Exception as error:  # a library that cannot be loaded, of whatever kind
        pytest.skip(f"there is no nvrtc: {error}")
    # For all GPUs from Volta on; CuPy itself adds the architecture of the GPU that there is.
    options = [*cuda_device._OPTIONS, "-arch=compute_75", "--device-as-default-execution-space"]
    for source in sources():
        program = nvrtc.createProgram(source.for_cuda(), f"{source.name}.cu", [], [])
        try:
            nvrtc.compileProgram(program, options)
        except nvrtc.NVRTCError:
            pytest.fail(f"{source.name}: {nvrtc.getProgramLog(program)}")
        ptx = nvrtc.getPTX(program)
        assert b".ftz" not in ptx
        assert b"fma." not in ptx
