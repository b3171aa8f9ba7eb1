"""Digests of a file's documents and lines: what `duplicates` compares, instead of their text.

For near duplicates a document has a digest for each band of its MinHash signature (Broder 1997;
rensa's R-MinHash).

A file of digests has three columns, one after the other: the upper and the lower half of each
digest (little-endian uint64), and where it was found (uint32): a document's row, from 0, or a
line's number among all lines of the file's documents. Rows are sorted by digest, then place, so
that a range of hashes is a slice.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from hashlib import blake2b
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from olmo.corpus.dedupe import DecontaminateSection, DedupeSection, NearSection, read_marks
from olmo.corpus.documents import document_decoder
from olmo.corpus.dolma import open_dolma
from olmo.corpus.listing import read_listing, read_objects, run_shard, write_listing
from olmo.corpus.overlaps import overlap_filter, overlaps
from olmo.io import gz
from olmo.store.stage import Facts, Input, Inputs, Output, stage

DIGEST_BYTES, ROW_BYTES = 16, 20
MAX_PLACE = 2**32 - 1
# Rust's White_Space besides ASCII's: the toolkit never counts a line of these alone.
WHITE_SPACE = " \t\r\v\f\x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(
    map(chr, range(0x2000, 0x200B))
)
ASCII_WHITE_SPACE = b" \t\r\v\f"
WORD = re.compile(r"\w+")


def batch_references(
    documents: list[Path],
    listing: Path,
    requirements: Path,
    environment: Path | None = None,
    against: tuple[Path, ...] = (),
    dedupe: DedupeSection | None = None,
    decontaminate: DecontaminateSection | None = None,
) -> None:
    """Make what each file is compared with: held-out documents, evaluation sets.

    Otherwise as `olmo tokens`.

    Args:
        against: files whose text must not be in the documents
        dedupe: the recipe's section of this name
        decontaminate: the recipe's section of this name
    """
    heldout, entries = read_objects(documents, "heldout"), []
    if dedupe is not None and dedupe.exact:
        made = {"heldout_digests": "references/{}.heldout"}
        entries += run_shard(heldout_digests, listing, "all", made, heldout=heldout)
    if decontaminate is not None:
        made = {"overlap_filter": "references/{}.filter"}
        files = [*against, *(heldout if decontaminate.heldout else [])]
        with open_dolma(requirements, environment) as dolma:
            given: dict[str, Any] = {"toolkit": dolma.toolkit, "dolma": dolma}
            given |= {"against": files, "ngram": decontaminate.ngram}
            entries += run_shard(overlap_filter, listing, "all", made, **given)
    write_listing(listing, entries)


def batch(
    documents: Path,
    references: Path,
    listing: Path,
    requirements: Path,
    environment: Path | None = None,
    dedupe: DedupeSection | None = None,
    decontaminate: DecontaminateSection | None = None,
    tags: tuple[Path, ...] = (),
) -> None:
    """Digest the documents of a batch's files, and find their overlaps with evaluation sets.

    Otherwise as `olmo tokens`.

    Args:
        references: the listing of `olmo references`
        dedupe: the recipe's section of this name
        decontaminate: the recipe's section of this name
        tags: the listing of `olmo tags`, for a recipe with conditions on quality
    """
    low = {entry.shard: entry.object for entry in read_listing(tags, "quality")}
    tables = {entry.shard: entry.object for entry in read_listing([documents], "table")}
    heldout = read_objects([references], "heldout_digests")
    entries = []
    with open_dolma(requirements, environment) as dolma:
        for entry in read_listing([documents], "documents"):
            found = []
            if decontaminate is not None:
                found = run_shard(
                    overlaps,
                    listing,
                    entry.shard,
                    {"overlaps": "digests/{}.overlaps.gz"},
                    documents=entry.object,
                    table=tables[entry.shard],
                    overlap_filter=read_objects([references], "overlap_filter")[0],
                    toolkit=dolma.toolkit,
                    dolma=dolma,
                    ngram=decontaminate.ngram,
                    overlap=decontaminate.overlap,
                )
            if dedupe is not None:
                made = ("document_digests", "line_digests", "near_digests", "line_starts")
                found += run_shard(
                    digests,
                    listing,
                    entry.shard,
                    {name: f"digests/{{}}.{name}" for name in made},
                    documents=entry.object,
                    overlaps=[one.object for one in found],
                    quality=low.get(entry.shard),
                    exact=dedupe.exact,
                    paragraphs=dedupe.paragraphs,
                    **signature_options(dedupe.near),
                )
                given = {one.output: one.object for one in found}
                found += run_shard(
                    copies,
                    listing,
                    entry.shard,
                    {"copies": "digests/{}.copies"},
                    document_digests=given["document_digests"],
                    heldout=heldout,
                )
            entries += found
    write_listing(listing, entries)


@stage(version=1)
def heldout_digests(heldout: Inputs, heldout_digests: Output) -> Facts:
    """The digests of held-out documents."""
    found = bytearray()
    for path in heldout:
        for text in read_texts(path):
            found += digest(text)
    sort_rows(found, range(len(found) // DIGEST_BYTES)).write(heldout_digests)
    return {"heldout": len(found) // DIGEST_BYTES}


@stage(version=1)
def digests(
    documents: Input,
    overlaps: Inputs,
    document_digests: Output,
    line_digests: Output,
    near_digests: Output,
    line_starts: Output,
    exact: bool = False,
    paragraphs: bool = False,
    ngram: int = 0,
    bands: int = 0,
    rows: int = 0,
    minhash: str = "",
    quality: Input | None = None,
) -> Facts:
    """The digests of a file's documents (`exact`), lines (`paragraphs`) and signatures (`bands`).

    Lines and signatures of documents with a mark in `overlaps`, of the stage of this name, do not
    count, nor do blank lines. A document with a mark in `quality`, of the stage of this name,
    counts nowhere. `line_starts` has the number of each document's first line, uint32. `minhash` is
    the package that makes signatures, with its version, which decides their bits; `ngram`, `bands`
    and `rows` as in NearSection.

    Raises ValueError for a file of 2^32 lines or more.
    """
    of_documents, of_lines, of_bands = bytearray(), bytearray(), bytearray()
    places, line_counts, starts = array("I"), array("I"), array("I")
    first = 0  # the number of a document's first line
    for text in read_texts(documents):
        if exact:
            of_documents += digest(text)
        if bands:
            of_bands += band_digests(text.decode(), ngram, bands, rows)
        if not paragraphs:
            continue
        lines = text.split(b"\n")
        if first + len(lines) > MAX_PLACE:
            raise ValueError(
                f"expected a file of fewer than {MAX_PLACE:,} lines of text, found more; split the "
                "source"
            )
        counted = [n for n, line in enumerate(lines, first) if not is_blank(line)]
        of_lines += b"".join(digest(lines[n - first]) for n in counted)
        places.extend(counted)
        line_counts.append(len(counted))
        starts.append(first)
        first += len(lines)
    whole = sort_rows(of_documents, range(len(of_documents) // DIGEST_BYTES))
    count = max(whole.place.size, len(line_counts), len(of_bands) // DIGEST_BYTES // max(bands, 1))
    kept = np.ones(count, bool)
    if quality is not None:
        kept = np.array([not marks for marks in read_marks(quality)], bool)
        counted_rows = kept[whole.place]
        whole = Rows(whole.high[counted_rows], whole.low[counted_rows], whole.place[counted_rows])
    whole.write(document_digests)
    np.array(starts, "<u4").tofile(line_starts)
    for path in overlaps if paragraphs or bands else ():
        kept &= np.array([not marks for marks in read_marks(path)], bool)
    line_kept: Any = np.repeat(kept, np.frombuffer(line_counts, np.uint32)) if paragraphs else []
    write_kept_rows(line_digests, of_lines, np.frombuffer(places, np.uint32), line_kept)
    in_bands = np.repeat(np.arange(count, dtype=np.uint32), bands)
    write_kept_rows(near_digests, of_bands, in_bands, np.repeat(kept, bands))
    return {"lines": len(places)}


@stage(version=1)
def copies(document_digests: Input, heldout: Inputs, copies: Output) -> Facts:
    """The rows of documents that were held out elsewhere, uint32.

    `document_digests` is of the stage `digests`, `heldout` of `heldout_digests`.
    """
    rows = Rows.read(document_digests)
    found = [rows.place[rows.find(Rows.read(path))] for path in heldout]
    sorted_rows = np.sort(np.concatenate([np.zeros(0, "<u4"), *found]))
    sorted_rows.tofile(copies)
    return {"copies": sorted_rows.size}


def write_kept_rows(path: Path, raw: bytearray, places: np.ndarray, kept: Any) -> None:
    """Write the rows that are `kept`, sorted."""
    pairs = np.frombuffer(raw, "<u8").reshape(-1, 2)
    chosen = np.asarray(kept, bool)
    sort_rows(pairs[chosen], places[: len(pairs)][chosen]).write(path)


def signature_options(near: NearSection | None) -> dict[str, Any]:
    """The parameters of `digests` for near duplicates."""
    return {**asdict(near), "minhash": f"rensa=={version('rensa')}"} if near else {}


def band_digests(text: str, ngram: int, bands: int, rows: int) -> bytes:
    """A digest for each band of a document's MinHash signature."""
    from rensa import RMinHash

    words = WORD.findall(text.lower())
    starts = range(max(1, len(words) - ngram + 1))
    grams = [" ".join(words[start : start + ngram]) for start in starts]
    signature = RMinHash(num_perm=bands * rows, seed=0)
    signature.update(grams)
    raw = np.array(signature.digest(), "<u4").reshape(bands, rows)
    return b"".join(digest(bytes([band]) + row.tobytes()) for band, row in enumerate(raw))


