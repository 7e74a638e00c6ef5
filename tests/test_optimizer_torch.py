"""Torch's own optimizers as a second witness, where they have the same rule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from kvcoll import optimizer as o
from kvcoll.schema import Spec

torch = pytest.importorskip("torch", reason="torch is not installed")
pytestmark = pytest.mark.single

TINY = 1e-30  # an epsilon that does not show, where torch adds it in another place
# Ours, and what torch calls it, with its settings.
PAIRS: dict[str, tuple[Callable[[], o.Optimizer], str, dict[str, Any]]] = {
    "SGD": (lambda: o.SGD(learning_rate=0.05, wd=0.1), "SGD", {"weight_decay": 0.1}),
    "SGD with momentum": (
        lambda: o.SGD(learning_rate=0.05, momentum=0.9, wd=0.1),
        "SGD",
        {"momentum": 0.9, "weight_decay": 0.1},
    ),
    "NAG": (
        lambda: o.NAG(learning_rate=0.05, momentum=0.9, wd=0.1),
        "SGD",
        {"momentum": 0.9, "weight_decay": 0.1, "nesterov": True},
    ),
    # Torch's epsilon is not scaled by the bias correction.
    "Adam": (
        lambda: o.Adam(learning_rate=0.05, wd=0.1, epsilon=TINY),
        "Adam",
        {"weight_decay": 0.1, "eps": TINY},
    ),
    "AdamW": (
        lambda: o.AdamW(learning_rate=0.05, wd=0.1, epsilon=0.01),
        "AdamW",
        {"weight_decay": 0.1, "eps": 0.01},
    ),
    "Nadam": (
        lambda: o.Nadam(learning_rate=0.05, wd=0.1, epsilon=0.01),
        "NAdam",
        {"weight_decay": 0.1, "eps": 0.01},
    ),
    "Adamax": (
        lambda: o.Adamax(learning_rate=0.05, wd=0.1),
        "Adamax",
        {"weight_decay": 0.1, "eps": TINY},
    ),
    # Torch adds epsilon to the root.
    "RMSProp": (
        lambda: o.RMSProp(learning_rate=0.05, gamma1=0.8, wd=0.1, epsilon=TINY),
        "RMSprop",
        {"alpha": 0.8, "weight_decay": 0.1, "eps": TINY},
    ),
    "RMSProp, centered": (
        lambda: o.RMSProp(
            learning_rate=0.05, gamma1=0.8, gamma2=0.5, wd=0.1, epsilon=TINY, centered=True
        ),
        "RMSprop",
        {"alpha": 0.8, "momentum": 0.5, "weight_decay": 0.1, "eps": TINY, "centered": True},
    ),
    # Torch makes the decay part of the gradient, we do not.
    "AdaGrad": (lambda: o.AdaGrad(learning_rate=0.05, eps=0.01), "Adagrad", {"eps": 0.01}),
    "AdaDelta": (
        lambda: o.AdaDelta(learning_rate=0.05, rho=0.8, epsilon=0.01),
        "Adadelta",
        {"rho": 0.8, "eps": 0.01},
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_torchs_optimizers_make_the_same_steps(name: str) -> None:
    make, theirs_name, settings = PAIRS[name]
    start = np.random.default_rng(1).standard_normal((4, 5))
    theirs_weight = torch.tensor(start, requires_grad=True)
    theirs = vars(torch.optim)[theirs_name]([theirs_weight], lr=0.05, **settings)
    ours, weight = make(), start.copy()
    state = ours.create_state(Spec("w", weight.shape, weight.dtype, 0), weight)
    for step in range(20):
        grad = np.random.default_rng(step).standard_normal(weight.shape)
        ours.update("w", weight, grad, state)
        theirs_weight.grad = torch.tensor(grad)
        theirs.step()
    rtol = 1e-6 if name == "Nadam" else 1e-10  # torch keeps its product of momenta in float32
    np.testing.assert_allclose(weight, theirs_weight.detach().numpy(), rtol=rtol, atol=1e-12)
