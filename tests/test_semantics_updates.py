"""What updaters and optimizers make of the sum of a push."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from kvcoll import KVStore, optimizer

Array = npt.NDArray[Any]


def f32(*numbers: float) -> Array:
    return np.array(numbers, np.float32)


def close_to(array: Array, *numbers: float) -> None:
    np.testing.assert_allclose(array, numbers, rtol=1e-6)


def test_sgd_with_momentum_gives_the_figures_of_the_semantics(kv: KVStore) -> None:
    kv.init(3, f32(1))
    # The figures are one rank's: the mean over the ranks is what one of them pushes.
    kv.set_optimizer(
        optimizer.SGD(learning_rate=0.1, momentum=0.9, rescale_grad=1 / kv.num_workers)
    )
    kv.push(3, f32(1))
    close_to(kv.pull(3), 0.9)
    kv.push(3, [f32(1), f32(1), f32(1)])
    close_to(kv.pull(3), 0.51)


def test_an_optimizer_sees_the_sum_over_the_ranks(kv: KVStore) -> None:
    kv.init(3, f32(10))
    kv.set_optimizer("sgd", learning_rate=0.5)
    kv.push(3, f32(kv.rank + 1))
    close_to(kv.pull(3), 10 - 0.5 * sum(range(1, kv.num_workers + 1)))


def test_rescale_grad_makes_a_mean_of_the_sum(kv: KVStore) -> None:
    batch = 4
    kv.init(3, f32(10))
    kv.set_optimizer("SGD", learning_rate=1.0, rescale_grad=1 / (batch * kv.num_workers))
    kv.push(3, [f32(6), f32(10)])
    close_to(kv.pull(3), 10 - 16 / batch)


def test_the_learning_rate_may_be_changed_between_pushes(kv: KVStore) -> None:
    sgd = optimizer.SGD(learning_rate=1.0)
    kv.init(3, f32(100))
    kv.set_optimizer(sgd)
    kv.push(3, f32(1))
    close_to(kv.pull(3), 100 - kv.num_workers)
    sgd.lr = 0.5
    kv.push(3, f32(1))
    close_to(kv.pull(3), 100 - 1.5 * kv.num_workers)
    sgd.set_learning_rate(2.0)
    kv.push(3, f32(1))
    close_to(kv.pull(3), 100 - 3.5 * kv.num_workers)


def test_rescale_grad_may_be_changed_between_pushes(kv: KVStore) -> None:
    sgd = optimizer.SGD(learning_rate=1.0)
    kv.init(3, f32(100))
    kv.set_optimizer(sgd)
    for rescale, expected in ((1.0, 1.0), (0.25, 1.25), (3.0, 4.25)):
        sgd.rescale_grad = rescale
        kv.push(3, f32(1))
        close_to(kv.pull(3), 100 - expected * kv.num_workers)


def test_a_schedule_is_asked_for_the_number_of_updates(kv: KVStore) -> None:
    kv.init(3, f32(0))
    kv.set_optimizer("sgd", learning_rate=9.0, lr_scheduler=lambda n: 10.0**-n)
    expected = 0.0
    for update in range(1, 4):
        kv.push(3, f32(-1))
        expected += kv.num_workers * 10.0**-update
        close_to(kv.pull(3), expected)


def test_momentum_and_weight_decay_follow_their_formula(kv: KVStore) -> None:
    kv.init(3, f32(1, 2))
    kv.set_optimizer("sgd", learning_rate=0.1, momentum=0.5, wd=0.01)
    weight, momentum = np.array([1.0, 2.0]), np.zeros(2)
    for step in range(1, 5):
        kv.push(3, f32(step, -step))
        gradient = np.array([step, -step]) * kv.num_workers + 0.01 * weight
        momentum = 0.5 * momentum - 0.1 * gradient
        weight += momentum
        close_to(kv.pull(3), *weight)


def test_adam_follows_its_formula(kv: KVStore) -> None:
    kv.init(3, f32(1, 2))
    kv.set_optimizer("adam", learning_rate=0.1)
    weight, mean, variance = np.array([1.0, 2.0]), np.zeros(2), np.zeros(2)
    for step in range(1, 5):
        kv.push(3, f32(step, -0.5))
        gradient = np.array([step, -0.5]) * kv.num_workers
        mean = 0.9 * mean + 0.1 * gradient
        variance = 0.999 * variance + 0.001 * gradient**2
        rate = 0.1 * np.sqrt(1 - 0.999**step) / (1 - 0.9**step)
        weight -= rate * mean / (np.sqrt(variance) + 1e-8)
        np.testing.assert_allclose(kv.pull(3), weight, rtol=1e-5)


def test_each_key_has_a_momentum_of_its_own(kv: KVStore) -> None:
    kv.init([1, 2], [f32(0), f32(0)])
    kv.set_optimizer("sgd", learning_rate=1.0, momentum=0.5, rescale_grad=1 / kv.num_workers)
    kv.push([1, 2], [f32(-1), f32(-10)])
    kv.push(1, f32(-1))
    close_to(kv.pull(1), 1 + 1.5)
    close_to(kv.pull(2), 10)
    kv.push([2, 1], [f32(0), f32(0)])
    close_to(kv.pull(1), 2.5 + 0.75)
    close_to(kv.pull(2), 10 + 5)


def test_a_key_pushed_alone_or_among_others_is_updated_alike(kv: KVStore) -> None:
    sizes = [3, 40_000, 0, 300_000, 1]
    keys = range(len(sizes))
    kv.init(list(keys), [np.zeros(n, np.float32) for n in sizes])
    kv.set_optimizer("sgd", learning_rate=1.0, momentum=0.5, rescale_grad=1 / kv.num_workers)
    gradients = [np.full(n, -(k + 1), np.float32) for k, n in enumerate(sizes)]
    kv.push(list(keys), gradients)
    for k in keys:
        kv.push(k, gradients[k])
    kv.push(list(keys)[::-1], gradients[::-1])
    for k, n in enumerate(sizes):  # 1, then 1.5, then 1.75 times the gradient
        np.testing.assert_array_equal(kv.pull(k), np.full(n, 4.25 * (k + 1), np.float32))


def test_the_last_of_updaters_and_optimizers_counts(kv: KVStore) -> None:
    kv.init(3, f32(1))
    kv.set_updater(lambda key, input, stored: np.multiply(stored, input, out=stored))
    kv.set_optimizer("test")
    kv.push(3, f32(2))
    equal = 1 + 2 * kv.num_workers
    close_to(kv.pull(3), equal)
    kv.set_updater(lambda key, input, stored: np.subtract(stored, input, out=stored))
    kv.push(3, f32(2))
    close_to(kv.pull(3), 1)


@pytest.mark.parametrize("multi_precision", [False, True])
def test_multi_precision_keeps_what_16_bits_cannot(kv: KVStore, multi_precision: bool) -> None:
    kv.init(3, np.full(2, 2048, np.float16))
    kv.set_optimizer(
        "sgd",
        learning_rate=1.0,
        multi_precision=multi_precision,
        rescale_grad=1 / kv.num_workers,
    )
    for _ in range(4):
        kv.push(3, np.full(2, -0.5, np.float16))  # 2048.5 is no float16
    np.testing.assert_array_equal(kv.pull(3), np.full(2, 2050 if multi_precision else 2048))


def test_an_updater_may_pull_other_keys_and_its_own(kv: KVStore) -> None:
    seen: list[tuple[float, float]] = []

    def update(key: Any, input: Array, stored: Array) -> None:
        stored += input
        seen.append((float(kv.pull(1)[0]), float(kv.pull(2)[0])))

    kv.init([1, 2], [f32(10), f32(20)])
    kv.set_updater(update)
    kv.push([1, 2], [f32(1), f32(2)])
    n = kv.num_workers
    assert seen == [(10 + n, 20), (10 + n, 20 + 2 * n)]


def test_an_updater_may_keep_and_push_what_it_was_given(kv: KVStore) -> None:
    kept: list[Array] = []

    def update(key: Any, input: Array, stored: Array) -> None:
        stored += input
        kept.append(stored)

    kv.init([1, 2, 3], [f32(1), f32(10), f32(100)])
    kv.set_updater(update)
    n = kv.num_workers
    kv.push([1, 2, 3], [f32(1), f32(2), f32(3)])
    kv.set_optimizer("test")
    kv.push([1, 2, 3], kept[::-1])  # each gets another's value, from the replica itself
    close_to(kv.pull(1), (1 + n) + n * (100 + 3 * n))
    close_to(kv.pull(2), (10 + 2 * n) * (1 + n))
    close_to(kv.pull(3), (100 + 3 * n) + n * (1 + n))


def test_an_updater_may_keep_its_input_and_push_it(kv: KVStore) -> None:
    kept: list[Array] = []
    kv.init([1, 2, 3], [f32(0), f32(0), f32(0)])
    kv.set_updater(lambda key, input, stored: kept.append(input))
    kv.push([1, 2, 3], [f32(1), f32(20), f32(300)])
    inputs = [float(one[0]) for one in kept]
    assert inputs == [kv.num_workers, 20 * kv.num_workers, 300 * kv.num_workers]
    kv.set_updater(lambda key, input, stored: np.copyto(stored, input))
    kv.push([1, 2, 3], kept[::-1])
    for key, factor in ((1, 300), (2, 20), (3, 1)):
        close_to(kv.pull(key), factor * kv.num_workers**2)
