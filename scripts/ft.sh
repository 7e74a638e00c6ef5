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

# _kvcoll_open_end; CODE of what ran then; _kvcoll_close_end CODE: returns 88 in place of 0 if rank 0 has not come to
# its end meanwhile. So it is when a whole host is lost: Open MPI 5.0.11's mpirun often ends with 0 then, with
# --with-ft ulfm and without.
_kvcoll_open_end() {
    KVCOLL_ENDED_FILE=$(mktemp -p . .kvcoll-ended.XXXXXX) || return
    export KVCOLL_ENDED_FILE=$PWD/${KVCOLL_ENDED_FILE#./}
}

_kvcoll_close_end() {
    local code=$1
    if [ "$code" -eq 0 ] && [ ! -s "$KVCOLL_ENDED_FILE" ]; then
        echo "kvcoll: the job has not come to its end: a host was lost. Go on from the last checkpoint (--resume)." >&2
        code=88
    fi
    rm -f "$KVCOLL_ENDED_FILE"
    return "$code"
}
