#!/usr/bin/env bash
# An environment with the oldest torch that we claim, and the Python that GPU machines have today; all
# else as it is pinned. Prints its Python:
#
#     "$(bash envs/oldest.sh)" -m pytest -m "not slow" tests/unit tests/golden
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$PWD/environments/torch-2.11
python=3.12
if command -v pyenv >/dev/null; then # whose Pythons uv does not see unless they are chosen
  python=$(ls -d "$(pyenv root)"/versions/3.12.*/bin/python 2>/dev/null | tail -n 1)
fi
uv venv --quiet --no-project --allow-existing --python "${python:-3.12}" "$folder" >&2
uv export --quiet --all-groups --no-hashes --no-header --no-annotate --no-emit-project |
  grep -v -E '^(torch|triton|setuptools|nvidia-[a-z0-9-]+|cuda-[a-z]+)==' >"$folder/others.txt"
# From elsewhere, since what this project pins for its own torch would hold here too.
(cd / && uv pip install --quiet --python "$folder/bin/python" torch==2.11.0 -r "$folder/others.txt") >&2
echo "$folder/bin/python"
