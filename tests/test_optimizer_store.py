"""Optimizers in a store: sums over the ranks, buckets, own arrays, and behind the caller."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pytest
from marks import first_quick
from optimizer_references import RULES, book_with_everything, make, make_with_everything
from raised_by_all import raised_by_all

import kvcoll
from kvcoll import KVStore, lr_scheduler
from kvcoll.errors import RanksDisagreeError
from kvcoll.optimizer.base import PIECE_ELEMENTS

if TYPE_CHECKING:
    from mpi4py import MPI

Array: TypeAlias = npt.NDArray[Any]
# The large one takes two pieces, and shares a bucket with the others, in the midst of them.
SHAPES = {
    "a_weight": (3, 5),
    "b_bias": (5,),
    "c_weight": (PIECE_ELEMENTS + 1000,),
    "d_weight": (0, 4),
    "e_weight": (),
}
KEYS = list(SHAPES)
STEPS = 3
WAYS = ["one by one", "own arrays", "behind", "late", "as codes", "as codes, behind"]
# The last settings of each class; all of them are tested without a store.
ONE_OF_EACH = list({rule[0]: name for name, rule in RULES.items()}.values())


def numbers(dtype: str, *seed: int, at_most: int = 2 * PIECE_ELEMENTS) -> list[Array]:
    """Give an array for each key, another for every seed; large ones may be cut."""
    arrays = []
    for place, shape in enumerate(SHAPES.values()):
        cut = tuple(min(n, at_most) for n in shape)
        array = np.random.default_rng([*seed, place]).standard_normal(cut)
        arrays.append(np.asarray(array).astype(dtype))
    return arrays


def check_same_on_all_ranks(comm: MPI.Intracomm, values: list[Array]) -> None:
    said = comm.allgather(b"".join(value.tobytes() for value in values))
    assert set(said) == {said[0]}


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_all_ranks_step_by_the_book_and_to_the_same_bits(comm: MPI.Intracomm, name: str) -> None:
    ours, _ = make_with_everything(name, "c_weight")
    books = [
        book_with_everything(
            name,
            *((0.5, 3.0) if key == "c_weight" else ()),
            **({"is_bias": True} if name[:4] == "LARS" and key == "b_bias" else {}),
        )
        for key in KEYS
    ]
    # Of the others each element is by itself: what a few do, all do.
    own_numbers = partial(numbers, at_most=2 * PIECE_ELEMENTS if ours.needs_whole_keys else 50)
    expected = own_numbers("f8", 1)
    with kvcoll.create("dist_sync", comm=comm) as kv:
        kv.init(KEYS, expected)
        kv.set_optimizer(ours)
        for step in range(STEPS):
            kv.push(KEYS, own_numbers("f8", 2, step, kv.rank))
            pushed = [own_numbers("f8", 2, step, rank) for rank in range(kv.num_workers)]
            totals = [np.asarray(sum(arrays)) for arrays in zip(*pushed, strict=True)]
            expected = [b.step(w, t) for b, w, t in zip(books, expected, totals, strict=True)]
        values = kv.pull(KEYS)
    for value, wanted in zip(values, expected, strict=True):
        np.testing.assert_allclose(value, wanted, rtol=1e-9, atol=1e-11)
    check_same_on_all_ranks(comm, values)


def train(comm: MPI.Intracomm, name: str, dtype: str, way: str) -> list[Array]:
    """Push some gradients in one of several ways; give the values."""
    ours, _ = make_with_everything(name, "a_weight", multi_precision=dtype == "f2")
    store = "dist_async" if way == "late" else "dist_sync"
    overlap: dict[str, Any] = {"overlap": "always"} if "behind" in way else {}
    with kvcoll.create(store, comm=comm, **overlap) as kv:
        kv.init(KEYS, numbers(dtype, 1))
        kv.set_optimizer(ours)
        if way.startswith("as codes"):
            kv.set_gradient_compression({"type": "fp16"})
        own = kv.empty(KEYS) if way == "own arrays" else []
        for step in range(STEPS):
            # Numbers that codes of 16 bits hold, and sums of them too.
            grads = [(np.round(g * 64) / 64).astype(dtype) for g in numbers("f4", 2, step, kv.rank)]
            if way == "one by one":
                for key, grad in zip(KEYS, grads, strict=True):
                    kv.push(key, grad)
                continue
            for place, grad in zip(own, grads, strict=False):
                place[...] = grad
            kv.push(KEYS, own or grads)
        kv.barrier()
        values: list[Array] = kv.pull(KEYS)
    return values


@pytest.mark.parametrize(
    ("name", "dtype"),
    first_quick(
        [("LAMB", "f4"), ("RMSProp, centered", "f2"), ("LAMB", "f2"), ("LARS with momentum", "f4")],
        2,
    ),
)
def test_keys_in_one_bucket_are_updated_as_each_alone_would_be(
    comm: MPI.Intracomm, name: str, dtype: str
) -> None:
    together = train(comm, name, dtype, "together")
    for value, start in zip(together, numbers(dtype, 1), strict=True):
        assert value.size == 0 or value.tobytes() != start.tobytes()
    for way in WAYS:
        for key, one, other in zip(KEYS, together, train(comm, name, dtype, way), strict=True):
            assert one.tobytes() == other.tobytes(), (way, key)
    check_same_on_all_ranks(comm, together)


@pytest.mark.single
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_every_optimizer_goes_on_from_its_file_with_the_same_bits(
    tmp_path: Path, name: str
) -> None:
    grads = [numbers("f2", 2, step, at_most=50) for step in range(2 * STEPS)]
    with kvcoll.create("local") as kv, kvcoll.create("local") as other:
        kv.init(KEYS, numbers("f2", 1, at_most=50))
        kv.set_optimizer(make(name, wd=0.1, clip_gradient=0.5, multi_precision=True)[0])
        for grad in grads[:STEPS]:
            kv.push(KEYS, grad)
        kv.save_optimizer_states(tmp_path / "states", dump_optimizer=True)
        other.init(KEYS, kv.pull(KEYS))
        other.load_optimizer_states(tmp_path / "states")
        for grad in grads[STEPS:]:
            kv.push(KEYS, grad)
            other.push(KEYS, grad)
        for key, one, copy in zip(KEYS, kv.pull(KEYS), other.pull(KEYS), strict=True):
            assert one.tobytes() == copy.tobytes(), key


def test_a_norm_is_of_one_key_and_not_of_its_neighbours(kv: KVStore) -> None:
    kv.init([1, 2], [np.full(4, 2.0), np.full(4, 32.0)])
    kv.set_optimizer("lamb", learning_rate=0.5, epsilon=0.0)
    kv.push([1, 2], [np.full(4, 7.0), np.full(4, 7.0)])
    # The direction is 1 everywhere, so its norm is 2; those of the values are 4 and 64.
    np.testing.assert_allclose(kv.pull(1), 2 - 0.5 * 4 / 2, rtol=1e-12)
    np.testing.assert_allclose(kv.pull(2), 32 - 0.5 * 64 / 2, rtol=1e-12)


def test_a_bias_is_not_scaled_by_lars_but_other_keys_are(kv: KVStore) -> None:
    keys = ["fc_weight", "fc_bias", "bn_gamma", "bn_beta"]
    kv.init(keys, [np.full(4, 8.0)] * 4)
    kv.set_optimizer("lars", learning_rate=0.5, eta=0.25, rescale_grad=1 / kv.num_workers)
    kv.push(keys, [np.full(4, 2.0)] * 4)
    scaled = 8 - 0.5 * (0.25 * 16 / 4) * 2
    for key, expected in zip(keys, [scaled, 7, 7, 7], strict=True):
        np.testing.assert_allclose(kv.pull(key), expected, rtol=1e-12)


def test_a_schedule_is_asked_once_a_push(kv: KVStore) -> None:
    asked: list[int] = []

    def schedule(num_update: int) -> float:
        asked.append(num_update)
        return 1.0 / num_update if num_update else 0.0

    kv.init([1, 2], [np.zeros(2), np.zeros(3)])
    kv.set_optimizer("sgd", lr_scheduler=schedule)
    asked.clear()
    for _ in range(3):
        kv.push([1, 2], [np.ones(2), np.ones(3)])
    assert asked == [1, 2, 3]
    for key in (1, 2):
        np.testing.assert_allclose(kv.pull(key), -kv.num_workers * (1 + 1 / 2 + 1 / 3))


def test_a_push_that_is_repeated_by_other_lists_keeps_its_schedule(kv: KVStore) -> None:
    schedule = lr_scheduler.MultiFactorScheduler([2], factor=0.5, base_lr=1.0, warmup_steps=2)
    kv.init([1, 2], [np.zeros(1), np.zeros(1)])
    kv.set_optimizer("sgd", lr_scheduler=schedule, rescale_grad=1 / kv.num_workers)
    for keys in ([1], [1, 2], [2], [1]):
        kv.push(keys, [np.ones(1)] * len(keys))
    # Rates of the updates: 1: half of the warm-up, 2: 1, 2 once more, 3: decayed.
    np.testing.assert_allclose([kv.pull(1)[0], kv.pull(2)[0]], [-(0.5 + 1 + 0.5), -(1 + 1)])


DIFFERENT: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "a bound": ("lamb", {"lower_bound": 1.0}, {}),
    "a correction": ("lars", {"momentum_correction": False}, {}),
    "centered": ("rmsprop", {"centered": True}, {}),
    "lazy_update": ("adagrad", {"lazy_update": False}, {"lazy_update": True}),
    "a schedule whose first rates are the same": (
        "sgd",
        {"lr_scheduler": lr_scheduler.FactorScheduler(5, factor=0.5)},
        {"lr_scheduler": lr_scheduler.FactorScheduler(6, factor=0.5)},
    ),
}


@pytest.mark.ranks(at_least=2)
@pytest.mark.parametrize(("name", "one", "others"), DIFFERENT.values(), ids=DIFFERENT.keys())
def test_settings_that_differ_among_ranks_are_an_error(
    comm: MPI.Intracomm, name: str, one: dict[str, Any], others: dict[str, Any]
) -> None:
    with kvcoll.create("dist_sync", comm=comm) as kv:
        settings = one if kv.rank == 1 else others
        raised = raised_by_all(comm, lambda: kv.set_optimizer(name, **settings))
        assert type(raised) is RanksDisagreeError
        for setting, value in one.items():
            shown = value if setting == "lr_scheduler" else f"{float(value):g}"
            assert f"{setting}={shown}" in str(raised)


@pytest.mark.ranks(at_least=2)
@pytest.mark.parametrize(
    ("name", "setting", "value"),
    [("Adam", "lazy_update", False), ("LAMB", "upper_bound", 3.0), ("Ftrl", "beta", 0.5)],
)
def test_a_setting_changed_on_one_rank_is_an_error_of_the_push(
    comm: MPI.Intracomm, name: str, setting: str, value: float
) -> None:
    ours, _ = make(name)
    with kvcoll.create("dist_sync", comm=comm) as kv:
        kv.init("w", np.ones(3))
        kv.set_optimizer(ours)
        if kv.rank == 1:
            vars(ours)[setting] = value
        raised = raised_by_all(comm, lambda: kv.push("w", np.ones(3)))
        assert type(raised) is RanksDisagreeError
        assert f"{setting}={float(value):g}" in str(raised)
        np.testing.assert_array_equal(kv.pull("w"), np.ones(3))
