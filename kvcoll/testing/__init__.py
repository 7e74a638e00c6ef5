"""Faults on demand: see what a training makes of a rank that is late, dies, or errs.

In a program::

    from kvcoll.testing import Delay, Kill, faults

    with faults(Delay(rank=1, push=5, seconds=3), Kill(rank=0, push=9)):
        train()

or for a program as it is, by the environment of all its ranks::

    KVCOLL_FAULTS="rank=1 push=5 delay=3; rank=0 push=9 kill" mpirun -n 2 python train.py

Each part of that, up to a ``;``, is one fault: where it strikes (``rank=``, ``push=``, ``key=``),
and what it does, one of ``delay=SECONDS``, ``stop=SECONDS``, ``kill``, ``raise`` or ``raise=TEXT``,
``skip``, ``reshape``, ``flip=gradient``, ``flip=replica`` or ``flip=state`` (with ``bit=`` and
``element=``), ``fill-disk`` or ``fill-disk=SECONDS``, ``cut=COMMAND``; quotes are those of a shell.

Every fault strikes once, in whichever store of the process comes to it first. What must follow
stands with each. While no fault waits, a push costs one look at a variable more.
"""

from .armed import arm, faults
from .kinds import (
    Cut,
    Delay,
    Fault,
    FillDisk,
    Flip,
    InjectedError,
    Kill,
    Raise,
    Reshape,
    Skip,
    Stop,
)
from .words import VARIABLE, parse

__all__ = [
    "VARIABLE",
    "Cut",
    "Delay",
    "Fault",
    "FillDisk",
    "Flip",
    "InjectedError",
    "Kill",
    "Raise",
    "Reshape",
    "Skip",
    "Stop",
    "arm",
    "faults",
    "parse",
]
