"""Imports go one way, and the trainer needs torch, numpy and omegaconf only."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "olmo"

# Rooms that import nothing of ours, or only what is named.
LEAVES: dict[str, set[str]] = {
    "lazy": set(),
    "kinds": set(),
    "patterns": set(),
    "numbers": set(),
    "strict": {"resolvers", "urls"},
    # A bucket, to look into one where a config asks for its last checkpoint.
    "resolvers": {"bucket", "patterns"},
    "config": {"kinds", "strict"},
    "log": {"urls"},
    "plugin": set(),
    "process": set(),
    "io": {"sealed", "urls"},
    "bucket": {"io", "urls"},
    "lease": set(),
    "action": set(),
    "foreign": set(),
    "urls": set(),
    "sealed": set(),
    "store": {"action", "foreign", "lease", "sealed"},
    "naming": {"store", "lease", "sealed"},
}
# Rooms, and the rooms further along the one way that they must not know.
NEVER = {
    "data": {"model", "train", "checkpoint", "evaluate", "report", "run", "export"},
    "model": {
        "data",
        "train",
        "checkpoint",
        "evaluate",
        "report",
        "run",
        "export",
        "store",
        "stage",
    },
    "precision": {"data", "model", "train", "checkpoint", "evaluate", "report", "run", "export"},
    "checkpoint": {"evaluate", "report", "run", "export"},
    "train": {"report", "run", "export", "store", "stage"},
    "evaluate": {"report", "run", "export", "store", "stage"},
}


def imports(path: Path) -> set[str]:
    """The rooms of ours that a module imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("olmo.")}
    return found


def files(room: str) -> list[Path]:
    module = PACKAGE / f"{room}.py"
    return [module] if module.exists() else sorted((PACKAGE / room).rglob("*.py"))


@pytest.mark.parametrize("room", LEAVES)
def test_leaves_import_nothing_of_ours(room: str):
    assert {name for file in files(room) for name in imports(file)} <= LEAVES[room]


@pytest.mark.parametrize("room", NEVER)
def test_imports_go_one_way(room: str):
    assert files(room)
    for file in files(room):
        assert not imports(file) & NEVER[room], file


def test_the_model_has_no_word_of_how_it_is_spread():
    for file in files("model"):
        if file.name == "regroup.py":  # reads names that wrappers left in old checkpoints
            continue
        # FlexAttention is a kernel only where it is compiled by itself.
        text = file.read_text().lower().replace("torch.compile(flex_attention)", "")
        assert not re.findall(r"fsdp|distributed|torch\.compile\b", text), file


def test_the_trainer_needs_torch_numpy_and_omegaconf_only():
    """A GPU machine often has no more: everything else is as if it were not installed."""
    script = """
import importlib.metadata, pathlib, re, sys, sysconfig
packages, allowed, todo = set(), {"olmo", "setuptools"}, ["torch", "numpy", "omegaconf"]
while todo:
    name = re.split(r"[ ;<>=!~\\[(]", todo.pop())[0].lower()
    try:
        distribution = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        continue
    if name not in packages:
        packages.add(name)
        todo += distribution.requires or []
        allowed |= {file.parts[0].split(".")[0] for file in distribution.files}
for path in pathlib.Path(sysconfig.get_path("purelib")).iterdir():
    if (module := path.name.split(".")[0]).isidentifier() and module not in allowed:
        sys.modules[module] = None
assert sys.modules["snakemake"] is None
import olmo.train.loop, olmo.train.__main__, olmo.model, olmo.data, olmo.optim
import olmo.checkpoint.sharded
assert "polars" not in sys.modules or sys.modules["polars"] is None
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=PACKAGE.parent)
