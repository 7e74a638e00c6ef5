# Sourced by the job scripts: finds Python and its MPI, and starts the ranks of a SLURM job.
# shellcheck shell=bash
#
# The Python is that of the environment that was active when the job was submitted, if it holds kvcoll and
# mpi4py; else, or if KVCOLL_MPI names an MPI, that of scripts/environment.sh (which makes it, if that has not
# been done on a login node).
#
# Settings, all optional; sbatch passes the environment on:
#   KVCOLL_LAUNCHER=srun|mpirun   who starts the ranks; mpirun does on the job's nodes, too. Default: srun for
#                                 Open MPI, where SLURM has PMIx; else mpirun
#   KVCOLL_MPI, KVCOLL_VENV       see scripts/environment.sh
#   KVCOLL_ELASTIC=yes            go on when a rank is lost; mpirun starts the ranks then, as srun would end them

# Not from this folder, where kvcoll is found by any Python, but by the programs in scripts/ it is not.
_kvcoll_find_python() {
    { [ -z "${KVCOLL_MPI-}" ] && (cd / && python -c 'import kvcoll, mpi4py') 2>/dev/null; } ||
        source scripts/environment.sh
}

# The name of the MPI that mpi4py loads, without starting it.
_kvcoll_mpi_name() {
    python -c 'import mpi4py
mpi4py.rc.initialize = False
from mpi4py import MPI
print(MPI.get_vendor()[0])'
}

# kvcoll_launch PROGRAM [ARGUMENT...]: runs it on all tasks of the job; returns its exit code. A SIGUSR1 that
# comes to this shell goes on to all ranks, and is remembered.
kvcoll_launch() {
    local name mpirun mpi_type=pmi2 launcher=${KVCOLL_LAUNCHER-} command started code looks= kvcoll_ft=()
    [[ " $* " != *" --elastic "* ]] || KVCOLL_ELASTIC=yes
    name=$(_kvcoll_mpi_name) || return
    [ "$name" != 'Open MPI' ] || mpi_type=pmix
    if [ -z "$launcher" ]; then
        launcher=mpirun
        [ "${KVCOLL_ELASTIC-}" = yes ] || [ "$mpi_type" != pmix ] || ! srun --mpi=list 2>&1 | grep -qw pmix || launcher=srun
    fi
    case $launcher in
        srun)
            # A rank that fails ends the job: else the others would wait for it until the time limit.
            command=(srun --kill-on-bad-exit=1 --mpi="$mpi_type")
            # PMI-2 carries 1,024 characters, and MPICH's addresses of UCX can be longer: then it aborts.
            [ "$mpi_type" != pmi2 ] || export MPIR_CVAR_CH4_NETMOD=${MPIR_CVAR_CH4_NETMOD:-ofi}
            ;;
        mpirun)
            mpirun=$(dirname "$(command -v python)")/mpirun
            [ -x "$mpirun" ] || mpirun=mpirun
            command=("$mpirun" -n "$SLURM_NTASKS")
            # Else each rank and all its threads were bound to one core.
            [ "$name" != 'Open MPI' ] || command+=(--bind-to none)
            _kvcoll_ft "$mpirun"
            command+=("${kvcoll_ft[@]}")
            [ ${#kvcoll_ft[@]} -eq 0 ] || looks=yes
            [ "$name" != 'Open MPI' ] || [ "${SLURM_NNODES:-1}" -eq 1 ] || looks=yes
            ;;
        *)
            echo "kvcoll: KVCOLL_LAUNCHER is '$launcher': set it to srun or mpirun" >&2
            return 2
            ;;
    esac
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
    export OPENBLAS_NUM_THREADS=${OPENBLAS_NUM_THREADS:-$OMP_NUM_THREADS}
    export OMPI_MCA_osc=${OMPI_MCA_osc:-^ucx} # ucx: one-sided calls abort where no fabric is
    export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # which srun does not take over from the job
    echo "+ ${command[*]} python $*"
    [ -z "$looks" ] || { _kvcoll_open_end && command+=(-x KVCOLL_ENDED_FILE); } || return
    kvcoll_was_asked=
    "${command[@]}" "$(command -v python)" "$@" & # beside this shell, which else would hear of no signal
    started=$!
    trap 'kvcoll_was_asked=yes; kill -USR1 "$started"' USR1
    while kill -0 "$started" 2>/dev/null; do # a wait ends with each signal
        wait "$started"
    done
    wait "$started"
    code=$?
    trap '' USR1
    [ -z "$looks" ] || { _kvcoll_close_end "$code" && code=0 || code=$?; }
    return "$code"
}

# kvcoll_end CODE: ends the job with the code of kvcoll_launch; or, if the program has stopped for a SIGUSR1
# (codes of programs that have come to their end, well or badly, are 0, 1 and 2), has SLURM queue it again.
kvcoll_end() {
    if [ -n "$kvcoll_was_asked" ] && [ "$1" -gt 2 ]; then
        echo "kvcoll: job $SLURM_JOB_ID stopped before its time limit: queued again"
        scontrol requeue "$SLURM_JOB_ID" && exit "$1"
        echo "kvcoll: SLURM does not queue it again (see above): sbatch it once more to go on" >&2
    fi
    exit "$1"
}

# shellcheck source=scripts/ft.sh
source scripts/ft.sh
_kvcoll_find_python
