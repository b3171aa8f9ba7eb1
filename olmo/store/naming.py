"""Human names: the paths of a project that point into a store.

A file is a link to its object, a folder is one of links, with `record.json` beside them. What
was named is written down in the store's `links/`, one sealed file a name: `gc` keeps what a name
points to, and a name that was deleted is still known, for who asks why its stage runs again. A
file that is damaged is written anew from the link itself.

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

from olmo.io import sealed
from olmo.io.sealed import Damaged
from olmo.runtime.log import log
from olmo.store.lease import lease
from olmo.store.record import Record, list_files, output_files
from olmo.store.store import Store

Name = dict[str, str]  # {"path", "project", "key", "output"}
NO_LINK_LEFT = (
    "no link below this folder tells which name it was; run `olmo store verify` in the project "
    "that it is of, or delete that file if the project is gone"
)


def link_output(store: Store, record: Record, output: str, path: Path) -> None:
    """Make `path` a name for an output: a link, or a folder of links with its record.json.

    Replaces what was there. A folder is there whole or, for a moment, not at all.
    """
    path = Path(os.path.abspath(path))
    made = record["outputs"][output]
    with store.explain_write_errors():
        _save_name(store, path, record["key"], output)
        path.parent.mkdir(parents=True, exist_ok=True)
        if "files" in made:
            inner = made["files"] | made["aside"]
            targets = {name: store.object_path(file["sha256"]) for name, file in inner.items()}
            targets["record.json"] = store.record_path(record["key"])
            _link_folder(store, path, targets)
        else:
            symlink_atomic(store, path, store.object_path(made["sha256"]))


def _save_name(store: Store, path: Path, key: str, output: str) -> Name:
    """Write a name down."""
    name = {
        "path": _stored_path(store, path),
        "project": _stored_path(store, _project_of(store, path)),
    }
    name |= {"key": key, "output": output}
    sealed.write_atomic(_name_file(store, path), sealed.dumps(name), read_only=True)
    return name


def symlink_atomic(store: Store, path: Path, target: Path) -> None:
    """Make `path` a link to something in the store, a folder that is worked in for example."""
    path = Path(os.path.abspath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.parent / f".{path.name}.link"
    while True:
        try:
            _symlink(store, draft, target)
            os.replace(draft, path)
            return
        except FileExistsError:  # of a process that was killed here, or names it just now
            draft.unlink(missing_ok=True)
        except FileNotFoundError:  # that one took ours for its own
            continue


def _link_folder(store: Store, path: Path, targets: Mapping[str, Path]) -> None:
    """A folder cannot be replaced as a file can, so one process at a time does it."""
    with lease(store.root / "leases", f"name-{_name_file(store, path).name}"):
        for left in path.parent.glob(f".{glob.escape(path.name)}.{'[0-9a-f]' * 8}"):
            shutil.rmtree(left)  # by a process that was killed here
        if path.is_dir() and all(
            os.path.realpath(path / name) == os.path.realpath(target)
            for name, target in targets.items()
        ):
            return
        draft, old = _temp_sibling(path), _temp_sibling(path)
        for name, target in targets.items():
            (draft / name).parent.mkdir(parents=True, exist_ok=True)
            _symlink(store, draft / name, target)
        if path.is_dir() and not path.is_symlink():
            os.replace(path, old)
            os.replace(draft, path)
            shutil.rmtree(old)
        else:
            os.replace(draft, path)


def _temp_sibling(path: Path) -> Path:
    return path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}"


def _symlink(store: Store, path: Path, target: Path) -> None:
    """Relative where name and store lie in the project that we are in."""
    here = Path.cwd()
    inside = path.is_relative_to(here) and store.root.is_relative_to(here)
    path.symlink_to(os.path.relpath(target, path.parent) if inside else target)


def _stored_path(store: Store, path: Path) -> str:
    """A path as the store writes it down: from its own folder, where it lies beside that."""
    beside = path.is_relative_to(store.root.parent)
    return os.path.relpath(path, store.root) if beside else str(path)


def _project_of(store: Store, path: Path) -> Path:
    """The project that a name belongs to."""
    places = (Path.cwd(), store.root.parent)
    return next((place for place in places if path.is_relative_to(place)), path.parent)


def _name_file(store: Store, path: Path) -> Path:
    """Where a name is written down."""
    path = Path(os.path.abspath(path))
    digest = hashlib.sha256(_stored_path(store, path).encode()).hexdigest()
    return store.root / "links" / digest[:32]


def find_name(store: Store, path: Path) -> Name | None:
    """What a name stands for, or stood for before it was deleted."""
    path = Path(os.path.abspath(path))
    file = _name_file(store, path)
    try:
        return _load_name(file)
    except FileNotFoundError:
        return None
    except Damaged:
        if (name := _restore_name(store, path, _output_index(store))) is None:
            store.quarantine(file, f"the damaged name of {path}, where there is no link")
        return name


def _load_name(file: Path) -> Name:
    """A name as it is written down.

    Raises:
        Damaged: the file is not as it was written.
    """
    content = file.read_bytes()
    try:
        return sealed.loads(content, file)
    except Damaged:
        try:  # from before names were sealed
            name: Name = json.loads(content)
            path = hashlib.sha256(name["path"].encode()).hexdigest()[:32]
            if set(name) - {"project"} == {"path", "key", "output"} and path == file.name:
                return name
        except (ValueError, TypeError, KeyError, AttributeError):
            pass
        raise


def _output_index(store: Store) -> dict[str, tuple[str, str]]:
    """What a link leads to, a content's digest or a folder's key → (key, output)."""
    found: dict[str, tuple[str, str]] = {}
    for record in store.records():
        for output, made in record["outputs"].items():
            found.setdefault(made.get("sha256", record["key"]), (record["key"], output))
    return found


def _restore_name(store: Store, path: Path, outputs: Mapping[str, tuple[str, str]]) -> Name | None:
    """Write a name down from its link; None where there is no link to what the store made."""
    made = _output_behind(store, path, outputs)
    return None if made is None else _save_name(store, path, *made)


def _output_behind(
    store: Store, path: Path, outputs: Mapping[str, tuple[str, str]]
) -> tuple[str, str] | None:
    """Which action's output a link, or a folder of links, leads to."""
    is_folder = path.is_dir() and not path.is_symlink()
    target = Path(os.path.realpath(path / "record.json" if is_folder else path))
    inside = target.is_relative_to(os.path.realpath(store.root))
    return outputs.get(target.stem) if inside else None


