"""Short names for arrays of one dtype."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt


def f32(values: npt.ArrayLike) -> npt.NDArray[Any]:
    return np.array(values, np.float32)


def f64(values: npt.ArrayLike) -> npt.NDArray[Any]:
    return np.array(values, np.float64)
