"""Attributes: which documents are duplicates, which of their lines are, and which overlap with
evaluation sets. Found by `dolma dedupe`, for all files of a data set at once.

The toolkit's Bloom filter must see every document, one after the other: what comes first is kept.
So this is one process, however many cores there are. It stops after so many bytes of documents to
leave its filters where the next attempt finds them.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import groupby, zip_longest
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from olmo.corpus import bloom
from olmo.corpus.documents import MAX_LINE_BYTES, TRAIN, parse, size_in_utf8
from olmo.corpus.dolma import Dolma, time_limit
from olmo.data.order import available_memory
from olmo.io import gz
from olmo.runtime.log import log
from olmo.store.stage import Facts, Folder, Free, Inputs, Work, stage

if TYPE_CHECKING:
    import polars

# Names as the toolkit's taggers have them. The first two are for whole documents.
OVERLAP, DUPLICATE, PARAGRAPH = "dedupe__overlap", "dedupe__duplicate", "dedupe__paragraph"
REASONS = {OVERLAP: "overlap", DUPLICATE: "duplicate", PARAGRAPH: "duplicate-paragraph"}
# A document has thousands of n-grams, and one that seems to be known is enough to lose it.
OVERLAP_FALSE_POSITIVES = 1e-9
MOST_NESTED = 127  # what the toolkit's JSON decoder takes
Spans = list[list[float]]  # start, end (characters), share


@stage(version=1, conditions=gz.conditions)
def attributes(
    documents: Inputs,
    tables: Inputs,
    heldout: Inputs,
    against: Inputs,
    attributes: Folder,
    progress: Work,
    toolkit: str,
    dolma: Free[Dolma],
    exact: bool = False,
    paragraphs: bool = False,
    ngram: int = 0,
    overlap: float = 0.0,
    false_positives: float = 1e-6,
    step_bytes: Free[int] = 1 << 30,
) -> Facts:
    """Tell of each training document what of it is there already.

    `attributes` gets a file per file of `documents`, 00000.gz, …, with a line per document:
    {"id", "attributes"}, the attributes spans of characters, [start, end, share].

    - dedupe__duplicate (`exact`): its text is that of an earlier document, or of one in `heldout`.
    - dedupe__paragraph (`paragraphs`): these lines, the ends of lines included, are in an earlier
      document or stand further up. Blank ones never are. Documents that go do not count.
    - dedupe__overlap (`ngram` words, not 0): it has a line of whose n-grams the share `overlap`,
      or a single one if that is 0, stands in a line of a file of `against`. Words are Unicode's;
      lines of fewer than `ngram` have none.

    A Bloom filter also takes what is new for known, `false_positives` times of a document or line,
    at most. About `step_bytes` of compressed documents lie between two places to carry on from.

    Raises ValueError for too little memory, files of `against` that hold no documents, and where
    the toolkit does not tell of every document; ChildProcessError when it dies or takes too long.
    """
    kinds = Kinds(exact, paragraphs, ngram, overlap)
    files = [TrainFile.of(*pair) for pair in zip(documents, tables, strict=True)]
    filters = sizes(kinds, files, heldout, against, false_positives)
    refuse_too_large(filters)
    if filters.get(OVERLAP, (1, 0))[0] == 0:
        log.warning(
            f"decontaminate: {len(against)} files to decontaminate against hold no text, so "
            "nothing is taken out"
        )

    done = carry_on(progress)
    if done is None:
        scratch = fresh(progress)
        for kind, (elements, rate) in filters.items():
            bloom.write(scratch / kind, elements, rate)
        if OVERLAP in filters:
            fill(dolma, scratch, OVERLAP, against, kinds)
        if DUPLICATE in filters and heldout:
            fill(dolma, scratch, DUPLICATE, heldout, kinds)
        done = leave(progress, scratch, filters, 0)
    for _, steps in groupby(range(done, len(files)), key=step_of(files, step_bytes)):
        numbers = list(steps)
        scratch = fresh(progress)
        for kind in filters:
            shutil.copyfile(progress / f"done-{done}" / kind, scratch / kind)
        for number, lines in told(dolma, scratch, numbers, files, kinds):
            with gz.writing(progress / f"{number:05d}.gz") as output:
                output.writelines(lines)
        done = leave(progress, scratch, filters, numbers[-1] + 1)

    attributes.mkdir(parents=True)
    counts: Counter[str] = Counter()
    for number in range(len(files)):
        path = progress / f"{number:05d}.gz"
        for spans in read(path):
            counts.update({REASONS[kind]: len(found) for kind, found in spans.items()})
        os.replace(path, attributes / path.name)
    shutil.rmtree(progress)
    return {
        "documents": sum(file.count for file in files),
        "against": len(against),
        **{REASONS[kind]: counts[REASONS[kind]] for kind in filters},
        "filter_bytes": {REASONS[kind]: 4 * bloom.dimensions(*f)[0] for kind, f in filters.items()},
    }


@dataclass(frozen=True)
class Kinds:
    """What is asked for."""

    exact: bool
    paragraphs: bool
    ngram: int
    overlap: float

    def request(self, kind: str) -> dict[str, Any]:
        """How the toolkit is to look for a kind."""
        if kind == OVERLAP:
            # A share of 0 would be that of every line; no line has as many n-grams as this.
            return {"by": "ngrams", "ngram": self.ngram, "least": self.overlap or 1e-9}
        return {"by": "text" if kind == DUPLICATE else "paragraphs"}


@dataclass(frozen=True)
class TrainFile:
    """A file of training documents, and what its table knows of it."""

    path: Path
    table: Path
    count: int
    text_bytes: int

    @classmethod
    def of(cls, path: Path, table: Path) -> TrainFile:
        rows = train_rows(table)
        return cls(path, table, rows.height, int(rows["bytes"].sum()))


def train_rows(table: Path) -> polars.DataFrame:
    """The rows of a documents' table that stand in the file of training documents, in its order."""
    import polars

    return polars.read_parquet(table).filter(polars.col("split") == TRAIN).sort("row")


