# Sourced by environment.sh and slurm.sh: how mpirun goes on when a rank is lost.
# shellcheck shell=bash

# Sets kvcoll_ft to the options with which mpirun goes on when a rank is lost, if KVCOLL_ELASTIC asks for it.
# Not without being asked: such a job no longer ends when a rank ends with an exit code and without MPI_Finalize.
_kvcoll_ft() {
    kvcoll_ft=()
    [ "${KVCOLL_ELASTIC-}" = yes ] || return 0
    if ! [[ $("${1:-mpirun}" --version 2>&1) =~ 'Open MPI) '([0-9]+) ]] || [ "${BASH_REMATCH[1]}" -lt 5 ]; then
        echo "kvcoll: this MPI cannot go on when a rank is lost (Open MPI 5 can): the job will end then." >&2
        return 0
    fi
    kvcoll_ft=(--with-ft ulfm)
    export OMPI_MCA_coll=${OMPI_MCA_coll:-^han} # han: wrong sums across hosts after a loss
}

# kvcoll_ended COMMAND...: runs it; where its exit code is 0, but rank 0 has not come to its end, returns 88. So it
# is when a whole host is lost: mpirun --with-ft ulfm ends with 0 then.
kvcoll_ended() {
    local code=0
    KVCOLL_ENDED_FILE=$(mktemp -p . .kvcoll-ended.XXXXXX) || return
    export KVCOLL_ENDED_FILE=$PWD/${KVCOLL_ENDED_FILE#./}
    "$@" || code=$?
    if [ "$code" -eq 0 ] && [ ! -s "$KVCOLL_ENDED_FILE" ]; then
        echo "kvcoll: the job has not come to its end: a host was lost. Go on from the last checkpoint (--resume)." >&2
        code=88
    fi
    rm -f "$KVCOLL_ENDED_FILE"
    return "$code"
}
