"""What a place on a GPU does, on a fake one: the bits of the host, and no race."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from any_gpus import AnyGpus, gpus_and_nccl, needs_kernels
from arrays_of import f32
from quick_first import quick_first
from test_kernels_fused import assert_same_bits, awkward

from kvcoll import optimizer as optimizers
from kvcoll.arrays import wide
from kvcoll.errors import DeviceError
from kvcoll.gpu.array import as_any, as_device
from kvcoll.gpu.kernel import KernelSource
from kvcoll.gpu_place import GpuPlace
from kvcoll.kernels.steps import trace_step
from kvcoll.kernels.updates import Whole, rows_of_parts, rows_of_whole
from kvcoll.optimizer.layerwise import LayerWise, sum_of_squares
from kvcoll.optimizer.step import Step
from kvcoll.place import Parts, Update, UpdateEach

pytestmark = [pytest.mark.single, needs_kernels]

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


@pytest.fixture
def gpus() -> Iterator[AnyGpus]:
    own, _ = gpus_and_nccl(2)
    yield own
    own.finish()


@pytest.fixture
def place(gpus: AnyGpus) -> GpuPlace:
    return GpuPlace(gpus, gpus.devices[0])


def put(place: GpuPlace, numbers: Any) -> Any:
    made = place.empty(numbers.size, numbers.dtype)
    place.copy(numbers, made)
    return made


def got(place: GpuPlace, array: Any) -> Any:
    numbers = np.empty(array.shape, array.dtype)
    place.download(as_device(array), numbers)
    return numbers


@pytest.mark.parametrize("n", quick_first([129, 600_003, 1, 7, 8, 127, 128, 2049, 65536, 65537], 2))
@pytest.mark.parametrize("dtype", [np.dtype(np.float32), BFLOAT16], ids=lambda dtype: dtype.name)
@pytest.mark.parametrize("name", ["lamb", "lars"])
def test_norms_are_the_bits_of_the_host(
    place: GpuPlace, name: str, dtype: np.dtype[Any], n: int
) -> None:
    optimizer = optimizers.create(name, wd=0.01, learning_rate=0.1)
    random = np.random.default_rng(n)
    sizes = (n, 300)
    hosts, ours = [], []
    for size in sizes:
        weight, grad = (random.standard_normal(size).astype(dtype) for _ in range(2))
        states = [np.zeros(size, wide(dtype)) for _ in range(optimizer.n_states(dtype))]
        hosts.append((weight, grad, states))
        ours.append((put(place, weight), put(place, grad), [put(place, s) for s in states]))
    for count in (1, 2):
        step = Step(0.1, 0.01, count)
        place.update(optimizer, [Update(*arrays, step) for arrays in ours])
        for weight, grad, states in hosts:
            optimizer.update_flat(weight, grad, states, step)
        for (weight, _, states), (w, _, s) in zip(hosts, ours, strict=True):
            assert_same_bits(got(place, w), weight)
            for one, other in zip(states, s, strict=True):
                assert_same_bits(got(place, other), one)


LAYERS: list[tuple[str, dict[str, Any]]] = [
    ("lars", {}),
    ("lars", {"momentum": 0.9, "eps": 0.5, "wd": 0.1, "clip_gradient": 0.5}),
    ("lars", {"momentum": 0.9, "momentum_correction": False, "rescale_grad": 0.25}),
    ("lars", {"eta": 0.0}),
    ("lamb", {}),
    ("lamb", {"lower_bound": 30.0, "upper_bound": 40.0, "wd": 0.1}),
    ("lamb", {"lower_bound": 0.0, "bias_correction": False}),
    ("lamb", {"upper_bound": 0.5, "clip_gradient": 0.5}),
    ("lamb", {"upper_bound": 0.0}),
]


@pytest.mark.parametrize("dtype", [np.dtype(np.float32), np.dtype(np.float64)], ids=str)
@pytest.mark.parametrize(("name", "settings"), LAYERS)
def test_what_norms_make_of_steps_are_the_bits_of_the_host(
    place: GpuPlace, name: str, settings: dict[str, Any], dtype: np.dtype[Any]
) -> None:
    optimizer = optimizers.create(name, **settings)
    usual, none = np.linspace(-2, 3, 500).astype(dtype), np.zeros(500, dtype)
    odd = np.array([np.nan, *usual[1:]], dtype)
    huge, tiny = np.full(500, 1e30, dtype), np.full(500, 1e-30, dtype)
    pairs = [(usual, usual), (none, usual), (usual, none), (none, none), (odd, usual)]
    pairs += [(usual, odd), (huge, usual), (usual, huge), (tiny, huge), (huge, tiny)]
    keys = []
    for number, (weight, grad) in enumerate(pairs):
        arrays = [weight.copy(), grad.copy()]
        arrays += [np.zeros(500, wide(dtype)) for _ in range(optimizer.n_states(dtype))]
        step = Step(0.1, optimizer.wd * (1 + number % 2), 1, number != 7)
        keys.append((arrays, [put(place, array) for array in arrays], step))
    for _ in range(2):
        place.update(optimizer, [Update(a[0], a[1], a[2:], step) for _, a, step in keys])
        for (weight, grad, *states), ours, step in keys:
            optimizer.update_flat(weight, grad, states, step)
            for one, other in zip((weight, grad, *states), ours, strict=True):
                assert_same_bits(got(place, other), one)


class WholeKeys(optimizers.Optimizer):
    """One of a user's, which wants whole keys for reasons of its own."""

    needs_whole_keys = True

    def _n_states(self) -> int:
        return 1

    def _step(self, weight: Any, grad: Any, state: Any, scratch: Any, step: Step) -> None:
        np.add(state[0], grad, out=state[0])
        np.multiply(state[0], step.lr * step.trust, out=scratch[0])
        np.subtract(weight, scratch[0], out=weight)


