"""Checks of untrusted strings that become paths here: digests, names, files in a folder.

They come from a second store, a mirror, a list or a checkpoint's manifest, and are checked in this
one place before they are used. Each function returns its argument, or raises ValueError with its
source (`whose`), what was expected and what was found.

Imports nothing of ours.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

# The folders of a project with the outputs of its rules. Nothing in them is run or imported.
OUTPUT_FOLDERS = ("data", "checkpoints", "eval", "hf", "bench-results")
# What the pipeline itself writes there and the store does not link: listings, a journal, a run.
RESERVED = r"data/[^/]+/(damage\.log|[^/]+/(\d+|all)\.tsv)|checkpoints/[^/]+/run(/.*)?"
NAME_PATTERN = re.compile(rf"(?!({RESERVED})$)[^/]+(/[^./][^/]*)+")  # nothing hidden
RECORD_FILE = "record.json"
MAX_FILE_BYTES = 1 << 60
MAX_PART_BYTES = 200  # of one part of a path: file systems allow 255, and drafts have longer names


def check_digest(found: Any, whose: str) -> str:
    """A sha256 in hexadecimal."""
    if not isinstance(found, str) or not re.fullmatch("[0-9a-f]{64}", found):
        raise ValueError(
            f"{whose}: expected a sha256 of 64 hexadecimal digits, found {show(found)}"
        )
    return found


def check_byte_count(found: Any, whose: str) -> int:
    """A number of bytes of a file."""
    if type(found) is not int or not 0 <= found < MAX_FILE_BYTES:
        raise ValueError(f"{whose}: expected a number of bytes, found {show(found)}")
    return found


def check_relative(found: Any, whose: str) -> str:
    """A path of a file in a folder: relative, and inside the folder on every operating system."""
    is_clean = isinstance(found, str) and found.isprintable() and "\\" not in found
    parts = found.split("/") if is_clean else [""]
    if any(part in ("", ".", "..") or len(os.fsencode(part)) > MAX_PART_BYTES for part in parts):
        raise ValueError(
            f"{whose}: expected the name of a file inside its folder, found {show(found)}"
        )
    return str(found)


def check_part(found: Any, whose: str) -> str:
    """A name that is one part of a path."""
    if "/" in check_relative(found, whose):
        raise ValueError(f"{whose}: expected a name without /, found {show(found)}")
    return str(found)


def check_name(found: Any, whose: str) -> str:
    """A name of the store: a path below one of the folders of the rules' outputs."""
    top = check_relative(found, whose).partition("/")[0]
    if top not in OUTPUT_FOLDERS or not NAME_PATTERN.fullmatch(found):
        raise ValueError(
            f"{whose}: expected a name below {', '.join(OUTPUT_FOLDERS)}, found {show(found)}; "
            "nothing of it is pulled. Name the paths to pull, for example 'checkpoints/*'"
        )
    return str(found)


def resolve_inside(folder: Path, found: Any, whose: str) -> Path:
    """The path of that file in a folder; no link on the way may lead out of the folder."""
    path = folder / check_relative(found, whose)
    for step in (path, *path.parents):
        if step == folder:
            return path
        if step.is_symlink():
            raise ValueError(f"{whose}: {show(found)} would be written through the link {step}")
    raise AssertionError("a relative path is below its folder")


def check_no_overlap(names: Iterable[str], whose: str) -> None:
    """Raises ValueError if a name occurs twice, or is that of a file and of a folder."""
    count = Counter(list(names))  # of a dict its keys
    folders = {parent for name in count for parent in map(str, Path(name).parents)}
    if twice := sorted(name for name, n in count.items() if n > 1 or name in folders):
        raise ValueError(f"{whose}: expected each path once, found {show(twice[0])} twice")


def check_mapping(found: Any, whose: str) -> Mapping[str, Any]:
    """A JSON object."""
    if not isinstance(found, Mapping):
        raise ValueError(f"{whose}: expected a mapping, found {show(found)}")
    return found


def show(found: Any) -> str:
    """A value for an error message: ASCII, of 80 characters at most."""
    text = ascii(found)
    return text if len(text) <= 80 else f"{text[:77]}…"
