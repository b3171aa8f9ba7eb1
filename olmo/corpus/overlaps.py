"""Overlaps with evaluation sets: lines that share n-grams with them, found by `dolma dedupe`.

The toolkit's filter is built once and then only read, so files are searched side by side. The
toolkit skips what it cannot read and reports success, so its output is compared with its input.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable
from functools import partial
from itertools import zip_longest
from math import isfinite
from pathlib import Path
from typing import Any

from olmo.corpus import bloom
from olmo.corpus.dedupe import OVERLAP, Spans, read_train_rows, write_marks
from olmo.corpus.documents import MAX_LINE_BYTES, parse_document, size_in_utf8
from olmo.corpus.dolma import Dolma, scratch_folder, time_limit
from olmo.data.order import available_memory
from olmo.io import gz
from olmo.runtime.log import log
from olmo.store.stage import Facts, Input, Inputs, Output, Unhashed, stage

# A document has thousands of n-grams, and one false positive among them drops it.
FALSE_POSITIVES = 1e-9
MAX_NESTING = 127  # of lists and objects, in the toolkit's JSON decoder
GZ_RATIO = 20  # bytes of text in a byte of gz, at most in practice: for a time limit


@stage(version=1)
def overlap_filter(
    against: Inputs, overlap_filter: Output, toolkit: str, dolma: Unhashed[Dolma], ngram: int
) -> Facts:
    """A Bloom filter of the n-grams of words in files of documents.

    Raises ValueError for too little memory, and for files that are not documents.
    """
    elements = count_text_bytes(against)  # a word has at least a byte, and begins one n-gram
    if not elements:
        log.warning(
            f"decontaminate: expected text in {len(against)} files to decontaminate against, found "
            "none, so nothing is dropped"
        )
    size = bloom.filter_bytes(elements, FALSE_POSITIVES)
    check_memory(size, elements)
    with scratch_folder(overlap_filter) as folder:
        bloom.write_filter(folder / OVERLAP, elements, FALSE_POSITIVES)
        names = link_documents(folder, against)
        limit = time_limit(sum(path.stat().st_size for path in against) * GZ_RATIO)
        try:
            toolkit_output = request_dedupe(dolma, limit, folder, names, ngram)
        except ValueError:
            for path in against:
                check_readable(path, partial(locate_line, path))
            raise
        for path, name in zip(against, names, strict=True):
            output = folder / attributes_path(name)
            if not output.exists() or count_lines(output) != count_lines(path):
                log.info(toolkit_output)
                raise ValueError(f"the toolkit did not read all of {path}; its output is above")
        os.replace(folder / OVERLAP, overlap_filter)
    return {"against": len(against), "filter_bytes": size}


@stage(version=1, conditions=gz.conditions)
def overlaps(
    documents: Input,
    table: Input,
    overlap_filter: Input,
    overlaps: Output,
    toolkit: str,
    dolma: Unhashed[Dolma],
    ngram: int,
    overlap: float,
) -> Facts:
    """The lines of a file's documents that share n-grams with evaluation sets.

    A line counts if the share `overlap` of its n-grams, or a single one if that is 0, is in
    `overlap_filter`, of the stage of this name. Words are Unicode's; a line of fewer than `ngram`
    words has no n-gram. `overlaps` has a line per document, as `marks` has them.

    Raises ValueError where the toolkit leaves a document out; ChildProcessError when it dies or
    takes too long.
    """
    rows = read_train_rows(table)
    check_memory(overlap_filter.stat().st_size)
    with scratch_folder(overlaps) as folder:
        [name] = link_documents(folder, [documents])
        os.symlink(os.path.realpath(overlap_filter), folder / OVERLAP)
        limit = time_limit(int(rows["bytes"].sum()))
        least = overlap or 1e-9  # the toolkit marks every line for 0; no line has 1e9 n-grams
        try:
            toolkit_output = request_dedupe(dolma, limit, folder, [name], ngram, least, True)
        except ValueError:
            check_readable(documents, partial(locate_row, rows))
            raise
        found = read_spans(folder / attributes_path(name), rows, toolkit_output)
        write_marks(overlaps, rows["id"].to_list(), [{OVERLAP: s} if s else {} for s in found])
    return {"documents": len(found), "overlap": sum(map(len, found))}


def count_text_bytes(against: list[Path]) -> int:
    """Bytes of text in files of documents. Raises ValueError for a line that is not a document."""
    total = 0
    for path in against:
        with gz.reading(path, longest=MAX_LINE_BYTES) as lines:
            for number, line in enumerate(lines, 1):
                if len(line) <= MAX_LINE_BYTES:
                    _, text, reason = parse_document(line)
                else:
                    text, reason = None, f"a line of more than {MAX_LINE_BYTES:,} bytes"
                if text is None:
                    raise ValueError(
                        f"{path}:{number}: expected a document with an id and a text, found none "
                        f"({reason}). Files to decontaminate against are files of documents"
                    )
                total += size_in_utf8(text)
    return total


def check_memory(needed: int, elements: int | None = None) -> None:
    """Raises ValueError if the filter, of `needed` bytes, does not fit into memory."""
    free = available_memory()
    if free is not None and needed > free:
        of = "" if elements is None else f" for up to {elements:,} n-grams"
        raise ValueError(
            f"the filter{of} needs {needed:,} bytes of memory, but {free:,} are free here. Use a "
            "machine with more memory (the result is the same), or name fewer files in "
            "decontaminate.against"
        )


def read_spans(attributes: Path, rows: Any, toolkit_output: str) -> list[Spans]:
    """The spans of each document, which the toolkit wrote to `attributes`.

    Raises ValueError unless the file has each of `rows`, once, in order.
    """
    expected = rows["id"].to_list()
    lines = []
    if attributes.exists():
        with gz.reading(attributes) as file:
            lines = [json.loads(line) for line in file]
    if (ids := [line["id"] for line in lines]) != expected:
        pairs = zip_longest(ids, expected)
        row = next(row for row, (one, other) in enumerate(pairs) if one != other)
        place = locate_row(rows, row) if row < len(expected) else rows["file"][0]
        log.info(toolkit_output)
        raise ValueError(
            f"{place}: expected attributes of {len(expected):,} documents from the toolkit, in "
            f"their order, found {len(lines):,}; its output is above"
        )
    return [line["attributes"].get(OVERLAP) or [] for line in lines]


def request_dedupe(
    dolma: Dolma,
    limit: float,
    folder: Path,
    documents: list[str],
    ngram: int,
    least: float = 1.0,
    read_only: bool = False,
) -> str:
    """Run `dolma dedupe` with the filter in `folder`; the toolkit's output."""
    request = {"by": "ngrams", "ngram": ngram, "least": least, "name": OVERLAP}
    request |= {"documents": documents, "bloom_filter": OVERLAP, "read_only": read_only}
    return dolma.request("dedupe", limit, folder=str(folder), **request)


def attributes_path(documents: str) -> str:
    """Where the toolkit writes the attributes of a file of documents."""
    return documents.replace("/documents/", f"/attributes/{OVERLAP}/")


def link_documents(scratch: Path, documents: Iterable[Path]) -> list[str]:
    """Link files under names that the toolkit's globs accept: in a folder `documents/`."""
    names = []
    (scratch / "in/documents").mkdir(parents=True)
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


def locate_row(table: Any, row: int) -> str:
    return f"{table['file'][row]}:{table['line'][row]}"
