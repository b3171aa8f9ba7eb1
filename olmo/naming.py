"""Human names: the paths of a project that point into a store.

A file is a link to its object, a folder is one of links, with `record.json` beside them. What
was named is written down in the store's `links/`, one file a name: `gc` keeps what a name points
to, and a name that was deleted is still known, for who asks why its stage runs again.

Where the store lies in the project, links are relative, and so is what is written down: the folder
can be moved or copied whole. A name is written down with its project, without which `gc` would
take a disk that is not mounted for names that were deleted.
"""

import glob
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path

from olmo.lease import lease
from olmo.store import Record, Store, files, write_whole

Name = dict[str, str]  # {"path", "project", "key", "output"}


def link(store: Store, record: Record, output: str, path: Path) -> None:
    """Make `path` a name for an output: a link, or a folder of links with its record.json.

    Replaces what was there. A folder is there whole or, for a moment, not at all.
    """
    path = Path(os.path.abspath(path))
    made = record["outputs"][output]
    with store.writable():
        known = {"path": _written(store, path), "project": _written(store, _project(store, path))}
        known |= {"key": record["key"], "output": output}
        write_whole(_file(store, path), json.dumps(known))
        path.parent.mkdir(parents=True, exist_ok=True)
        if "files" in made:
            inner = made["files"] | made["aside"]
            targets = {name: store.object_path(file["sha256"]) for name, file in inner.items()}
            targets["record.json"] = store.record_path(record["key"])
            _link_folder(store, path, targets)
        else:
            point(store, path, store.object_path(made["sha256"]))


def point(store: Store, path: Path, target: Path) -> None:
    """Make `path` a link to something in the store, a folder that is worked in for example."""
    path = Path(os.path.abspath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = _beside(path)
    _symlink(store, draft, target)
    os.replace(draft, path)


def _link_folder(store: Store, path: Path, targets: Mapping[str, Path]) -> None:
    """A folder cannot be replaced as a file can, so one process at a time does it."""
    with lease(store.root / "leases", f"name-{_file(store, path).name}"):
        for left in path.parent.glob(f".{glob.escape(path.name)}.{'[0-9a-f]' * 8}"):
            shutil.rmtree(left)  # by a process that was killed here
        if path.is_dir() and all(
            os.path.realpath(path / name) == os.path.realpath(target)
            for name, target in targets.items()
        ):
            return
        draft, old = _beside(path), _beside(path)
        for name, target in targets.items():
            (draft / name).parent.mkdir(parents=True, exist_ok=True)
            _symlink(store, draft / name, target)
        if path.is_dir() and not path.is_symlink():
            os.replace(path, old)
            os.replace(draft, path)
            shutil.rmtree(old)
        else:
            os.replace(draft, path)


def _beside(path: Path) -> Path:
    return path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}"


def _symlink(store: Store, path: Path, target: Path) -> None:
    """Relative where name and store lie in the project that we are in."""
    here = Path.cwd()
    inside = path.is_relative_to(here) and store.root.is_relative_to(here)
    path.symlink_to(os.path.relpath(target, path.parent) if inside else target)


def _written(store: Store, path: Path) -> str:
    """A path as the store writes it down: from its own folder, where it lies beside that."""
    beside = path.is_relative_to(store.root.parent)
    return os.path.relpath(path, store.root) if beside else str(path)


def _project(store: Store, path: Path) -> Path:
    """The project that a name belongs to."""
    places = (Path.cwd(), store.root.parent)
    return next((place for place in places if path.is_relative_to(place)), path.parent)


def _file(store: Store, path: Path) -> Path:
    """Where a name is written down."""
    path = Path(os.path.abspath(path))
    digest = hashlib.sha256(_written(store, path).encode()).hexdigest()
    return store.root / "links" / digest[:32]


def known_as(store: Store, path: Path) -> Name | None:
    """What a name stands for, or stood for before it was deleted."""
    try:
        name: Name = json.loads(_file(store, path).read_text())
        return name
    except FileNotFoundError:
        return None


def last(store: Store, path: Path) -> Record | None:
    """The action that a name stands for, or stood for before it was deleted."""
    name = known_as(store, path)
    return store.record(name["key"]) if name else None


def written(store: Store) -> Iterator[tuple[Path, Name]]:
    """Every name that was ever made, and the file it is written down in."""
    for file in sorted((store.root / "links").glob("*")):
        if "." not in file.name:  # else a draft
            name: Name = json.loads(file.read_text())
            project = name.get("project", "..")  # which older stores do not tell
            places = {"path": name["path"], "project": project}
            yield file, name | {n: os.path.normpath(store.root / p) for n, p in places.items()}


def names(store: Store) -> Iterator[Name]:
    """The names that still point into the store, and what they point to: {…, "target"}.

    Those too that this user may not look at: that they are gone is not known.
    """
    root = os.path.realpath(store.root)
    for _, name in written(store):
        path = Path(name["path"])
        try:
            probe = path / "record.json" if path.is_dir() and not path.is_symlink() else path
            there = probe.is_symlink()
        except PermissionError:
            yield name | {"target": ""}
            continue
        target = Path(os.path.realpath(probe))
        if there and target.is_relative_to(root):
            yield name | {"target": target.name}


def named(store: Store, path: Path) -> Record:
    """The record of the action behind a name.

    Raises:
        ValueError: the store made no such name.
    """
    wanted = os.path.abspath(path)
    for name in names(store):
        if wanted == name["path"] or wanted.startswith(name["path"] + os.sep):
            target = name["target"]
            is_folder = target.endswith(".json")
            record = store.record(target.removesuffix(".json") if is_folder else name["key"])
            if record and (is_folder or target in {file["sha256"] for file in files(record)}):
                return record
    raise ValueError(f"expected a name that the store {store.root} made, found {path}")


def lost_projects(store: Store) -> list[Path]:
    """The projects that have names here and are not where they were."""
    found = {Path(name["project"]) for _, name in written(store)}
    return sorted(project for project in found if _is_lost(project))


def _is_lost(project: Path) -> bool:
    try:
        return not os.listdir(project)  # nothing is mounted there
    except PermissionError:
        return False
    except (FileNotFoundError, NotADirectoryError):
        return True


def of_project(store: Store, project: Path) -> dict[str, Path]:
    """A project's names, and the files they are written down in.

    Raises:
        ValueError: it has none here.
    """
    project = Path(os.path.abspath(project))
    found = {n["path"]: file for file, n in written(store) if n["project"] == str(project)}
    if not found:
        raise ValueError(f"expected a project that has names in {store.root}, found {project}")
    return found