def read_names(store: Store, all_links: bool = False) -> tuple[dict[Path, Name], list[Path]]:
    """Every name that was ever made, by the file that it is written down in.

    Damaged ones of the project that we are in are written down anew, from their links, and with
    `all_links` also those that are not written down at all. The second list is of the files that
    were damaged and for which there is no link here.
    """
    found: dict[Path, Name] = {}
    damaged = set()
    for file in sorted((store.root / "links").glob("[0-9a-f]" * 32)):
        try:
            found[file] = _load_name(file)
        except IsADirectoryError:  # nothing of ours
            continue
        except Damaged:
            damaged.add(file)
    if not (damaged or all_links):
        return found, []
    outputs = _output_index(store)
    named = {(name["key"], name["output"]) for name in found.values()}
    for path in _find_links(store):
        file = _name_file(store, path)
        lost = all_links and file not in found and _output_behind(store, path, outputs) not in named
        if (file in damaged or lost) and (name := _restore_name(store, path, outputs)):
            log.warning(f"store: the name of {path} was damaged or gone and is written down again")
            found[file] = name
            damaged.discard(file)
    return found, sorted(damaged)


def _find_links(store: Store) -> Iterator[Path]:
    """All that can be a name in the folder that we are in: links, and folders with a record."""
    for folder, folders, names in os.walk(Path.cwd()):
        here = Path(folder)
        if here != Path.cwd() and "record.json" in names:
            folders.clear()
            yield here
            continue
        yield from (here / name for name in (*names, *folders) if (here / name).is_symlink())
        folders[:] = [n for n in folders if not n.startswith(".") and here / n != store.root]


def last_record(store: Store, path: Path) -> Record | None:
    """The action that a name stands for, or stood for before it was deleted."""
    name = find_name(store, path)
    return store.record(name["key"]) if name else None


def all_names(store: Store) -> Iterator[tuple[Path, Name]]:
    """Every name that was ever made, and the file it is written down in."""
    found, lost = read_names(store)
    if lost:
        raise Damaged(f"{lost[0]} is damaged, and {NO_LINK_LEFT}")
    for file, name in sorted(found.items()):
        places = {"path": name["path"], "project": name.get("project", "..")}  # not told, once
        yield file, name | {n: os.path.normpath(store.root / p) for n, p in places.items()}


def live_names(store: Store) -> Iterator[Name]:
    """The names that still point into the store, and what they point to: {…, "target"}.

    Those too that this user may not look at: that they are gone is not known.
    """
    root = os.path.realpath(store.root)
    for _, name in all_names(store):
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


def broken_names(store: Store) -> list[Path]:
    """The names, of whichever project, whose record or objects are gone from the store."""
    return [Path(name["path"]) for name in live_names(store) if not _is_complete(store, name)]


def _is_complete(store: Store, name: Name) -> bool:
    record = store.record(name["key"])
    if record is None:
        return False
    files = list_files(record["outputs"][name["output"]])
    return all(store.object_path(file["sha256"]).exists() for file in files)


def remove_name(path: Path) -> None:
    """Remove a name: a link, or a folder of links."""
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def record_of(store: Store, path: Path) -> Record:
    """The record of the action behind a name.

    Raises:
        ValueError: the store made no such name.
    """
    wanted = os.path.abspath(path)
    for name in live_names(store):
        if wanted == name["path"] or wanted.startswith(name["path"] + os.sep):
            target = name["target"]
            is_folder = target.endswith(".json")
            record = store.record(target.removesuffix(".json") if is_folder else name["key"])
            if record is None:
                raise ValueError(
                    f"the record of {path} is damaged or gone from the store {store.root}; "
                    "`olmo store verify`, then the command that made it, makes it anew"
                )
            if is_folder or target in {file["sha256"] for file in output_files(record)}:
                return record
    raise ValueError(f"expected a name that the store {store.root} made, found {path}")


def missing_projects(store: Store) -> list[Path]:
    """The projects that have names here and are not where they were."""
    found = {Path(name["project"]) for _, name in all_names(store)}
    return sorted(project for project in found if _is_missing(project))


def _is_missing(project: Path) -> bool:
    try:
        return not os.listdir(project)  # nothing is mounted there
    except PermissionError:
        return False
    except (FileNotFoundError, NotADirectoryError):
        return True


def names_of_project(store: Store, project: Path) -> dict[str, Path]:
    """A project's names, and the files they are written down in.

    Raises:
        ValueError: it has none here.
    """
    project = Path(os.path.abspath(project))
    found = {n["path"]: file for file, n in all_names(store) if n["project"] == str(project)}
    if not found:
        raise ValueError(f"expected a project that has names in {store.root}, found {project}")
    return found
