"""Ends a job whose ranks no longer move, with the test's name and the Python stacks of all ranks.

Rules of this file
- The clock thread keeps the limit; it asks nothing of MPI before this rank's stacks are out.
- The listener thread prints this rank's stacks when another rank asks for them.
- faulthandler's C thread is the last line, for a rank whose main thread holds the GIL; it prints
  that rank's stacks without its name.
- Text goes to the terminal's stderr itself, because pytest captures file descriptor 2.
- Nobody aborts before all ranks have said what they have to say, and mpirun has read it: what is
  still in a pipe to mpirun when it hears of the abort is lost.
"""

from __future__ import annotations

import array
import faulthandler
import fcntl
import math
import os
import stat
import sys
import termios
import threading
import time
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, final

if TYPE_CHECKING:
    from mpi4py import MPI
    from mpi_world import World

ABORT_CODE: Final = 86
TICK_S: Final = 0.1
C_THREAD_AFTER_S: Final = 3.0  # how late the clock may be before faulthandler steps in
OTHERS_PRINT_S: Final = 5.0  # longer than that: a rank that cannot print is faulthandler's
MPIRUN_READS_S: Final = 3.0
MPIRUN_PASSES_ON_S: Final = 0.3  # what it has read is still on its way to the terminal
RANK_0_FIRST_S: Final = 0.7  # so that the last words are mostly said once
FORCED_EXIT_S: Final = 4.0  # beyond that, MPI itself is taken to be stuck
ASK_ALL, ASK_STUCK, ANSWER = 1, 2, 3
NOT_OURS: Final = ("/_pytest/", "/pytest/__main__.py", "/pluggy/", "<frozen runpy>")


