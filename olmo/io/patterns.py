"""Glob patterns for local files, with one meaning in recipes and training configs.

`*`, `?` and `[…]` as in the shell; `**` as a full path component matches any number of folders,
also none. Names that begin with a dot match only if the pattern has the dot.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from fnmatch import fnmatchcase
from functools import cache


def match_files(pattern: str) -> list[str]:
    """The files that match a pattern, sorted by path, independent of the locale.

    Below `**` each file counts once, even if several links lead to its folder. A pattern may also
    be the name of an existing file, brackets included. Empty without a match.

    Raises:
        ValueError: the pattern matches a folder, or is the name of a file and matches others too;
            a folder cannot be read.
    """
    parts = pattern.split("/")
    top = "/" if pattern.startswith("/") else ""
    real = cache(os.path.realpath) if "**" in parts else str  # without `**` a file may match twice
    once: dict[tuple[str, str], str] = {}
    for path in _expand(top, parts[1:] if top else parts):
        folder, name = os.path.split(path)
        once.setdefault((real(folder), name), path)
    found = set(once.values())
    if os.path.exists(pattern) and pattern not in found:
        if found:
            raise ValueError(
                f"{pattern} is a file, and as a pattern it matches {min(found)}; write the file as "
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
    """The paths below a folder that match the parts of a pattern; some may occur twice."""
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
    """A folder and all folders below it, each once; links are followed last."""
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
