"""A tutorial's commands, run as they are."""

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from project import REPOSITORY

TUTORIALS = REPOSITORY / "docs/tutorials"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.M | re.S)


def copy_repository(root: Path) -> Path:
    """The files of this repository in another folder."""
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
            # With its time, or snakemake would write the shared environment's file again.
            shutil.copy2(REPOSITORY / name, root / name)
    return root


def share_environments(root: Path) -> Path:
    """Let a copy use the environments that are built beside the repository's own."""
    (REPOSITORY / "environments").mkdir(exist_ok=True)
    (root / "environments").symlink_to(REPOSITORY / "environments")
    return root


def environment() -> dict[str, str]:
    """`uv run` finds the environment that these tests run in, and changes nothing of it."""
    found = {name: value for name, value in os.environ.items() if not name.startswith("OLMO_")}
    project = {"UV_PROJECT_ENVIRONMENT": str(REPOSITORY / ".venv"), "UV_NO_SYNC": "1"}
    return found | project | {"PYTHONPATH": str(REPOSITORY)}


def follow(tutorial: str, folder: Path, environment: Mapping[str, str]) -> None:
    """Run a tutorial's `bash` blocks in a folder. A `text` block is what the block before it
    prints: its lines in order, with … for anything. Others, as `console`, are not run.
    """
    blocks = BLOCK.findall((TUTORIALS / f"{tutorial}.md").read_text())
    printed = ""
    for language, text in blocks:
        if language == "text":
            lines = [re.escape(line.strip()).replace("…", ".*") for line in text.splitlines()]
            assert re.search(".*".join(lines), printed, re.S), (text, printed[-3000:])
        if language == "bash":
            done = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", text],
                cwd=folder,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=900,
            )
            printed = done.stdout
            assert done.returncode == 0, (text, printed[-3000:])
    assert "bash" in dict(blocks)
