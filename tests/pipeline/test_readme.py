"""The commands of README and guides exist: each is parsed, or planned, in a copy of the project."""

import re
import shlex
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from project import REPOSITORY

GUIDES = (
    "README.md",
    *(f"docs/{name}.md" for name in ("data", "ladder", "store", "training", "speed")),
)
COMMANDS = list(
    dict.fromkeys(
        line.split("#")[0].strip()
        for name in GUIDES
        for block in re.findall(r"```bash\n(.*?)```", (REPOSITORY / name).read_text(), re.DOTALL)
        for line in block.splitlines()
        if line.strip()
    )
)


def test_the_readme_has_commands():
    assert "pip install -q uv && uv run snakemake --cores 2 checkpoints/olmo-tiny/final" in COMMANDS
    assert "uv run pytest" in COMMANDS
    assert "uv run pytest" in (REPOSITORY / ".ci/run").read_text()


@pytest.mark.parametrize("command", [c for c in COMMANDS if "snakemake" in c])
def test_a_snakemake_command_can_be_planned(command: str, tmp_path: Path):
    for name in ("rules", "profiles", "envs", "config"):
        shutil.copytree(REPOSITORY / name, tmp_path / name)
    shutil.copy(REPOSITORY / "Snakefile", tmp_path)
    if "--extra slurm" in command and not find_spec("snakemake_executor_plugin_slurm"):
        pytest.skip("no executor plugin for SLURM; uv run --extra slurm pytest")
    if "novels" in command:  # as the README's command before made it
        (tmp_path / "texts").mkdir()
        for path in (REPOSITORY / "docs").glob("*.md"):
            shutil.copy(path, tmp_path / "texts")
        new = [sys.executable, "-m", "olmo.cli", "new", "novels", "texts"]
        subprocess.run(new, cwd=tmp_path, check=True)
    words = shlex.split(re.split(r"uv run (?:--extra slurm )?snakemake", command)[1])
    words += [] if "-n" in words else ["-n"]
    done = subprocess.run(
        [sys.executable, "-m", "snakemake", *words, "--cores", "2"]
        if "--cores" not in words
        else [sys.executable, "-m", "snakemake", *words],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert re.search(f"^{'bench_tps' if 'bench_tps' in command else 'train'} ", said, re.M)
    if "250m" in command:
        assert "known after its list" in said and re.search("^source_list ", said, re.M)


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("uv run olmo")])
def test_an_olmo_command_can_be_parsed(command: str):
    words = shlex.split(command)[3:]
    verb = words[:2] if words[0] in ("store", "checkpoint") else words[:1]
    done = subprocess.run(
        [sys.executable, "-m", "olmo.cli", *verb, "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for flag in (word for word in words if word.startswith("--")):
        assert flag in done.stdout
