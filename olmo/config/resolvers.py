"""What `${name:…}` in a config looks up: the environment, files; in a foreign config, nothing."""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from olmo.io.patterns import matching

STORE = "OLMO_STORE"  # what a foreign config may ask: final ones say by it where their data is
# Of OmegaConf's own resolvers those that look at nothing but the config.
PURE = ("oc.create", "oc.decode", "oc.deprecated", "oc.dict.keys", "oc.dict.values", "oc.select")


@contextlib.contextmanager
def resolvers(validate_paths: bool, foreign: bool) -> Iterator[tuple[set[str], set[str]]]:
    """What ${name:…} means meanwhile; the variables that were read, and what was not told."""
    from omegaconf import OmegaConf
    from omegaconf.basecontainer import BaseContainer
    from omegaconf.resolvers import oc

    read: set[str] = set()
    withheld: set[str] = set()

    def missing(what: str, empty: Any) -> Any:
        if validate_paths:
            raise FileNotFoundError(what)
        return empty

    def path_glob(*patterns: str) -> list[str]:
        found = [matching(pattern) for pattern in patterns]
        for pattern, files in zip(patterns, found, strict=True):
            # Where some are here, the rest belongs here too.
            if not files and (validate_paths or any(found)):
                raise FileNotFoundError(f"no file matches {pattern}")
        return [file for files in found for file in files]

    def path_choose(*paths: str) -> str:
        for path in paths:
            if "://" in path or Path(path).exists():
                return path
        return missing(f"none of these exist: {', '.join(paths)}", "")

    def path_last_checkpoint(folder: str) -> str:
        if "://" in folder:
            from olmo.io.bucket import Bucket

            names = {name.split("/")[0] for name in Bucket(folder).sizes()}
        else:
            names = {path.name for path in Path(folder).glob("step*")}
        steps = [m for name in names if (m := re.fullmatch(r"step(\d+)(-unsharded)?", name))]
        if not steps:
            return missing(f"no checkpoint (step{{N}} or step{{N}}-unsharded) in {folder}", "")
        # Of two at one step the sharded one comes first, as it is the cheaper to load.
        latest = max(steps, key=lambda m: (int(m[1]), m[2] is None))
        return f"{folder.rstrip('/')}/{latest[0]}"

    def environment(name: str, *default: Any) -> Any:
        if foreign and name != STORE:
            if default:
                return default[0] if default[0] is None else str(default[0])
            return withhold(name)
        read.add(name)
        return oc.env(name, *default)

    def withhold(*asked: Any) -> Any:
        withheld.add(str(asked))
        raise ValueError("a config from elsewhere reads nothing of this machine")

    # OmegaConf 2.4 renamed the call and warns of the old name, the only one that 2.3 has.
    modern = "replace" in inspect.signature(OmegaConf.register_resolver).parameters
    register = OmegaConf.register_resolver if modern else OmegaConf.register_new_resolver
    known: dict[str, Any] = {
        "path.glob": path_glob,
        "path.choose": path_choose,
        "path.last_checkpoint": path_last_checkpoint,
    }
    before = dict(BaseContainer._resolvers)
    if foreign:  # what another library has registered is withheld as well
        ours = {*before, *known} - set(PURE)
        known = dict.fromkeys(ours, withhold)
    for name, resolver in (known | {"oc.env": environment}).items():
        register(name, resolver, replace=True)
    try:
        yield read, withheld
    finally:
        BaseContainer._resolvers.clear()
        BaseContainer._resolvers.update(before)
