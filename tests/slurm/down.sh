#!/usr/bin/env bash
# Ends what up.sh started in FOLDER: its jobs, then each daemon by the number in its pid file.
#
#   tests/slurm/down.sh FOLDER
set -uo pipefail
folder=$(realpath -m "${1:?usage: down.sh FOLDER}")
export SLURM_CONF=$folder/slurm.conf
if [ -s "$SLURM_CONF" ] && scontrol ping 2>/dev/null | grep -q " UP"; then
  scancel --user="$(id -un)"
  for _ in $(seq 100); do
    [ -z "$(squeue -h 2>/dev/null)" ] && break
    sleep 0.2
  done
fi
for name in "$folder"/run/slurmd-*.pid slurmctld.pid slurmdbd.pid mariadbd.pid munged.pid; do
  file=$folder/run/${name##*/}
  [ -s "$file" ] || continue
  pid=$(cat "$file")
  kill "$pid" 2>/dev/null || continue
  for _ in $(seq 300); do
    kill -0 "$pid" 2>/dev/null || break
    sleep 0.1
  done
  kill -KILL "$pid" 2>/dev/null && echo "down.sh: ${name##*/} did not end by itself" >&2
done
exit 0
