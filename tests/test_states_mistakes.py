"""States that cannot be saved or loaded: one named error on all ranks, and nothing changed."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from raised_by_all import raised_by_all

import kvcoll
from kvcoll import KVStore, optimizer, tensors
from kvcoll.errors import (
    ArgumentError,
    DTypeMismatchError,
    FileError,
    FileFormatError,
    NoOptimizerError,
    RanksDisagreeError,
    StatesMismatchError,
)
from kvcoll.optimizer.base import Step

Array = npt.NDArray[Any]

pytestmark = pytest.mark.limit(20)


class Own(optimizer.Optimizer):
    """A user's class."""

    def _n_states(self) -> int:
        return 1

    def _step(
        self, weight: Array, grad: Array, state: list[Array], scratch: list[Array], step: Step
    ) -> None:
        state[0] += grad
        weight -= state[0]


def f32(*numbers: float) -> Array:
    return np.array(numbers, np.float32)


@contextmanager
def longest_file(n_bytes: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def trained(kv: KVStore) -> KVStore:
    """Give a store with two keys of SGD with momentum, updated twice, each by the mean of 1."""
    kv.init(["a", "b"], [f32(0, 0), f32(0)])
    mean = 1 / kv.num_workers
    kv.set_optimizer("sgd", learning_rate=1.0, momentum=0.5, rescale_grad=mean)
    for _ in range(2):
        kv.push(["a", "b"], [f32(-1, -1), f32(-1)])
    return kv


def unchanged(kv: KVStore) -> None:
    """Check that the momentum of `trained` is still 1.5."""
    np.testing.assert_array_equal(kv.pull("a"), f32(2.5, 2.5))
    kv.push("a", f32(0, 0))
    np.testing.assert_array_equal(kv.pull("a"), f32(3.25, 3.25))


def raised_alike(kv: KVStore, comm: Any, call: Callable[[], object]) -> Exception:
    """Get the error of a call; in a distributed store the same one on every rank."""
    if kv.type == "dist_sync":
        return raised_by_all(comm, call)
    with pytest.raises(Exception) as raised:  # noqa: PT011
        call()
    return raised.value


def test_without_an_optimizer_there_is_nothing_to_save(
    kv: KVStore, comm: Any, tmp_path: Path
) -> None:
    kv.init(3, f32(1))
    own: Any = optimizer.Adam()
    with kvcoll.create("local") as other:
        other.set_optimizer(own)
        other.save_optimizer_states(tmp_path / "states")
    before = sorted(tmp_path.iterdir())
    for said in ("the store has no updater", "the store has an updater"):
        error = raised_alike(kv, comm, lambda: kv.save_optimizer_states(tmp_path / "f"))
        assert type(error) is NoOptimizerError
        assert f"no optimizer states to be saved: {said}; call set_optimizer first" in str(error)
        error = raised_alike(kv, comm, lambda: kv.load_optimizer_states(tmp_path / "states"))
        assert type(error) is NoOptimizerError
        assert f"no optimizer states to be loaded: {said}" in str(error)
        kv.set_updater(lambda key, input, stored: np.copyto(stored, input))
    assert sorted(tmp_path.iterdir()) == before


def test_a_place_that_cannot_be_written_is_the_same_error_on_all_ranks(
    trained: KVStore, comm: Any, tmp_path: Path
) -> None:
    kv = trained
    error = raised_alike(kv, comm, lambda: kv.save_optimizer_states(tmp_path / "none" / "f"))
    assert type(error) is FileError
    assert "cannot be written (No such file or directory): check the path" in str(error)
    unchanged(kv)


def test_a_disk_that_is_full_leaves_the_old_file(
    trained: KVStore, comm: Any, tmp_path: Path
) -> None:
    kv, path = trained, tmp_path / "states"
    kv.save_optimizer_states(path)
    kv.push("b", f32(7))

    def save() -> None:
        with longest_file(400):
            kv.save_optimizer_states(path)

    error = raised_alike(kv, comm, save)
    assert type(error) is FileError
    assert "File too large" in str(error)
    assert list(tmp_path.iterdir()) == ([path] if _writes(kv) else [])
    kv.load_optimizer_states(path)
    unchanged(kv)


def _writes(kv: KVStore) -> bool:
    return kv.rank == 0 or kv.type == "local"


@pytest.mark.parametrize("part", ["header", "data", "end", "missing", "folder", "foreign"])
def test_a_broken_file_changes_nothing_on_any_rank(
    trained: KVStore, comm: Any, tmp_path: Path, part: str
) -> None:
    kv, path = trained, tmp_path / "states"
    kv.save_optimizer_states(path, dump_optimizer=True)
    kind: type[Exception] = FileFormatError
    if _writes(kv):
        raw = bytearray(path.read_bytes())
        if part == "header":
            raw[raw.index(b'"SGD"') + 1] ^= 1
        elif part == "data":
            raw[-1] ^= 1
        elif part == "end":
            raw = raw[:-1]
        path.write_bytes(raw)
        if part == "foreign":
            tensors.write(str(path), {"w": f32(1)}, {})
        elif part in ("missing", "folder"):
            path.unlink()
        if part == "folder":
            path.mkdir()
    if part in ("missing", "folder"):
        kind = FileError
    error = raised_alike(kv, comm, lambda: kv.load_optimizer_states(path))
    assert type(error) is kind
    assert "states" in str(error)
    unchanged(kv)


@pytest.mark.parametrize(
    ("values", "kind", "settings", "why"),
    [
        ({"a": f32(0, 0)}, "sgd", {"momentum": 0.5}, "holds states of key 'b', which is not in"),
        ({1: f32(0, 0)}, "sgd", {"momentum": 0.5}, "holds states of key 'a', which is not in"),
        (
            {"a": f32(0), "b": f32(0)},
            "sgd",
            {"momentum": 0.5},
            "key 'a' holds float32[1], in ",
        ),
        (
            {"a": f32(0, 0), "b": np.zeros(1)},
            "sgd",
            {"momentum": 0.5},
            "key 'b' holds float64[1], in ",
        ),
        ({"a": f32(0, 0), "b": f32(0)}, "adam", {}, "holds states of SGD, the store's optimizer"),
        (
            {"a": f32(0, 0), "b": f32(0)},
            "sgd",
            {},
            "key 'a' holds float32[2], and SGD keeps [] of it, ",
        ),
    ],
)
def test_states_of_other_keys_or_optimizers_are_refused_and_named(
    trained: KVStore,
    comm: Any,
    tmp_path: Path,
    values: dict[Any, Array],
    kind: str,
    settings: dict[str, Any],
    why: str,
) -> None:
    trained.save_optimizer_states(tmp_path / "states")
    with kvcoll.create(trained.type) as kv:
        kv.init(list(values), list(values.values()))
        kv.set_optimizer(kind, learning_rate=1.0, rescale_grad=-1 / kv.num_workers, **settings)
        error = raised_alike(kv, comm, lambda: kv.load_optimizer_states(tmp_path / "states"))
        assert type(error) is StatesMismatchError
        assert why in str(error)
        assert "states'" in str(error)
        key = next(iter(values))
        kv.push(key, np.full_like(values[key], 4))
        assert kv.pull(key)[0] == (4 if kind == "sgd" else pytest.approx(1, rel=1e-6))


def test_multi_precision_must_be_as_it_was(kv: KVStore, comm: Any, tmp_path: Path) -> None:
    kv.init(3, np.zeros(2, np.float16))
    kv.set_optimizer("sgd", multi_precision=True)
    kv.push(3, np.ones(2, np.float16))
    kv.save_optimizer_states(tmp_path / "states")
    kv.set_optimizer("sgd", momentum=0.5)  # as many arrays, but others
    error = raised_alike(kv, comm, lambda: kv.load_optimizer_states(tmp_path / "states"))
    assert type(error) is StatesMismatchError
    assert "SGD keeps [state0] of it" in str(error)
    assert "has [master]" in str(error)


def test_a_schedule_is_not_lost_without_a_word(kv: KVStore, comm: Any, tmp_path: Path) -> None:
    kv.init(3, f32(0))
    kv.set_optimizer("sgd", lr_scheduler=lambda n: 1.0)
    kv.save_optimizer_states(tmp_path / "states", dump_optimizer=True)
    for other in (optimizer.SGD(), optimizer.Adam(lr_scheduler=lambda n: 1.0)):
        kv.set_optimizer(other)
        error = raised_alike(kv, comm, lambda: kv.load_optimizer_states(tmp_path / "states"))
        assert type(error) is StatesMismatchError
        assert "was saved with an lr_scheduler, which a file does not hold" in str(error)


def test_a_class_of_the_users_keeps_its_states_but_is_not_dumped(
    kv: KVStore, comm: Any, tmp_path: Path
) -> None:
    mean = 1 / kv.num_workers
    kv.init(3, f32(0))
    kv.set_optimizer(Own())
    kv.push(3, f32(-mean))
    error = raised_alike(
        kv, comm, lambda: kv.save_optimizer_states(tmp_path / "f", dump_optimizer=True)
    )
    assert type(error) is ArgumentError
    assert "Own is not one of kvcoll's optimizers" in str(error)
    kv.save_optimizer_states(tmp_path / "states")
    kv.set_optimizer(Own())
    kv.load_optimizer_states(tmp_path / "states")
    kv.push(3, f32(0))
    np.testing.assert_allclose(kv.pull(3), f32(2), rtol=1e-6)


def test_a_state_that_the_format_has_no_dtype_for_is_named(
    kv: KVStore, comm: Any, tmp_path: Path
) -> None:
    if np.dtype("g") == np.float64:
        pytest.skip("long double is double here")
    kv.init(3, np.zeros(2, "g"))
    kv.set_optimizer("sgd", momentum=0.5)
    kv.push(3, np.zeros(2, "g"))
    error = raised_alike(kv, comm, lambda: kv.save_optimizer_states(tmp_path / "f"))
    assert type(error) is DTypeMismatchError
    assert "array 'state0:3' is " in str(error)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("wrong", [3, None, ""])
def test_what_is_no_path_is_told_to_all(trained: KVStore, comm: Any, wrong: Any) -> None:
    kv = trained
    for call in (kv.save_optimizer_states, kv.load_optimizer_states):

        def mistaken(call: Any = call) -> None:
            call(wrong if kv.rank == kv.num_workers - 1 else "no/such/folder/f")

        error = raised_alike(kv, comm, mistaken)
        assert isinstance(error, (TypeError, ArgumentError))
    unchanged(kv)


@pytest.mark.ranks(at_least=2)
def test_ranks_that_do_not_all_save_or_load_get_one_error(comm: Any, tmp_path: Path) -> None:
    with kvcoll.create("dist_sync") as kv:
        kv.init(3, f32(1))
        sgd = optimizer.SGD(momentum=0.5)
        kv.set_optimizer(sgd)
        kv.push(3, f32(0))
        path, last = tmp_path / "f", kv.rank == kv.num_workers - 1
        for call in (
            lambda: kv.barrier() if last else kv.save_optimizer_states(path),
            lambda: kv.load_optimizer_states(path) if last else kv.save_optimizer_states(path),
            lambda: kv.save_optimizer_states(path, dump_optimizer=last),
            lambda: kv.push(3, f32(1)) if last else kv.load_optimizer_states(path),
        ):
            assert type(raised_by_all(comm, call)) is RanksDisagreeError
        assert list(tmp_path.iterdir()) == []
        kv.save_optimizer_states(path)
        if last:
            sgd.momentum = 0.0  # so that this rank would await another number of states
        error = raised_by_all(comm, lambda: kv.load_optimizer_states(path))
        assert type(error) is StatesMismatchError
        assert f"rank {kv.num_workers - 1}: key 3 holds float32[1], and SGD keeps []" in str(error)


def test_an_updater_may_not_save_or_load(kv: KVStore, comm: Any, tmp_path: Path) -> None:
    kv.init(3, f32(1))
    for call in (kv.save_optimizer_states, kv.load_optimizer_states):
        kv.set_updater(lambda key, input, stored, call=call: call(tmp_path / "f"))  # type: ignore[misc]
        error = raised_alike(kv, comm, lambda: kv.push(3, f32(1)))
        assert "an updater may pull, but must not init" in str(error)
