"""Write every version that uv resolves into pyproject.toml, or check that it is there.

    uv run python envs/pin.py             # after changing a dependency
    uv run python envs/pin.py --upgrade   # take the newest versions
    uv run python envs/pin.py --check     # what CI runs

uv.lock contains these versions too, but it names the host of each package, and hosts differ between
machines. So the versions are in `[tool.uv] constraint-dependencies`, where
`uv run` finds them on a fresh clone.
"""

import argparse
import re
import subprocess
import sys
from pathlib import Path

import uv

PROJECT = Path(__file__).parent.parent / "pyproject.toml"
BLOCK = re.compile(r"^constraint-dependencies = \[\n(.*?)^\]\n", re.MULTILINE | re.DOTALL)


def resolved() -> list[str]:
    """`name==version ; marker` of everything that the project, its groups and extras need."""
    only_versions = ["--no-hashes", "--no-header", "--no-annotate", "--no-emit-project", "--quiet"]
    export = subprocess.run(
        [uv.find_uv_bin(), "export", "--all-groups", "--all-extras", *only_versions],
        cwd=PROJECT.parent,
        check=True,
        capture_output=True,
        text=True,
    )
    return sorted(line for line in export.stdout.splitlines() if line and line[0] != "#")


def block(lines: list[str]) -> str:
    return "constraint-dependencies = [\n" + "".join(f'    "{line}",\n' for line in lines) + "]\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--upgrade", action="store_true")
    options = parser.parse_args()
    text = PROJECT.read_text()
    if options.upgrade:
        PROJECT.write_text(BLOCK.sub(block([]), text))
        subprocess.run([uv.find_uv_bin(), "lock", "--upgrade"], cwd=PROJECT.parent, check=True)
    pinned = BLOCK.sub(lambda _: block(resolved()), text)
    if options.check and pinned != text:
        found, wanted = (set(BLOCK.search(t)[1].splitlines()) for t in (text, pinned))
        sys.exit(
            "pyproject.toml is not what uv resolves; run: uv run python envs/pin.py\n"
            + "\n".join([*sorted(f"- {x}" for x in found - wanted)])
            + "\n".join(sorted(f"+ {x}" for x in wanted - found))
        )
    PROJECT.write_text(pinned)


if __name__ == "__main__":
    main()
