"""Every tutorial, literally: its commands in order, and that they print what it shows.

    uv run pytest -m long tests/tutorials -n 0

`bash` blocks are run in one copy of this repository, tutorial after tutorial, since later ones need
the run of the first. A `text` block is what the block before it prints: its lines in order, with …
for anything.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from project import REPOSITORY

pytestmark = [pytest.mark.slow, pytest.mark.long]
TUTORIALS = REPOSITORY / "docs/tutorials"
ORDER = ("first-run", "inspect", "share-a-store", "fine-tune-and-chat", "compare")
ALONE = ("your-own-folder", "benchmark")
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.M | re.S)


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of this repository, with its environments."""
    root = tmp_path_factory.mktemp("tutorial") / "olmo"
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (REPOSITORY / name).exists():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPOSITORY / name, root / name)
    (REPOSITORY / "environments").mkdir(exist_ok=True)
    (root / "environments").symlink_to(REPOSITORY / "environments")
    return root


def environment() -> dict[str, str]:
    """`uv run` finds the environment that these tests run in, and changes nothing of it."""
    found = {name: value for name, value in os.environ.items() if not name.startswith("OLMO_")}
    project = {"UV_PROJECT_ENVIRONMENT": str(REPOSITORY / ".venv"), "UV_NO_SYNC": "1"}
    return found | project | {"PYTHONPATH": str(REPOSITORY)}


def test_every_tutorial_is_here() -> None:
    assert {path.stem for path in TUTORIALS.glob("*.md")} == {*ORDER, *ALONE}


@pytest.mark.parametrize("name", [*ORDER, *ALONE])
def test_a_tutorial(name: str, copy: Path) -> None:
    blocks = BLOCK.findall((TUTORIALS / f"{name}.md").read_text())
    assert blocks and blocks[0][0] == "bash"
    printed = ""
    for language, text in blocks:
        if language == "text":
            lines = [re.escape(line.strip()).replace("…", ".*") for line in text.splitlines()]
            assert re.search(".*".join(lines), printed, re.S), (text, printed[-3000:])
            continue
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", text],
            cwd=copy,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=900,
        )
        printed = done.stdout
        assert done.returncode == 0, (text, printed[-3000:])
