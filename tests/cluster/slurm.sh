#!/usr/bin/env bash
# Runs a real SLURM (munge, slurmctld, a slurmd each) on the pretend hosts of hosts.sh, without systemd.
set -euo pipefail

usage="Usage, as root, once hosts.sh has made hosts kv1 to kvN:

  slurm.sh up                  start it: the controller on kv1, nodes kv1 to kvN
  slurm.sh on HOST COMMAND...  run a command on a host, with SLURM's settings
  slurm.sh down                stop it (hosts.sh down does, too)

  slurm.sh on kv1 sbatch --wait scripts/train.sbatch

It needs the Debian packages slurm-wlm, munge and libpmix-dev (srun --mpi=pmix opens its libpmix.so).
Its files are in the folder 'slurm' of that of the hosts. Settings, all optional:

  KVCOLL_CLUSTER=FOLDER        whose hosts (see hosts.sh)
  KVCOLL_CLUSTER_CPUS=2        the cores of a node, and its GPUs: SLURM takes these words for it,
  KVCOLL_CLUSTER_GPUS=0        whatever the machine has
"

cluster=${KVCOLL_CLUSTER:-/var/tmp/kvcoll-cluster}
run=$cluster/slurm
hosts=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)/hosts.sh

fail() {
    printf 'slurm.sh: %s\n' "$@" >&2
    exit 1
}

at() {
    "$hosts" on "$1" SLURM_CONF="$run/slurm.conf" "${@:2}"
}

write_settings() {
    local n=$1 gpus=${KVCOLL_CLUSTER_GPUS:-0} i
    mkdir -p "$run"/{state,log}
    # linuxproc and task/none: pretend hosts have no cgroups of their own. cred_expire is also how long a
    # job that is queued again must wait.
    cat >"$run/slurm.conf" <<END
ClusterName=kvcoll
SlurmctldHost=kv1
SlurmUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$run/munge.sock,cred_expire=5
StateSaveLocation=$run/state
SlurmdSpoolDir=$run/spool-%n
SlurmctldPidFile=$run/slurmctld.pid
SlurmdPidFile=$run/slurmd-%n.pid
SlurmctldLogFile=$run/log/slurmctld.log
SlurmdLogFile=$run/log/slurmd-%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_interval=1
ReturnToService=2
KillWait=2
MpiDefault=none
GresTypes=gpu
NodeName=kv[1-$n] CPUs=${KVCOLL_CLUSTER_CPUS:-2} Gres=gpu:$gpus State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
END
    echo "CgroupPlugin=cgroup/v1" >"$run/cgroup.conf" # not used, but autodetection wants /sys/fs/cgroup
    : >"$run/gres.conf"
    for ((i = 0; i < gpus; i++)); do # a GPU is a file to SLURM
        : >"$run/gpu$i"
        echo "Name=gpu File=$run/gpu$i" >>"$run/gres.conf"
    done
    [ -s "$run/munge.key" ] || (umask 077 && head -c 128 /dev/urandom >"$run/munge.key")
}

# HOST DAEMON PIDFILE: pid files hold numbers of the host's own process table.
runs() {
    local pid
    pid=$(cat "$3" 2>/dev/null) && [ "$("$hosts" on "$1" cat "/proc/$pid/comm" 2>/dev/null)" = "$2" ]
}

start() {
    local n i tool
    for tool in munged slurmctld slurmd srun sbatch; do
        command -v "$tool" >/dev/null || [ -x "/usr/sbin/$tool" ] ||
            fail "there is no '$tool': apt-get install slurm-wlm munge libpmix-dev"
    done
    "$hosts" on kv1 true
    n=$(<"$cluster/n")
    write_settings "$n"
    # One munged serves all hosts: its socket is a file, and files they have in common.
    runs kv1 munged "$run/munged.pid" ||
        at kv1 munged --force --num-threads=2 --key-file="$run/munge.key" --socket="$run/munge.sock" \
            --pid-file="$run/munged.pid" --log-file="$run/log/munged.log" --seed-file="$run/munge.seed"
    runs kv1 slurmctld "$run/slurmctld.pid" || at kv1 slurmctld -c
    for ((i = 1; i <= n; i++)); do
        mkdir -p "$run/spool-kv$i"
        runs "kv$i" slurmd "$run/slurmd-kv$i.pid" || at "kv$i" slurmd -N "kv$i"
    done
    for ((i = 0; i < 200; i++)); do # a state such as 'idle*' is that of a node that does not answer
        [ "$(at kv1 sinfo -h -N -o %t 2>/dev/null | grep -cxE 'idle|mix|alloc')" != "$n" ] || {
            echo "up: $n nodes; export SLURM_CONF=$run/slurm.conf"
            return
        }
        sleep 0.1
    done
    fail "the nodes did not come up: see $run/log"
}

# HOST DAEMON PIDFILE
stop_one() {
    local pid i
    runs "$@" && pid=$(cat "$3") || return 0
    at "$1" kill "$pid"
    for ((i = 0; i < 100; i++)); do
        runs "$@" || return 0
        sleep 0.1
    done
    at "$1" kill -9 "$pid"
}

stop() {
    local n i
    [ -d "$run" ] || return 0
    n=$(<"$cluster/n")
    at kv1 timeout 5 scancel --user=root 2>/dev/null || true
    for ((i = 1; i <= n; i++)); do
        stop_one "kv$i" slurmd "$run/slurmd-kv$i.pid" &
    done
    stop_one kv1 slurmctld "$run/slurmctld.pid"
    wait
    stop_one kv1 munged "$run/munged.pid"
    rm -rf "$run"
}

case ${1-}/$# in
    up/1) start ;;
    down/1) stop ;;
    on/[!12] | on/??*) at "${@:2}" ;;
    --help/1 | -h/1) echo "$usage" ;;
    *) echo "$usage" >&2 && exit 2 ;;
esac
