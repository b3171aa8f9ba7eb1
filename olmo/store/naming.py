"""Names: the paths of a project that link into a store.

A file is a link to its object, a folder is one of links, with `record.json` in it. Each name is
also written to the store's `links/`, a sealed file each: `gc` keeps the objects of a name, and a
deleted name is still known, to report why its stage runs again. A damaged file there is restored
from the link itself.

If the store lies in the project, links and the paths in `links/` are relative: the folder can be
moved or copied as a whole. A name is written down with its project, or `gc` would take names on a
disk that is not mounted for deleted ones.
"""

import contextlib
import difflib
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
    "no link below this folder shows which name it was; run `olmo store verify` in the project of "
    "that name, or delete the file if the project was deleted"
)


def link_output(store: Store, record: Record, output: str, path: Path) -> None:
    """Make `path` a name of an output: a link, or a folder of links with record.json.

    Replaces what exists there; a folder is missing for a moment.
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
    """Write a name to links/, unless it is there: to write it takes two calls of fsync."""
    name = {
        "path": stored_path(store, path),
        "project": stored_path(store, _project_of(store, path)),
    }
    name |= {"key": key, "output": output}
    file, text = name_file(store, path), sealed.dumps(name)
    with contextlib.suppress(FileNotFoundError, UnicodeDecodeError):
        if file.read_text(encoding="utf-8") == text:
            return name
    sealed.write_atomic(file, text, read_only=True)
    return name


def symlink_atomic(store: Store, path: Path, target: Path) -> None:
    """Make `path` a link to a path in the store: an object, or the work folder of an action."""
    path = Path(os.path.abspath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.parent / f".{path.name}.link"
    while True:
        try:
            _symlink(store, draft, target)
            os.replace(draft, path)
            return
        except FileExistsError:  # of a killed process, or one that does the same now
            draft.unlink(missing_ok=True)
        except FileNotFoundError:  # that process moved our link
            continue


def _link_folder(store: Store, path: Path, targets: Mapping[str, Path]) -> None:
    """Replace a folder by one of links; it takes two renames, so one process at a time does it."""
    with lease(store.root / "leases", f"name-{name_file(store, path).name}"):
        for left in path.parent.glob(f".{glob.escape(path.name)}.{'[0-9a-f]' * 8}"):
            shutil.rmtree(left)  # of a killed process
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
    """Make a link, a relative one if the name and the store lie in the current project."""
    here = Path.cwd()
    inside = path.is_relative_to(here) and store.root.is_relative_to(here)
    path.symlink_to(os.path.relpath(target, path.parent) if inside else target)


def stored_path(store: Store, path: Path) -> str:
    """A path as in links/: relative to the store if it lies below the store's parent folder."""
    is_near = path.is_relative_to(store.root.parent)
    return os.path.relpath(path, store.root) if is_near else str(path)


def _project_of(store: Store, path: Path) -> Path:
    """The project that a name belongs to."""
    places = (Path.cwd(), store.root.parent)
    return next((place for place in places if path.is_relative_to(place)), path.parent)


def name_file(store: Store, path: Path) -> Path:
    """The file of a name in links/."""
    path = Path(os.path.abspath(path))
    digest = hashlib.sha256(stored_path(store, path).encode()).hexdigest()
    return store.root / "links" / digest[:32]


def find_name(store: Store, path: Path, repair: bool = True) -> Name | None:
    """What a name stands for, or stood for before it was deleted; None if it is unknown."""
    path = Path(os.path.abspath(path))
    file = name_file(store, path)
    try:
        return load_name(file)
    except FileNotFoundError:
        return None
    except Damaged:
        if not repair:
            return None
        if (name := _restore_name(store, path, _output_index(store))) is None:
            store.quarantine(file, f"the name {path}, which has no link now")
        return name


def load_name(file: Path) -> Name:
    """A name from its file in links/. Raises Damaged."""
    content = file.read_bytes()
    try:
        return sealed.loads(content, file)
    except Damaged:
        try:  # an old version did not seal names
            name: Name = json.loads(content)
            path = hashlib.sha256(name["path"].encode()).hexdigest()[:32]
            if set(name) - {"project"} == {"path", "key", "output"} and path == file.name:
                return name
        except (ValueError, TypeError, KeyError, AttributeError):
            pass
        raise


def _output_index(store: Store) -> dict[str, tuple[str, str]]:
    """The target of a link (an object's digest, or a folder's key) → (key, output)."""
    found: dict[str, tuple[str, str]] = {}
    for record in store.records():
        for output, made in record["outputs"].items():
            found.setdefault(made.get("sha256", record["key"]), (record["key"], output))
    return found


def _restore_name(store: Store, path: Path, outputs: Mapping[str, tuple[str, str]]) -> Name | None:
    """Write a name to links/ from its link; None if `path` does not link to an output."""
    made = _output_behind(store, path, outputs)
    return None if made is None else _save_name(store, path, *made)


def _output_behind(
    store: Store, path: Path, outputs: Mapping[str, tuple[str, str]]
) -> tuple[str, str] | None:
    """The (key, output) that a link, or a folder of links, leads to."""
    is_folder = path.is_dir() and not path.is_symlink()
    target = Path(os.path.realpath(path / "record.json" if is_folder else path))
    inside = target.is_relative_to(os.path.realpath(store.root))
    return outputs.get(target.stem) if inside else None


