#!/usr/bin/env bash
# A SLURM of one's own: two nodes on this machine, from Debian's slurm-wlm, for tests and for trying.
#
#   tests/slurm/up.sh FOLDER                  # without accounting: squeue
#   ACCOUNTING=1 tests/slurm/up.sh FOLDER     # with slurmdbd on a MariaDB of its own: sacct
#   . FOLDER/activate                         # what sbatch, squeue and snakemake then need
#   tests/slurm/down.sh FOLDER
#
# NODES=2, of each node CPUS (as many as the machine has) and GPUS=2 (pretended), and PORT=16800 (the
# first of NODES + 3) may be set; MACHINE, a command that runs another one as a machine of that name
# (MACHINE node1 slurmd …), too.
# Everything lives in FOLDER, munge's key and the database too; /etc is not touched, and no daemon
# of the system is used or needed. No cgroups either: a job that uses more memory than it asked
# for is found by the accounting plugin, which looks every two seconds (OverMemoryKill).
set -euo pipefail
folder=$(realpath -m "${1:?usage: up.sh FOLDER}")
NODES=${NODES:-2} GPUS=${GPUS:-2} PORT=${PORT:-16800} ACCOUNTING=${ACCOUNTING:-0}
CPUS=${CPUS:-$(env -u OMP_NUM_THREADS nproc)} # nproc alone says how many threads are wanted
export PATH=$PATH:/usr/sbin:/sbin SLURM_CONF=$folder/slurm.conf

needed="slurmctld slurmd munged"
[ "$ACCOUNTING" = 1 ] && needed="$needed slurmdbd mariadbd"
for program in $needed; do
  command -v "$program" >/dev/null || {
    echo "up.sh: found no $program; apt-get install slurm-wlm munge slurmdbd mariadb-server" >&2
    exit 69
  }
done
[ "$(id -u)" = 0 ] || { echo "up.sh: slurmd starts jobs as other users, which needs root" >&2; exit 69; }

# Without its file scontrol asks the network's name server for one, which may take minutes.
answers() { [ -s "$SLURM_CONF" ] && scontrol ping 2>/dev/null | grep -q " UP"; }
if ! answers && (: <"/dev/tcp/127.0.0.1/$PORT") 2>/dev/null; then
  echo "up.sh: port $PORT is taken, perhaps by another SLURM of this script; PORT=17000 up.sh …" >&2
  exit 1
fi

until_it_works() { # SECONDS COMMAND…
  local end=$((SECONDS + $1)); shift
  until "$@" >/dev/null 2>&1; do
    [ $SECONDS -lt $end ] || { echo "up.sh: not up in time: $*; see $folder/log" >&2; exit 1; }
    sleep 0.1
  done
}
detached() { setsid -f "$@" </dev/null >>"$folder/log/$1.log" 2>&1; }

mkdir -p "$folder"/{log,run,state,spool,munge}
chmod 755 "$folder"
chmod 700 "$folder/munge"

# munge: who a message is from. A daemon of our own, by a socket of our own.
[ -s "$folder/munge/key" ] || (umask 077; head -c 1024 /dev/urandom >"$folder/munge/key")
socket=$folder/run/munge.socket
munge -n -S "$socket" >/dev/null 2>&1 ||
  munged --force --socket="$socket" --key-file="$folder/munge/key" --seed-file="$folder/munge/seed" \
    --pid-file="$folder/run/munged.pid" --log-file="$folder/log/munged.log"
until_it_works 20 munge -n -S "$socket"

accounting="AccountingStorageType=accounting_storage/none"
if [ "$ACCOUNTING" = 1 ]; then
  accounting="AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=localhost
