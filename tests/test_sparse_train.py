"""Training by pushes of rows: what an embedding learns, and which rows an optimizer changes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sparse_values import F16, F32, numbers

import kvcoll
from kvcoll import KVStore, RowSparse, optimizer

N_WORDS, WIDTH, BATCH, STEPS = 200, 6, 30, 10
SHAPE = (N_WORDS, WIDTH)
START, TARGET = numbers(SHAPE, 1), numbers(SHAPE, 2)
ALL = sorted({*optimizer.__all__} - {"Optimizer", "create"})
# What does nothing to a row whose gradient is 0: lazy and dense runs are the same.
SAME = [("SGD", {}), ("AdaGrad", {"eps": 1e-6}), ("SGD", {"clip_gradient": 0.5})]


def batch(rank: int, step: int) -> Any:
    """Give words of a text: some often, most never."""
    rng = np.random.default_rng([rank, step])
    return np.minimum(rng.zipf(1.3, BATCH) - 1, N_WORDS - 1)


def train(kv: KVStore, key: str, push: Callable[[Any, Any], Any], *, first: int = 0) -> Any:
    """Pull the rows of a batch, push what leads to their targets, and give the table."""
    for step in range(first, first + STEPS):
        words = batch(kv.rank, step)
        rows = kv.row_sparse_pull(key, row_ids=words)
        values = rows.data[np.searchsorted(rows.indices, words)]
        kv.push(key, push((values - TARGET[words]) / np.float32(BATCH), words))
    kv.barrier()
    return kv.pull(key, ignore_sparse=False)


def by_rows(grads: Any, words: Any) -> RowSparse:
    return RowSparse(grads, words, SHAPE)


def by_array(grads: Any, words: Any) -> Any:
    whole = np.zeros(SHAPE, F32)
    for grad, word in zip(grads, words, strict=True):
        whole[word] += grad
    return whole


def start(kv: KVStore, name: str, **settings: Any) -> None:
    kv.init(["w", "d"], [RowSparse.from_dense(START), START])
    kv.set_optimizer(name, learning_rate=0.05, **settings)


def both(kv_name: str, name: str, **settings: Any) -> tuple[Any, Any]:
    with kvcoll.create(kv_name) as kv:
        start(kv, name, **settings)
        return train(kv, "w", by_rows), train(kv, "d", by_array)


def loss(table: Any) -> float:
    often = np.unique(np.concatenate([batch(0, step) for step in range(STEPS)]))
    return float(np.square(table - TARGET)[often].mean())


@pytest.mark.parametrize("name", ALL)
def test_an_embedding_learns_the_same_bits_by_rows_and_by_arrays(comm: Any, name: str) -> None:
    lazy = {"lazy_update": False} if name in ("SGD", "Adam", "AdaGrad") else {}
    sparse, dense = both("dist_sync", name, wd=0.01, **lazy)
    assert sparse.tobytes() == dense.tobytes()
    assert len(set(comm.allgather(sparse.tobytes()))) == 1
    # Test adds the gradient; whether all others learn is not asked for here.
    assert (sparse != START).any()


@pytest.mark.parametrize(("name", "settings"), SAME)
def test_lazy_updates_without_momentum_and_decay_are_those_of_the_dense_run(
    comm: Any, name: str, settings: dict[str, Any]
) -> None:
    sparse, dense = both("dist_sync", name, **settings)
    np.testing.assert_array_equal(sparse, dense)
    assert loss(sparse) < loss(START)


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdaGrad"])
def test_late_pushes_by_rows_end_where_late_pushes_by_arrays_do(comm: Any, name: str) -> None:
    with kvcoll.create("dist_async", staleness=0) as kv:
        start(kv, name, lazy_update=False)
        assert train(kv, "w", by_rows).tobytes() == train(kv, "d", by_array).tobytes()


def lazy_adam(grads: dict[int, Any], weight: Any, mean: Any, square: Any, count: int) -> None:
    for row, grad in grads.items():
        g = grad + 0.01 * weight[row]
        mean[row] = 0.9 * mean[row] + 0.1 * g
        square[row] = 0.999 * square[row] + 0.001 * g * g
        rate = 0.05 * np.sqrt(1 - 0.999**count) / (1 - 0.9**count)
        weight[row] -= rate * mean[row] / (np.sqrt(square[row]) + 1e-8)


def lazy_sgd(grads: dict[int, Any], weight: Any, mean: Any, square: Any, count: int) -> None:
    for row, grad in grads.items():
        mean[row] = 0.9 * mean[row] - 0.05 * (grad + 0.01 * weight[row])
        weight[row] += mean[row]


def lazy_adagrad(grads: dict[int, Any], weight: Any, mean: Any, square: Any, count: int) -> None:
    for row, grad in grads.items():
        square[row] += grad * grad
        weight[row] -= 0.05 * (grad / (np.sqrt(square[row]) + 1e-7) + 0.01 * weight[row])


@pytest.mark.parametrize("dtype", ["f8", "f4", "f2"])
@pytest.mark.parametrize(
    ("name", "settings", "rule"),
    [
        ("SGD", {"momentum": 0.9}, lazy_sgd),
        ("Adam", {}, lazy_adam),
        ("AdaGrad", {}, lazy_adagrad),
    ],
)
def test_lazy_optimizers_change_values_and_states_of_the_pushed_rows_only(
    kv: KVStore, name: str, settings: dict[str, Any], rule: Callable[..., None], dtype: Any
) -> None:
    before = START.astype(dtype)
    kv.init(["d", "w"], [before, RowSparse.from_dense(before)])
    kv.set_optimizer(name, learning_rate=0.05, wd=0.01, multi_precision=True, **settings)
    weight, mean, square = before.astype("f8"), np.zeros(SHAPE), np.zeros(SHAPE)
    touched = set()
    for step in range(6):
        every = {r: batch(r, step)[: 5 + r] for r in range(kv.num_workers)}
        grads = {r: numbers((words.size, WIDTH), 10 + r, dtype) for r, words in every.items()}
        own = RowSparse(grads[kv.rank], every[kv.rank], SHAPE)
        kv.push(["w", "d"], [own, own])
        total: dict[int, Any] = {}
        for r, words in every.items():
            for word, grad in zip(words.tolist(), grads[r].astype("f8"), strict=True):
                total[word] = total.get(word, 0) + grad
        if dtype == "f2":
            total = {word: grad.astype(F16).astype("f8") for word, grad in total.items()}
        rule(total, weight, mean, square, step + 1)
        touched |= {*total}
    for key in ("w", "d"):
        table = kv.pull(key, ignore_sparse=False)
        tolerance = {"f8": 1e-12, "f4": 1e-5, "f2": 2e-2}[dtype]
        np.testing.assert_allclose(table, weight, tolerance, tolerance)
        others = [row for row in range(N_WORDS) if row not in touched]
        assert table[others].tobytes() == before[others].tobytes()


def test_lazy_update_may_be_turned_off_between_pushes(kv: KVStore) -> None:
    sgd = optimizer.SGD(learning_rate=0.5, wd=1)
    kv.init("w", np.ones((3, 1), F32))
    kv.set_optimizer(sgd)
    kv.push("w", RowSparse.empty((3, 1), F32))
    np.testing.assert_array_equal(kv.pull("w"), np.ones((3, 1)))
    sgd.lazy_update = False
    n = int(kv.rank == 0)
    kv.push("w", RowSparse(np.ones((n, 1), F32), [1] * n, (3, 1)))
    np.testing.assert_array_equal(kv.pull("w"), [[0.5], [0], [0.5]])
    sgd.lazy_update = True
    kv.push("w", RowSparse(np.zeros((1, 1), F32), [2], (3, 1)))
    np.testing.assert_array_equal(kv.pull("w"), [[0.5], [0], [0.25]])


def test_an_optimizer_of_the_users_sees_the_array_that_the_rows_stand_for(kv: KVStore) -> None:
    seen = []

    class Own(optimizer.Optimizer):
        def _n_states(self) -> int:
            return 0

        def _step(self, weight: Any, grad: Any, state: Any, scratch: Any, step: Any) -> None:
            seen.append(grad.copy())
            weight -= grad

    kv.init("w", RowSparse.empty((4, 2), F32))
    kv.set_optimizer(Own())
    kv.push("w", RowSparse(np.ones((1, 2), F32), [2], (4, 2)))
    n = kv.num_workers
    np.testing.assert_array_equal(np.concatenate(seen), [0, 0, 0, 0, n, n, 0, 0])
    np.testing.assert_array_equal(
        kv.pull("w", ignore_sparse=False), [[0, 0], [0, 0], [-n, -n], [0, 0]]
    )


def test_states_of_rows_go_on_from_their_file(comm: Any, shared_tmp_path: Path) -> None:
    file = shared_tmp_path / "states"
    with kvcoll.create("dist_sync") as kv:
        start(kv, "adam")
        half = train(kv, "w", by_rows)
        kv.save_optimizer_states(file)
        expected = train(kv, "w", by_rows, first=STEPS)
    with kvcoll.create("dist_sync") as kv:
        kv.init(["w", "d"], [RowSparse.from_dense(half), START])
        kv.set_optimizer("adam", learning_rate=0.05)
        kv.load_optimizer_states(file)
        assert train(kv, "w", by_rows, first=STEPS).tobytes() == expected.tobytes()


def test_rows_are_not_compressed(kv: KVStore) -> None:
    kv.init(["d", "w"], [np.zeros(3, F32), RowSparse.empty((4, 2), F32)])
    kv.set_gradient_compression({"type": "2bit", "threshold": 0.5})
    for _ in range(2):
        kv.push(
            ["w", "d"],
            [RowSparse(np.full((1, 2), 7, F32), [2], (4, 2)), np.full(3, 0.25, F32)],
        )
    np.testing.assert_array_equal(
        kv.row_sparse_pull("w", row_ids=[2]).data, [[7 * kv.num_workers] * 2]
    )
    np.testing.assert_array_equal(kv.pull("d"), np.full(3, 0.5 * kv.num_workers))
