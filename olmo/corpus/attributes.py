"""Attributes: which documents and lines are duplicates, and which documents overlap with
evaluation sets. Found by `dolma dedupe`, for all files of a data set in one pass.

The toolkit's Bloom filter must see the documents one after the other, since the first one stays. So
this is one process, on any number of cores. It saves its filters after every `step_bytes` of
documents, where the next attempt resumes.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from olmo.config import BaseConfig
from olmo.corpus import bloom
from olmo.corpus.dedupe import (
    DUPLICATE,
    OVERLAP,
    PARAGRAPH,
    REASONS,
    Search,
    Spans,
    TrainFile,
    count_lines,
    fill_filter,
    find_attributes,
    make_scratch,
)
from olmo.corpus.documents import MAX_LINE_BYTES, parse_document, size_in_utf8
from olmo.corpus.dolma import Dolma, open_dolma
from olmo.corpus.listing import Entry, read_listing, read_objects, write_listing
from olmo.data.order import available_memory
from olmo.io import gz
from olmo.runtime.log import log
from olmo.store.stage import Facts, Folder, Inputs, Unhashed, Work, stage

# A document has thousands of n-grams, and one false positive among them drops it.
OVERLAP_FALSE_POSITIVES = 1e-9
FilterSizes = dict[str, tuple[int, float]]  # kind → elements at most, rate of false positives


@dataclass
class DedupeSection(BaseConfig):
    """Drops training documents, and lines of them, that occur earlier; the first one stays."""

    exact: bool = False  # documents with the text of an earlier one, or of a held-out one
    paragraphs: bool = False  # lines of any length that an earlier document has
    false_positives: float = 1e-6  # the share of new documents or lines that may be dropped too

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.exact or self.paragraphs):
            raise ValueError("dedupe: expected exact or paragraphs to be true, found neither")
        if not 0 < self.false_positives < 1:
            raise ValueError(
                f"dedupe.false_positives: expected from 0 to 1, found {self.false_positives}"
            )


@dataclass
class DecontaminateSection(BaseConfig):
    """Drops training documents that share n-grams with evaluation sets."""

    against: list[str] = field(default_factory=list)  # local gz files of documents; globs
    heldout: bool = True  # also against the data set's own held-out documents
    ngram: int = 13  # words
    overlap: float = 0.0  # the smallest share of a line's n-grams that counts; 0: one n-gram

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.against or self.heldout):
            raise ValueError("decontaminate: expected against or heldout: true, found neither")
        if self.ngram < 1 or not 0 <= self.overlap <= 1:
            raise ValueError(
                "decontaminate: expected ngram of at least 1 and overlap from 0 to 1, found "
                f"{self.ngram} and {self.overlap}"
            )


def batch(
    documents: list[Path],
    listing: Path,
    requirements: Path,
    environment: Path | None = None,
    against: tuple[Path, ...] = (),
    dedupe: DedupeSection | None = None,
    decontaminate: DecontaminateSection | None = None,
) -> None:
    """Find the documents of a data set that are duplicates, or overlap with files of `against`.

    Otherwise as `olmo tokens`.

    Args:
        against: files whose text must not be in the documents
        dedupe: the recipe's section of this name
        decontaminate: the recipe's section of this name
    """
    shards = read_listing(documents, "documents")
    heldout = read_objects(documents, "heldout")
    if twice := [name for name, times in Counter(e.shard for e in shards).items() if times > 1]:
        raise ValueError(
            f"expected each source once, found {twice[0]} twice, so that every document of it is a "
            "duplicate; remove one from the sources, or remove dedupe from the recipe"
        )
    options: dict[str, Any] = {"heldout": [], "against": list(against)}
    if dedupe is not None:
        options |= {"exact": dedupe.exact, "paragraphs": dedupe.paragraphs}
        options |= {"false_positives": dedupe.false_positives}
        options["heldout"] = heldout if dedupe.exact else []
    if decontaminate is not None:
        options |= {"ngram": decontaminate.ngram, "overlap": decontaminate.overlap}
        options["against"] += heldout if decontaminate.heldout else []
    with open_dolma(requirements, environment) as dolma:
        record = attributes(
            documents=[entry.object for entry in shards],
            tables=read_objects(documents, "table"),
            attributes=listing.parent / "dedupe",
            toolkit=dolma.toolkit,
            dolma=dolma,
            **options,
        )
    entries = []
    for number, shard in enumerate(shards):
        name = f"{number:05d}.gz"
        file = record["outputs"]["attributes"]["files"][name]
        path = f"{listing.parent.name}/dedupe/{name}"
        entries.append(Entry(shard.shard, "attributes", path, file["sha256"], file["size"]))
    write_listing(listing, entries)


@stage(version=1, conditions=gz.conditions)
def attributes(
    documents: Inputs,
    tables: Inputs,
    heldout: Inputs,
    against: Inputs,
    attributes: Folder,
    progress: Work,
    toolkit: str,
    dolma: Unhashed[Dolma],
    exact: bool = False,
    paragraphs: bool = False,
    ngram: int = 0,
    overlap: float = 0.0,
    false_positives: float = 1e-6,
    step_bytes: Unhashed[int] = 1 << 30,
) -> Facts:
    """Find, in each training document, what occurs earlier in the data set or in evaluation sets.

    `attributes` gets a file per file of `documents`, 00000.gz, …, with a line per document:
    {"id", "attributes"}, the attributes spans of characters, [start, end, share].

    - dedupe__duplicate (`exact`): its text is that of an earlier document, or of one in `heldout`.
    - dedupe__paragraph (`paragraphs`): lines, with their line ends, that occur in an earlier
      document or earlier in this one. Blank lines never count, nor do lines of dropped documents.
    - dedupe__overlap (`ngram` words, not 0): it has a line of whose n-grams the share `overlap`,
      or a single one if that is 0, occurs in a line of a file of `against`. Words are Unicode's;
      lines of fewer than `ngram` words have no n-gram.

    A Bloom filter has false positives: at most the share `false_positives` of new documents or
    lines. The stage saves its progress after about `step_bytes` of compressed documents.

    Raises ValueError for too little memory, for files of `against` without documents, and
    where the toolkit leaves a document out; ChildProcessError when it dies or takes too long.
    """
    search = Search(exact, paragraphs, ngram, overlap)
    files = [TrainFile.from_table(*pair) for pair in zip(documents, tables, strict=True)]
    filters = filter_sizes(search, files, heldout, against, false_positives)
    check_memory(filters)
    if filters.get(OVERLAP, (1, 0))[0] == 0:
        log.warning(
            f"decontaminate: expected text in {len(against)} files to decontaminate against, found "
            "none, so nothing is dropped"
        )

    done = find_progress(progress)
    if done is None:
        scratch = make_scratch(progress)
        for kind, (elements, rate) in filters.items():
            bloom.write_filter(scratch / kind, elements, rate)
        if OVERLAP in filters:
            fill_filter(dolma, scratch, OVERLAP, against, search)
        if DUPLICATE in filters and heldout:
            fill_filter(dolma, scratch, DUPLICATE, heldout, search)
        done = save_progress(progress, scratch, filters, 0)
    for _, step in groupby(range(done, len(files)), key=step_numbers(files, step_bytes)):
        numbers = list(step)
        scratch = make_scratch(progress)
        for kind in filters:
            shutil.copyfile(progress / f"done-{done}" / kind, scratch / kind)
        found = find_attributes(dolma, scratch, [files[n] for n in numbers], search)
        for number, lines in zip(numbers, found, strict=True):
            with gz.writing(progress / f"{number:05d}.gz") as output:
                output.writelines(lines)
        done = save_progress(progress, scratch, filters, numbers[-1] + 1)

    attributes.mkdir(parents=True)
    counts: Counter[str] = Counter()
    for number in range(len(files)):
        path = progress / f"{number:05d}.gz"
        for spans in read_attributes(path):
            counts.update({REASONS[kind]: len(found) for kind, found in spans.items()})
        os.replace(path, attributes / path.name)
    shutil.rmtree(progress)
    return {
        "documents": sum(file.count for file in files),
        "against": len(against),
        **{REASONS[kind]: counts[REASONS[kind]] for kind in filters},
        "filter_bytes": {REASONS[kind]: bloom.filter_bytes(*f) for kind, f in filters.items()},
    }


def filter_sizes(
    search: Search,
    files: list[TrainFile],
    heldout: list[Path],
    against: list[Path],
    false_positives: float,
) -> FilterSizes:
    """The size of each filter that a search needs."""
    found = {}
    if search.ngram:
        # A word has at least a byte, and each begins at most one n-gram.
        found[OVERLAP] = (count_text_bytes(against), OVERLAP_FALSE_POSITIVES)
    if search.exact:
        count = sum(file.count for file in files) + sum(map(count_lines, heldout))
        found[DUPLICATE] = (count, false_positives)
    if search.paragraphs:
        found[PARAGRAPH] = (sum(count_paragraphs(file.path) for file in files), false_positives)
    return found


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


def count_paragraphs(path: Path) -> int:
    """The lines of all documents, or a few more: counts the line ends in their JSON, \\n."""
    with gz.reading(path) as lines:
        return sum(1 + line.count(b"\\n") for line in lines)


def check_memory(filters: FilterSizes) -> None:
    """Raises ValueError if a filter does not fit into memory: the toolkit loads one at a time."""
    free = available_memory()
    for kind, (elements, rate) in filters.items():
        needed = bloom.filter_bytes(elements, rate)
        if free is not None and needed > free:
            remedy = "name fewer files in decontaminate.against"
            if kind != OVERLAP:
                remedy = "raise dedupe.false_positives in the recipe"
            raise ValueError(
                f"the filter for {REASONS[kind]} is for up to {elements:,} elements and needs "
                f"{needed:,} bytes of memory, but {free:,} are free here. Use a machine with more "
                f"memory (the result is the same), or {remedy}"
            )


# --- progress of an attempt, in a folder that the next one finds --------------------------------


def find_progress(progress: Path) -> int | None:
    """How many files an earlier attempt finished; None if it did not save its first filters."""
    progress.mkdir(parents=True, exist_ok=True)
    done = [int(path.name.removeprefix("done-")) for path in progress.glob("done-*")]
    return max(done, default=None)


def save_progress(progress: Path, scratch: Path, filters: Iterable[str], done: int) -> int:
    """Save the filters as they are after `done` files, atomically; returns `done`."""
    draft = progress / "next"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    for kind in filters:
        os.replace(scratch / kind, draft / kind)
    os.replace(draft, progress / f"done-{done}")
    for path in progress.glob("done-*"):
        if path.name != f"done-{done}":
            shutil.rmtree(path)
    shutil.rmtree(scratch)
    return done


def step_numbers(files: list[TrainFile], step_bytes: int) -> Callable[[int], int]:
    """A function from a file's number to its step, which does not depend on where a run resumes."""
    steps, total = [], 0
    for file in files:
        steps.append(total // step_bytes)
        total += file.path.stat().st_size
    return steps.__getitem__


def read_attributes(path: Path) -> Iterator[dict[str, Spans]]:
    """The attributes of a file's documents, in order."""
    with gz.reading(path) as lines:
        for line in lines:
            yield json.loads(line)["attributes"]
