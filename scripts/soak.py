#!/usr/bin/env python3
"""Train under random faults for a time; fail on any hang, drift or loss.

    python scripts/soak.py --seconds 180                      # 4 ranks on 2 pretend hosts
    python scripts/soak.py --seed 7 --first 12 --rounds 1     # one round of a run again

Each round is a job of its own whose faults (`kvcoll.testing`) are drawn from the seed: ranks that
are late, stopped, killed, or raise, other shapes, pushes left out, flipped bits, a full disk, a
cut cable. It must end within its limit: at the values of an undisturbed run, bit for bit, be it
after a repair, a recovery or a step back; or with the named error that the docs promise, and then,
resumed from its checkpoint in a new job, at these values.

Exit codes: 0 all rounds are well; 1 some are not; 2 a wrong option.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

os.environ.setdefault("OMP_NUM_THREADS", "1")

import soak_rounds
from soak_rounds import Place, Round
from soak_world import CHECKOUT, Ended, World, world

_JOB: Final = CHECKOUT / "scripts" / "soak_job.py"
_LIMIT_S: Final = 60.0
_CUT_LIMIT_S: Final = 30.0
_STACKS_AT: Final = 0.8  # of its limit a rank shows where it is
_SHOWN_LINES: Final = 40
_SHOWN_LINES_OF_HUNG: Final = 400


def main() -> int:
    """Run rounds until the time is up; print a table."""
    args = parse_args()
    began = time.monotonic()
    with world(args.ranks, args.hosts) as (where, why_not):
        if why_not:
            print(f"soak.py: {why_not}", flush=True)
        place = Place(where.ranks, where.hosts, where.survives)
        kinds = [k for k in soak_rounds.possible(place) if not args.kinds or k in args.kinds]
        if not kinds:
            print("soak.py: error: none of these kinds can be here", file=sys.stderr)
            return 2
        print(f"{where.mpi}: {where.ranks} ranks, {where.hosts} host(s), seed {args.seed}")
        results: list[dict[str, Any]] = []
        while not is_over(args, len(results), time.monotonic() - began):
            results.append(run_round(args, where, place, kinds, args.first + len(results)))
    print(table(results))
    failed = [result for result in results if result["problem"]]
    if args.json is not None:
        about = {"seed": args.seed, "ranks": place.ranks, "hosts": place.hosts, "mpi": where.mpi}
        seconds = round(time.monotonic() - began, 1)
        written = {**about, "seconds": seconds, "failed": len(failed), "rounds": results}
        args.json.write_text(json.dumps(written, indent=1) + "\n")
    print(f"{len(results)} rounds, {len(failed)} of them not well")
    return 1 if failed else 0


def is_over(args: argparse.Namespace, n_rounds: int, gone_s: float) -> bool:
    """Say whether enough has been done; one round is made in any case."""
    if args.rounds is not None:
        return n_rounds >= int(args.rounds)
    return n_rounds > 0 and gone_s >= float(args.seconds)


def run_round(
    args: argparse.Namespace, where: World, place: Place, kinds: Sequence[str], number: int
) -> dict[str, Any]:
    """Run one round, and a job that resumes it if its job ends before its time."""
    # /var/tmp: pretend hosts have it in common.
    folder = Path(tempfile.mkdtemp(prefix="kvcoll-soak-round-", dir="/var/tmp"))
    round_ = soak_rounds.draw(args.seed, number, place, kinds, str(folder))
    expected = soak_rounds.undisturbed(round_.settings)
    job, reports = run_job(where, round_, 0)
    problem = "it hung" if job.hung else ""
    problem = problem or soak_rounds.problem(round_, reports, expected, is_well=job.code == 0)
    seconds, outcome = job.seconds, "done"
    if "a cable is cut" in round_.kind:
        where.mend()
    if not problem and any(report["end"] != "done" for report in reports or [{"end": ""}]):
        ended = [report["end"] for report in reports if report["end"] != "done"]
        outcome = f"{ended[0] if ended else 'killed'}, resumed"
        job, problem = resume(where, round_, expected)
        seconds += job.seconds
    elif any(report["errors"] for report in reports):
        outcome = f"done after {max((r['errors'] for r in reports), key=len)[0]}"
    if problem:
        outcome = f"FAILED: {problem}"
        shown = _SHOWN_LINES_OF_HUNG if job.hung else _SHOWN_LINES
        print("\n".join(job.output.splitlines()[-shown:]))
        print(f"round {number} is kept in {folder}; --seed {args.seed} --first {number} --rounds 1")
    else:
        shutil.rmtree(folder, ignore_errors=True)
    return told(round_, outcome, problem, seconds)


def told(round_: Round, outcome: str, problem: str, seconds: float) -> dict[str, Any]:
    """Print what came of a round, and give it for the file."""
    print(f"{round_.number:4} {seconds:5.1f} s  {round_.kind:18} {round_.store}")
    print(f"              {round_.faults or 'no faults'}\n              {outcome}", flush=True)
    return {
        "number": round_.number,
        "kind": round_.kind,
        "store": round_.store,
        "optimizer": round_.settings.optimizer["optimizer"],
        "faults": round_.faults,
        "outcome": outcome,
        "problem": problem,
        "seconds": round(seconds, 1),
    }


def resume(where: World, round_: Round, expected: str) -> tuple[Ended, str]:
    """Go on from the checkpoint in a new job without faults; say what is wrong with it."""
    calm = Round(round_.number, round_.kind, round_.settings, "", is_known=round_.is_known)
    job, reports = run_job(where, calm, 1)
    if job.hung:
        return job, "it hung once resumed"
    problem = soak_rounds.problem(calm, reports, expected, is_well=job.code == 0)
    return job, f"resumed: {problem}" if problem else ""


def run_job(where: World, round_: Round, launch: int) -> tuple[Ended, list[dict[str, Any]]]:
    """Run a job of a round; give what became of it, and what its ranks have seen."""
    folder = Path(round_.settings.folder)
    limit_s = _CUT_LIMIT_S if "cut=" in round_.faults else _LIMIT_S
    described = {"settings": asdict(round_.settings), "launch": launch, "resumes": launch > 0}
    file = folder / f"round-{launch}.json"
    file.write_text(json.dumps(described | {"stacks_after_s": _STACKS_AT * limit_s}))
    job = where.run(_JOB, file, limit_s=limit_s, faults=round_.faults, survives=round_.survives)
    reports = [json.loads(path.read_text()) for path in sorted(folder.glob(f"{launch}-*.json"))]
    return job, reports


def table(results: Sequence[dict[str, Any]]) -> str:
    """Write how many rounds there were of each kind, and how they ended."""
    lines = ["", f"{'kind':18}  rounds  failed  mean s  outcomes"]
    for kind in dict.fromkeys(result["kind"] for result in results):
        own = [result for result in results if result["kind"] == kind]
        failed = sum(bool(result["problem"]) for result in own)
        mean_s = sum(result["seconds"] for result in own) / len(own)
        outcomes = [result["outcome"].partition(":")[0] for result in own]
        shown = ", ".join(f"{outcomes.count(one)} {one}" for one in dict.fromkeys(outcomes))
        lines.append(f"{kind:18}  {len(own):6}  {failed:6}  {mean_s:6.1f}  {shown}")
    return "\n".join(lines)


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--seconds", type=float, default=180.0, help="begin no round after these (default: 180)")
    add("--seed", type=int, default=1, help="what is drawn follows from it (default: 1)")
    add("--ranks", type=int, default=4, help="of each job (default: 4)")
    add("--hosts", type=int, default=2, help="pretend hosts, which need root (default: 2)")
    add("--first", type=int, default=0, help="the number of the first round (default: 0)")
    add("--rounds", type=int, help="how many, whatever the time")
    add("--kinds", nargs="+", choices=list(soak_rounds.KINDS), metavar="KIND", help="these only")
    add("--json", type=Path, metavar="FILE", help="write the results of all rounds")
    args = parser.parse_args()
    if args.ranks < 1 or args.hosts < 1 or args.ranks < args.hosts:
        parser.error("there is at least one rank, and one a host")
    return args


if __name__ == "__main__":
    sys.exit(main())
