"""What one update of one key goes by: numbers alone."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple


class Factors(NamedTuple):
    """What is set for single keys."""

    lr: float = 1.0
    wd: float = 1.0
    adapts: bool = True  # whether the norms of the key set its step, where an optimizer does so


@dataclass(frozen=True)
class Step:
    """The numbers of one update of one key, or of several that share them."""

    lr: float
    wd: float
    count: int  # updates of this key so far, this one included
    adapts: bool = True
    trust: float = 1.0  # what the norms of the key make of it


def is_one(factor: float) -> bool:
    """Say whether a factor is known to change nothing: of one that a GPU will know it is not."""
    return isinstance(factor, float) and factor == 1.0


def power(base: float, count: int) -> float:
    """Give ``base**count`` for a whole number that is not below 0.

    By multiplication alone, so that it is the same bits on every machine; the C
    library's ``pow`` need not be. Of counts that follow one another few are worked out.
    """
    return _raised(base, count & 255) * _raised(_raised(base, 256), count >> 8)


@lru_cache(maxsize=4096)
def _raised(base: float, count: int) -> float:
    product = 1.0
    while count:
        if count & 1:
            product *= base
        base *= base
        count >>= 1
    return product