def sizes(
    kinds: Kinds,
    files: list[TrainFile],
    heldout: list[Path],
    against: list[Path],
    false_positives: float,
) -> dict[str, tuple[int, float]]:
    """For each filter that is needed, how many elements it takes at most, and its rate."""
    found = {}
    if kinds.ngram:
        # A word has at least a byte, and each begins at most one n-gram.
        found[OVERLAP] = (text_bytes(against), OVERLAP_FALSE_POSITIVES)
    if kinds.exact:
        count = sum(file.count for file in files) + sum(map(count_lines, heldout))
        found[DUPLICATE] = (count, false_positives)
    if kinds.paragraphs:
        found[PARAGRAPH] = (sum(count_paragraphs(file.path) for file in files), false_positives)
    return found


def text_bytes(against: list[Path]) -> int:
    """Bytes of text in files of documents. Raises ValueError for a line that is no document."""
    total = 0
    for path in against:
        with gz.reading(path, longest=MAX_LINE_BYTES) as lines:
            for number, line in enumerate(lines, 1):
                too_long = f"a line of more than {MAX_LINE_BYTES:,} bytes"
                _, text, reason = (
                    parse(line) if len(line) <= MAX_LINE_BYTES else (None, None, too_long)
                )
                if text is None:
                    raise ValueError(
                        f"{path}:{number}: expected a document with an id and a text, found none "
                        f"({reason}). Files to decontaminate against are files of documents"
                    )
                total += size_in_utf8(text)
    return total


def count_lines(path: Path) -> int:
    with gz.reading(path) as lines:
        return sum(1 for _ in lines)


def count_paragraphs(path: Path) -> int:
    """The lines of all documents, or a few more: JSON writes the end of a line as \\n."""
    with gz.reading(path) as lines:
        return sum(1 + line.count(b"\\n") for line in lines)


