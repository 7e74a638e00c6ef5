#!/usr/bin/env bash
# Runs the whole suite at several numbers of ranks, goes on after a failure, and sums up.
set -uo pipefail

usage="Usage: scripts/test.sh [-n 'RANKS...'] [OPTIONS AND FILES OF PYTEST...]

Runs the tests at 1, 2, 3 and 4 ranks of this machine, or at those that -n gives.
The first run sets up a virtual environment; how to choose it stands in scripts/environment.sh.

  scripts/test.sh
  scripts/test.sh -n '2 3' -x tests/test_store.py
  KVCOLL_MPI=mpich scripts/test.sh

Tests that take some seconds each (marked long: training runs, checkpoints under a kill, the
doctor) are left out, unless KVCOLL_LONG_TESTS=yes.

What it runs is mpirun -n RANKS python -m pytest ..., and it prints that line. At 1 rank two of them run at
once, as tests which start jobs of their own or sleep (marked jobs, waits) wait most of the time; their run may
go on beside the next one.
A run of one number of ranks is ended after KVCOLL_TEST_RUN_LIMIT_S seconds (default: 600).
"

all_ranks="1 2 3 4"
case ${1-} in
    -n)
        all_ranks=${2-}
        shift $(($# < 2 ? $# : 2))
        ;;
    --help | -h)
        echo "$usage"
        exit
        ;;
esac
if ! [[ $all_ranks =~ ^[\ ]*[1-9][0-9]*([\ ]+[1-9][0-9]*)*[\ ]*$ ]]; then
    echo "scripts/test.sh: -n takes numbers of ranks, such as '1 2', got '$all_ranks'" >&2
    exit 2
fi

# shellcheck source=scripts/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" || exit

# pytest finds its settings in the repository; paths may be given from the caller's folder too.
arguments=()
[ "${KVCOLL_LONG_TESTS-}" = yes ] || arguments+=(-m "not long")
for argument in "$@"; do
    [ "$PWD" = "$kvcoll_root" ] || [ ! -e "${argument%%::*}" ] || argument=$PWD/$argument
    arguments+=("$argument")
done
cd "$kvcoll_root" || exit
results=$(mktemp -d) || exit
trap 'rm -rf "$results"' EXIT
beside='' # the process that runs tests beside this one

end_beside() {
    [ -z "$beside" ] || kill "$(cat "/proc/$beside/task/$beside/children")" 2>/dev/null
}
trap 'echo; echo "interrupted"; end_beside; exit 130' INT TERM

passed=0 failed=0 skipped=0 worst=0 lines=()

# RANKS COUNTS PYTEST-ARGUMENT...
run() {
    local ranks=$1 counts=$2
    KVCOLL_PRINT_COMMAND=yes KVCOLL_TEST_COUNTS=$counts kvcoll_time_limit_s=${KVCOLL_TEST_RUN_LIMIT_S:-600} \
        kvcoll_mpirun "$ranks" python -m pytest "${@:3}" "${arguments[@]}"
}

# HEADING CODE SECONDS COUNTS: adds up what a run has left.
add_up() {
    local p f s
    if ! read -r p f s <"$4"; then
        p=0 f=1 s=0 # the run was aborted, and what it had counted is lost
        lines+=("$1: the run did not reach its end (exit code $2), $3 s")
    else
        [ "$2" -eq 0 ] || [ "$f" -gt 0 ] || f=1
        lines+=("$1: $p passed, $f failed, $s skipped, $3 s (exit code $2)")
    fi
    passed=$((passed + p)) failed=$((failed + f)) skipped=$((skipped + s))
    [ "$2" -eq 0 ] || worst=1
}

# Their own cache: two runs that end together would overwrite each other's list of failures.
run_jobs_tests() {
    trap - INT # which a shell has what runs beside it ignore, and tests with it
    KVCOLL_TEST_PART=aside run 1 "$results/jobs" -o cache_dir=.pytest_cache/jobs
    echo "$? $SECONDS" >"$results/jobs-ended"
}

# They end while the next run goes on, if there is one.
end_jobs_tests() {
    local code ended
    [ -n "$beside" ] || return 0
    wait "$beside"
    beside=
    printf '\n== 1 rank, tests that start jobs of their own ==\n'
    cat "$results/said"
    read -r code ended <"$results/jobs-ended"
    add_up "1 rank(s), with jobs of their own" "$code" $((ended - jobs_began)) "$results/jobs"
}

for ranks in $all_ranks; do
    : >"$results/counts"
    began=$SECONDS
    printf '\n== %s rank(s) ==\n' "$ranks"
    if [ "$ranks" -gt 1 ]; then
        run "$ranks" "$results/counts"
        add_up "$ranks rank(s)" $? $((SECONDS - began)) "$results/counts"
        end_jobs_tests
        continue
    fi
    end_jobs_tests # of another '1' in what -n gives
    : >"$results/jobs"
    jobs_began=$began
    run_jobs_tests </dev/null >"$results/said" 2>&1 &
    beside=$!
    KVCOLL_TEST_PART=others run 1 "$results/counts"
    add_up "1 rank(s)" $? $((SECONDS - began)) "$results/counts"
done
end_jobs_tests

printf '\n== summary: %s, %s cores ==\n' "$kvcoll_mpi" "$kvcoll_cores"
printf '%s\n' "${lines[@]}"
echo "$passed passed, $failed failed$([ "$skipped" -eq 0 ] || echo ", $skipped skipped")"
exit "$worst"
