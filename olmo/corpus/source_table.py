"""Source tables: the files that a data set is made from, and local files that patterns match.

A table is tab-separated: url, bytes, sha256, licence. Unknown values are empty; the first download
of a file fills them in (trust on first use), and later ones must agree.
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import urlparse

from olmo.io import file_types, sealed, untrusted
from olmo.io.patterns import match_files
from olmo.runtime.urls import stash_secrets

COLUMNS = ("url", "bytes", "sha256", "licence")
# Text files are grouped into sources of about this many, or this many bytes.
GROUP_FILES, GROUP_BYTES = 1000, 64 << 20
GROUP = "texts:"  # begins a group's place
SUFFIXES = "jsonl?|ndjson|csv|tsv|txt|md|markdown|rst|text"
RESULTS = ("eval", "hf")  # folders in which snakemake takes any file for an output of a rule


@dataclass(frozen=True)
class Source:
    """One file of a data set: a name that is safe in paths, its place, its expected contents."""

    name: str
    place: str
    bytes: int | None = None
    sha256: str | None = None
    licence: str = ""
    mirrors: tuple[str, ...] = ()  # other places of the file
    parts: tuple[str, ...] = ()  # the text files of a group, each of which becomes a document

    @property
    def is_remote(self) -> bool:
        return "://" in self.place

    def allows(self, size: int, sha256: str) -> bool:
        """Whether a file of `size` bytes and this sha256 agrees with the table."""
        return self.bytes in (None, size) and self.sha256 in (None, sha256)


def read_stashing_secrets(path: Path) -> list[Source]:
    """The files of a table, in order, each named by its url without its secrets.

    The secrets of urls go to this process's environment, where downloads and commands that it
    starts find them (olmo.runtime.urls).

    Raises:
        ValueError: other columns; bytes that are not a number; a sha256 that is not one.
    """
    lines = file_types.read_text(path, str(path)).splitlines()
    header, *rows = [line.split("\t") for line in lines or [""]]
    if tuple(header) not in (COLUMNS, COLUMNS[:3]):
        raise ValueError(f"{path}: expected the columns {', '.join(COLUMNS)}; found {header}")
    found = []
    for number, row in enumerate(rows, 2):
        url, size, digest, licence, *rest = [*row, "", "", ""][: max(4, len(row))]
        is_valid = url and re.fullmatch("[0-9]{0,18}", size) and not rest
        if not is_valid or not re.fullmatch("([0-9a-f]{64})?", digest):
            raise ValueError(
                f"{path}, line {number}: expected url, bytes, sha256 (64 hexadecimal digits) and "
                f"licence between tabs; found {row}"
            )
        known = int(size) if size else None
        found.append(Source("", url, known, digest or None, licence))
    places = stash_secrets([source.place for source in found])
    return assign_names([replace(s, place=place) for s, place in zip(found, places, strict=True)])


def complete_table(path: Path, downloaded: dict[str, tuple[int, str]]) -> None:
    """Fill in the (bytes, sha256) of downloaded files where a table has none."""
    rows, before = [COLUMNS], path.read_text(encoding="utf-8")
    urls = [line.split("\t")[0] for line in before.splitlines()[1:]]  # with their secrets
    for url, source in zip(urls, read_stashing_secrets(path), strict=True):
        size, digest = downloaded.get(source.place, (source.bytes, source.sha256))
        size, digest = source.bytes or size, source.sha256 or digest
        rows.append((url, str(size or ""), digest or "", source.licence))
    text = "".join("\t".join(row) + "\n" for row in rows)
    if text != before:
        sealed.write_atomic(path, text, alone=True)


def find_local_files(
    patterns: Iterable[str],
    recipe: Path,
    key: str = "sources.files",
    is_grouped: Callable[[str], bool] | None = None,
) -> list[Source]:
    """The local files that patterns match (olmo.io.patterns), in the order of the patterns.

    `recipe` has the patterns, under `key`; error messages name both. Files that are grouped come
    last, as sources with `parts`.
    """
    found: list[Source] = []
    groups: dict[str, list[str]] = {}
    for pattern in patterns:
        if "://" in pattern:
            raise ValueError(
                f"{recipe}: {key}: expected local files, found the URL {pattern}; download it "
                "first, or use a table of URLs (sources: {table: FILE.tsv})"
            )
        try:
            matches = match_files(pattern)
        except ValueError as error:
            raise ValueError(f"{recipe}: {key}: {error}") from error
        if not matches:
            raise ValueError(
                f"{recipe}: {key} names {pattern}, which does not exist (looked in "
                f"{os.getcwd()}); put the file there or remove the line"
            )
        if taken := next((m for m in matches if os.path.dirname(m) in RESULTS), None):
            raise ValueError(
                f"{recipe}: {key} names {taken}, but {os.path.dirname(taken)}/ is for results, one "
                "per run; move the file to another folder"
            )
        made = f"data/{recipe.stem}/"
        if taken := next((m for m in matches if os.path.normpath(m).startswith(made)), None):
            raise ValueError(
                f"{recipe}: {key} names {taken}, but {made} is for outputs; begin the pattern "
                f"{pattern} in the folder of the corpus"
            )
        if taken := next((m for m in matches if not is_utf8(m)), None):
            raise ValueError(
                f"{recipe}: {key}: expected a name in UTF-8, found {taken!r}; rename it"
            )
        base = os.path.dirname(pattern.split("*")[0]) or "texts"
        texts = groups.setdefault(safe_name(base.replace("/", "-")), [])
        for place in matches:
            if is_grouped and is_grouped(place):
                texts.append(place)
            else:
                found.append(Source("", place))
    named = assign_names(found)
    names = {source.name: source.place for source in named}
    grouped = [group for base, places in groups.items() for group in group_texts(base, places)]
    if taken := next((names[group.name] for group in grouped if group.name in names), None):
        raise ValueError(f"{recipe}: {key}: {taken} has the name of a group of texts; rename it")
    return named + grouped


def is_utf8(name: str) -> bool:
    """Whether a file's name has no bytes that are not UTF-8 (in Python, surrogates)."""
    return not any("\ud800" <= letter <= "\udfff" for letter in name)


