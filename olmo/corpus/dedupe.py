"""The toolkit's `dolma dedupe`, run on files of documents: its requests, filters and output.

The toolkit skips what it cannot read and reports success, so its output is compared with its
input.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from olmo.corpus.documents import TRAIN
from olmo.corpus.dolma import Dolma, time_limit
from olmo.io import gz
from olmo.runtime.log import log

if TYPE_CHECKING:
    import polars

# Attribute names, as the toolkit's taggers have them. The first two are for whole documents.
OVERLAP, DUPLICATE, PARAGRAPH = "dedupe__overlap", "dedupe__duplicate", "dedupe__paragraph"
REASONS = {OVERLAP: "overlap", DUPLICATE: "duplicate", PARAGRAPH: "duplicate-paragraph"}
MAX_NESTING = 127  # of lists and objects, in the toolkit's JSON decoder
GZ_RATIO = 20  # bytes of text in a byte of gz, at most in practice: for a time limit
Spans = list[list[float]]  # start, end (characters), share


@dataclass(frozen=True)
class Search:
    """What `dolma dedupe` looks for; the parameters of the stage `attributes`."""

    exact: bool
    paragraphs: bool
    ngram: int
    overlap: float

    def request(self, kind: str) -> dict[str, Any]:
        """The arguments of the worker's `dedupe` for one kind of attribute."""
        if kind == OVERLAP:
            # The toolkit marks every line for a share of 0. No line has 1e9 n-grams.
            return {"by": "ngrams", "ngram": self.ngram, "least": self.overlap or 1e-9}
        return {"by": "text" if kind == DUPLICATE else "paragraphs"}


@dataclass(frozen=True)
class TrainFile:
    """A file of training documents, and what its table has about it."""

    path: Path
    table: Path
    count: int
    text_bytes: int

    @classmethod
    def from_table(cls, path: Path, table: Path) -> TrainFile:
        rows = read_train_rows(table)
        return cls(path, table, rows.height, int(rows["bytes"].sum()))


def read_train_rows(table: Path) -> polars.DataFrame:
    """A documents' table, its training documents only, in the order of their file."""
    import polars

    return polars.read_parquet(table).filter(polars.col("split") == TRAIN).sort("row")


def make_scratch(progress: Path) -> Path:
    """An empty folder for the toolkit."""
    scratch = progress / "scratch"
    shutil.rmtree(scratch, ignore_errors=True)
    (scratch / "in" / "documents").mkdir(parents=True)
    return scratch


def fill_filter(
    dolma: Dolma, scratch: Path, kind: str, documents: list[Path], search: Search
) -> None:
    """Add documents to a filter."""
    names = link_documents(scratch, documents)
    limit = time_limit(sum(path.stat().st_size for path in documents) * GZ_RATIO)
    try:
        toolkit_output = request_dedupe(dolma, limit, scratch, kind, names, search)
    except ValueError:
        for path in documents:
            check_readable(path, partial(locate_line, path))
        raise
    for path, name in zip(documents, names, strict=True):
        output = scratch / attributes_path(name, kind)
        if not output.exists() or count_lines(output) != count_lines(path):
            log.info(toolkit_output)
            raise ValueError(f"the toolkit did not read all of {path}; its output is above")
    shutil.rmtree(scratch / "in")
    (scratch / "in" / "documents").mkdir(parents=True)


def find_attributes(
    dolma: Dolma, scratch: Path, files: list[TrainFile], search: Search
) -> Iterator[list[bytes]]:
    """For each file its attributes, a JSON line per document; the filters learn the documents."""
    names = link_documents(scratch, [file.path for file in files])
    limit = time_limit(sum(file.text_bytes for file in files))
    tables = [read_train_rows(file.table) for file in files]
    found: list[list[dict[str, Spans]]] = [[{} for _ in range(file.count)] for file in files]

    def find(kind: str) -> None:
        try:
            toolkit_output = request_dedupe(
                dolma, limit, scratch, kind, names, search, read_only=kind == OVERLAP
            )
        except ValueError:
            for file, table in zip(files, tables, strict=True):
                check_readable(file.path, partial(locate_row, table))
            raise
        for name, table, rows in zip(names, tables, found, strict=True):
            # Dropped documents are not searched for paragraphs.
            searched = [row for row, spans in enumerate(rows) if kind != PARAGRAPH or not spans]
            attributes = scratch / attributes_path(name, kind)
            read_spans_into(rows, attributes, kind, table, searched, toolkit_output)

    document_kinds = [k for k, on in ((OVERLAP, search.ngram), (DUPLICATE, search.exact)) if on]
    for kind in document_kinds:
        find(kind)
    if search.paragraphs:
        if any(spans for rows in found for spans in rows):
            drops = {"attributes": document_kinds, "exclude": document_kinds, "cut": []}
            dolma.request("mix", limit, folder=str(scratch), documents=names, **drops)
            names = [name.replace("in/", "mixed/", 1) for name in names]
        find(PARAGRAPH)
    for table, rows in zip(tables, found, strict=True):
        yield [
            json.dumps({"id": identity, "attributes": spans}).encode() + b"\n"
            for identity, spans in zip(table["id"], rows, strict=True)
        ]


