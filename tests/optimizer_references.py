"""Every optimizer once more, by the book: whole arrays, float64, no regard to speed.

Each rule takes the state that it keeps, the value, the rescaled and clipped gradient, the
learning rate, the weight decay, the number of the update, and its own settings, and gives
the new value.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from kvcoll import optimizer as o

Array: TypeAlias = npt.NDArray[Any]
State: TypeAlias = dict[str, Any]
Rule: TypeAlias = Callable[..., Any]


def sgd(s: State, w: Array, g: Array, lr: float, wd: float, t: int, momentum: float = 0) -> Any:
    s["m"] = momentum * s["m"] - lr * (g + wd * w)
    return w + s["m"]


def nag(s: State, w: Array, g: Array, lr: float, wd: float, t: int, momentum: float = 0) -> Any:
    # Sutskever's second form: of x, where the gradient is taken, not of theta.
    before = s["m"]
    s["m"] = momentum * before - lr * (g + wd * w)
    return w - momentum * before + (1 + momentum) * s["m"]


def moments(s: State, g: Array, beta1: float, beta2: float) -> None:
    s["m"] = beta1 * s["m"] + (1 - beta1) * g
    s["v"] = beta2 * s["v"] + (1 - beta2) * g**2


def adam(
    s: State, w: Array, g: Array, lr: float, wd: float, t: int,
    beta1: float = 0.9, beta2: float = 0.999, epsilon: float = 1e-8,
) -> Any:  # fmt: skip
    moments(s, g + wd * w, beta1, beta2)
    alpha = lr * math.sqrt(1 - beta2**t) / (1 - beta1**t)
    return w - alpha * s["m"] / (np.sqrt(s["v"]) + epsilon)


def adamw(
    s: State, w: Array, g: Array, lr: float, wd: float, t: int,
    beta1: float = 0.9, beta2: float = 0.999, epsilon: float = 1e-6, correct_bias: bool = True,
) -> Any:  # fmt: skip
    moments(s, g, beta1, beta2)
    m, v = s["m"], s["v"]
    if correct_bias:
        m, v = m / (1 - beta1**t), v / (1 - beta2**t)
    return w - lr * (m / (np.sqrt(v) + epsilon) + wd * w)


def lamb(
    s: State, w: Array, g: Array, lr: float, wd: float, t: int,
    beta1: float = 0.9, beta2: float = 0.999, epsilon: float = 1e-6,
    lower_bound: float = 0, upper_bound: float = math.inf, bias_correction: bool = True,
) -> Any:  # fmt: skip
    moments(s, g, beta1, beta2)
    m, v = s["m"], s["v"]
    if bias_correction:
        m, v = m / (1 - beta1**t), v / (1 - beta2**t)
    r = m / (np.sqrt(v) + epsilon) + wd * w
    phi = min(max(norm(w), lower_bound), upper_bound)
    ratio = phi / norm(r) if phi and norm(r) else 1.0
    return w - lr * ratio * r


def norm(x: Array) -> float:
    return math.sqrt(math.fsum((x**2).ravel()))


def lars(
    s: State, w: Array, g: Array, lr: float, wd: float, t: int,
    momentum: float = 0, eta: float = 0.001, eps: float = 0, momentum_correction: bool = True,
    is_bias: bool = False,
) -> Any:  # fmt: skip
    ratio = 1.0
    if not is_bias and norm(w) and norm(g):
        ratio = eta * norm(w) / (norm(g) + wd * norm(w) + eps)
    # Goyal et al.: where the rate is part of the momentum, the momentum follows the rate.
    last, s["lr"] = s["lr"] or lr, lr
    correction = lr / last if momentum_correction else 1.0
    s["m"] = momentum * correction * s["m"] + lr * ratio * (g + wd * w)
    return w - s["m"]


def rmsprop(
    s: State, w: Array, g: Array, lr: float, wd: float, t: int,
    gamma1: float = 0.9, gamma2: float = 0.9, epsilon: float = 1e-8, centered: bool = False,
    clip_weights: float = math.inf,
) -> Any:  # fmt: skip
    g = g + wd * w
    s["n"] = gamma1 * s["n"] + (1 - gamma1) * g**2
    s["g"] = gamma1 * s["g"] + (1 - gamma1) * g
    if centered:
        s["delta"] = gamma2 * s["delta"] - lr * g / np.sqrt(s["n"] - s["g"] ** 2 + epsilon)
    else:
        s["delta"] = -lr * g / np.sqrt(s["n"] + epsilon)
    return np.clip(w + s["delta"], -clip_weights, clip_weights)


def adagrad(s: State, w: Array, g: Array, lr: float, wd: float, t: int, eps: float = 1e-7) -> Any:
    s["h"] = s["h"] + g**2
    return w - lr * (g / (np.sqrt(s["h"]) + eps) + wd * w)


def adadelta(
    s: State, w: Array, g: Array, lr: float, wd: float, t: int,
    rho: float = 0.9, epsilon: float = 1e-5,
) -> Any:  # fmt: skip
    s["n"] = rho * s["n"] + (1 - rho) * g**2
    delta = np.sqrt(s["d"] + epsilon) / np.sqrt(s["n"] + epsilon) * g
    s["d"] = rho * s["d"] + (1 - rho) * delta**2
    return w - lr * (delta + wd * w)


def adamax(
    s: State, w: Array, g: Array, lr: float, wd: float, t: int,
    beta1: float = 0.9, beta2: float = 0.999,
) -> Any:  # fmt: skip
    g = g + wd * w
    s["m"] = beta1 * s["m"] + (1 - beta1) * g
    s["u"] = np.maximum(beta2 * s["u"], abs(g))
    moved = np.divide(s["m"], s["u"], out=np.zeros_like(w), where=s["u"] > 0)
    return w - lr / (1 - beta1**t) * moved


def nadam(
    s: State, w: Array, g: Array, lr: float, wd: float, t: int,
    beta1: float = 0.9, beta2: float = 0.999, epsilon: float = 1e-8, schedule_decay: float = 0.004,
) -> Any:  # fmt: skip
    g = g + wd * w
    moments(s, g, beta1, beta2)
    mu = [beta1 * (1 - 0.5 * 0.96 ** (i * schedule_decay)) for i in range(1, t + 2)]
    m = mu[t] * s["m"] / (1 - math.prod(mu)) + (1 - mu[t - 1]) * g / (1 - math.prod(mu[:t]))
    return w - lr * m / (np.sqrt(s["v"] / (1 - beta2**t)) + epsilon)


def ftrl(
    s: State, w: Array, g: Array, lr: float, wd: float, t: int,
    lamda1: float = 0.01, beta: float = 1,
) -> Any:  # fmt: skip
    sigma = (np.sqrt(s["n"] + g**2) - np.sqrt(s["n"])) / lr
    s["z"] = s["z"] + g - sigma * w
    s["n"] = s["n"] + g**2
    z = s["z"]
    kept = -(z - np.sign(z) * lamda1) / ((beta + np.sqrt(s["n"])) / lr + wd)
    return np.where(abs(z) <= lamda1, 0.0, kept)


def signum(
    s: State, w: Array, g: Array, lr: float, wd: float, t: int,
    momentum: float = 0.9, wd_lh: float = 0,
) -> Any:  # fmt: skip
    s["m"] = momentum * s["m"] + (1 - momentum) * (g + wd * w)
    return (1 - lr * wd_lh) * w - lr * np.sign(s["m"])


class Reference:
    """One rule on one key, with what all rules share."""

    def __init__(
        self,
        rule: Rule,
        *,
        lr: Callable[[int], float],
        wd: float = 0.0,
        rescale: float = 1.0,
        clip: float = math.inf,
        **own: Any,
    ) -> None:
        self.rule, self.lr, self.wd, self.rescale, self.clip = rule, lr, wd, rescale, clip
        self.own = own
        self.count = 0
        self.state: State = defaultdict(float)

    def step(self, weight: Array, grad: Array) -> Array:
        """Give the value after one more gradient."""
        self.count += 1
        g = np.clip(grad.astype("f8") * self.rescale, -self.clip, self.clip)
        lr = self.lr(self.count)
        moved: Array = self.rule(self.state, weight, g, lr, self.wd, self.count, **self.own)
        return moved


def halving(count: int) -> float:
    return 0.1 * 0.5 ** (count // 5)


# Our class, the same by the book, and settings of each rule's own that are not the defaults.
RULES: dict[str, tuple[type[o.Optimizer], Rule, dict[str, Any]]] = {
    "SGD": (o.SGD, sgd, {}),
    "SGD with momentum": (o.SGD, sgd, {"momentum": 0.9}),
    "NAG": (o.NAG, nag, {"momentum": 0.9}),
    "NAG without momentum": (o.NAG, nag, {}),
    "Adam": (o.Adam, adam, {}),
    "Adam, other settings": (o.Adam, adam, {"beta1": 0.8, "beta2": 0.9, "epsilon": 1e-3}),
    "AdamW": (o.AdamW, adamw, {}),
    "AdamW, other settings": (
        o.AdamW, adamw, {"beta1": 0.8, "beta2": 0.9, "epsilon": 1e-3, "correct_bias": False}),
    "LAMB": (o.LAMB, lamb, {}),
    "LAMB, other settings": (
        o.LAMB, lamb, {"beta1": 0.8, "beta2": 0.9, "epsilon": 1e-3, "bias_correction": False}),
    "LAMB, bounded below": (o.LAMB, lamb, {"lower_bound": 30.0, "upper_bound": 40.0}),
    "LAMB, bounded above": (o.LAMB, lamb, {"upper_bound": 0.5}),
    "LARS": (o.LARS, lars, {"eta": 0.1}),
    "LARS with momentum": (o.LARS, lars, {"eta": 0.1, "momentum": 0.9, "eps": 0.5}),
    "LARS, not corrected": (
        o.LARS, lars, {"eta": 0.1, "momentum": 0.9, "momentum_correction": False}),
    "RMSProp": (o.RMSProp, rmsprop, {}),
    "RMSProp, centered": (o.RMSProp, rmsprop, {"centered": True}),
    "RMSProp, clipped": (
        o.RMSProp, rmsprop,
        {"gamma1": 0.8, "gamma2": 0.5, "epsilon": 0.1, "centered": True, "clip_weights": 0.75}),
    "AdaGrad": (o.AdaGrad, adagrad, {}),
    "AdaGrad, other settings": (o.AdaGrad, adagrad, {"eps": 0.1}),
    "AdaDelta": (o.AdaDelta, adadelta, {}),
    "AdaDelta, other settings": (o.AdaDelta, adadelta, {"rho": 0.8, "epsilon": 0.1}),
    "Adamax": (o.Adamax, adamax, {}),
    "Adamax, other settings": (o.Adamax, adamax, {"beta1": 0.8, "beta2": 0.9}),
    "Nadam": (o.Nadam, nadam, {}),
    "Nadam, other settings": (
        o.Nadam, nadam, {"beta1": 0.8, "beta2": 0.9, "epsilon": 1e-3, "schedule_decay": 0.5}),
    "Ftrl": (o.Ftrl, ftrl, {}),
    "Ftrl, other settings": (o.Ftrl, ftrl, {"lamda1": 0.1, "beta": 0.5}),
    "Signum": (o.Signum, signum, {}),
    "signSGD": (o.Signum, signum, {"momentum": 0.0, "wd_lh": 0.5}),
}  # fmt: skip


def make(name: str, **settings: Any) -> tuple[o.Optimizer, Reference]:
    """Make an optimizer of `RULES` anew, for it counts, and the same by the book."""
    ours, rule, own = RULES[name]
    rate = settings.pop("learning_rate", 0.05)
    return ours(learning_rate=rate, **own, **settings), Reference(
        rule,
        lr=lambda count: rate,
        wd=settings.get("wd", 0.0),
        rescale=settings.get("rescale_grad", 1.0),
        clip=settings.get("clip_gradient", math.inf),
        **own,
    )


EVERYTHING: dict[str, Any] = {
    "lr_scheduler": halving,
    "wd": 0.1,
    "rescale_grad": 0.25,
    "clip_gradient": 0.3,
}


def book_with_everything(
    name: str, lr_mult: float = 1.0, wd_mult: float = 1.0, **own: Any
) -> Reference:
    """Make by the book what an optimizer with `EVERYTHING` does to one key."""
    _, rule, settings = RULES[name]
    return Reference(
        rule,
        lr=lambda t: lr_mult * halving(t),
        wd=0.1 * wd_mult,
        rescale=0.25,
        clip=0.3,
        **settings,
        **own,
    )


def make_with_everything(name: str, key: str, **settings: Any) -> tuple[o.Optimizer, Reference]:
    """Make both with a schedule, decay, clipping, rescaling, and factors of one key."""
    ours, _, own = RULES[name]
    made = ours(**EVERYTHING, **own, **settings)
    made.set_lr_mult({key: 0.5})
    made.set_wd_mult({key: 3.0})
    return made, book_with_everything(name, 0.5, 3.0)
