#!/usr/bin/env bash
# Makes pretend hosts on this machine, which MPI and SLURM take for machines of their own.
set -euo pipefail

usage="Usage, as root:

  hosts.sh up [N]              make hosts kv1 to kvN (default: 2)
  hosts.sh on HOST COMMAND...  run a command there, in the folder it is called from
  hosts.sh rate HOST MBIT      limit the host's cable to MBIT Mbit/s each way; 0 takes the limit off
  hosts.sh cut HOST            pull the cable: every frame is lost, and nobody is told
  hosts.sh mend HOST           put it back
  hosts.sh bytes HOST          print how many bytes its network card has received and sent
  hosts.sh down                remove them
  hosts.sh hold [N]            as up, but only until standard input ends

Each host has its own network, host name, process table, IPC, /tmp, /run, /dev/shm and sshd, and a cable
to one switch. Other folders are common to them, as on a network file system. 'hostfile' (Open MPI) and
'machinefile' (MPICH) list them:

  hosts.sh up 2
  hosts.sh on kv1 mpirun --hostfile /var/tmp/kvcoll-cluster/hostfile -n 4 hostname

It needs the Debian packages iproute2 and openssh-server. Settings, all optional:

  KVCOLL_CLUSTER=FOLDER   where these hosts' files go (default: /var/tmp/kvcoll-cluster); hosts of another
                          folder are other hosts, whatever they are called
  KVCOLL_CLUSTER_SHARED='FOLDER...'   folders in /tmp that the hosts have in common (this checkout is one)
  KVCOLL_CLUSTER_SLOTS=2  the ranks a host takes, for the two lists
"

# All processes of the hosts live in one process table (that of 'lab'), so that nothing can be left behind:
# when its first process ends, for whatever reason, the kernel ends all others, and networks and mounts
# that nobody uses vanish.
state=${KVCOLL_CLUSTER:-/var/tmp/kvcoll-cluster}
checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd -P)
net=10.78.0

fail() {
    printf 'hosts.sh: %s\n' "$@" >&2
    exit 1
}

born() { # PID: when the process started; tells it from another one of the same number
    sed 's/.*) //' "/proc/$1/stat" 2>/dev/null | cut -d ' ' -f 20
}

lab_pid() {
    local pid since
    read -r pid since 2>/dev/null <"$state/lab" && [ "$(born "$pid")" = "$since" ] && echo "$pid"
}

host_pid() {
    lab_pid >/dev/null || fail "no hosts are up in $state: run hosts.sh up"
    [ -s "$state/$1.pid" ] || fail "there is no host '$1': hosts are $(seq -s ' ' -f 'kv%g' "$(<"$state/n")")"
    cat "$state/$1.pid"
}

on() {
    local pid
    pid=$(host_pid "$1")
    # env: a folder is entered by its name there; entered from here it would have no name.
    exec nsenter -t "$pid" --net --uts --ipc --mount --pid -- env --chdir="$PWD" "${@:2}"
}

on_switch() {
    nsenter -t "$(lab_pid)" --net -- "$@"
}

# What takes the place of files in the hosts' /etc, and the two lists of hosts.
write_settings() {
    local n=$1 slots=${KVCOLL_CLUSTER_SLOTS:-2} i
    echo "$n" >n
    echo "127.0.0.1 localhost" >hosts
    for ((i = 1; i <= n; i++)); do echo "$net.$i kv$i" >>hosts; done
    seq -f "kv%g slots=$slots" "$n" >hostfile
    seq -f "kv%g:$slots" "$n" >machinefile
    ssh-keygen -q -t ed25519 -N '' -f key
    cat >sshd_config <<END
HostKey $state/key
AuthorizedKeysFile $state/key.pub
PermitRootLogin prohibit-password
StrictModes no
UsePAM no
UseDNS no
PidFile none
MaxStartups 100
END
    cat >ssh_config <<END
IdentityFile $state/key
BatchMode yes
StrictHostKeyChecking no
UserKnownHostsFile /dev/null
LogLevel ERROR
END
}

