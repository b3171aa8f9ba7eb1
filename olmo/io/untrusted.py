"""Strings from elsewhere that name things here: checked in this one place, before they are used.

A second store, a mirror, a list, a checkpoint's manifest: what they call a digest, a name or a
file becomes part of a path here. Each function returns what it was given, or raises ValueError
with whose it was, what was expected and what was found.

Imports nothing of ours.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

# The folders of a project that hold what the pipeline makes and the store names: the outputs of
# the rules. Nothing that is run or imported lies in them.
OUTPUT_FOLDERS = ("data", "checkpoints", "eval", "hf", "bench-results")
# Not what the pipeline itself writes there (listings, a journal, a run's folder); nothing hidden.
RESERVED = r"data/[^/]+/(damage\.log|[^/]+/(\d+|all)\.tsv)|checkpoints/[^/]+/run(/.*)?"
NAME_PATTERN = re.compile(rf"(?!({RESERVED})$)[^/]+(/[^./][^/]*)+")
RECORD_FILE = "record.json"
MAX_FILE_BYTES = 1 << 60  # of one file
MAX_PART_BYTES = 200  # of one part of a path: file systems allow 255, and drafts have longer names


def check_digest(found: Any, whose: str) -> str:
    """A sha256 in hexadecimal."""
    if not isinstance(found, str) or not re.fullmatch("[0-9a-f]{64}", found):
        raise ValueError(
            f"{whose}: expected a sha256 of 64 hexadecimal digits, found {_show(found)}"
        )
    return found


def check_byte_count(found: Any, whose: str) -> int:
    """A number of bytes."""
    if type(found) is not int or not 0 <= found < MAX_FILE_BYTES:
        raise ValueError(f"{whose}: expected a number of bytes, found {_show(found)}")
    return found


def check_relative(found: Any, whose: str) -> str:
    """The path of a file in a folder: relative, and no way out of it on any system."""
    well = isinstance(found, str) and found.isprintable() and "\\" not in found
    parts = found.split("/") if well else [""]
    if any(one in ("", ".", "..") or len(os.fsencode(one)) > MAX_PART_BYTES for one in parts):
        raise ValueError(
            f"{whose}: expected the name of a file inside its folder, found {_show(found)}"
        )
    return str(found)


def check_part(found: Any, whose: str) -> str:
    """A name that is one part of a path."""
    if "/" in check_relative(found, whose):
        raise ValueError(f"{whose}: expected a name without /, found {_show(found)}")
    return str(found)


def check_name(found: Any, whose: str) -> str:
    """A human name: a path below one of the folders that the pipeline makes."""
    top = check_relative(found, whose).partition("/")[0]
    if top not in OUTPUT_FOLDERS or not NAME_PATTERN.fullmatch(found):
        raise ValueError(
            f"{whose}: expected a name below {', '.join(OUTPUT_FOLDERS)}, found {_show(found)}; "
            "nothing of it is taken. Name the paths that you want, 'checkpoints/*' for example"
        )
    return str(found)


def resolve_inside(folder: Path, found: Any, whose: str) -> Path:
    """Where a file of that name goes in a folder; no link on the way leads out of it."""
    path = folder / check_relative(found, whose)
    for step in (path, *path.parents):
        if step == folder:
            return path
        if step.is_symlink():
            raise ValueError(f"{whose}: {_show(found)} would be written through the link {step}")
    raise AssertionError("an inner name lies below its folder")


def check_record(found: Any, key: str, whose: str) -> dict[str, Any]:
    """A store's record of the action `key`: everything in it that names a file here."""
    outputs = _check_mapping(_check_mapping(found, whose).get("outputs"), f"{whose}, outputs")
    if found.get("key") != key:
        raise ValueError(f"{whose}: it is another action's record")
    action = _check_mapping(found.get("action"), f"{whose}, action")
    if sorted(action) != ["inputs", "params", "stage", "version"]:
        raise ValueError(f"{whose}: expected an action, found {_show(action)}")
    _check_mapping(action["params"], f"{whose}, params")
    for given in _check_mapping(action["inputs"], f"{whose}, inputs").values():
        for one in given if isinstance(given, list) else [given]:
            check_digest(one, f"{whose}, inputs")
    for output, made in outputs.items():
        check_part(output, f"{whose}, outputs")
        where = f"{whose}, output {output}"
        for file in _check_files(_check_mapping(made, where), where):
            check_digest(_check_mapping(file, where).get("sha256"), where)
            check_byte_count(file.get("size"), where)
    for facts in ("facts", "conditions", "run"):
        _check_mapping(found.get(facts, {}), f"{whose}, {facts}")
    return dict(found)


def _check_files(made: Mapping[str, Any], where: str) -> list[Any]:
    """The files of an output."""
    if "files" not in made:
        return [made]
    inside, aside = _check_mapping(made["files"], where), _check_mapping(made.get("aside"), where)
    names = [check_relative(member, where) for member in (*inside, *aside)]
    check_no_overlap(names, where)
    if twice := sorted(set(inside) & set(aside)):
        raise ValueError(f"{where}: {_show(twice[0])} is there twice, as a file and as another")
    if any(one.split("/")[0] == RECORD_FILE for one in names):
        raise ValueError(
            f"{where}: expected no file {RECORD_FILE}, which the store makes; found one"
        )
    return [*inside.values(), *aside.values()]


def check_no_overlap(names: Iterable[str], whose: str) -> None:
    """Raises ValueError where a name is that of a file and of a folder at once."""
    names = list(names)
    folders = {parent for one in names for parent in map(str, Path(one).parents)}
    if twice := sorted(folders & set(names)):
        raise ValueError(f"{whose}: {_show(twice[0])} is there twice, as a file and as another")


def _check_mapping(found: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(found, Mapping):
        raise ValueError(f"{where}: expected a mapping, found {_show(found)}")
    return found


def _show(found: Any) -> str:
    said = ascii(found)
    return said if len(said) <= 80 else f"{said[:77]}…"