def test_whole_keys_without_norms_are_one_kernel(place: GpuPlace) -> None:
    keys = [(f32([1, 2, 3]) * k, f32([4, 8, 12]) + k, f32([16, 32, 64])) for k in (1, 2)]
    ours = [[put(place, array) for array in arrays] for arrays in keys]
    updates = [Update(w, g, [s], Step(0.5, 0.0, 1)) for w, g, s in ours]
    before = place.launcher.n_launches
    place.update(WholeKeys(), updates)
    assert place.launcher.n_launches == before + 1
    for (weight, grad, state), (w, _, s) in zip(keys, ours, strict=True):
        np.testing.assert_array_equal(got(place, s), state + grad)
        np.testing.assert_array_equal(got(place, w), weight - (state + grad) / 2)


@pytest.mark.parametrize(
    "factor",
    [
        lambda total: math.sqrt(total),
        lambda total: float(np.sqrt(total)),
        lambda total: total * 2 - 8,
        lambda total: total**0.5,
        lambda total: 5.0 if total == 9 else 1.0,
        lambda total: 1.0 if total > 9 else 5.0,
        lambda total: 5.0 if total else 1.0,
    ],
)
def test_whole_keys_whose_norms_the_users_code_takes_go_op_by_op(
    place: GpuPlace, factor: Callable[[Any], float]
) -> None:
    class Own(optimizers.Optimizer):
        needs_whole_keys = True
        factor = 0.0

        def _n_states(self) -> int:
            return 0

        def update_flat(self, weight: Any, grad: Any, state: Any, step: Step) -> None:
            total = np.add.reduce(np.multiply(grad, grad))
            self.factor = factor(total)
            super().update_flat(weight, grad, state, step)

        def _step(self, weight: Any, grad: Any, state: Any, scratch: Any, step: Step) -> None:
            np.multiply(grad, self.factor, out=scratch[0])
            np.subtract(weight, scratch[0], out=weight)

    weight, grad = f32([7, 8, 9]), f32([1, 2, 2])
    ours = put(place, weight), put(place, grad)
    with pytest.warns(RuntimeWarning, match="a sum over all elements that is used for more"):
        place.update(Own(), [Update(*ours, [], Step(0.5, 0.0, 1))])
    expected = weight - grad * f32(factor(9.0))
    np.testing.assert_array_equal(got(place, ours[0]), expected)


def test_a_table_that_lacks_what_its_kernel_reads_is_refused(place: GpuPlace) -> None:
    layered, plain = optimizers.create("lars"), optimizers.create("sgd")
    step, kind = Step(0.5, 0.0, 1), np.dtype(np.float32)
    weight, grad = (put(place, f32([1, 2, 3])) for _ in range(2))
    factor = place.empty_on_gpu(1, np.dtype(np.float64))
    for optimizer, trust in ((layered, None), (plain, factor)):
        traced = trace_step(optimizer, kind, step)
        with pytest.raises(ValueError, match=r"rows of \d words, this table has"):
            rows_of_whole(traced.program, [Whole(Update(weight, grad, [], step), traced, trust)])
    parts = Parts(weight, np.array([0]), np.array([3]))
    traced = trace_step(layered, kind, step)
    with pytest.raises(ValueError, match="1 of the numbers"):
        rows_of_parts(traced.program, UpdateEach(parts, [], [grad], step), traced)


