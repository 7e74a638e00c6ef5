"""Signals that ask a program to end: noted when they come, and acted upon where it suits.

Rules of the file: a handler does nothing but note its signal, as it may run between any two
lines; what all ranks do about it they agree on themselves, by `KVStore.any_rank`.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterable
from types import FrameType, TracebackType
from typing import Any, final

from .errors import ThreadError

USUAL = (signal.SIGTERM, signal.SIGUSR1)


@final
class StopSignals:
    """In a with-block, signals that ask to stop are noted, and end nothing by themselves.

    A scheduler sends them some time before it ends a job, and perhaps not to all ranks. So
    the ranks ask each other, once a step::

        with kvcoll.StopSignals() as stop:
            for batch in batches:
                kv.push(names, gradients(params, batch))
                kv.pull(names, out=params)
                if kv.any_rank(stop.came):  # the same answer on all ranks
                    kv.save("run")
                    break

    Parameters
    ----------
    signals : iterable of signal.Signals, default (SIGTERM, SIGUSR1)
        Which ones. SIGTERM is what ``scancel`` and a time limit come as;
        SIGUSR1 is what ``sbatch --signal`` is often told to send.

    Notes
    -----
    mpirun passes both on to its ranks. After a SIGTERM Open MPI 5 kills them within a fraction
    of a second, too soon for a save; MPICH 5 does not. So send SIGUSR1 to mpirun.
    """

    def __init__(self, signals: Iterable[signal.Signals] = USUAL) -> None:
        self._signals = tuple(signals)
        self._before: dict[signal.Signals, Any] = {}
        self._first = ""

    @property
    def came(self) -> bool:
        """Whether a signal has come to this rank since the block began."""
        return bool(self._first)

    @property
    def name(self) -> str:
        """The first that came: ``'SIGTERM'``; or ``''``."""
        return self._first

    def __enter__(self) -> StopSignals:
        """Begin to note signals.

        Raises
        ------
        ThreadError
            Not in the main thread, which alone may set what signals do.
        """
        if threading.current_thread() is not threading.main_thread():
            raise ThreadError(
                "StopSignals is entered in the main thread of a program, got thread "
                f"{threading.current_thread().name!r}: Python lets no other handle signals"
            )
        self._first = ""
        self._before = {one: signal.signal(one, self._note) for one in self._signals}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for one, handler in self._before.items():
            # None: it was set by a library in C, and Python cannot set it again.
            signal.signal(one, signal.SIG_DFL if handler is None else handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._first = self._first or signal.Signals(number).name
