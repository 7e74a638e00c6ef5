#!/usr/bin/env bash
# Trains on several ranks of this machine; sets up the environment first if that is not done yet.
set -uo pipefail

usage="Usage: scripts/train.sh [-n RANKS] [OPTIONS OF scripts/train.py...]

Trains the handwritten-digits network data-parallel on RANKS ranks (default: 2) of this machine.
The first run sets up a virtual environment; how to choose it stands in scripts/environment.sh.

  scripts/train.sh
  scripts/train.sh -n 4 --epochs 5 --optimizer adam
  scripts/train.sh -n 4 --elastic        # goes on with 3 if one is killed
  KVCOLL_MPI=mpich scripts/train.sh

What it runs is mpirun -n RANKS python scripts/train.py ..., and it prints that line.
"

ranks=2
if [ "${1-}" = -n ]; then
    ranks=${2-}
    shift $(($# < 2 ? $# : 2))
fi
if ! [[ $ranks =~ ^[1-9][0-9]*$ ]]; then
    echo "scripts/train.sh: -n takes a number of ranks, got '$ranks'" >&2
    exit 2
fi

# shellcheck source=scripts/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" || exit

program=$kvcoll_root/scripts/train.py
[ "$PWD" != "$kvcoll_root" ] || program=scripts/train.py
if [[ " $* " == *" --help "* || " $* " == *" -h "* ]]; then
    echo "$usage"
    exec python "$program" --help
fi
[[ " $* " != *" --elastic "* ]] || KVCOLL_ELASTIC=yes
KVCOLL_PRINT_COMMAND=yes kvcoll_mpirun "$ranks" python "$program" "$@"
