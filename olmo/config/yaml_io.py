"""YAML read and written for configs: no repeated keys, a bounded size, 1e-4 as a number."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

# Limits of a config's size: YAML's aliases expand a few lines to billions of values.
MAX_VALUES, MAX_DEPTH = 1_000_000, 50
PROJECT_CONFIG = "config/config.yaml"  # of the project in the working folder


def check_count(found: int) -> None:
    if found > MAX_VALUES:
        raise ValueError(f"expected at most {MAX_VALUES:,} values, found more")


class Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """YAML with 1e-4 read as a number, dates left as text, and a repeated key refused."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node.value, str):
                raise yaml.constructor.ConstructorError(
                    None, None, "expected text as a key", key_node.start_mark
                )
            if key_node.value in seen:
                raise yaml.constructor.ConstructorError(
                    None,
                    None,
                    f"found the key '{key_node.value}' twice",
                    key_node.start_mark,
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)

    depth = 0

    def descend_resolver(self, node: Any, index: Any) -> None:
        self.depth += 1
        if (
            self.depth > MAX_DEPTH
        ):  # libyaml's recursion would overflow the stack and kill the process
            raise yaml.YAMLError(f"expected at most {MAX_DEPTH} levels, found more")
        super().descend_resolver(node, index)

    def ascend_resolver(self) -> None:
        self.depth -= 1
        super().ascend_resolver()

    def flatten_mapping(self, node: Any) -> None:
        super().flatten_mapping(node)
        check_count(len(node.value))


Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in rules if not tag.endswith((":timestamp", ":float"))]
    for first, rules in Loader.yaml_implicit_resolvers.items()
}
_FLOAT = r"[-+]?(\d[\d_]*\.[\d_]*([eE][-+]?\d+)?|\d[\d_]*[eE][-+]?\d+|\.\d[\d_]*([eE][-+]?\d+)?"


class Dumper(getattr(yaml, "CSafeDumper", yaml.SafeDumper)):  # type: ignore[misc]
    """Quotes text that the loader would read as a number: '1e-4'."""


for _class in (Loader, Dumper):
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(rf"^({_FLOAT}|\.(inf|Inf|INF))|\.(nan|NaN|NAN))$"),
        list("-+0123456789."),
    )


def read_yaml(path: str | Path) -> Any:
    """The content of a YAML file; ValueError if it is unreadable or repeats a key."""
    if not Path(path).is_file():
        found = ", which is a folder" if Path(path).is_dir() else ""
        raise FileNotFoundError(f"no config file at {path}{found}; name one that exists")
    try:
        with open(path, encoding="utf-8") as stream:
            return yaml.load(stream, Loader)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected text in UTF-8, found {error}; save it so") from error
    except (yaml.YAMLError, RecursionError) as error:
        reason = re.sub(r"\s+", " ", str(error))
        raise ValueError(f"{path} is not readable as YAML: {reason}; correct it there") from error


def require_project() -> None:
    """Raises ValueError outside of a project's folder; it names that of a folder above."""
    if not Path(PROJECT_CONFIG).is_file():
        above = (str(path) for path in Path.cwd().parents if (path / PROJECT_CONFIG).is_file())
        found = "a folder" if Path(PROJECT_CONFIG).is_dir() else "none"
        place = next(above, "to the project's folder")
        raise ValueError(f"expected {PROJECT_CONFIG} in {Path.cwd()}, found {found}; cd {place}")


def read_project_config() -> dict[str, Any]:
    """The content of config/config.yaml; ValueError if there is none, or no keys in it."""
    require_project()
    return require_keys(read_yaml(PROJECT_CONFIG), PROJECT_CONFIG)


def list_runs() -> list[str]:
    """The runs, those of ladders too, and soups of config/config.yaml."""
    config = read_project_config()
    runs = [*(config.get("runs") or {}), *list_ladder_runs(config.get("ladders"))]
    return [*runs, *(config.get("soups") or {})]


def list_shown_runs() -> list[str]:
    """The runs and soups of config/config.yaml; of the many runs of ladders, those that began."""
    of_ladders = set(list_ladder_runs(read_project_config().get("ladders")))
    return [n for n in list_runs() if n not in of_ladders or Path("checkpoints", n).is_dir()]


def list_ladder_runs(ladders: Any) -> list[str]:
    """The names of ladders' runs; of a section with mistakes, those that can be read."""
    found = []
    for name, ladder in ladders.items() if isinstance(ladders, dict) else ():
        if not isinstance(ladder, dict):
            continue
        sizes, budgets = (ladder.get(key) or () for key in ("sizes", "budgets"))
        if isinstance(sizes, dict) and isinstance(budgets, list):
            found += [name_ladder_run(name, size, budget) for size in sizes for budget in budgets]
    return found


def name_ladder_run(ladder: str, size: str, budget: Any) -> str:
    """The name of one run of a ladder."""
    return f"{ladder}-{size}-{budget}"


def require_keys(content: Any, path: str | Path) -> dict[str, Any]:
    """The content of a YAML file, which must be a mapping; ValueError for any other."""
    if not isinstance(content, dict):
        found = "an empty file" if content is None else f"a {type(content).__name__}"
        raise ValueError(f"{path}: expected a mapping of keys, found {found}; write `key: value`")
    return content


def to_yaml(plain: dict[str, Any]) -> str:
    return yaml.dump(plain, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=10_000)