def read_spans_into(
    rows: list[dict[str, Spans]],
    attributes: Path,
    kind: str,
    table: polars.DataFrame,
    searched: list[int],
    toolkit_output: str,
) -> None:
    """Add the spans of one kind, which the toolkit wrote to `attributes`, to `rows`.

    Raises ValueError unless the file has each of the rows `searched`, once, in order.
    """
    expected = table["id"].gather(searched).to_list()
    lines = []
    if attributes.exists():
        with gz.reading(attributes) as file:
            lines = [json.loads(line) for line in file]
    if (ids := [line["id"] for line in lines]) != expected:
        pairs = zip_longest(ids, expected)
        row = next(row for row, (one, other) in enumerate(pairs) if one != other)
        place = locate_row(table, searched[row]) if row < len(searched) else table["file"][0]
        log.info(toolkit_output)
        raise ValueError(
            f"{place}: expected attributes of {len(expected):,} documents from the toolkit, in "
            f"their order, found {len(lines):,}; its output is above"
        )
    for row, line in zip(searched, lines, strict=True):
        if spans := line["attributes"].get(kind):
            rows[row][kind] = spans


def request_dedupe(
    dolma: Dolma,
    limit: float,
    scratch: Path,
    kind: str,
    documents: list[str],
    search: Search,
    read_only: bool = False,
) -> str:
    """Run `dolma dedupe` with the filter of one kind; the toolkit's output."""
    request = search.request(kind) | {"documents": documents, "name": kind, "bloom_filter": kind}
    return dolma.request("dedupe", limit, folder=str(scratch), read_only=read_only, **request)


def attributes_path(documents: str, kind: str) -> str:
    """Where the toolkit writes the attributes of a file of documents."""
    return documents.replace("/documents/", f"/attributes/{kind}/")


def link_documents(scratch: Path, documents: Iterable[Path]) -> list[str]:
    """Link files under names that the toolkit's globs accept: in a folder `documents/`."""
    names = []
    for number, path in enumerate(documents):
        names.append(f"in/documents/{number:05d}.gz")
        os.symlink(os.path.realpath(path), scratch / names[-1])
    return names


def count_lines(path: Path) -> int:
    with gz.reading(path) as lines:
        return sum(1 for _ in lines)


def check_readable(documents: Path, locate: Callable[[int], str]) -> None:
    """Raises ValueError for a line that `dolma tokens` can read and `dolma dedupe` cannot.

    `dolma dedupe` decodes all fields of a document, with another decoder (serde's). `locate` gives
    the origin of a line by its number from 0.
    """
    with gz.reading(documents) as lines:
        for at, line in enumerate(lines):
            if problem := find_unreadable(line):
                raise ValueError(
                    f"{locate(at)}: expected a document that dolma dedupe can read, found "
                    f"{problem}. Correct the source or leave it out, or remove dedupe and "
                    "decontaminate from the recipe"
                )


def find_unreadable(line: bytes) -> str | None:
    """What in a document's JSON `dolma dedupe` cannot read; None if it can read all."""
    depth = 0
    for bracket in re.findall(rb"[\[{\]}]", re.sub(rb'"(?:[^"\\]|\\.)*"', b"", line)):
        depth += 1 if bracket in b"[{" else -1
        if depth > MAX_NESTING:
            return f"more than {MAX_NESTING} lists and objects in one another"
    numbers: list[float] = []
    number = lambda text: numbers.append(float(text))  # noqa: E731
    try:
        json.loads(line, parse_int=number, parse_float=number)
    except ValueError:
        return "no JSON"
    return None if all(map(isfinite, numbers)) else "a number that does not fit into a float"


def locate_line(path: Path, row: int) -> str:
    return f"{path}:{row + 1}"


def locate_row(table: polars.DataFrame, row: int) -> str:
    return f"{table['file'][row]}:{table['line'][row]}"
