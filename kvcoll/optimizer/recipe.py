"""An optimizer's settings as plain data, and an optimizer made of them again.

Rules of the file: what comes in may be a stranger's; it is used as numbers and as names of
kvcoll's own optimizers and of their arguments, and can be nothing else. Each argument of
an optimizer is its attribute of the same name, unless `arguments_of` says otherwise.
"""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np

from ..errors import ArgumentError
from ..schema import Key
from .base import Optimizer
from .create import create

_LARGEST_INT = 2**62


def is_own(optimizer: Optimizer) -> bool:
    """Say whether it is one of kvcoll's optimizers, and not a class of the user's."""
    return type(optimizer).__module__.startswith("kvcoll.")


def arguments_of(optimizer: Optimizer) -> dict[str, Any]:
    """Give by name what the constructor makes the optimizer of again, but its schedule."""
    kept = vars(optimizer)
    known = {**kept, "learning_rate": kept["lr"], "param_idx2name": kept["_names"]}
    names = inspect.signature(type(optimizer)).parameters
    return {name: known[name] for name in names if name != "lr_scheduler"}


def take_settings(optimizer: Optimizer, other: Optimizer) -> None:
    """Make an optimizer as another of its class is; its schedule stays as it is."""
    own = {"lr_scheduler", "version", "_counts", "_scratch"}
    kept = {name: value for name, value in vars(other).items() if name not in own}
    vars(optimizer).update(kept)
    optimizer.version += 1


def recipe_of(optimizer: Optimizer) -> dict[str, Any]:
    """Give all settings of one of kvcoll's optimizers, but its schedule, as JSON holds them.

    Raises
    ------
    ArgumentError
        A setting is no number.
    """
    arguments = arguments_of(optimizer)
    names = arguments.pop("param_idx2name")
    kept = vars(optimizer)
    return {
        "arguments": {word: _plain(word, value) for word, value in arguments.items()},
        "param_idx2name": [[key, str(name)] for key, name in names.items()],
        "lr_mult": [[key, float(factor)] for key, factor in kept["_lr_mult"].items()],
        "wd_mult": [[key, float(factor)] for key, factor in kept["_wd_mult"].items()],
        "has_lr_scheduler": optimizer.lr_scheduler is not None,
    }


def make(name: str, recipe: Any) -> Optimizer:
    """Make an optimizer of what `recipe_of` gave.

    Raises
    ------
    ArgumentError
        It is no such recipe.
    """
    try:
        usual = arguments_of(create(name))
        arguments = dict(recipe["arguments"])
        for word, value in arguments.items():
            _check(word, value, usual[word])
        arguments["param_idx2name"] = _table(recipe["param_idx2name"], str)
        made = create(name, **arguments)
        made.set_lr_mult(_table(recipe["lr_mult"], float))
        made.set_wd_mult(_table(recipe["wd_mult"], float))
    except (TypeError, ValueError, LookupError) as error:
        raise ArgumentError(f"no optimizer {name!r} can be made of it: {error!r}") from None
    return made


def had_schedule(recipe: Any) -> bool:
    """Say whether the optimizer had an lr_scheduler, which a recipe does not hold."""
    return isinstance(recipe, dict) and recipe.get("has_lr_scheduler") is not False


def _plain(word: str, value: Any) -> Any:
    """Turn NumPy's numbers into Python's, which JSON holds to the last digit."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is not None and not isinstance(value, (bool, int, float)):
        raise ArgumentError(
            f"the setting {word} is a {type(value).__name__}, which a file does not hold: "
            "give a number"
        )
    return value


def _check(word: str, value: Any, usual: Any) -> None:
    """Raise unless a setting is of the kind that it usually is."""
    if isinstance(usual, bool):
        fits = type(value) is bool
    elif word == "begin_num_update":
        fits = type(value) is int and 0 <= value <= _LARGEST_INT
    else:
        is_number = type(value) is float or (type(value) is int and abs(value) <= _LARGEST_INT)
        fits = is_number or (usual is None and value is None)
    if not fits:
        raise ValueError(f"{word} cannot be {value!r}")


def _table(pairs: Any, kind: type) -> dict[Key, Any]:
    table: dict[Key, Any] = dict(pairs)
    if not all(type(key) in (int, str) and type(table[key]) is kind for key in table):
        raise ValueError("a table of names or multipliers is none")
    return table
