"""Stages: a function is a stage, and a stage is a command line, of one shape.

    @stage(version=1)
    def documents(source: Input, documents: Output, keep_one_in: int = 1) -> Facts:
        "Keep one line in N of a source."

A call goes through the store: the result is found there, or the function runs once, and the
outputs' names are linked to it. `documents.build(…)` is the function alone. On the command line it
is `olmo documents --source … --documents … --keep-one-in 10`.

The type of a parameter defines its part in the action's identity:

    Input, Inputs      files to read: the digests of their contents
    Output, Folder     a file, a folder to make: not in the identity
    Work               a folder that survives a failed attempt, in the store; a caller who passes a
                       path gets a link to it there: not in the identity
    Unhashed[T]        changes no byte (threads, progress, a running toolkit): not in the identity
    a dataclass        a section of the recipe: its fields are parameters, but `unhashed` ones
    anything else      a parameter that changes bytes

A parameter equal to its default is left out of the identity, so a new parameter changes no key.
A changed default, or code that gives other bytes, needs a new version.
"""

import contextlib
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
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, TypeVar

from olmo.config.strict import hashed_fields
from olmo.runtime.energy import EnergyMeter
from olmo.runtime.log import log
from olmo.runtime.process import own_peak_memory_bytes
from olmo.runtime.urls import redact, stash_secrets
from olmo.store import naming
from olmo.store.action import Action
from olmo.store.lookup import LookupStore
from olmo.store.record import Record
from olmo.store.store import Store, utc_now

T = TypeVar("T")
Input = Annotated[Path, "input"]
Inputs = Annotated[list[Path], "input"]
Output = Annotated[Path, "output"]
Folder = Annotated[Path, "output"]
Work = Annotated[Path, "work"]
Unhashed = Annotated[T, "unhashed"]
Facts = Mapping[str, Any]

STORE_ENV = "OLMO_STORE"
COUNTED = ("documents", "conversations", "tokens", "instances")  # facts that are shown as it runs
RECORDED_PACKAGES = (
    "torch",
    "numpy",
    "polars",
    "tokenizers",
    "gigatoken",
    "tiktoken",
    "isal",
    "safetensors",
    "altair",
)


_lookup_store: LookupStore | None = None


@contextlib.contextmanager
def looking_up(store: LookupStore) -> Iterator[None]:
    """Call stages, in the block and all threads, on a store that finds and never makes."""
    global _lookup_store
    _lookup_store = store
    try:
        yield
    finally:
        _lookup_store = None


def current_store() -> Store:
    """The store of this process: $OLMO_STORE, or the folder `store`.

    If the group may write to that folder (chmod g+ws), it may write to everything made from now on.
    """
    if _lookup_store is not None:
        return _lookup_store
    root = Path(os.environ.get(STORE_ENV, "store"))
    if root.is_dir() and root.stat().st_mode & stat.S_IWGRP:
        os.umask(os.umask(0o077) & ~stat.S_IRWXG)
    return Store(root)


def require_store() -> None:
    """Raises ValueError if there is no store here."""
    root = current_store().root
    if not any((root / name).is_dir() for name in ("objects", "actions", "leases")):
        found = "another folder," if root.is_dir() else "no folder"
        raise ValueError(
            f"expected a store, found {found} {root}; cd to the project's folder, or name its "
            f"store: {STORE_ENV}=/path/to/store olmo store …"
        )


