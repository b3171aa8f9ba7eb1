#!/usr/bin/env bash
# Builds environments/torch-2.11, or finds it: the oldest torch that we claim, CUDA's build, with
# Python 3.12, as GPU machines have it; all else as it is pinned. Prints the path of its Python:
#
#     python=$(bash envs/oldest.sh)
#     PATH=${python%/*}:$PATH "$python" -m pytest -m "not slow" tests/unit tests/golden
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$PWD/environments/torch-2.11
python=3.12
if command -v pyenv >/dev/null; then # whose Pythons uv does not see unless they are chosen
  python=$(ls -d "$(pyenv root)"/versions/3.12.*/bin/python 2>/dev/null | tail -n 1)
fi
uv venv --quiet --no-project --allow-existing --python "${python:-3.12}" "$folder" >&2 ||
  uv venv --quiet --no-project --allow-existing "$folder" >&2 # another Python, where that is missing
uv export --quiet --all-groups --no-hashes --no-header --no-annotate --no-emit-project |
  grep -v -E '^(torch|triton|setuptools|nvidia-[a-z0-9-]+|cuda-[a-z]+)==' >"$folder/others.txt"
# From elsewhere, since what this project pins for its own torch would hold here too.
into() { (cd / && uv pip install --quiet --python "$folder/bin/python" "$@") >&2; }
into torch==2.11.0 -r "$folder/others.txt"
into --no-deps --editable "$PWD"
echo "$folder/bin/python"