def refuse_too_large(filters: dict[str, tuple[int, float]]) -> None:
    """Raises ValueError where memory does not hold a filter: the toolkit takes one at a time."""
    free = available_memory()
    for kind, (elements, rate) in filters.items():
        needed = 4 * bloom.dimensions(elements, rate)[0]
        if free is not None and needed > free:
            less = "or name fewer files in decontaminate.against"
            if kind != OVERLAP:
                less = "or raise dedupe.false_positives in the recipe"
            raise ValueError(
                f"the filter for {REASONS[kind]} holds up to {elements:,} elements and needs "
                f"{needed:,} bytes of memory; {free:,} are free here. Use a machine with more: the "
                f"result is the same; {less}"
            )


# --- where to carry on from ---------------------------------------------------------------------


def carry_on(progress: Path) -> int | None:
    """How many files an earlier attempt did; None if it did not get to the first."""
    progress.mkdir(parents=True, exist_ok=True)
    done = [int(path.name.removeprefix("done-")) for path in progress.glob("done-*")]
    return max(done, default=None)


def fresh(progress: Path) -> Path:
    """An empty folder for the toolkit."""
    scratch = progress / "scratch"
    shutil.rmtree(scratch, ignore_errors=True)
    (scratch / "in" / "documents").mkdir(parents=True)
    return scratch


def leave(progress: Path, scratch: Path, filters: Iterable[str], done: int) -> int:
    """Keep the filters as they are after so many files; `done`."""
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


