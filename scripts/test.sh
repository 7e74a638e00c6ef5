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

What it runs is mpirun -n RANKS python -m pytest ..., and it prints that line.
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
counts=$(mktemp) || exit
trap 'rm -f "$counts"' EXIT
trap 'echo; echo "interrupted"; exit 130' INT TERM

passed=0 failed=0 skipped=0 worst=0 lines=()
for ranks in $all_ranks; do
    : >"$counts"
    began=$SECONDS
    printf '\n== %s rank(s) ==\n' "$ranks"
    KVCOLL_PRINT_COMMAND=yes KVCOLL_TEST_COUNTS=$counts kvcoll_time_limit_s=${KVCOLL_TEST_RUN_LIMIT_S:-600} \
        kvcoll_mpirun "$ranks" python -m pytest "${arguments[@]}"
    code=$?
    if ! read -r p f s <"$counts"; then
        p=0 f=1 s=0 # the run was aborted, and what it had counted is lost
        lines+=("$ranks rank(s): the run did not reach its end (exit code $code), $((SECONDS - began)) s")
    else
        [ "$code" -eq 0 ] || [ "$f" -gt 0 ] || f=1
        lines+=("$ranks rank(s): $p passed, $f failed, $s skipped, $((SECONDS - began)) s (exit code $code)")
    fi
    passed=$((passed + p)) failed=$((failed + f)) skipped=$((skipped + s))
    [ "$code" -eq 0 ] || worst=1
done

printf '\n== summary: %s, %s cores ==\n' "$kvcoll_mpi" "$kvcoll_cores"
printf '%s\n' "${lines[@]}"
echo "$passed passed, $failed failed$([ "$skipped" -eq 0 ] || echo ", $skipped skipped")"
exit "$worst"