@final
class Watchdog:
    """Watches the main thread of one rank; `watch` names what it does and sets its limit."""

    def __init__(self, world: World) -> None:
        self._name = f"[rank {world.rank} of {world.size}]"
        self._others = [rank for rank in range(world.size) if rank != world.rank]
        self._comm = world.duplicate()
        self._world = world
        self._stderr_fd = os.dup(2)
        self._watched = ("nothing", math.inf, math.inf)
        self._waiting_since = math.inf
        self._asks: list[MPI.Request] = []
        self._says = threading.Lock()
        self._has_said = False
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._clock, name="watchdog clock", daemon=True)]
        if self._others:
            listener = threading.Thread(target=self._listen, name="watchdog listener", daemon=True)
            self._threads.append(listener)
        self.failures: list[str] = []
        for thread in self._threads:
            thread.start()

    def watch(self, what: str, limit_s: float) -> None:
        """Start the limit of what the main thread does next; 0 is no limit."""
        deadline = time.monotonic() + limit_s if limit_s else math.inf
        self._watched = (what, limit_s, deadline)
        faulthandler.cancel_dump_traceback_later()
        if limit_s:
            c_limit_s = limit_s + C_THREAD_AFTER_S
            faulthandler.dump_traceback_later(c_limit_s, exit=True, file=self._stderr_fd)

    def waits_for_others(self, *, yes: bool) -> None:
        """Note that the main thread waits at an exchange, or that the wait is over."""
        self._waiting_since = time.monotonic() if yes else math.inf

    def waited_s(self) -> float:
        """Return for how long the main thread has waited for other ranks."""
        return time.monotonic() - self._waiting_since

    def write(self, text: str) -> None:
        """Write a text of this rank to the terminal's stderr."""
        data = f"\n{self._name} {text}\n".encode(errors="backslashreplace")
        while data:
            data = data[os.write(self._stderr_fd, data) :]

    def give_up_on_others(self, report: str) -> None:
        """End the job for a rank that failed while others are still inside the test."""
        what = self._watched[0]
        self.write(
            f"{what} failed here, and other ranks have not ended it within "
            f"{self.waited_s():.0f} s; the stacks of those follow. The failure:\n{report}"
        )
        self.end_job(f"{what}: failed on one rank while others were stuck", ask=ASK_STUCK)

    def end_job(self, why: str, *, ask: int | None = None) -> None:
        """Have the other ranks print their stacks if asked to, then abort the job."""
        faulthandler.cancel_dump_traceback_later()
        exit_timer = threading.Timer(
            OTHERS_PRINT_S + RANK_0_FIRST_S + MPIRUN_READS_S + FORCED_EXIT_S, os._exit, [ABORT_CODE]
        )
        exit_timer.daemon = True
        exit_timer.start()
        if self._comm is not None and ask is not None:
            self._asks += [self._comm.Isend(b"", dest=rank, tag=ask) for rank in self._others]
            self._await_answers(self._comm)
        if self._world.rank:
            time.sleep(RANK_0_FIRST_S)
        if self.failures:
            self.write("Before this, the run had these failures:\n" + "\n".join(self.failures))
        self.write(f"The job ends here: {why}")
        self._let_mpirun_read()
        if self._world.comm is None:
            os._exit(ABORT_CODE)
        self._world.comm.Abort(ABORT_CODE)

    def close(self) -> None:
        """Stop watching."""
        faulthandler.cancel_dump_traceback_later()
        self._stop.set()
        for thread in self._threads:
            thread.join()
        os.close(self._stderr_fd)

    def _clock(self) -> None:
        while not self._stop.wait(TICK_S):
            what, limit_s, deadline = self._watched
            if time.monotonic() > deadline:
                why = f"{what} reached its limit of {limit_s:g} s"
                self._print_stacks(why)
                self.end_job(why, ask=ASK_ALL)

    def _listen(self) -> None:
        from mpi4py import MPI

        assert self._comm is not None
        while not self._stop.wait(TICK_S):
            for ask in (ASK_ALL, ASK_STUCK):
                if not self._comm.Iprobe(tag=ask):
                    continue
                status = MPI.Status()
                self._comm.Recv(bytearray(), tag=ask, status=status)
                if ask == ASK_ALL or self._waiting_since == math.inf:
                    self._print_stacks(f"{self._watched[0]}: another rank asked for the stacks")
                self._let_mpirun_read()
                self._asks.append(self._comm.Isend(b"", dest=status.Get_source(), tag=ANSWER))

    def _await_answers(self, comm: MPI.Intracomm) -> None:
        """Wait until each other rank has had its stacks read; a rank that cannot is not awaited."""
        answered = 0

        def have_all() -> bool:
            nonlocal answered
            if comm.Iprobe(tag=ANSWER):
                comm.Recv(bytearray(), tag=ANSWER)
                answered += 1
            return answered == len(self._others)

        _wait_until(have_all, OTHERS_PRINT_S)

    def _let_mpirun_read(self) -> None:
        """Wait until mpirun has what was written here; a file has it at once."""
        mode = os.fstat(self._stderr_fd).st_mode
        if stat.S_ISFIFO(mode):
            _wait_until(lambda: _in_pipe_bytes(self._stderr_fd) == 0, MPIRUN_READS_S)
        if not stat.S_ISREG(mode):
            time.sleep(MPIRUN_PASSES_ON_S)

    def _print_stacks(self, why: str) -> None:
        """Print this rank's stacks, once; who comes later returns when they are out."""
        with self._says:
            if not self._has_said:
                self._has_said = True
                self._print_stacks_now(why)

    def _print_stacks_now(self, why: str) -> None:
        faulthandler.cancel_dump_traceback_later()
        if self._waiting_since != math.inf:
            why += f"\nThis rank is done with it and has waited {self.waited_s():.1f} s for others."
        frames = sys._current_frames()
        parts = [
            f"Thread '{thread.name}' (innermost call last):\n{_stack(frames[thread.ident])}"
            for thread in threading.enumerate()
            if thread not in self._threads and thread.ident in frames
        ]
        self.write(why + "\n" + "".join(parts))


def _wait_until(done: Callable[[], bool], limit_s: float) -> None:
    """Poll until something is done, or the limit is reached."""
    deadline = time.monotonic() + limit_s
    while not done() and time.monotonic() < deadline:
        time.sleep(0.01)


def _in_pipe_bytes(fd: int) -> int:
    """Return how much of what was written to a pipe has not been read yet."""
    waiting = array.array("i", [0])
    fcntl.ioctl(fd, termios.FIONREAD, waiting)
    return waiting[0]


def _stack(frame: object) -> str:
    """Return the lines of a stack, without pytest's own where others are left."""
    entries = traceback.extract_stack(frame)  # type: ignore[arg-type]
    ours = [entry for entry in entries if not any(part in entry.filename for part in NOT_OURS)]
    return "".join(traceback.format_list(ours or entries))