class Stage:
    """A function whose results are kept in the store; see the module's docstring."""

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

    def arguments(self, kwargs: Mapping[str, Any], role: str) -> dict[str, Any]:
        return {name: value for name, value in kwargs.items() if self.roles[name] == role}

    def input_stats(self, kwargs: Mapping[str, Any]) -> list[tuple[int, int, int]]:
        """Size, mtime and inode of each input file, to detect a change while it is read.

        Not of the store's objects, which do not change.
        """
        inputs = [v for v in self.arguments(kwargs, "input").values() if v is not None]
        paths = [p for v in inputs for p in (v if isinstance(v, list | tuple) else [v])]
        store = current_store()
        found = [os.stat(p) for p in paths if os.path.exists(p) and not store.is_object(Path(p))]
        return [(stat.st_size, stat.st_mtime_ns, stat.st_ino) for stat in found]

    def action(self, store: Store, **kwargs: Any) -> Action:
        """The action of a call. Hashes the inputs that are not in the store yet."""
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
        """Find or make the outputs, link their names; the action's record.

        Raises:
            ValueError: a bad input, or one that changed while it was read.
        """
        store, kwargs = current_store(), stash_secrets(kwargs)
        before = self.input_stats(kwargs)
        action = self.action(store, **kwargs)
        names = {n: p for n, p in self.arguments(kwargs, "output").items() if p is not None}
        if isinstance(store, LookupStore):
            return store.find(action, names, kwargs)
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
            if self.input_stats(kwargs) != before:
                raise ValueError(
                    f"{self.name}: an input changed while it was read; expected it to stay "
                    "as it was until the stage ends. Run the same command again"
                )
            return {"facts": facts, "conditions": self.conditions(), **extra, "run": run}

        with store.protect_from_gc(action.key):
            record = store.run(action, build)
            for name, path in names.items():
                naming.link_output(store, record, name, path)
        origin = "made" if ran else "found in the store"
        counts = format_counts(record["facts"])
        log.info(f"{self.name}: {origin} ({action.key[:12]}…){counts}")
        return record


def stage(
    version: int, conditions: Callable[[], Facts] = dict
) -> Callable[[Callable[..., Any]], Stage]:
    """Make a function a stage. `version` is part of its actions' identity; increase it by hand.

    `conditions` returns properties of this machine that the bytes depend on: part of the record,
    not of the identity. A function may return its own as "conditions", beside "facts".
    """
    return lambda build: Stage(build, version, conditions)


def format_counts(facts: Facts) -> str:
    """The numbers of a record's facts that tell how much was made.

    >>> format_counts({"tokens": 12345, "documents": 7, "dtype": "uint16"})
    ': 7 documents, 12,345 tokens'
    """
    found = [f"{facts[name]:,} {name}" for name in COUNTED if facts.get(name)]
    return ": " * bool(found) + ", ".join(found)


def parameter_role(hint: Any) -> str:
    """The role of a parameter of this type: input, output, work, unhashed, section, parameter."""
    for candidate in (hint, *typing.get_args(hint)):  # Input | None is an input
        for mark in getattr(candidate, "__metadata__", ()):
            if mark in ("input", "output", "work", "unhashed"):
                return str(mark)
    return "section" if dataclasses.is_dataclass(hint) else "parameter"


def explain_run(store: Store, action: Action, names: list[Path]) -> str:
    """Why an action runs: how it differs from the one that these names stood for."""
    from olmo.store.lineage import diff_actions

    known = next(filter(None, (naming.last_record(store, name) for name in names)), None)
    if known is None:
        return f"runs for the first time here ({action.key[:12]}…)"
    if known["key"] == action.key:
        return f"runs again: its outputs are missing in the store ({action.key[:12]}…)"
    changed = diff_actions(known["action"], action.as_dict())
    return f"runs, because it differs from {known['key'][:12]}… in " + "; ".join(changed)


@contextlib.contextmanager
def measure_run() -> Iterator[dict[str, Any]]:
    """The `run` of a record: environment and cost of the block; complete when the block ends."""
    run: dict[str, Any] = {"started": utc_now(), **run_environment()}
    wall, cpu, energy = time.monotonic(), cpu_seconds(), EnergyMeter()
    yield run
    run |= {
        "wall_s": round(time.monotonic() - wall, 3),
        "cpu_s": round(cpu_seconds() - cpu, 3),
        "peak_memory_bytes": peak_memory_bytes(),
        "machine_energy_j": energy.joules(),
        "tools": {name: version(name) for name in RECORDED_PACKAGES if name in sys.modules},
    }


def peak_memory_bytes() -> int:
    """Peak resident memory of this process or of a child that it has waited for."""
    unit = 1 if sys.platform == "darwin" else 1024
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit
    return max(own_peak_memory_bytes(), children)


def cpu_seconds() -> float:
    """CPU time of this process and the children it has waited for."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


@functools.cache
def run_environment() -> dict[str, Any]:
    """Where and how this process runs, for people: nothing of it is part of an identity."""

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