AccountingStoragePass=$socket
AccountingStoragePort=$((PORT + 1))
AccountingStorageEnforce=associations"
fi
memory=$(($(awk '/MemTotal/ {print $2}' /proc/meminfo) / 1024 * 9 / 10 / NODES))
# A GPU of SLURM's is a character device; any will do to be counted and handed out.
devices=(null zero full random urandom)
{
  for ((node = 1; node <= NODES; node++)); do
    for ((gpu = 0; gpu < GPUS; gpu++)); do
      echo "NodeName=node$node Name=gpu Type=pretended File=/dev/${devices[gpu]}"
    done
  done
} >"$folder/gres.conf"
{
  cat <<CONF
ClusterName=trial
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmctldPort=$PORT
AuthType=auth/munge
AuthInfo=socket=$socket
SlurmUser=root
SlurmdUser=root
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool/%n
SlurmctldPidFile=$folder/run/slurmctld.pid
SlurmdPidFile=$folder/run/slurmd-%n.pid
SlurmctldLogFile=$folder/log/slurmctld.log
SlurmdLogFile=$folder/log/slurmd-%n.log
MpiDefault=none
# No cgroups here: processes are found by their parents, memory by looking.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=2
JobAcctGatherParams=OverMemoryKill
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0,requeue_delay=1
KillWait=20
MinJobAge=600
SlurmctldTimeout=30
SlurmdTimeout=30
GresTypes=gpu
SlurmdParameters=config_overrides
$accounting
CONF
  for ((node = 1; node <= NODES; node++)); do
    echo "NodeName=node$node NodeHostname=$(hostname -s) NodeAddr=127.0.0.1 Port=$((PORT + 2 + node))" \
      "CPUs=$CPUS RealMemory=$memory Gres=gpu:pretended:$GPUS"
  done
  echo "PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1"
  echo "PartitionName=urgent Nodes=ALL MaxTime=INFINITE PriorityTier=2 PreemptMode=OFF"
} >"$SLURM_CONF"

if [ "$ACCOUNTING" = 1 ]; then
  mkdir -p "$folder/mysql"
  export MYSQL_UNIX_PORT=$folder/mysql/socket
  [ -d "$folder/mysql/mysql" ] || mariadb-install-db --no-defaults --user=root \
    --datadir="$folder/mysql" --auth-root-authentication-method=socket >"$folder/log/mysql.log" 2>&1
  sql() { mariadb --no-defaults --socket="$MYSQL_UNIX_PORT" -e "$1"; }
  sql "select 1" >/dev/null 2>&1 ||
    detached mariadbd --no-defaults --user=root --datadir="$folder/mysql" --skip-networking \
      --socket="$MYSQL_UNIX_PORT" --pid-file="$folder/run/mariadbd.pid" \
      --innodb-buffer-pool-size=64M --innodb-lock-wait-timeout=900
  until_it_works 60 sql "select 1"
  cat >"$folder/slurmdbd.conf" <<CONF
AuthType=auth/munge
AuthInfo=socket=$socket
DbdHost=localhost
DbdPort=$((PORT + 1))
SlurmUser=root
PidFile=$folder/run/slurmdbd.pid
LogFile=$folder/log/slurmdbd.log
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=slurm
CONF
  chmod 600 "$folder/slurmdbd.conf"
  sacctmgr -n list cluster >/dev/null 2>&1 || slurmdbd
  until_it_works 60 sacctmgr -n list cluster
  sacctmgr -i -Q add cluster trial >/dev/null || true
  sacctmgr -i -Q add account lab cluster=trial >/dev/null || true
  sacctmgr -i -Q add user "$(id -un)" account=lab >/dev/null || true
fi

answers || slurmctld
for ((node = 1; node <= NODES; node++)); do
  pgrep -F "$folder/run/slurmd-node$node.pid" >/dev/null 2>&1 || ${MACHINE:+"$MACHINE" "node$node"} slurmd -N "node$node"
done
all_idle() { [ "$(sinfo -h -N -p main -t idle,mix,alloc -o %N | wc -l)" = "$NODES" ]; }
until_it_works 60 all_idle

# The executor plugin takes SLURM_CONF out of a job's environment, and its commands would look
# in /etc. So they are told again.
mkdir -p "$folder/bin"
for command in srun scontrol; do
  real=$(PATH=${PATH//$folder\/bin:/} command -v $command)
  printf '#!/bin/sh\nSLURM_CONF=%s exec %s "$@"\n' "$SLURM_CONF" "$real" >"$folder/bin/$command"
  chmod 755 "$folder/bin/$command"
done
printf 'export SLURM_CONF=%s PATH=%s:$PATH\n' "$SLURM_CONF" "$folder/bin" >"$folder/activate"
sinfo -N -p main -o "%N %t %c %m %G"
