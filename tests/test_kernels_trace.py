"""What the tracer writes down, and what it refuses: never a wrong program."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from any_gpus import needs_kernels
from arrays_of import f32, f64
from host_kernel import HostKernel

from kvcoll import optimizer as optimizers
from kvcoll.kernels.fused import kernel_of, layout_of
from kvcoll.kernels.steps import trace_measure, trace_step
from kvcoll.kernels.table import Piece, n_lanes, rows_of
from kvcoll.kernels.trace import UntraceableError, trace
from kvcoll.optimizer.layerwise import LayerWise
from kvcoll.optimizer.step import Step

pytestmark = pytest.mark.single

FLOAT, DOUBLE = np.dtype(np.float32), np.dtype(np.float64)


def run(function: Callable[[list[Any]], None], arrays: list[Any]) -> None:
    """Do to arrays what a function does, by its kernel."""
    traced = trace(function, [array.dtype for array in arrays])
    words = [*(array.ctypes.data for array in arrays), *traced.numbers]
    table = rows_of(layout_of(traced.program), [Piece(arrays[0].size, words)])
    kernel = HostKernel(kernel_of(traced.program))
    kernel(n_lanes(table), [table.ctypes.data, np.int64(len(table))])


def test_numbers_are_no_part_of_a_program() -> None:
    adam = optimizers.create("adam", wd=0.1)
    one, other = (trace_step(adam, FLOAT, Step(lr, 0.1, n)) for lr, n in ((0.5, 1), (0.25, 7)))
    assert one.program == other.program
    assert one.numbers != other.numbers
    assert kernel_of(one.program) is kernel_of(other.program)


def test_what_a_step_decides_by_its_numbers_is_another_program() -> None:
    sgd = optimizers.create("sgd", momentum=0.9)
    one, other = (trace_step(sgd, FLOAT, Step(0.5, wd, 1)) for wd in (0.0, 0.1))
    assert one.program != other.program


@needs_kernels
def test_operators_and_functions_give_what_numpy_gives() -> None:
    def in_numpy(a: Any, b: Any) -> tuple[Any, Any]:
        first = np.where(b > 0.5, a * 2 - 1, np.sqrt(abs(b)) / 3) + a * 0.1
        return first, np.clip(b, -1, 1)

    a, b = f64([1, -2, 3.5, 0]), f64([0.6, -4, 0.1, 9])

    def function(arrays: list[Any]) -> None:
        a, b = arrays
        kept = a.copy()
        a[...] = np.where(b > 0.5, a * 2 - 1, np.sqrt(abs(b)) / 3)
        a += kept * 0.1
        np.clip(b, -1, 1, out=b)

    expected = in_numpy(a.copy(), b.copy())
    run(function, [a, b])
    assert (a.tolist(), b.tolist()) == (expected[0].tolist(), expected[1].tolist())


@needs_kernels
def test_a_float64_number_widens_as_in_numpy() -> None:
    def function(arrays: list[Any]) -> None:
        np.multiply(arrays[0], np.float64(0.1), out=arrays[0], casting="same_kind")

    a = f32([3, 7, 1e-3])
    expected = a.copy()
    np.multiply(expected, np.float64(0.1), out=expected, casting="same_kind")
    run(function, [a])
    assert a.tobytes() == expected.tobytes()


def elementwise(text: str, function: Callable[..., Any]) -> Any:
    return pytest.param(function, text, id=text)


@pytest.mark.parametrize(
    ("function", "text"),
    [
        elementwise("numpy.power", lambda a, b: a**2.0),
        elementwise("numpy.exp", lambda a, b: np.exp(a, out=a)),
        elementwise("numpy.add", lambda a, b: np.add(a, 1, out=a, where=np.array([True]))),
        elementwise("single elements", lambda a, b: a[3]),
        elementwise("single elements", lambda a, b: a[::2]),
        elementwise("a decision", lambda a, b: 1 if (a > b) else 0),
        elementwise("a Python number", lambda a, b: float(a)),
        elementwise("reads the elements", lambda a, b: np.asarray(a)),
        elementwise("an operand of type ndarray", lambda a, b: a + np.ones(1 << 16)),
        elementwise("an out that is none", lambda a, b: np.add(a, b, out=np.ones(1 << 16))),
        elementwise("another shape", lambda a, b: a.reshape(2, -1)),
        elementwise("float64 into int64", lambda a, b: np.multiply(b, 1.5, out=b)),
        elementwise("add in int64", lambda a, b: np.add(b, b, out=b)),
        elementwise("numpy.dot", lambda a, b: np.dot(a, a)),
        elementwise("before it is written", lambda a, b: np.add(a.scratch(FLOAT), 1, out=a)),
        elementwise("numpy.maximum (reduce", lambda a, b: np.maximum.reduce(a)),
    ],
)
def test_what_is_no_kernel_is_refused_by_name(function: Callable[..., Any], text: str) -> None:
    with pytest.raises(UntraceableError) as raised:
        trace(lambda arrays: function(*arrays), [FLOAT, np.dtype(np.int64)])
    assert text in str(raised.value)


def test_norms_that_are_no_sums_are_refused() -> None:
    class Odd(LayerWise):
        def _n_states(self) -> int:
            return 0

        def _measure(self, weight: Any, grad: Any, state: Any, scratch: Any, step: Any) -> Any:
            return 1.0, 2.0

        def _trust(self, weight_norm: float, other_norm: float, step: Step) -> float:
            return 1.0

        def _step(self, weight: Any, grad: Any, state: Any, scratch: Any, step: Any) -> None:
            np.subtract(weight, grad, out=weight)

    with pytest.raises(UntraceableError, match="norms that are not sums"):
        trace_measure(Odd(), FLOAT, Step(0.1, 0.0, 1))