def test_an_optimizer_that_decides_by_norms_goes_op_by_op_and_changes_nothing_before(
    place: GpuPlace,
) -> None:
    class Decides(LayerWise):
        def _n_states(self) -> int:
            return 1

        def _measure(
            self, weight: Any, grad: Any, state: Any, scratch: Any, step: Any
        ) -> tuple[float, float]:
            np.add(state[0], 1, out=state[0])
            return sum_of_squares(weight, scratch[0]), sum_of_squares(grad, scratch[0])

        def _trust(self, weight_norm: float, other_norm: float, step: Step) -> float:
            return 0.5 if weight_norm > other_norm else 2.0

        def _step(self, weight: Any, grad: Any, state: Any, scratch: Any, step: Any) -> None:
            np.multiply(grad, step.trust, out=scratch[0])
            np.subtract(weight, scratch[0], out=weight)

    arrays = f32([3, 4]), f32([1, 0.5]), f32([0, 0])
    weight, grad, state = (put(place, array) for array in arrays)
    with pytest.warns(RuntimeWarning, match="decision that depends on elements"):
        place.update(Decides(), [Update(weight, grad, [state], Step(0.1, 0.0, 1))])
    assert got(place, weight).tolist() == [2.5, 3.75]
    assert got(place, state).tolist() == [1, 1]


@pytest.mark.parametrize("kind", ["fold", "walk", "trust", "fused"])
def test_what_does_not_compile_leaves_states_as_they_were(
    place: GpuPlace, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    compiled = type(place.device).compile

    def fails(own: Any, source: KernelSource) -> Any:
        if source.name.startswith(f"kvcoll_{kind}"):
            raise DeviceError("nvrtc: no more memory")
        return compiled(own, source)

    optimizer = optimizers.create("lamb")
    states = [f32([5, 6]), f32([7, 8])]
    own = [put(place, state) for state in states]
    update = Update(put(place, f32([1, 2])), put(place, f32([3, 4])), own, Step(0.1, 0.0, 1))
    with monkeypatch.context() as patched:
        patched.setattr(type(place.device), "compile", fails)
        with pytest.raises(DeviceError, match="no more memory"):
            place.update(optimizer, [update])
    for state, one in zip(states, own, strict=True):
        np.testing.assert_array_equal(got(place, one), state)


def test_steps_that_differ_in_numbers_alone_are_one_launch(place: GpuPlace) -> None:
    optimizer = optimizers.create("adam", wd=0.1)
    pairs = []
    for k in range(5):
        arrays = [awkward(1500 + k, np.dtype(np.float32), 10 * k + j) for j in range(2)]
        arrays += [np.zeros(1500 + k, np.float32) for _ in range(2)]
        step = Step(0.1 * (k + 1), 0.01 * (k + 1), k + 1)
        pairs.append((arrays, [put(place, array) for array in arrays], step))
    before = place.launcher.n_launches
    place.update(optimizer, [Update(a[0], a[1], a[2:], step) for _, a, step in pairs])
    assert place.launcher.n_launches == before + 1
    for (weight, grad, *states), arrays, step in pairs:
        optimizer.update_flat(weight, grad, states, step)
        for one, other in zip((weight, grad, *states), arrays, strict=True):
            assert_same_bits(got(place, other), one)


def test_lists_are_added_where_some_lie_on_another_gpu(place: GpuPlace, gpus: AnyGpus) -> None:
    numbers = [f32([2048, 2**-20, k]) for k in range(3)]
    values = [gpus.adopt(gpus.array(x, k % 2), place.stream) for k, x in enumerate(numbers)]
    total = place.empty(3, np.dtype(np.float32))
    place.add_lists([[as_any(value) for value in values]], [total])
    assert_same_bits(got(place, total), (numbers[0] + numbers[1]) + numbers[2])
    place.stream.synchronize()


def test_copies_to_another_gpu_come_before_what_follows(place: GpuPlace, gpus: AnyGpus) -> None:
    source = put(place, np.arange(5, dtype=np.float64))
    out = gpus.array(np.zeros(5, np.float16), 1)
    place.copy(source, as_any(gpus.adopt(out, place.stream)))
    place.copy(np.zeros(5), source)  # after it
    gpus.give_back(out, place.stream)
    assert out.get().tolist() == [0, 1, 2, 3, 4]


def test_an_optimizer_that_is_no_kernel_says_so_once(place: GpuPlace) -> None:
    class Odd(optimizers.Optimizer):
        def _n_states(self) -> int:
            return 0

        def _step(self, weight: Any, grad: Any, state: Any, scratch: Any, step: Any) -> None:
            np.exp(grad, out=scratch[0])
            np.subtract(weight, scratch[0], out=weight)

    weight, grad = f32([1, 2, 3]), f32([0, 1, 0.5])
    ours = put(place, weight), put(place, grad)
    with pytest.warns(RuntimeWarning, match=r"Odd updates one operation after another .*exp"):
        place.update(Odd(), [Update(*ours, [], Step(0.1, 0.0, 1))])
    place.update(Odd(), [Update(*ours, [], Step(0.1, 0.0, 2))])
    expected = (weight - np.exp(grad)) - np.exp(grad)
    np.testing.assert_allclose(got(place, ours[0]), expected, rtol=1e-6)  # exp has no one answer