def group_texts(base: str, places: list[str]) -> list[Source]:
    """Text files as sources `base`-0, … of many, each file's by the hash of its place.

    A file more changes one source, unless their number, a power of two, grows with it.
    """
    size = sum(map(os.path.getsize, places))
    count = 1
    while count * GROUP_FILES < len(places) or count * GROUP_BYTES < size:
        count *= 2
    parts: list[list[str]] = [[] for _ in range(count)]
    for place in sorted(places):
        parts[zlib.crc32(place.encode()) % count].append(place)
    names = [f"{base}-{i}" for i in range(count)]
    return [
        Source(name, GROUP + name, parts=tuple(files))
        for name, files in zip(names, parts, strict=True)
        if files
    ]


def assign_names(sources: list[Source]) -> list[Source]:
    """Give each file a unique name that is safe in paths.

    The last part of its place, without the suffix; where two would be equal, with the folders
    before it, and at last with the suffix. A place that is listed twice, to be used twice, has one
    name.
    """
    places = [urlparse(s.place).path if s.is_remote else s.place for s in sources]
    parts = [[part for part in place.split("/") if part] for place in places]
    different = len({source.place for source in sources})
    deepest = max([1, *map(len, parts)])
    tries = [(depth, safe_name) for depth in range(1, deepest + 1)] + [(deepest, safe_letters)]
    for depth, clean in tries:
        names = [untrusted.check_part(clean("-".join(part[-depth:])), "sources") for part in parts]
        if len(set(names)) == different:
            return [replace(s, name=name) for s, name in zip(sources, names, strict=True)]
    first: dict[str, str] = {}
    for name, source in zip(names, sources, strict=True):
        if first.setdefault(name, source.place) != source.place:
            raise ValueError(
                f"two sources would have the name {name}: {first[name]} and {source.place}"
            )
    raise AssertionError("as many names as places, though not at once")


def safe_name(name: str) -> str:
    """A name without suffixes, spaces, leading dashes or characters that a shell interprets."""
    return safe_letters(
        re.sub(rf"(\.({SUFFIXES}))?\.(gz|zst)$|\.({SUFFIXES}|parquet|npy)$", "", name)
    )


def safe_letters(name: str) -> str:
    """A name with its suffixes, and otherwise as `safe_name`."""
    return re.sub(r"[^A-Za-z0-9._-]", "_", name).lstrip("-.") or "_"


def quote(place: str) -> str:
    """A place with its # escaped, since # separates a place from its mirrors."""
    return place.replace("%", "%25").replace("#", "%23")


def unquote(place: str) -> str:
    """The inverse of `quote`."""
    return place.replace("%23", "#").replace("%25", "%")
