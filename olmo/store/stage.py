"""Stages: a function is a stage, and a stage is a command line, of one shape.

    @stage(version=1)
    def documents(source: Input, documents: Output, keep_one_in: int = 1) -> Facts:
        "Keep one line in N of a source."

Called, it goes through the store: found there, or run once and put there, and the outputs' names
are linked to what came out. `documents.build(…)` is the function alone. On the command line it is
`olmo documents --source … --documents … --keep-one-in 10`.

The types say what each parameter is to the action's identity:

    Input, Inputs      files that are read: their contents' digests
    Output, Folder     a file, a folder that is made: not in the identity
    Work               a place that survives a failed attempt, given by the store; a caller who
                       names a path gets a link to it there: not in the identity
    Free[T]            changes no byte: threads, progress, a running toolkit
    a dataclass        a recipe's section: its fields are parameters, but those that are `unhashed`
    anything else      a parameter that changes bytes

A parameter equal to its default is left out of the identity, so that a new one re-keys nothing.
A default that changes, or code that gives other bytes, is a new VERSION.
"""

import dataclasses
import functools
import inspect
import os
import platform
import resource
import stat
import subprocess
import sys
import time
import typing
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, TypeVar

from olmo.config.strict import hashed_fields
from olmo.runtime.energy import EnergyMeter
from olmo.runtime.log import log
from olmo.runtime.urls import redact, stash_secrets
from olmo.store import naming
from olmo.store.action import Action
from olmo.store.record import Record
from olmo.store.store import Store, utc_now

T = TypeVar("T")
Input = Annotated[Path, "input"]
Inputs = Annotated[list[Path], "input"]
Output = Annotated[Path, "output"]
Folder = Annotated[Path, "output"]
Work = Annotated[Path, "work"]
Unhashed = Annotated[T, "free"]
Facts = Mapping[str, Any]

STORE_ENV = "OLMO_STORE"
RECORDED_PACKAGES = (
    "torch",
    "numpy",
    "polars",
    "tokenizers",
    "tiktoken",
    "isal",
    "safetensors",
    "altair",
)


def current_store() -> Store:
    """The store of this process: $OLMO_STORE, or the folder `store`.

    Where the group may write to that folder (chmod g+ws), it may to all that is made from now on.
    """
    root = Path(os.environ.get(STORE_ENV, "store"))
    if root.is_dir() and root.stat().st_mode & stat.S_IWGRP:
        os.umask(os.umask(0o077) & ~stat.S_IRWXG)
    return Store(root)


def require_store() -> None:
    """Raises ValueError where there is no store: of one that is elsewhere nothing can be said."""
    root = current_store().root
    if not any((root / name).is_dir() for name in ("objects", "actions", "leases")):
        found = "another folder," if root.is_dir() else "no folder"
        raise ValueError(
            f"expected a store, found {found} {root}; cd to the project's folder, or name its "
            f"store: {STORE_ENV}=/path/to/store olmo store …"
        )


class Stage:
    """A function whose results live in the store; see the module's text."""

    def __init__(
        self, build: Callable[..., Any], number: int, conditions: Callable[[], Facts]
    ) -> None:
        functools.update_wrapper(self, build)
        self.build = build
        self.conditions = conditions
        self.version = number
        self.name = build.__name__
        self.signature = inspect.signature(build)
        hints = typing.get_type_hints(build, include_extras=True)
        self.roles = {name: parameter_role(hints[name]) for name in self.signature.parameters}

    def arguments(self, kwargs: Mapping[str, Any], chosen: str) -> dict[str, Any]:
        return {name: value for name, value in kwargs.items() if self.roles[name] == chosen}

    def stamps(self, kwargs: Mapping[str, Any]) -> list[tuple[int, int, int]]:
        """Size, time of change and number of each input file: other ones mean other bytes.

        Not of the store's objects, which do not change and whose times the store sets.
        """
        given = [v for v in self.arguments(kwargs, "input").values() if v is not None]
        paths = [p for v in given for p in (v if isinstance(v, list | tuple) else [v])]
        store = current_store()
        found = [os.stat(p) for p in paths if os.path.exists(p) and not store.is_object(Path(p))]
        return [(stat.st_size, stat.st_mtime_ns, stat.st_ino) for stat in found]

    def action(self, store: Store, **kwargs: Any) -> Action:
        """What a call asks for. Hashes the inputs that are not in the store yet."""
        parameters = self.signature.parameters
        inputs = {
            name: [store.digest(path) for path in value]
            if isinstance(value, list | tuple)
            else store.digest(value)
            for name, value in self.arguments(kwargs, "input").items()
            if value is not None
        }
        params = {
            name: value
            for name, value in self.arguments(kwargs, "parameter").items()
            if value != parameters[name].default
        }
        for section in self.arguments(kwargs, "section").values():
            params |= hashed_fields(section)
        return Action(self.name, self.version, params, inputs)

    def __call__(self, **kwargs: Any) -> Record:
        """Run through the store, link the outputs' names; the action's record.

        Raises:
            ValueError: bad input; an input that changed while it was read.
        """
        store, kwargs = current_store(), stash_secrets(kwargs)
        before = self.stamps(kwargs)
        action = self.action(store, **kwargs)
        names = {n: p for n, p in self.arguments(kwargs, "output").items() if p is not None}
        ran = False

        def build(work: Path) -> Facts:
            nonlocal ran
            ran = True
            log.info(f"{self.name}: {explain_run(store, action, list(names.values()))}")
            made = {name: work / "outputs" / name for name in names}
            places = {name: work / name for name, kind in self.roles.items() if kind == "work"}
            for name, path in self.arguments(kwargs, "work").items():
                naming.symlink_atomic(store, path, places[name])
            with measure_run() as run:
                result = dict(self.build(**{**kwargs, **made, **places}) or {})
            facts = result if "facts" not in result else dict(result.pop("facts"))
            extra = {} if facts is result else result
            if self.stamps(kwargs) != before:
                raise ValueError(
                    f"{self.name}: an input changed while it was read; expected it to stay "
                    "as it was until the stage ends. Run the same command again"
                )
            return {"facts": facts, "conditions": self.conditions(), **extra, "run": run}

        with store.protect_from_gc(action.key):
            record = store.run(action, build)
            for name, path in names.items():
                naming.link_output(store, record, name, path)
        if not ran:
            log.info(f"{self.name}: found in the store ({action.key[:12]}…)")
        return record