@dataclass(frozen=True)
class Rows:
    """Digests and their places, sorted."""

    high: np.ndarray
    low: np.ndarray
    place: np.ndarray

    @classmethod
    def read(cls, path: Path) -> Rows:
        """A file's rows, which are read where they are used. Raises ValueError for another size."""
        size = path.stat().st_size
        if size % ROW_BYTES:
            raise ValueError(f"{path}: expected rows of {ROW_BYTES} bytes, found {size:,} bytes")
        n = size // ROW_BYTES
        if not n:
            return cls(*(np.zeros(0, kind) for kind in ("<u8", "<u8", "<u4")))
        raw = np.memmap(path, np.uint8, "r")
        return cls(
            raw[: 8 * n].view("<u8"), raw[8 * n : 16 * n].view("<u8"), raw[16 * n :].view("<u4")
        )

    def write(self, path: Path) -> None:
        with path.open("wb") as file:
            for column in (self.high, self.low, self.place):
                file.write(column.data)

    def between(self, first: int, last: int) -> Rows:
        """The rows whose upper half is from `first` to `last`."""
        start = np.searchsorted(self.high, np.uint64(first))
        end = np.searchsorted(self.high, np.uint64(last), side="right")
        return Rows(self.high[start:end], self.low[start:end], self.place[start:end])

    def find(self, others: Rows) -> np.ndarray:
        """Which rows have a digest that is one of `others`."""
        found = np.isin(self.high, others.high)
        if found.any():  # the lower halves of few are compared
            near = np.isin(others.high, self.high[found])
            known = set(zip(others.high[near].tolist(), others.low[near].tolist(), strict=True))
            at = np.flatnonzero(found)
            pairs = zip(self.high[at].tolist(), self.low[at].tolist(), strict=True)
            found[at] = [pair in known for pair in pairs]
        return found


def sort_rows(raw: bytearray | np.ndarray, places: Any) -> Rows:
    """Rows of digests in the order of their places, sorted by digest, then place."""
    pairs = np.frombuffer(raw, "<u8").reshape(-1, 2) if isinstance(raw, bytearray) else raw
    high, low, place = pairs[:, 0], pairs[:, 1], np.asarray(places, "<u4")
    order = np.lexsort((low, high))
    return Rows(high[order], low[order], place[order])


def read_texts(documents: Path) -> Iterator[bytes]:
    """The texts of a file of documents, in UTF-8."""
    decode = document_decoder().decode
    with gz.reading(documents) as lines:
        for line in lines:
            yield decode(line).text.encode()


def digest(text: bytes) -> bytes:
    return blake2b(text, digest_size=DIGEST_BYTES).digest()


def is_blank(line: bytes) -> bool:
    """Whether a line is white space only, by Unicode's property, as Rust's `trim` has it."""
    rest = line.strip(ASCII_WHITE_SPACE)
    return not rest or (not rest.isascii() and not rest.decode().strip(WHITE_SPACE))