def step_of(files: list[TrainFile], step_bytes: int) -> Any:
    """Which step a file belongs to: the same whichever is the first."""
    steps, total = [], 0
    for file in files:
        steps.append(total // step_bytes)
        total += file.path.stat().st_size
    return steps.__getitem__


# --- the toolkit --------------------------------------------------------------------------------


def fill(dolma: Dolma, scratch: Path, kind: str, documents: list[Path], kinds: Kinds) -> None:
    """Put what documents hold into a filter."""
    names = link(scratch, documents)
    limit = time_limit(sum(path.stat().st_size for path in documents) * 20)
    try:
        said = search(dolma, limit, scratch, kind, names, kinds)
    except ValueError:
        for path in documents:
            refuse_unreadable(path, partial(line_of, path))
        raise
    for path, name in zip(documents, names, strict=True):
        made = scratch / attributes_of(name, kind)
        if not made.exists() or count_lines(made) != count_lines(path):
            log.info(said)
            raise ValueError(f"the toolkit did not read all of {path}; what it said stands above")
    shutil.rmtree(scratch / "in")
    (scratch / "in" / "documents").mkdir(parents=True)


def refuse_unreadable(documents: Path, place: Callable[[int], str]) -> None:
    """Raises ValueError for a line that `dolma tokens` reads and `dolma dedupe` does not.

    The latter looks into everything, by another decoder (serde's). `place` names a line's origin
    by its number from 0.
    """
    with gz.reading(documents) as lines:
        for at, line in enumerate(lines):
            if found := unreadable(line):
                raise ValueError(
                    f"{place(at)}: expected a document that dolma dedupe can read, found {found}. "
                    "Mend the source or take it out, or take dedupe and decontaminate out of the "
                    "recipe"
                )


def unreadable(line: bytes) -> str | None:
    """What of a document's JSON the toolkit's dedupe cannot read; None where it can."""
    depth = 0
    for bracket in re.findall(rb"[\[{\]}]", re.sub(rb'"(?:[^"\\]|\\.)*"', b"", line)):
        depth += 1 if bracket in b"[{" else -1
        if depth > MOST_NESTED:
            return f"more than {MOST_NESTED} lists and objects in one another"
    numbers: list[float] = []
    number = lambda text: numbers.append(float(text))  # noqa: E731
    try:
        json.loads(line, parse_int=number, parse_float=number)
    except ValueError:
        return "no JSON"
    return None if all(map(isfinite, numbers)) else "a number that no float holds"


def line_of(path: Path, row: int) -> str:
    return f"{path}:{row + 1}"


def place_of(table: polars.DataFrame, row: int) -> str:
    return f"{table['file'][row]}:{table['line'][row]}"


def search(
    dolma: Dolma,
    limit: float,
    scratch: Path,
    kind: str,
    documents: list[str],
    kinds: Kinds,
    read_only: bool = False,
) -> str:
    """Have the toolkit look for what is in a filter already; what it said."""
    request = kinds.request(kind) | {"documents": documents, "name": kind, "bloom_filter": kind}
    return dolma.ask("dedupe", limit, folder=str(scratch), read_only=read_only, **request)


def attributes_of(documents: str, kind: str) -> str:
    """Where the toolkit puts what it finds."""
    return documents.replace("/documents/", f"/attributes/{kind}/")


def link(scratch: Path, documents: Iterable[Path]) -> list[str]:
    """Give files the names that the toolkit wants: a folder, documents/, and what it globs."""
    names = []
    for number, path in enumerate(documents):
        names.append(f"in/documents/{number:05d}.gz")
        os.symlink(os.path.realpath(path), scratch / names[-1])
    return names


def told(
    dolma: Dolma, scratch: Path, numbers: list[int], files: list[TrainFile], kinds: Kinds
) -> Iterator[tuple[int, list[bytes]]]:
    """For each of these files, the lines of its attributes."""
    chosen = [files[number] for number in numbers]
    names = link(scratch, [file.path for file in chosen])
    limit = time_limit(sum(file.text_bytes for file in chosen))
    tables = [train_rows(file.table) for file in chosen]
    found: list[list[dict[str, Spans]]] = [[{} for _ in range(file.count)] for file in chosen]

    def ask(kind: str) -> None:
        try:
            said = search(dolma, limit, scratch, kind, names, kinds, read_only=kind == OVERLAP)
        except ValueError:
            for file, table in zip(chosen, tables, strict=True):
                refuse_unreadable(file.path, partial(place_of, table))
            raise
        for name, table, rows in zip(names, tables, found, strict=True):
            # Documents that go have no paragraphs to tell of.
            here = [row for row, spans in enumerate(rows) if kind != PARAGRAPH or not spans]
            add(scratch / attributes_of(name, kind), kind, table, here, rows, said)

    wholes = [kind for kind, asked in ((OVERLAP, kinds.ngram), (DUPLICATE, kinds.exact)) if asked]
    for kind in wholes:
        ask(kind)
    if kinds.paragraphs:
        if any(spans for rows in found for spans in rows):
            gone = {"attributes": wholes, "exclude": wholes, "cut": []}
            dolma.ask("mix", limit, folder=str(scratch), documents=names, **gone)
            names = [name.replace("in/", "mixed/", 1) for name in names]
        ask(PARAGRAPH)
    for number, table, rows in zip(numbers, tables, found, strict=True):
        yield (
            number,
            [
                json.dumps({"id": identity, "attributes": spans}).encode() + b"\n"
                for identity, spans in zip(table["id"], rows, strict=True)
            ],
        )


def add(
    path: Path,
    kind: str,
    table: polars.DataFrame,
    here: list[int],
    rows: list[dict[str, Spans]],
    said: str,
) -> None:
    """Take the spans of one kind from a file of the toolkit's; `here`: the rows it tells of.

    Raises ValueError unless it tells of each, once, in order: what the toolkit cannot read it
    leaves out, and says that all is well.
    """
    wanted = table["id"].gather(here).to_list()
    lines = []
    if path.exists():
        with gz.reading(path) as file:
            lines = [json.loads(line) for line in file]
    if (ids := [line["id"] for line in lines]) != wanted:
        pairs = zip_longest(ids, wanted)
        row = next(row for row, (one, other) in enumerate(pairs) if one != other)
        place = place_of(table, here[row]) if row < len(here) else table["file"][0]
        log.info(said)
        raise ValueError(
            f"{place}: expected attributes of {len(wanted):,} documents from the toolkit, in their "
            f"order, found {len(lines):,}; what it said stands above"
        )
    for row, line in zip(here, lines, strict=True):
        if spans := line["attributes"].get(kind):
            rows[row][kind] = spans


def read(path: Path) -> Iterator[dict[str, Spans]]:
    """The attributes of a file's documents, in order."""
    with gz.reading(path) as lines:
        for line in lines:
            yield json.loads(line)["attributes"]
