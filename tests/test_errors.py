"""The exception tree: each class is a built-in one too, and can be raised on another rank."""

from __future__ import annotations

import inspect

import numpy as np
import pytest

from kvcoll import errors
from kvcoll.errors import KVCollError, RankFailedError, name_of, rebuild, text_of

pytestmark = pytest.mark.single

BUILTIN_OF: dict[type[KVCollError], type[Exception]] = {
    errors.KVCollError: Exception,
    errors.KeyNotFoundError: KeyError,
    errors.KeyExistsError: ValueError,
    errors.KeyKindError: TypeError,
    errors.ShapeMismatchError: ValueError,
    errors.DTypeMismatchError: TypeError,
    errors.ArrayError: TypeError,
    errors.ArgumentError: ValueError,
    errors.RanksDisagreeError: RuntimeError,
    errors.RankFailedError: RuntimeError,
    errors.UpdaterError: RuntimeError,
    errors.RankLeftError: RuntimeError,
    errors.ReplicasDifferError: RuntimeError,
    errors.WaitEndedError: RuntimeError,
    errors.RankLostError: RuntimeError,
    errors.LateRankError: RuntimeError,
    errors.NotSurvivableError: RuntimeError,
    errors.NoWholeReplicaError: RuntimeError,
    errors.BrokenMPIError: RuntimeError,
    errors.StoreClosedError: RuntimeError,
    errors.ThreadError: RuntimeError,
    errors.DeviceError: RuntimeError,
    errors.CollectiveError: RuntimeError,
    errors.MissingDependencyError: ImportError,
    errors.LaunchError: RuntimeError,
    errors.NoOptimizerError: RuntimeError,
    errors.FileError: OSError,
    errors.FileFormatError: ValueError,
    errors.NoCheckpointError: FileNotFoundError,
    errors.CheckpointMismatchError: ValueError,
    errors.StatesMismatchError: ValueError,
}


class UnknownError(Exception):
    """Of a library that the other ranks need not have."""


class OwnArgumentError(errors.ArgumentError):
    """A user's refinement, which is made of more than a text."""

    def __init__(self, text: str, times: int) -> None:
        super().__init__(f"{text}, {times} times")


def test_every_class_of_the_module_is_in_the_table() -> None:
    there = {cls for _, cls in inspect.getmembers(errors, inspect.isclass)}
    assert {cls for cls in there if issubclass(cls, KVCollError)} == set(BUILTIN_OF)


@pytest.mark.parametrize(("own", "builtin"), BUILTIN_OF.items())
def test_every_class_is_the_builtin_that_one_expects(
    own: type[KVCollError], builtin: type[Exception]
) -> None:
    assert issubclass(own, KVCollError)
    assert issubclass(own, builtin)


@pytest.mark.parametrize("own", [*BUILTIN_OF, TypeError, ValueError, IndexError, MemoryError])
@pytest.mark.parametrize("text", ["key 'w' holds float32[2, 3]", "", "'quoted'\nand é"])
def test_every_class_is_rebuilt_with_its_text(own: type[Exception], text: str) -> None:
    error = own(text)
    again = rebuild(name_of(error), str(error))
    assert type(again) is own
    assert str(again) == text


def test_a_class_that_is_not_known_becomes_a_rank_failed_error_that_names_it() -> None:
    for error, text in [
        (UnknownError("no luck"), "UnknownError: no luck"),
        (ZeroDivisionError("by 0"), "ZeroDivisionError: by 0"),
        (KeyError("w"), "KeyError: 'w'"),
    ]:
        again = rebuild(name_of(error), str(error))
        assert type(again) is RankFailedError
        assert str(again) == text


def test_a_subclass_that_is_not_known_becomes_the_nearest_class_that_is() -> None:
    with pytest.raises(MemoryError) as raised:
        np.empty(2**60, np.int8)
    assert type(raised.value) is not MemoryError  # it is one of NumPy's own
    for error, kind in [
        (raised.value, MemoryError),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), ValueError),
        (OwnArgumentError("wrong", 2), errors.ArgumentError),
    ]:
        again = rebuild(name_of(error), str(error))
        assert type(again) is kind
        assert str(again) == str(error)


def test_a_foreign_class_of_a_known_name_is_not_taken_for_it() -> None:
    namesake = type("ShapeMismatchError", (Exception,), {})
    assert name_of(namesake("x")) == "ShapeMismatchError"
    own = type("ArgumentError", (TypeError,), {})
    assert type(rebuild(name_of(own("x")), "x")) is TypeError


def test_an_error_that_cannot_write_its_text_still_has_one() -> None:
    class MuteError(ValueError):
        def __str__(self) -> str:
            raise ZeroDivisionError

    assert text_of(MuteError()) == "(its text cannot be written: ZeroDivisionError)"
    assert text_of(ValueError("plain")) == "plain"
