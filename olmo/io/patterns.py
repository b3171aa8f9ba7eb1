"""Patterns for files of this machine: one meaning wherever they may be written.

`*`, `?` and `[…]` are the shell's, and `**`, as a whole part of a path, is any number of folders,
also none. Names that begin with a dot are hidden, unless the pattern has the dot.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from fnmatch import fnmatchcase
from functools import cache


def match_files(pattern: str) -> list[str]:
    """The files that a pattern names, in the order of their paths, the same in every locale.

    What is below `**` counts once, however many links lead to its folder. A pattern may also be
    a file's own name, brackets and all. Empty where there is none.

    Raises:
        ValueError: it names a folder, or both a file of this name and others; a folder cannot be
            read.
    """
    parts = pattern.split("/")
    top = "/" if pattern.startswith("/") else ""
    real = cache(os.path.realpath) if "**" in parts else str  # other patterns follow links as said
    once: dict[tuple[str, str], str] = {}
    for path in _expand(top, parts[1:] if top else parts):
        folder, name = os.path.split(path)
        once.setdefault((real(folder), name), path)
    found = set(once.values())
    if os.path.exists(pattern) and pattern not in found:
        if found:
            raise ValueError(
                f"{pattern} is a file, and as a pattern it names {min(found)}; write the file as "
                + glob.escape(pattern)
            )
        found = {pattern}
    folders = {path for path in found if os.path.isdir(path)}
    if folders and "**" not in parts:
        raise ValueError(
            f"{pattern}: expected files, found the folder {min(folders)}; end the pattern as the "
            "files do (*.gz), and write ** for any number of folders"
        )
    return sorted(found - folders)


def _expand(folder: str, parts: list[str]) -> Iterator[str]:
    """What matches the parts of a path below a folder; some of it may come more than once."""
    part, *rest = parts
    if part == "**":
        for inner in _walk_folders(folder):
            yield from _expand(inner, rest or ["*"])
        return
    names = [part]
    if glob.has_magic(part):
        hidden = part.startswith(".")
        names = [
            n for n in _list_names(folder) if fnmatchcase(n, part) and n.startswith(".") <= hidden
        ]
    for path in (os.path.join(folder, name) for name in names):
        if rest and os.path.isdir(path):
            yield from _expand(path, rest)
        elif not rest and os.path.lexists(path):
            yield path


def _walk_folders(top: str) -> Iterator[str]:
    """A folder and all that are below it, each once; links are followed after the rest."""
    seen, waiting = set(), [top]
    links: list[str] = []
    while waiting or links:
        folder = waiting.pop() if waiting else links.pop(0)
        if (place := os.path.realpath(folder)) in seen:
            continue
        seen.add(place)
        yield folder
        for name in sorted(_list_names(folder)):
            path = os.path.join(folder, name)
            if not name.startswith(".") and os.path.isdir(path):
                (links if os.path.islink(path) else waiting).append(path)


def _list_names(folder: str) -> list[str]:
    try:
        return os.listdir(folder or ".")
    except OSError as error:
        raise ValueError(f"{folder}: expected a folder to read: {error.strerror}") from error
