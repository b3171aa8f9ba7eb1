"""Targets of snakemake: what to type for a checkpoint, an export, an evaluation, a data set."""

import difflib
import re
from collections.abc import Iterable
from pathlib import Path

from olmo.config import list_runs, list_shown_runs, read_project_config

OF_RUNS = ("hf", "eval", "certificate")  # folders with one for each run
WITHOUT_NAMES = ("bench_tps", "bench_loss", "eval")  # targets of the project, not of a run


def describe_unknown_target(asked: str) -> str:
    """What to type in place of a target that no rule makes."""
    if near := find_nearest_target(asked):
        return f"no rule makes {asked}; the target is {near}"
    return (
        f"no rule makes {asked}; targets are checkpoints/<run>/final, hf/<run>, eval/<run>, "
        "certificate/<run>, data/<dataset>/statistics.txt, ladder/<ladder>/prediction.md, "
        f"{', '.join(WITHOUT_NAMES)}, with the runs of "
        f"config/config.yaml: {', '.join(list_shown_runs())}"
    )


def find_nearest_target(asked: str) -> str | None:
    """The target that was probably meant: of the run or data set whose name is in it, or nearly.

    None if there is no such name.
    """
    if near := difflib.get_close_matches(asked, WITHOUT_NAMES, 1, 0.75):
        return near[0]
    parts = asked.strip("/").split("/")
    kind = next(iter(difflib.get_close_matches(parts[0], OF_RUNS, 1, 0.75)), parts[0])
    by_name = {name: f"data/{name}/statistics.txt" for name in list_datasets()}
    for run in list_runs():
        by_name[run] = f"{kind}/{run}" if kind in OF_RUNS else f"checkpoints/{run}/final"
    if kind == "data":
        by_name |= {name: f"data/{name}/statistics.txt" for name in list_datasets()}
    if kind == "ladder":
        ladders = read_project_config().get("ladders") or {}
        by_name = {name: f"ladder/{name}/prediction.md" for name in ladders}
    for part in reversed(parts):
        for name in difflib.get_close_matches(part, by_name, 1, 0.75):
            if by_name[name] != asked:
                return by_name[name]
    return None


def suggest_name(name: str, known: Iterable[str], otherwise: str) -> str:
    """What to do about a name that is unknown: take the nearest, or else `otherwise`.

    >>> suggest_name("smal", ["small", "large"], "write it")
    "the nearest is 'small'"
    """
    near = difflib.get_close_matches(name, known, 1)
    return f"the nearest is '{near[0]}'" if near else otherwise


def list_datasets() -> list[str]:
    """The data sets that have a recipe."""
    return sorted(path.stem for path in Path("config/data").glob("*.yaml"))


def match_any(names: Iterable[str]) -> str:
    """A wildcard constraint: a regex of the names; of none, one that matches nothing."""
    return "|".join(map(re.escape, names)) or "(?!)"
