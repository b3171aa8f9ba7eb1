"""Marks: which documents of a file, and which of their lines, go; with the spans of each."""

from __future__ import annotations

from collections import Counter

import numpy as np

from olmo.corpus.dedupe import (
    DUPLICATE,
    NEAR,
    PARAGRAPH,
    REASONS,
    Spans,
    read_marks,
    read_train_rows,
    write_marks,
)
from olmo.corpus.digests import read_texts
from olmo.io import gz
from olmo.store.stage import Facts, Input, Inputs, Output, stage


@stage(version=1, conditions=gz.conditions)
def marks(
    documents: Input,
    table: Input,
    overlaps: Inputs,
    copies: Inputs,
    places: Inputs,
    marks: Output,
    quality: Input | None = None,
) -> Facts:
    """Bring together what was found in one file of training documents.

    `marks` gets a line per document, {"id", "attributes"}, the attributes spans of characters,
    [start, end, share]:

    - quality__dropped: as in `quality`, of the stage of this name.
    - dedupe__overlap: as in `overlaps`, of the stage of this name.
    - dedupe__duplicate: a copy of a held-out document (`copies`), or its text is that of an earlier
      document (`places`).
    - dedupe__near: it is much like an earlier document (`places`).
    - dedupe__paragraph: lines, with their line ends, that occur in an earlier document or earlier
      in this one. Blank lines never count, nor do lines of dropped documents.
    """
    ids = read_train_rows(table)["id"].to_list()
    found: list[dict[str, Spans]] = [{} for _ in ids]
    for path in overlaps:
        found = list(read_marks(path))
    if quality is not None:
        found = [low | one for low, one in zip(read_marks(quality), found, strict=True)]
    is_duplicate, is_near = np.zeros(len(ids), bool), np.zeros(len(ids), bool)
    for path in copies:
        is_duplicate[np.fromfile(path, "<u4")] = True
    marked = np.zeros(0, np.int64)  # lines
    for path in places:
        with np.load(path) as columns:
            is_duplicate[columns["documents"]] = True
            is_near[columns["near"]] = True
            # The type of what is looked up: of another one, each look would copy all.
            marked = columns["lines"].astype(np.int64)
    if is_duplicate.any() or is_near.any() or marked.size:
        first = 0
        for row, text in enumerate(read_texts(documents)):
            end = first + text.count(b"\n") + 1
            if is_duplicate[row] or is_near[row]:
                kind = DUPLICATE if is_duplicate[row] else NEAR
                found[row][kind] = [[0, len(text), 1]]
            elif not found[row]:
                here = slice(*np.searchsorted(marked, (first, end)))
                if spans := find_spans(text, (marked[here] - first).tolist()):
                    found[row][PARAGRAPH] = spans
            first = end
    write_marks(marks, ids, found)
    counts = Counter({reason: 0 for reason in REASONS.values()})
    for one in found:
        counts.update({REASONS[kind]: len(spans) for kind, spans in one.items()})
    return {"documents": len(ids), **counts}


def find_spans(text: bytes, numbers: list[int]) -> Spans:
    """The spans of some lines of a text: start, end (characters, with the line end), share.

    As in the toolkit: of a text with none but ASCII's characters, the last line that is not empty
    has no line end.
    """
    spans: Spans = []
    offset, wanted = 0, set(numbers)
    for number, line in enumerate(text.split(b"\n")) if wanted else ():
        start = offset
        offset += len(line) if line.isascii() else len(line.decode())
        if offset < len(text) - 1:
            offset += 1
        if number in wanted:
            spans.append([start, offset, 1])
    return spans