# The first process of host NAME.
be_host() {
    local name=$1 address=$2 pid folder
    read -r pid _ </proc/self/stat # our number in the machine's process table, which /proc still shows
    hostname "$name"
    mount -t proc proc /proc
    mount -t sysfs sysfs /sys
    mount -t tmpfs tmpfs /dev/shm
    mount -t tmpfs tmpfs /run
    mkdir -p /run/sshd /run/tmp
    chmod 1777 /run/tmp
    for folder in "$checkout" "$state" ${KVCOLL_CLUSTER_SHARED-}; do
        [[ $folder/ != /tmp/* ]] || { mkdir -p "/run$folder" && mount --bind "$folder" "/run$folder"; }
    done
    mount --rbind /run/tmp /tmp
    mount --bind "$state/hosts" /etc/hosts
    mount --bind "$state/ssh_config" /etc/ssh/ssh_config
    ip link set lo up
    echo "$pid" >"$state/$name.pid"
    until ip addr add "$address/24" dev eth0 2>/dev/null; do sleep 0.02; done # the switch plugs it in
    ip link set eth0 up
    exec /usr/sbin/sshd -D -E "$state/$name.log" -f "$state/sshd_config"
}

# The first process of all, and the switch: makes the hosts, then waits.
be_lab() {
    local how=$1 n=$2 pid i
    read -r pid _ </proc/self/stat
    ip link add switch type bridge
    ip link set switch up
    for ((i = 1; i <= n; i++)); do
        unshare --net --uts --ipc --mount --pid --fork \
            bash "$0" be_host "kv$i" "$net.$i" </dev/null >"$state/kv$i.out" 2>&1 &
        wait_for test -s "$state/kv$i.pid"
        ip link add "kv$i" type veth peer name eth0 netns "$!"
        ip link set "kv$i" master switch up
    done
    echo "$pid $(born "$pid")" >"$state/lab"
    [ "$how" = hold ] || sleep infinity
    cat >/dev/null # until the input ends: by its owner's wish, or because the owner was killed
    kill -9 -1 2>/dev/null || true
    rm -rf "$state"
}

wait_for() {
    local i
    for ((i = 0; i < 500; i++)); do
        ! "$@" >/dev/null 2>&1 || return 0
        sleep 0.02
    done
    fail "this did not come true in 10 s: $*" "see the logs in $state"
}

check_needs() {
    local tool
    [ "$(id -u)" = 0 ] || fail "only root can make hosts"
    for tool in ip sshd ssh ssh-keygen unshare nsenter; do
        command -v "$tool" >/dev/null || [ -x "/usr/sbin/$tool" ] ||
            fail "there is no '$tool': apt-get install iproute2 openssh-server"
    done
}

remove_state() {
    [ ! -e "$state" ] || [ -e "$state/sshd_config" ] || rmdir "$state" 2>/dev/null ||
        fail "$state holds other things: set KVCOLL_CLUSTER to a folder that is not there yet"
    rm -rf "$state"
}

# up [N], hold [N]
start() {
    local how=$1 n=${2:-2} i
    check_needs
    [[ $n =~ ^[1-9]$ ]] || fail "N is the number of hosts, 1 to 9, got '$n'"
    if lab_pid >/dev/null; then
        [ "$how $(<"$state/n")" = "up $n" ] || fail "other hosts are up in $state: run hosts.sh down first"
        return 0
    fi
    remove_state
    mkdir -p "$(dirname "$state")" && mkdir "$state"
    (cd "$state" && write_settings "$n")
    setsid unshare --net --mount --pid --fork bash "$0" be_lab "$how" "$n" <&0 >"$state/out" 2>&1 &
    wait_for lab_pid
    for ((i = 1; i <= n; i++)); do
        wait_for bash "$0" on kv1 ssh "kv$i" true
    done
    echo "up: $(seq -s ' ' -f 'kv%g' "$n")"
    [ "$how" = up ] || wait
}

set_rate() {
    local host=$1 limit=(root tbf rate "$2mbit" burst 128kb latency 30ms)
    on_switch tc qdisc del dev "$host" root 2>/dev/null || true
    (on "$host" tc qdisc del dev eth0 root) 2>/dev/null || true
    [ "$2" -gt 0 ] || return 0
    on_switch tc qdisc add dev "$host" "${limit[@]}"
    (on "$host" tc qdisc add dev eth0 "${limit[@]}")
}

stop() {
    local pid
    ! pid=$(lab_pid) || kill -9 "$pid"
    remove_state
}

[[ $state == /* ]] || fail "KVCOLL_CLUSTER is a full path, got '$state'"
case ${1-}/$# in
    up/[12] | hold/[12]) start "$@" ;;
    down/1) stop ;;
    on/[!1] | on/??*) on "${@:2}" ;;
    rate/3) host_pid "$2" >/dev/null && set_rate "$2" "$3" ;;
    cut/2) host_pid "$2" >/dev/null && on_switch ip link set "$2" nomaster ;;
    mend/2) host_pid "$2" >/dev/null && on_switch ip link set "$2" master switch up ;;
    bytes/2) on "$2" cat /sys/class/net/eth0/statistics/{rx,tx}_bytes | paste -s ;;
    be_lab/3 | be_host/3) "$@" ;;
    --help/1 | -h/1) echo "$usage" ;;
    *) echo "$usage" >&2 && exit 2 ;;
esac
