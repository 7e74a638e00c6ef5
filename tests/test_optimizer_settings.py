"""What may be set of an optimizer, and when it is counted."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kvcoll.errors import ArgumentError
from kvcoll.optimizer import SGD, Adam
from kvcoll.schema import Spec

pytestmark = pytest.mark.single

F64 = np.dtype("f8")


def test_settings_change_with_the_learning_rate() -> None:
    ours = SGD(learning_rate=0.5)
    before = ours.settings()
    ours.set_learning_rate(0.25)
    assert ours.learning_rate == 0.25
    assert ours.settings() == (0.25, *before[1:])
    weight = np.ones(1)
    ours.update("w", weight, np.ones(1), ())
    assert weight[0] == 0.75


def test_settings_that_differ_in_the_last_digit_read_differently() -> None:
    one, other = SGD(learning_rate=0.1), SGD(learning_rate=np.nextafter(0.1, 1))
    assert one.settings() != other.settings()
    assert one.describe() != other.describe()


def test_a_schedule_sees_the_number_of_updates_of_the_key_that_had_most() -> None:
    seen: list[int] = []

    def schedule(count: int) -> float:
        seen.append(count)
        return 1.0 / count

    ours = SGD(lr_scheduler=schedule, begin_num_update=10)
    a, b = np.zeros(1), np.zeros(1)
    for key, weight in [("a", a), ("a", a), ("b", b), ("a", a)]:
        ours.update(key, weight, np.ones(1), ())
    assert seen == [11, 12, 12, 13]
    np.testing.assert_allclose(a, -(1 / 11 + 1 / 12 + 1 / 13), rtol=1e-14)
    np.testing.assert_allclose(b, -1 / 12, rtol=1e-14)
    with pytest.raises(ArgumentError, match=r"^the learning rate is set by lr_scheduler"):
        ours.set_learning_rate(0.1)


def test_adam_counts_the_updates_of_each_key_by_itself() -> None:
    ours = Adam(learning_rate=0.1, epsilon=0.0)
    weights = {key: np.zeros(1) for key in "ab"}
    states = {
        key: ours.create_state(Spec(key, (1,), F64, 0), weight) for key, weight in weights.items()
    }
    for key in "aab":
        ours.update(key, weights[key], np.full(1, 5.0), states[key])
    # With one and the same gradient each step is the learning rate, if the count is right.
    np.testing.assert_allclose([weights["a"][0], weights["b"][0]], [-0.2, -0.1], rtol=1e-13)


@pytest.mark.parametrize("clip", [0, -1.0])
def test_a_clip_that_is_not_above_0_is_refused(clip: float) -> None:
    with pytest.raises(ArgumentError, match=f"^clip_gradient must be above 0 or None, got {clip}$"):
        SGD(clip_gradient=clip)


def test_a_schedule_must_be_callable() -> None:
    wrong: Any = 0.1
    with pytest.raises(TypeError, match=r"^lr_scheduler must be callable, got float$"):
        Adam(lr_scheduler=wrong)
