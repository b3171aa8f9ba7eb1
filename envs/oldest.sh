#!/usr/bin/env bash
# Builds environments/torch-2.11 if it does not exist: the oldest supported torch, CUDA's build, with
# Python 3.12, as on GPU machines; all other packages as pinned. Prints the path of its Python:
#
#     python=$(bash envs/oldest.sh)
#     PATH=${python%/*}:$PATH "$python" -m pytest -m "not slow" tests/unit tests/golden
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$PWD/environments/torch-2.11
python=3.12
if command -v pyenv >/dev/null; then # uv does not see pyenv's Pythons unless one is selected
  python=$(ls -d "$(pyenv root)"/versions/3.12.*/bin/python 2>/dev/null | tail -n 1)
fi
uv venv --quiet --no-project --allow-existing --python "${python:-3.12}" "$folder" >&2 ||
  uv venv --quiet --no-project --allow-existing "$folder" >&2 # another Python if 3.12 is missing
uv export --quiet --all-groups --no-hashes --no-header --no-annotate --no-emit-project |
  grep -v -E '^(torch|triton|setuptools|nvidia-[a-z0-9-]+|cuda-[a-z]+)==' >"$folder/others.txt"
# From /, since this project's pins for its own torch would otherwise apply.
into() { (cd / && uv pip install --quiet --python "$folder/bin/python" "$@") >&2; }
into torch==2.11.0 -r "$folder/others.txt"
into --no-deps --editable "$PWD"
echo "$folder/bin/python"
