"""Checkpoints that cannot be saved or loaded: one named error on all ranks, and nothing lost."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpointed import (
    f32,
    is_last,
    loadable,
    raised_alike,
    save_first,
    shared,
    unchanged,
)
from raised_by_all import raised_by_all

import kvcoll
from kvcoll import KVStore, optimizer
from kvcoll.errors import (
    ArgumentError,
    CheckpointMismatchError,
    DTypeMismatchError,
    FileError,
    NoCheckpointError,
    RanksDisagreeError,
    StatesMismatchError,
)

pytestmark = pytest.mark.limit(30)


@pytest.fixture
def path(kv: KVStore, tmp_path: Path, shared_tmp_path: Path) -> Path:
    return shared(kv, tmp_path, shared_tmp_path) / "run"


@pytest.fixture
def saved(kv: KVStore, path: Path) -> KVStore:
    return save_first(kv, path)


def test_where_there_is_none_it_is_said(kv: KVStore, comm: Any, path: Path) -> None:
    for folder in (path, path / "00000003", path / "7"):
        if kv.rank == 0 or kv.type == "local":
            folder.mkdir()
        kv.barrier()
        error = raised_alike(kv, comm, lambda: kv.load(path))
        assert "there is no such folder" in str(raised_alike(kv, comm, lambda: kv.load(path / "x")))
        assert type(error) is NoCheckpointError
        assert isinstance(error, FileNotFoundError)
        assert f"there is no complete checkpoint in {str(path)!r}" in str(error)
        with pytest.raises(NoCheckpointError):
            kvcoll.load(path)
    kv.init(3, f32(1))
    kv.save(path)
    assert sorted(os.listdir(path)) == ["00000004", "7"]


def test_what_is_no_path_number_or_json_is_told_to_all(
    saved: KVStore, comm: Any, path: Path
) -> None:
    kv = saved
    circle: list[Any] = []
    circle.append(circle)
    cases: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (TypeError, "is a str or a Path", {"path": 3}),
        (ArgumentError, "cannot be the path", {"path": ""}),
        (TypeError, "keep is an int or None, got True", {"keep": True}),
        (ArgumentError, "keep must be at least 1", {"keep": 0}),
        (TypeError, "wait is a bool, got 'no'", {"wait": "no"}),
        (ArgumentError, "metadata is not what JSON holds", {"metadata": {1: "one"}}),
        (ArgumentError, "metadata is not what JSON holds", {"metadata": float("nan")}),
        (ArgumentError, "metadata is not what JSON holds", {"metadata": circle}),
        (ArgumentError, "metadata is not what JSON holds", {"metadata": "\udc00"}),
        (ArgumentError, "rank_metadata is not what JSON holds", {"rank_metadata": f32(1)}),
    ]
    for kind, why, wrong in cases:
        given = {"path": path, **(wrong if is_last(kv) else {})}
        error = raised_alike(kv, comm, lambda given=given: kv.save(**given))  # type: ignore[misc]
        assert type(error) is kind
        assert why in str(error)
    assert os.listdir(path) == ["00000001"]
    unchanged(kv)


def test_a_checkpoint_is_not_saved_into_another(saved: KVStore, comm: Any, path: Path) -> None:
    error = raised_alike(saved, comm, lambda: saved.save(path / "00000001"))
    assert type(error) is FileError
    assert "is a checkpoint itself: save to the folder above" in str(error)
    loadable(saved, path)


def test_a_file_in_the_way_is_named(saved: KVStore, comm: Any, path: Path) -> None:
    kv = saved
    if kv.rank == 0 or kv.type == "local":
        (path / "file").write_text("mine")
    kv.barrier()
    for inside in (path / "file", path / "file" / "deep"):
        for call in (lambda p=inside: kv.save(p), lambda p=inside: kv.load(p)):
            assert isinstance(raised_alike(kv, comm, call), FileError)
    unchanged(kv)


MISMATCHES: list[tuple[dict[Any, Any], Callable[[KVStore], object], type[Exception], str]] = [
    ({"a": f32(0, 0)}, lambda kv: None, CheckpointMismatchError, "holds key 'b', which is not in"),
    (
        {"a": f32(0, 0), "b": np.zeros(900, np.float32), "c": f32(0)},
        lambda kv: None,
        CheckpointMismatchError,
        "key 'c' of the store is not in",
    ),
    (
        {"a": f32(0, 0), "b": np.zeros(900)},
        lambda kv: None,
        CheckpointMismatchError,
        "key 'b' holds float64[900], in ",
    ),
    ({1: f32(0)}, lambda kv: None, CheckpointMismatchError, "holds key 'a', which is not in"),
    (
        {},
        lambda kv: kv.set_updater(lambda key, input, stored: None),
        CheckpointMismatchError,
        "holds states of SGD, the store has an updater: call set_updater after load",
    ),
]


@pytest.mark.parametrize(("values", "prepare", "kind", "why"), MISMATCHES)
def test_a_store_of_other_keys_or_another_kind_of_updater_is_refused(
    saved: KVStore,
    comm: Any,
    path: Path,
    values: dict[Any, Any],
    prepare: Callable[[KVStore], object],
    kind: type[Exception],
    why: str,
) -> None:
    with kvcoll.create(saved.type) as kv:
        kv.init(list(values), list(values.values()))
        prepare(kv)
        error = raised_alike(kv, comm, lambda: kv.load(path))
        assert type(error) is kind
        assert why in str(error)
        assert not any(np.any(value) for value in kv.pull(list(values)))
        kv.init("new" if "a" in values or not values else 2, f32(1))


def test_what_a_file_cannot_hold_is_not_lost_without_a_word(
    kv: KVStore, comm: Any, path: Path
) -> None:
    kv.init("a", f32(0))
    kv.set_optimizer("sgd", lr_scheduler=lambda n: 1.0)
    kv.save(path)
    with kvcoll.create(kv.type) as other:
        error = raised_alike(other, comm, lambda: other.load(path))
        assert type(error) is StatesMismatchError
        assert "was saved with an lr_scheduler, which a file does not hold" in str(error)
        other.set_optimizer(optimizer.SGD(lr_scheduler=lambda n: 2.0))
        other.load(path)
    with kvcoll.create(kv.type) as plain:
        plain.init("a", f32(0))
        plain.save(path)
    error = raised_alike(kv, comm, lambda: kv.load(path))
    assert type(error) is CheckpointMismatchError
    assert "holds no optimizer, the store has SGD" in str(error)
    if np.dtype("g") != np.float64:
        kv.init("long", np.zeros(2, "g"))
        error = raised_alike(kv, comm, lambda: kv.save(path))
        assert type(error) is DTypeMismatchError
        assert "'value:long' is " in str(error)


@pytest.mark.ranks(at_least=2)
@pytest.mark.parametrize("wait", [True, False])
def test_ranks_that_do_not_mean_the_same_get_one_error(
    comm: Any, shared_tmp_path: Path, wait: bool
) -> None:
    with kvcoll.create("dist_sync") as kv:
        kv.init(3, f32(1))
        path, last = shared_tmp_path, is_last(kv)
        kv.save(path, wait=wait)
        for call, why in (
            (lambda: kv.save(path / "x" if last else path), "called save() with path '"),
            (lambda: kv.save(path, keep=1 + last), "called save() with keep=2"),
            (
                lambda: kv.save(path, metadata={"a": ["x" * 99], "e": kv.rank}),
                "rank 0 called save() with metadata['e'] 0, rank 1 called ",
            ),
            (lambda: kv.save(path, metadata={str(kv.rank): 0}), "with metadata of ['0'], rank 1"),
            (lambda: kv.save(path, metadata="e" * 99 + str(kv.rank)), "… (digest "),
            (lambda: kv.save(path, wait=last), "called save() with wait=True"),
            (lambda: kv.barrier() if last else kv.save(path), "called barrier()"),
            (lambda: kv.load(path) if last else kv.save(path), "called load()"),
            (lambda: kv.load(path / "x" if last else path), "called load() with path '"),
            (lambda: kv.push(3, f32(1)) if last else kv.wait_saved(), "called wait_saved()"),
        ):
            error = raised_by_all(comm, call)
            assert type(error) is RanksDisagreeError
            assert why in str(error)
        kv.wait_saved()
        assert os.listdir(path) == ["00000001"]


@pytest.mark.ranks(at_least=2)
def test_no_checkpoint_is_saved_while_ranks_are_at_the_end_of_join(
    comm: Any, shared_tmp_path: Path
) -> None:
    with kvcoll.create("dist_sync") as kv:
        kv.init(3, f32(0))
        kv.save(shared_tmp_path, wait=False)
        with kv.join():
            for _ in range(kv.rank):
                kv.push(3, f32(kv.rank))
        kv.save(shared_tmp_path)
        assert kvcoll.load(shared_tmp_path)[0][3] == comm.size - 1  # who pushed last, alone
        comm.Barrier()

        def save_in_join() -> None:
            with kv.join():
                if kv.rank:
                    kv.save(shared_tmp_path)

        error = raised_by_all(comm, save_in_join)
        assert type(error) is RanksDisagreeError
        assert "rank 0 is at the end of join(), others called save()" in str(error)


def test_an_updater_may_not_save_or_load(kv: KVStore, comm: Any, path: Path) -> None:
    kv.init(3, f32(1))
    for call in (kv.save, kv.load):
        kv.set_updater(lambda key, input, stored, call=call: call(path))  # type: ignore[misc]
        error = raised_alike(kv, comm, lambda: kv.push(3, f32(1)))
        assert "an updater may pull, but must not init" in str(error)
