"""`${name:…}` in a config: environment variables, files and other keys, resolved by OmegaConf.

An untrusted config, which came with a checkpoint or from a URL, learns nothing of this machine.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import operator
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

from olmo.config.conversion import default_values
from olmo.config.yaml_io import Loader, check_count
from olmo.io.patterns import match_files

KeyPath = tuple[str | int, ...]  # the keys and indices that lead to a value in a config

STORE = "OLMO_STORE"  # untrusted configs may read it: those of final checkpoints locate data by it
# OmegaConf's own resolvers that read nothing but the config.
PURE = ("oc.create", "oc.decode", "oc.deprecated", "oc.dict.keys", "oc.dict.values", "oc.select")


@contextlib.contextmanager
def registered_resolvers(
    validate_paths: bool, untrusted: bool
) -> Iterator[tuple[set[str], set[str]]]:
    """Register the resolvers of ${name:…} in the block.

    Yields two sets, to which the resolvers add the variables read, and the names withheld from a
    untrusted config.
    """
    from omegaconf import OmegaConf
    from omegaconf.basecontainer import BaseContainer
    from omegaconf.resolvers import oc

    read: set[str] = set()
    withheld: set[str] = set()

    def handle_missing(message: str, empty: Any) -> Any:
        if validate_paths:
            raise FileNotFoundError(message)
        return empty

    def path_glob(*patterns: str) -> list[str]:
        found = [match_files(pattern) for pattern in patterns]
        for pattern, files in zip(patterns, found, strict=True):
            # If one pattern matches, the data is on this machine, and all must match.
            if not files and (validate_paths or any(found)):
                raise FileNotFoundError(f"no file matches {pattern}")
        return [file for files in found for file in files]

    def path_choose(*paths: str) -> str:
        for path in paths:
            if "://" in path or Path(path).exists():
                return path
        return handle_missing(f"none of these exist: {', '.join(paths)}", "")

    def path_last_checkpoint(folder: str) -> str:
        if "://" in folder:
            from olmo.io.bucket import Bucket

            names = {name.split("/")[0] for name in Bucket(folder).sizes()}
        else:
            names = {path.name for path in Path(folder).glob("step*")}
        steps = [m for name in names if (m := re.fullmatch(r"step(\d+)(-unsharded)?", name))]
        if not steps:
            return handle_missing(
                f"no checkpoint (step{{N}} or step{{N}}-unsharded) in {folder}", ""
            )
        # Of two checkpoints at one step the sharded one, which is cheaper to load.
        latest = max(steps, key=lambda m: (int(m[1]), m[2] is None))
        return f"{folder.rstrip('/')}/{latest[0]}"

    def environment(name: str, *default: Any) -> Any:
        if untrusted and name != STORE:
            if default:
                return default[0] if default[0] is None else str(default[0])
            return withhold(name)
        read.add(name)
        return oc.env(name, *default)

    def withhold(*arguments: Any) -> Any:
        withheld.add(str(arguments))
        raise ValueError("a config from elsewhere reads nothing of this machine")

    # OmegaConf 2.4 renamed the function and warns about the old name; 2.3 has only that.
    is_renamed = "replace" in inspect.signature(OmegaConf.register_resolver).parameters
    register = OmegaConf.register_resolver if is_renamed else OmegaConf.register_new_resolver
    known: dict[str, Any] = {
        "path.glob": path_glob,
        "path.choose": path_choose,
        "path.last_checkpoint": path_last_checkpoint,
    }
    before = dict(BaseContainer._resolvers)
    if untrusted:  # resolvers that other libraries have registered are withheld as well
        ours = {*before, *known} - set(PURE)
        known = dict.fromkeys(ours, withhold)
    for name, resolver in (known | {"oc.env": environment}).items():
        register(name, resolver, replace=True)
    try:
        yield read, withheld
    finally:
        BaseContainer._resolvers.clear()
        BaseContainer._resolvers.update(before)


def resolve_config(
    cls: type, raw: dict[str, Any], overrides: Iterable[str], validate_paths: bool, untrusted: bool
) -> tuple[dict[str, Any], dict[KeyPath, str]]:
    """Apply overrides and resolve ${interpolations}, by OmegaConf.

    OmegaConf makes a node of every value, which takes minutes for thousands of data paths: long
    lists without interpolations are replaced by a placeholder meanwhile.

    Returns:
        The plain values, and the texts with environment variables: key path → text.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    long_lists: dict[str, list[Any]] = {}
    count = 0

    def replace_long_lists(value: Any) -> Any:
        nonlocal count
        count += len(value) if isinstance(value, dict | list) else 0
        check_count(count)
        if isinstance(value, dict):
            return {k: replace_long_lists(v) for k, v in value.items()}
        if isinstance(value, list):
            if len(value) > 32 and all(isinstance(v, str) and "${" not in v for v in value):
                placeholder = f"<list {len(long_lists)} set aside while resolving>"
                long_lists[placeholder] = value
                return placeholder
            return [replace_long_lists(v) for v in value]
        return value

    def restore_long_lists(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: restore_long_lists(v) for k, v in value.items()}
        if isinstance(value, list):
            return [restore_long_lists(v) for v in value]
        return long_lists.get(value, value) if isinstance(value, str) else value

    try:
        # With the defaults, since ${save_interval} may refer to a key that the file does not set.
        tree = OmegaConf.merge(
            OmegaConf.create(without_other_kinds(default_values(cls), raw)),
            OmegaConf.create(replace_long_lists(raw)),
        )
        for override in overrides:
            name, equals, value = override.lstrip("-").partition("=")
            try:
                parsed = yaml.load(value, Loader) if equals else True
            except yaml.YAMLError as error:
                raise ValueError(f"cannot read the value of --{name}={value}: {error}") from error
            name = name.replace("-", "_")
            # Values such as ${a.b} stay text here and are resolved with the rest.
            # A mapping is merged into the section, as in OLMo; any other value replaces it.
            OmegaConf.update(tree, name, parsed, merge=isinstance(parsed, dict), force_add=True)
        from_environment: dict[KeyPath, str] = {}
        with registered_resolvers(validate_paths, untrusted) as (read, withheld):
            for place, text in list(_interpolated(OmegaConf.to_container(tree), ())):
                read.clear()
                withheld.clear()
                *path, last = place
                node: Any = functools.reduce(operator.getitem, path, tree)  # type: ignore[arg-type]
                try:
                    value = node[last]
                    if OmegaConf.is_config(value):
                        OmegaConf.to_container(value, resolve=True)
                except OmegaConfBaseException:
                    if not withheld:
                        raise
                    node[last] = escape(text)
                if read:
                    from_environment[place] = text
            plain = OmegaConf.to_container(tree, resolve=True, throw_on_missing=True)
        return restore_long_lists(plain), from_environment
    except OmegaConfBaseException as error:
        reason, key = str(error).partition("\n")[0], getattr(error, "full_key", None)
        reason = reason.rpartition(" raised while resolving interpolation: ")[2]
        raise ValueError(f"{key}: {reason}; give --{key}=…" if key else reason) from error


def without_other_kinds(defaults: dict[str, Any], raw: dict[str, Any]) -> dict[str, Any]:
    """The defaults without those that do not merge: mappings where `raw` has a list, or reverse.

    Of such a key the conversion says what it expects.
    """
    kept = {}
    for key, default in defaults.items():
        found = raw.get(key)
        if isinstance(default, dict) and isinstance(found, dict):
            kept[key] = without_other_kinds(default, found)
        elif {type(default), type(found)} != {dict, list}:
            kept[key] = default
    return kept


def _interpolated(value: Any, place: KeyPath) -> Iterator[tuple[KeyPath, str]]:
    """The texts with ${…} in a tree, with their key paths."""
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _interpolated(inner, (*place, key))
    elif isinstance(value, str) and "${" in value:
        yield place, value


def escape(text: str) -> str:
    """Escape ${, so that OmegaConf reads the text as it is."""
    return re.sub(r"(\\*)\$\{", lambda found: found[1] * 2 + r"\${", text)


def get_at(value: Any, place: KeyPath) -> Any:
    """The value at a key path; None if there is none."""
    try:
        return functools.reduce(operator.getitem, place, value)
    except (KeyError, IndexError, TypeError):
        return None
