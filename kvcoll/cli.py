"""The command line: ``kvcoll doctor``, ``kvcoll env``, ``kvcoll bench``."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence

from ._version import __version__
from .doctor import bench, environment, page, supervise
from .doctor.facts import place_in
from .doctor.findings import Finding
from .doctor.seen import Seen

_DESCRIPTION = "A key-value store for data-parallel training over MPI."
_DOCTOR = """\
Examine this machine, or the job that this is started in, and say in words what is wrong and
what to do. Run it exactly as the training that does not work:

  kvcoll doctor                                  this machine: MPI, mpirun, limits, GPUs
  mpirun -n 4 python -m kvcoll doctor            and how its ranks reach each other, and how fast
  mpirun --hostfile hostfile -n 4 python -m kvcoll doctor
  srun --mpi=pmix python -m kvcoll doctor        in a SLURM job; pmi2 for MPICH

Rank 0 prints one page. A note is worth knowing; a problem makes jobs fail, hang, or run far too
slowly.

Exit code: 0 if there is no problem, 1 if there is one, 2 for a mistake in the command.
"""
_ENV = """\
Print versions and settings, to paste into a report of a bug. It starts no MPI, and shows of the
environment only what matters to a job.
"""
_BENCH = """\
Time push and pull over sizes, beside MPI_Allreduce by hand:

  mpirun -n 2 python -m kvcoll bench
  mpirun -n 2 python -m kvcoll bench --sizes 1000 25000000 --json

Medians over rounds, of the slowest rank. The checkout's scripts/bench.py compares with torch and
MXNet, too, and draws.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return the exit code."""
    arguments = _parse(sys.argv[1:] if argv is None else argv)
    if arguments.command == "env":
        return environment.report(as_json=arguments.json)
    if arguments.command == "bench":
        return bench.run(arguments.sizes, as_json=arguments.json)
    write = page.as_json if arguments.json else page.as_text

    def show(seen: Seen, found: list[Finding]) -> None:
        print(write(seen, found), flush=True)

    return supervise.examine(arguments.limit, quick=arguments.quick, show=show)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line; of several ranks the first one alone speaks."""
    parser = argparse.ArgumentParser("kvcoll", description=_DESCRIPTION)
    parser.add_argument("--version", action="version", version=f"kvcoll {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    doctor = _add(commands, "doctor", "find out why a job does not run, or runs slowly", _DOCTOR)
    doctor.add_argument(
        "--limit",
        type=_seconds,
        default=60.0,
        metavar="S",
        help="how many seconds to wait for a rank, or for any one step (default: 60)",
    )
    doctor.add_argument("--quick", action="store_true", help="leave out the push of 100 MB")
    _add(commands, "env", "print versions and settings for a report of a bug", _ENV)
    timed = _add(commands, "bench", "time push and pull beside MPI_Allreduce", _BENCH)
    timed.add_argument(
        "--sizes",
        type=_elements,
        nargs="+",
        default=bench.SIZES,
        metavar="N",
        help="float32 elements of a key (default: 1,000 to 10 million)",
    )
    with contextlib.ExitStack() as quiet:
        if place_in().rank:
            nowhere = quiet.enter_context(open(os.devnull, "w"))
            quiet.enter_context(contextlib.redirect_stdout(nowhere))
            quiet.enter_context(contextlib.redirect_stderr(nowhere))
        return parser.parse_args(argv)


def _add(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], name: str, help: str, text: str
) -> argparse.ArgumentParser:
    own = commands.add_parser(
        name, help=help, description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    own.add_argument("--json", action="store_true", help="print JSON, for machines")
    return own


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"a number of seconds above 0, got {text}")
    return value


def _elements(text: str) -> int:
    value = int(text.replace(",", "").replace("_", ""))
    if value < 1:
        raise argparse.ArgumentTypeError(f"a number of elements above 0, got {text}")
    return value
