"""Imports go one way, and the trainer needs torch, numpy and omegaconf only."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "olmo"

# Packages and modules of olmo/, from those that know nothing of the others to those that know all.
# Each may import what is on a line above its own, and of its own line what stands before it.
# `commands` names functions of all packages as text, and imports none before it is called.
LAYERS = """
runtime io config
store cluster usage commands completion
model precision optim distributed
tokenizer data
checkpoint eval
train
bench corpus inspect report
certificate
pipeline
cli
"""
RANK = {name: number for number, name in enumerate(LAYERS.split())}
# OLMo's names for what lives elsewhere: nothing of ours imports them.
FACADES = ("compat", "")
# The trainer's side, which must not know that there is a store: it needs torch and numpy only.
WITHOUT_STORE = (
    "model",
    "precision",
    "optim",
    "distributed",
    "data",
    "checkpoint",
    "eval",
    "train",
)


def modules() -> dict[str, Path]:
    """`data.order` → its file, of all modules; a package goes by its own name."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(part for part in parts if part != "__init__")] = path
    return found


def imports(path: Path) -> set[str]:
    """The modules of ours that a module imports, wherever in it, by a string too: `data.order`."""
    known, found = modules(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name.removeprefix("olmo.") in known else node.module for name in whole]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            names = [one.value for one in node.args if isinstance(one, ast.Constant)]
        else:
            continue
        found |= {name.removeprefix("olmo.") for name in names if name.startswith("olmo.")}
    return found


def package(module: str) -> str:
    return module.split(".")[0]


def files(name: str) -> list[Path]:
    return [path for module, path in modules().items() if package(module) == name]


def test_every_package_has_its_place():
    assert {package(module) for module in modules()} == RANK.keys() | set(FACADES)


@pytest.mark.parametrize("name", RANK)
def test_imports_go_one_way(name: str):
    for file in files(name):
        above = {other for other in imports(file) if RANK.get(package(other), 99) > RANK[name]}
        assert not above, file


@pytest.mark.slow
def test_no_module_is_in_a_circle():
    """Nor inside a package; what is imported when it is called counts, too."""
    graph = {module: imports(path) & modules().keys() for module, path in modules().items()}
    left = {module: set(others) - {module} for module, others in graph.items() if module}
    while free := [module for module, others in left.items() if not others & left.keys()]:
        for module in free:
            del left[module]
    assert not left, {module: sorted(others & left.keys()) for module, others in left.items()}


@pytest.mark.parametrize("name", WITHOUT_STORE)
def test_the_trainer_knows_no_store(name: str):
    for file in files(name):
        assert not [other for other in imports(file) if package(other) in ("store", "cluster")], (
            file
        )


def test_the_model_has_no_word_of_how_it_is_spread():
    for file in files("model"):
        if file.name == "regroup.py":  # reads names that wrappers left in old checkpoints
            continue
        # FlexAttention is a kernel only where it is compiled by itself.
        text = file.read_text().lower().replace("torch.compile(flex_attention)", "")
        assert not re.findall(r"fsdp|distributed|torch\.compile\b", text), file


@pytest.mark.slow
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


def test_no_two_test_files_have_one_name():
    """pytest imports a test by its file's name alone, and leaves out the second of a name."""
    files = [path.name for path in Path(__file__).parents[1].rglob("test_*.py")]
    assert sorted(files) == sorted(set(files))
