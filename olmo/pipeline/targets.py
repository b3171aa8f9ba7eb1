"""Targets of snakemake: what to type for a checkpoint, an export, an evaluation, a data set."""

import difflib
from pathlib import Path

from olmo.config import read_yaml


def describe_unknown_target(asked: str) -> str:
    """What to type in place of a target that no rule makes."""
    if near := find_nearest_target(asked):
        return f"no rule makes {asked}; the target is {near}"
    return (
        f"no rule makes {asked}; targets are checkpoints/<run>/final, hf/<run>, eval/<run> and "
        "data/<dataset>/statistics.txt, with the runs of config/config.yaml: "
        f"{', '.join(list_runs())}"
    )


def find_nearest_target(asked: str) -> str | None:
    """The target that was probably meant: of the run or data set whose name is in it, or nearly.

    None if there is no such name.
    """
    parts = asked.strip("/").split("/")
    kind = parts[0]
    by_name = {name: f"data/{name}/statistics.txt" for name in list_datasets()}
    for run in list_runs():
        by_name[run] = f"{kind}/{run}" if kind in ("hf", "eval") else f"checkpoints/{run}/final"
    if kind == "data":
        by_name |= {name: f"data/{name}/statistics.txt" for name in list_datasets()}
    for part in reversed(parts):
        for name in difflib.get_close_matches(part, by_name, 1, 0.75):
            if by_name[name] != asked:
                return by_name[name]
    return None


def list_runs() -> list[str]:
    """The runs and soups of config/config.yaml."""
    config = read_yaml("config/config.yaml")
    return [*(config.get("runs") or {}), *(config.get("soups") or {})]


def list_datasets() -> list[str]:
    """The data sets that have a recipe."""
    return sorted(path.stem for path in Path("config/data").glob("*.yaml"))
