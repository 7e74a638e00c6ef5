"""Every optimizer's settings go through JSON and come back, each by its name."""

from __future__ import annotations

import inspect
import json
from typing import Any

import numpy as np
import pytest

from kvcoll import optimizer
from kvcoll.errors import ArgumentError
from kvcoll.optimizer import SGD, Adam
from kvcoll.optimizer.create import _BY_NAME
from kvcoll.optimizer.recipe import arguments_of, had_schedule, make, recipe_of, take_settings

pytestmark = pytest.mark.single


def other_than(value: Any) -> Any:
    """Give another value of the kind."""
    if isinstance(value, bool):
        return not value
    if value is None:
        return 2.5
    return 3 if isinstance(value, int) else value * 0.75 + 0.01


ARGUMENTS = [
    (name, word)
    for name, cls in _BY_NAME.items()
    for word in inspect.signature(cls).parameters
    if word not in ("lr_scheduler", "param_idx2name")
]


@pytest.mark.parametrize(("name", "word"), ARGUMENTS)
def test_each_setting_comes_back(name: str, word: str) -> None:
    usual = inspect.signature(_BY_NAME[name]).parameters[word].default
    other = other_than(usual)
    given = optimizer.create(name, **{word: other})
    made = make(name, json.loads(json.dumps(recipe_of(given))))
    assert type(made) is type(given)
    assert arguments_of(made)[word] == other
    assert arguments_of(made) == arguments_of(given)
    assert made.describe() == given.describe()
    assert made.describe() != optimizer.create(name).describe()


@pytest.mark.parametrize("name", _BY_NAME)
def test_no_setting_is_forgotten(name: str) -> None:
    words = set(inspect.signature(_BY_NAME[name]).parameters) - {"lr_scheduler"}
    assert set(arguments_of(optimizer.create(name))) == words


def test_settings_are_those_of_now_to_the_last_digit() -> None:
    sgd = SGD(learning_rate=0.5, param_idx2name={1: "a_weight", 2: "b_bias"})
    sgd.lr = np.nextafter(0.1, 1)
    sgd.momentum = np.float32(0.1)
    sgd.set_lr_mult({1: 3, "b_bias": 0.1})
    sgd.set_wd_mult({"a_weight": np.float64(0.3)})
    made = make("SGD", json.loads(json.dumps(recipe_of(sgd))))
    assert made.settings() == sgd.settings()
    assert [made.multipliers(key) for key in (1, 2, 3)] == [sgd.multipliers(k) for k in (1, 2, 3)]
    table = ["lr_mult['b_bias']=0.1", "lr_mult[1]=3.0", "wd_mult['a_weight']=0.3"]
    assert set(table) < set(made.names_and_factors())


def test_a_schedule_is_not_kept_but_known_of() -> None:
    assert had_schedule(recipe_of(Adam(lr_scheduler=lambda n: 1.0)))
    assert not had_schedule(recipe_of(Adam()))


def test_a_setting_that_is_no_number_is_named() -> None:
    sgd = SGD()
    sgd.wd = "small"  # type: ignore[assignment]
    with pytest.raises(ArgumentError, match="the setting wd is a str"):
        recipe_of(sgd)


def test_an_optimizer_takes_the_settings_of_another_but_not_its_schedule() -> None:
    own = SGD(lr_scheduler=lambda n: 8.0)
    version = own.version
    take_settings(own, SGD(learning_rate=0.5, momentum=0.25, wd=0.125))
    assert own.settings()[:5] == (8.0, 0.125, 1.0, -1.0, 0.25)
    assert own.version > version
    assert own.lr == 0.5


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("momentum", "0.5"),
        ("momentum", None),
        ("momentum", True),
        ("momentum", 10**400),
        ("multi_precision", 1),
        ("begin_num_update", 0.5),
        ("begin_num_update", -1),
        ("clip_gradient", -1.0),
        ("lr_scheduler", 0.1),
        ("__class__", 0.1),
    ],
)
def test_a_recipe_that_cannot_be_is_refused(word: str, value: Any) -> None:
    recipe = recipe_of(SGD())
    recipe["arguments"][word] = value
    with pytest.raises(ArgumentError, match="no optimizer 'SGD' can be made of it"):
        make("SGD", recipe)
    with pytest.raises(ArgumentError, match=r"no optimizer 'os\.system' can be made of it"):
        make("os.system", recipe_of(SGD()))
