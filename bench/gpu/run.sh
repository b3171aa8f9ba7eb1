#!/usr/bin/env bash
# Runs all measurements of a GPU, the most valuable first, into one tar:
#
#     bash bench/gpu/run.sh OUT.tar [--budget-s 570] [--carry FOLDER] [--part NAME]…
#
# Needs a python3 (or $PYTHON) with torch and numpy. omegaconf, and AI2's sources for the part `peer`,
# may be in FOLDER: bash bench/gpu/pack.sh FOLDER downloads them. Without a GPU it runs a tiny matrix.
# Whenever it ends or is killed, OUT.tar holds every finished record; draw.py draws it.
set -euo pipefail
export OLMO_GPU_BEGAN=$(date +%s) # the budget includes the imports
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
carry=
for word in "$@"; do
  [ "${before:-}" = --carry ] && carry=$(cd "$word" && pwd)
  before=$word
done
export PYTHONPATH=$here/../..${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
python=${PYTHON:-python3}
if ! "$python" -c 'import omegaconf' 2>/dev/null; then
  wheel=$(ls "$carry"/omegaconf-*.whl 2>/dev/null | head -n 1) || true
  if [ -z "$wheel" ]; then
    echo "omegaconf is missing: bash bench/gpu/pack.sh FOLDER, then --carry FOLDER" >&2
    exit 2
  fi
  export PYTHONPATH=$PYTHONPATH:$wheel # a pure Python wheel can be imported without installing
fi
exec "$python" "$here/run.py" "$@"