def stage(
    version: int, conditions: Callable[[], Facts] = dict
) -> Callable[[Callable[..., Any]], Stage]:
    """Make a function a stage. `version` is part of its actions' identity; bumped by hand.

    `conditions` tells what of this machine its bytes depend on: part of the record, not of the
    identity. A function may return its own as "conditions", beside "facts".
    """
    return lambda build: Stage(build, version, conditions)


def parameter_role(hint: Any) -> str:
    """What a parameter of this type is to an action: input, output, work, free, section, …"""
    for candidate in (hint, *typing.get_args(hint)):  # Input | None is an input
        for mark in getattr(candidate, "__metadata__", ()):
            if mark in ("input", "output", "work", "free"):
                return str(mark)
    return "section" if dataclasses.is_dataclass(hint) else "parameter"


def explain_run(store: Store, action: Action, names: list[Path]) -> str:
    """Why an action runs: what differs from the one that these names stood for, field by field."""
    from olmo.store.lineage import diff_actions

    known = next(filter(None, (naming.last_record(store, name) for name in names)), None)
    if known is None:
        return f"runs for the first time here ({action.key[:12]}…)"
    if known["key"] == action.key:
        return f"runs again: its outputs are gone from the store ({action.key[:12]}…)"
    changed = diff_actions(known["action"], action.as_dict())
    return f"runs, since it differs from {known['key'][:12]}… in " + "; ".join(changed)


class measure_run:
    """What a run cost and what it ran with: a dict that is complete when the block ends."""

    def __enter__(self) -> dict[str, Any]:
        self.run: dict[str, Any] = {"started": utc_now(), **run_environment()}
        self.wall, self.cpu, self.joules = time.monotonic(), cpu_seconds(), EnergyMeter()
        return self.run

    def __exit__(self, *_: Any) -> None:
        own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
        unit = 1 if sys.platform == "darwin" else 1024
        self.run |= {
            "wall_s": round(time.monotonic() - self.wall, 3),
            "cpu_s": round(cpu_seconds() - self.cpu, 3),
            "peak_memory_bytes": max(own, children) * unit,
            "machine_energy_j": self.joules.used(),
            "tools": {name: version(name) for name in RECORDED_PACKAGES if name in sys.modules},
        }


def cpu_seconds() -> float:
    """CPU time of this process and the children it has waited for."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


@functools.cache
def run_environment() -> dict[str, Any]:
    """Where a record was made, for people: nothing here is part of an identity."""

    def git(*args: str) -> str | None:
        done = subprocess.run(
            ["git", *args], cwd=Path(__file__).parent, capture_output=True, text=True
        )
        return done.stdout.strip() if done.returncode == 0 else None

    try:
        commit, changes = git("rev-parse", "HEAD"), git("status", "--porcelain", "-uno")
    except FileNotFoundError:
        commit, changes = None, None
    return {
        "host": platform.node(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "commit": commit,
        "commit_has_changes": bool(changes),
        "command": [redact(word) for word in sys.argv],
    }
