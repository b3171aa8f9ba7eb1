"""Which files a data set is made from: local ones, or a table of them.

A table is tab-separated: url, bytes, sha256, licence. What is not known yet is empty; the first
download of a file tells it (trust on first use), and later ones must agree.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import urlparse

from olmo.io import file_kinds, foreign, sealed
from olmo.io.patterns import matching
from olmo.runtime.urls import entrusted

COLUMNS = ("url", "bytes", "sha256", "licence")
RESULTS = ("eval", "hf")  # folders in which snakemake takes any file for an output of its own


@dataclass(frozen=True)
class Source:
    """One file of a data set: a name that is safe in paths, where it is, what it should be."""

    name: str
    place: str
    bytes: int | None = None
    sha256: str | None = None
    licence: str = ""

    def allows(self, size: int, sha256: str) -> bool:
        """Whether a file of so many bytes and this sha256 is what is known of it."""
        return self.bytes in (None, size) and self.sha256 in (None, sha256)


def read(path: Path) -> list[Source]:
    """The files of a table, in order, each named by its url, which is public (olmo.runtime.urls).

    Raises:
        ValueError: other columns; a number of bytes that is none; a sha256 that is none.
    """
    lines = file_kinds.text_of(path, str(path)).splitlines()
    header, *rows = [line.split("\t") for line in lines or [""]]
    if tuple(header) not in (COLUMNS, COLUMNS[:3]):
        raise ValueError(f"{path}: expected the columns {', '.join(COLUMNS)}; found {header}")
    found = []
    for number, row in enumerate(rows, 2):
        url, size, digest, licence, *rest = [*row, "", "", ""][: max(4, len(row))]
        well = url and re.fullmatch("[0-9]{0,18}", size) and not rest
        if not well or not re.fullmatch("([0-9a-f]{64})?", digest):
            raise ValueError(
                f"{path}, line {number}: expected url, bytes, sha256 (64 hexadecimal digits) and "
                f"licence between tabs; found {row}"
            )
        known = int(size) if size else None
        found.append(Source("", url, known, digest or None, licence))
    places = entrusted([source.place for source in found])
    return named([replace(s, place=place) for s, place in zip(found, places, strict=True)])


def complete(path: Path, arrived: dict[str, tuple[int, str]]) -> None:
    """Write (bytes, sha256) of files that have arrived into a table, where it did not know them."""
    rows, before = [COLUMNS], path.read_text(encoding="utf-8")
    given = [line.split("\t")[0] for line in before.splitlines()[1:]]  # with their secrets
    for url, source in zip(given, read(path), strict=True):
        size, digest = arrived.get(source.place, (source.bytes, source.sha256))
        size, digest = source.bytes or size, source.sha256 or digest
        rows.append((url, str(size or ""), digest or "", source.licence))
    text = "".join("\t".join(row) + "\n" for row in rows)
    if text != before:
        sealed.write(path, text, alone=True)


def local(patterns: Iterable[str], whose: Path, key: str = "sources.files") -> list[Source]:
    """The files of this machine that patterns name (olmo.io.patterns), each pattern's in order.

    `whose` is the recipe that names them, under `key`.
    """
    found = []
    for pattern in patterns:
        if "://" in pattern:
            raise ValueError(
                f"{whose}: {key} are files of this machine, found the URL {pattern}; download it "
                "first, or take sources from a table of URLs (sources: {table: FILE.tsv})"
            )
        try:
            matches = matching(pattern)
        except ValueError as error:
            raise ValueError(f"{whose}: {key}: {error}") from error
        if not matches:
            raise ValueError(
                f"{whose}: {key} names {pattern}, which does not exist (looked in "
                f"{os.getcwd()}); put the file there or take the line out"
            )
        if taken := next((m for m in matches if os.path.dirname(m) in RESULTS), None):
            raise ValueError(
                f"{whose}: {key} names {taken}, but {os.path.dirname(taken)}/ is for results, one "
                "a run; move the file to another folder"
            )
        made = f"data/{whose.stem}/"
        if taken := next((m for m in matches if os.path.normpath(m).startswith(made)), None):
            raise ValueError(
                f"{whose}: {key} names {taken}, but {made} is for what is made of them; begin "
                f"the pattern {pattern} in the corpus's own folder"
            )
        found += [Source("", place) for place in matches]
    return named(found)


def named(sources: list[Source]) -> list[Source]:
    """Give each file a name that is safe in paths and unlike the others'.

    The last part of its place, without the ending; where two are alike, with the folders before
    it. A place that is named twice, to be seen twice, has one name.
    """
    places = [urlparse(s.place).path if "://" in s.place else s.place for s in sources]
    parts = [[part for part in place.split("/") if part] for place in places]
    different = len({source.place for source in sources})
    for depth in range(1, max([1, *map(len, parts)]) + 1):
        names = [foreign.part(safe("-".join(part[-depth:])), "sources") for part in parts]
        if len(set(names)) == different:
            return [replace(s, name=name) for s, name in zip(sources, names, strict=True)]
    first: dict[str, str] = {}
    for name, source in zip(names, sources, strict=True):
        if first.setdefault(name, source.place) != source.place:
            raise ValueError(
                f"two sources would have the name {name}: {first[name]} and {source.place}"
            )
    raise AssertionError("as many names as places, though not at once")


def safe(name: str) -> str:
    """A name without endings, spaces, leading dashes or anything else that a shell minds."""
    stem = re.sub(r"(\.(json|jsonl))?\.gz$|\.jsonl?$|\.parquet$|\.npy$", "", name)
    return re.sub(r"[^A-Za-z0-9._-]", "_", stem).lstrip("-.") or "_"


def quoted(place: str) -> str:
    """A place in which no # stands, so that one can part it from another."""
    return place.replace("%", "%25").replace("#", "%23")


def unquoted(place: str) -> str:
    return place.replace("%23", "#").replace("%25", "%")