def read_names(store: Store, all_links: bool = False) -> tuple[dict[Path, Name], list[Path]]:
    """Every name that was ever made, by its file in links/; and the damaged files.

    Damaged ones of the current project are restored from their links; with `all_links` missing
    ones too. The second list is of the damaged files without a link here.
    """
    found: dict[Path, Name] = {}
    damaged = set()
    for file in sorted((store.root / "links").glob("[0-9a-f]" * 32)):
        try:
            found[file] = load_name(file)
        except IsADirectoryError:  # not ours
            continue
        except Damaged:
            damaged.add(file)
    if not (damaged or all_links):
        return found, []
    outputs = _output_index(store)
    named = {(name["key"], name["output"]) for name in found.values()}
    for path in _find_links(store):
        file = name_file(store, path)
        lost = all_links and file not in found and _output_behind(store, path, outputs) not in named
        if (file in damaged or lost) and (name := _restore_name(store, path, outputs)):
            log.warning(f"store: the name of {path} was damaged or missing, and was restored")
            found[file] = name
            damaged.discard(file)
    return found, sorted(damaged)


def _find_links(store: Store) -> Iterator[Path]:
    """All paths that may be names in the current folder: links, and folders with a record."""
    for folder, folders, names in os.walk(Path.cwd()):
        here = Path(folder)
        if here != Path.cwd() and "record.json" in names:
            folders.clear()
            yield here
            continue
        yield from (here / name for name in (*names, *folders) if (here / name).is_symlink())
        folders[:] = [n for n in folders if not n.startswith(".") and here / n != store.root]


def last_record(store: Store, path: Path) -> Record | None:
    """The record of the action that a name stands for, or stood for before it was deleted."""
    name = find_name(store, path)
    return store.record(name["key"]) if name else None


def all_names(store: Store) -> Iterator[tuple[Path, Name]]:
    """Every name that was ever made, with its file in links/. Raises Damaged."""
    found, lost = read_names(store)
    if lost:
        raise Damaged(f"{lost[0]} is damaged, and {NO_LINK_LEFT}")
    for file, name in sorted(found.items()):
        places = {
            "path": name["path"],
            "project": name.get("project", ".."),
        }  # old versions had none
        yield file, name | {n: os.path.normpath(store.root / p) for n, p in places.items()}


def live_names(store: Store) -> Iterator[Name]:
    """The names that still link into the store, with their "target": the name of a file in it.

    Names that this user may not read are included, with target "": they may still exist.
    """
    root = os.path.realpath(store.root)
    for _, name in all_names(store):
        path = Path(name["path"])
        try:
            probe = path / "record.json" if path.is_dir() and not path.is_symlink() else path
            is_link = probe.is_symlink()
        except PermissionError:
            yield name | {"target": ""}
            continue
        target = Path(os.path.realpath(probe))
        if is_link and target.is_relative_to(root):
            yield name | {"target": target.name}


def paths_in_store(store: Store) -> dict[str, str]:
    """The path of each content and each action, by its digest or key, deleted paths too.

    A path of the current project, if there is one, relative to it.
    """
    here, found = os.getcwd(), dict[str, str]()
    names = {name["path"]: name["key"] for _, name in all_names(store)}
    for path in sorted(names, key=lambda path: (not path.startswith(here + os.sep), path)):
        shown = os.path.relpath(path, here) if path.startswith(here + os.sep) else path
        found.setdefault(names[path], shown)
        found.setdefault(os.path.basename(os.path.realpath(path)), shown)
    return found


def broken_names(store: Store) -> list[Path]:
    """The names, of all projects, whose record or objects are missing in the store."""
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
                    f"the record of {path} is damaged or missing in the store {store.root}; "
                    "run `olmo store verify`, then the command that made it"
                )
            if is_folder or target in {file["sha256"] for file in output_files(record)}:
                return record
    raise unknown_name_error(store, path)


def unknown_name_error(store: Store, path: Path | str) -> ValueError:
    """The error for a path that the store did not make, with the most similar one that it did."""
    known = [os.path.relpath(name["path"]) for _, name in all_names(store)]
    near = difflib.get_close_matches(str(path), known, 1, cutoff=0.0)
    remedy = f"the nearest is {near[0]}" if near else "run snakemake first"
    return ValueError(f"expected a name that the store {store.root} made, found {path}; {remedy}")


def missing_projects(store: Store) -> list[Path]:
    """The projects with names in this store whose folder is missing or empty."""
    found = {Path(name["project"]) for _, name in all_names(store)}
    return sorted(project for project in found if _is_missing(project))


def _is_missing(project: Path) -> bool:
    try:
        return not os.listdir(project)  # empty: not mounted
    except PermissionError:
        return False
    except (FileNotFoundError, NotADirectoryError):
        return True


def names_of_project(store: Store, project: Path) -> dict[str, Path]:
    """A project's names, and their files in links/. Raises ValueError if it has none."""
    project = Path(os.path.abspath(project))
    found = {n["path"]: file for file, n in all_names(store) if n["project"] == str(project)}
    if not found:
        raise ValueError(f"expected a project that has names in {store.root}, found {project}")
    return found


def check_not_in_store(*places: Path) -> None:
    """Raises ValueError if a file or folder to be written is, or contains, a link into a store.

    A write follows the link: it would change an object (root is not stopped by its mode).
    """
    for place in places:
        inner = place.iterdir() if place.is_dir() else ()
        if any(is_in_store(path) for path in (place, *inner)):
            raise ValueError(
                f"expected a place of your own to write to, found {place}, which the pipeline made "
                "of links into its store; name another one"
            )


def is_in_store(path: Path) -> bool:
    """Whether a path leads into a store, recognized by its folders."""
    parents = Path(os.path.realpath(path)).parents
    return any((p / "objects").is_dir() and (p / "actions").is_dir() for p in parents)
