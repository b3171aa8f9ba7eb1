"""Rooms know only what stands left of them, and the trainer needs three packages."""

import ast
import functools
import subprocess
import sys
import tomllib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def imported(node: ast.AST) -> Iterator[str]:
    """What is imported of ours at a module's top, as dotted names."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ImportFrom) and (child.module or "").split(".")[0] == "olmo":
            yield from (f"{child.module}.{alias.name}" for alias in child.names)
        elif isinstance(child, ast.Import):
            yield from (a.name for a in child.names if a.name.startswith("olmo."))
        elif not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from imported(child)


@functools.cache
def rooms() -> dict[str, set[str]]:
    """For each module or package under olmo/ the others that it imports."""
    found: dict[str, set[str]] = defaultdict(set)
    for path in (ROOT / "olmo").rglob("*.py"):
        room = path.relative_to(ROOT / "olmo").with_suffix("").parts[0]
        others = {name.split(".")[1] for name in imported(ast.parse(path.read_text()))}
        found[room] |= others - {room, "lazy"}
    return found


@pytest.mark.parametrize(
    "room, may_know",
    [
        *((room, set()) for room in ("io", "log", "process", "bucket", "kinds", "lazy")),
        ("strict", set()),
        ("config", {"kinds", "strict"}),
        ("store", {"action", "lease"}),
        ("model", {"config"}),
        ("precision", {"config"}),
        ("checkpoint", {"config", "model", "io", "log", "bucket"}),
    ],
)
def test_a_room_knows_only_what_it_may(room: str, may_know: set[str]) -> None:
    assert rooms()[room] <= may_know


def test_data_knows_nothing_of_what_is_trained_on_it() -> None:
    assert not rooms()["data"] & {"model", "train", "checkpoint", "evaluate", "precision"}


def test_the_trainer_needs_torch_numpy_and_omegaconf() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = [d.split(">")[0].split("[")[0].strip() for d in project["dependencies"]]
    others = {name.replace("-", "_") for name in names} - {"torch", "numpy", "omegaconf"}
    program = f"import sys, olmo.train.loop; print({others} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
    assert done.stdout.decode().strip() == "set()"
