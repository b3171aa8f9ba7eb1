"""`olmo check`: every mistake in the configs of a project, found without Snakemake."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from olmo.config import PROJECT_CONFIG, TrainConfig, read_project_config, require_project
from olmo.config.checks import check_train_config
from olmo.config.conversion import each_mistake
from olmo.config.yaml_io import Loader
from olmo.pipeline.parts import previous_link
from olmo.pipeline.plan import Plan
from olmo.pipeline.recipe import EvaluationConfig, prefix_errors
from olmo.pipeline.source_files import find_sources, source_table_path
from olmo.runtime.log import describe_error

CONFIG = PROJECT_CONFIG


def check() -> None:
    """Check config/config.yaml, recipes, training and evaluation configs, and show all mistakes.

    A file without one is a line on stdout. A mistake is a line on stderr, with its file, its line
    and the remedy.

    Example:
        olmo check
    """
    require_project()
    mistakes: dict[str, None] = {}  # in order, each once: two runs may share a file
    for name, examine in list_checks():
        found = []
        try:
            examine()
        except (ValueError, OSError) as error:
            each = [describe_error(error)] if isinstance(error, OSError) else each_mistake(error)
            found = [locate(name, mistake) for mistake in each]
        for mistake in found:
            if mistake not in mistakes:
                print(mistake, file=sys.stderr)
        mistakes |= dict.fromkeys(found)
        if not found:
            print(f"{name}: ok")
    if mistakes:
        count = f"{len(mistakes)} mistakes" if len(mistakes) > 1 else "one mistake"
        raise ValueError(f"found {count}; correct what the lines above name, then check again")


def list_checks() -> Iterator[tuple[str, Callable[[], Any]]]:
    """What is checked, and a function that raises ValueError or OSError of its mistakes."""
    plan: list[Plan] = []  # none if config/config.yaml is wrong: then the files are checked alone
    yield CONFIG, lambda: plan.append(check_pipeline(CONFIG))
    for path in sorted(map(str, Path("config/data").glob("*.yaml"))):
        known = plan[0] if plan else Plan({"runs": {}})
        yield path, partial(check_recipe, known, Path(path).stem)
    for path in sorted(map(str, Path("config/eval").glob("*.yaml"))):
        yield path, partial(EvaluationConfig.load, path)
    in_runs = {run.train for run in plan[0].pipeline.runs.values()} if plan else set()
    for path in sorted(map(str, Path("config/train").glob("*.yaml"))):
        if path not in in_runs:
            yield path, partial(check_training, path)
    for run in plan[0].pipeline.runs if plan else ():
        yield f"run {run}", partial(check_run, plan[0], run)


def check_pipeline(path: str) -> Plan:
    """The plan of config/config.yaml, of which the recipes and training configs are not read."""
    plan = Plan(read_project_config())
    for key in ("bench_loss", "eval"):
        for name in getattr(plan.pipeline, key):
            if not plan.is_made_here(name):
                raise ValueError(f"{path}: {key}: expected a run or a soup, found {name}")
    return plan


def check_recipe(plan: Plan, dataset: str) -> None:
    """A recipe, and the sources that it names, unless their list is still to be downloaded."""
    recipe = plan.recipe(dataset)
    if not recipe.sources.url_list or source_table_path(dataset, recipe.sources).exists():
        find_sources(dataset, recipe, is_tokenized=False)


def check_training(path: str) -> None:
    """A training config that no run names."""
    cfg = TrainConfig.load(path, validate_paths=False)
    with prefix_errors(f"{path}: "):
        check_train_config(cfg)


def check_run(plan: Plan, run: str) -> None:
    """A run: its training config with the overrides, its data set, start, links, evaluation."""
    plan.train_config(run)
    previous_link(plan, run)
    plan.evaluation_flags(run)


def locate(name: str, mistake: str) -> str:
    """A mistake with its file and line in front: "config/train/a.yaml:12: …".

    `name` is what was checked, in front of a mistake that names no file.
    """
    path, colon, rest = mistake.partition(": ")
    if not (colon and Path(path).is_file()):
        return f"{name}: {mistake}"
    line = find_line(path, rest)
    return mistake if line is None else f"{path}:{line}: {rest}"


def find_line(path: str, mistake: str) -> int | None:
    """The line, from 1, of the longest key path of a YAML file with which a mistake begins."""
    try:
        with open(path, encoding="utf-8") as file:
            root = yaml.compose(file, Loader)
    except (yaml.YAMLError, UnicodeDecodeError):
        return None  # the mistake tells where
    best, line = "", None
    for place, node in key_paths(root, ""):
        begins = re.match(re.escape(place) + r"(?![\w.\[-])|.* " + re.escape(place) + ":", mistake)
        if begins and len(place) > len(best):
            best, line = place, node.start_mark.line + 1
    return line


def key_paths(node: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """(key path, node) of every key and list item of a YAML document: "runs.a.train", "b[0]"."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            place = f"{prefix}.{key.value}" if prefix else str(key.value)
            yield place, key
            yield from key_paths(value, place)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield f"{prefix}[{index}]", value
            yield from key_paths(value, f"{prefix}[{index}]")
