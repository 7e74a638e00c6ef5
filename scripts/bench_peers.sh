#!/usr/bin/env bash
# Makes the environments of the programs that scripts/bench.py compares kvcoll with.
set -uo pipefail

usage="Usage: scripts/bench_peers.sh FOLDER

Makes FOLDER/torch (torch 2.13.0, a CPU build) and FOLDER/mxnet (MXNet 1.9.1), each a virtual
environment of its own, and says how to name them to the benchmark. What is there is kept.

  PYTHON=PROGRAM     the Python to make them with, 3.10 or 3.11 (MXNet 1.9.1 needs NumPy 1.23.5,
                     which later ones cannot run; default: python3.11, python3.10 or python3)
"

fail() {
    printf 'bench_peers.sh: %s\n' "$@" >&2
    exit 1
}

# is_fit PROGRAM: says whether both peers can be installed for this Python.
is_fit() {
    "$1" -c 'import sys, venv, ensurepip; sys.exit(not (3, 10) <= sys.version_info < (3, 12))' 2>/dev/null
}

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3.11 python3.10 python3}; do
        is_fit "$candidate" && echo "$candidate" && return
    done
    fail "no Python 3.10 or 3.11 with venv and ensurepip was found: install one, or set PYTHON."
}

# make NAME TEST CURE PIP_ARGUMENT...: an environment in which the program TEST runs.
make() {
    local venv=$folder/$1 test=$2 cure=$3
    shift 3
    if "$venv/bin/python" -c "$test" 2>/dev/null; then
        echo "$venv is there."
        return
    fi
    "$python" -m venv --clear "$venv" || fail "cannot make $venv."
    "$venv/bin/python" -m pip install -qq --retries 1 --disable-pip-version-check --no-input \
        "$@" || fail "pip install $* failed; what it said is above. $cure"
    "$venv/bin/python" -c "$test" || fail "what was installed in $venv does not work. $cure"
    echo "$venv is made."
}

case ${1-} in
    '' | -*)
        echo "$usage"
        [[ ${1-} == -h || ${1-} == --help ]]
        exit
        ;;
esac
mkdir -p "$1" && folder=$(cd "$1" && pwd -P) || fail "cannot make the folder $1."
python=$(find_python) || exit

make torch 'import torch.distributed as d; assert d.is_gloo_available()' \
    'A CPU build of torch 2.13.0 is at https://download.pytorch.org/whl/cpu, or name a folder with its wheel in PIP_FIND_LINKS.' \
    'torch==2.13.0+cpu' numpy --find-links https://download.pytorch.org/whl/cpu/torch/
make mxnet 'import threading; threading.Thread.isAlive = threading.Thread.is_alive; import mxnet' \
    'MXNet 1.9.1 is on PyPI as a wheel for Linux on x86-64 alone.' \
    'mxnet==1.9.1' 'numpy==1.23.5'

echo
echo "mpirun -np 2 python scripts/bench.py --torch $folder/torch/bin/python --mxnet $folder/mxnet/bin/python"
