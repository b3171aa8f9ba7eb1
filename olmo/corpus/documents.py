"""Documents: one line in N of a source, checked, and split into training and held-out documents.

A source is a gz file of JSON lines in Dolma's schema. Lines that are kept are copied byte for byte.
No line is lost silently: a line that is not a valid document is a drop, with its line number and a
reason, and a drop fails the stage unless the recipe allows its reason.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cache, partial
from itertools import count, islice
from math import ceil, isfinite
from pathlib import Path
from typing import Any

from olmo.config import BaseConfig
from olmo.config.strict import UNHASHED, check_range
from olmo.corpus import conversations, json_lines
from olmo.corpus.formats import CONVERTED, find_place
from olmo.corpus.json_lines import Parsed
from olmo.corpus.listing import Entry, read_listing, run_shards, write_listing
from olmo.io import file_types, gz
from olmo.runtime.log import log
from olmo.store.stage import Facts, Input, Output, stage

# Reasons for dropping a line; the recipe's `allow` takes these names.
REASONS = {
    **json_lines.REASONS,
    "no-id": "no id",
    "bad-id": "an id that is not a string",
    "no-text": "no text, or null",
    "bad-text": "a text that is not a string",
    "empty-text": "a text of white space only",
    "too-long": "a text longer than the tokenizing toolkit can process",
    **json_lines.SURROGATE,
    "carriage-return": "a carriage return, which the toolkit treats as a line end",
}
PARQUET: dict[str, Any] = {"compression": "zstd", "compression_level": 3, "row_group_size": 1 << 17}
# What a recipe may say of such sources.
NO_ID = (
    "Name the field that has the id, sources: {id_field: …}, or have ids made, "
    "sources: {one_document_per: row}"
)
HINTS = {
    "no-id": NO_ID,
    "bad-id": NO_ID,
    "no-text": "Name the field that has the text, sources: {text_field: …}",
}
TRAIN, HELDOUT, DROPPED = "train", "heldout", "dropped"
TEXT, MESSAGES = "text", "messages"  # kinds of lines: documents, conversations

# `dolma tokens` writes files of fewer than 2^30 tokens and never splits a document. A byte-level
# tokenizer makes at most one token of each byte; Unicode normalisation (NFC) may make a text three
# times as long before that; and each document ends with one more token.
MAX_TOKENS = 2**30
MAX_BYTES_PER_BYTE = 3
MAX_TEXT_BYTES = MAX_TOKENS // MAX_BYTES_PER_BYTE - 1
MAX_LINE_BYTES = 256 * 2**20  # with its line end; memory holds a line twice for a moment


@dataclass
class DocumentsSection(BaseConfig):
    """Which lines of a source become documents. `allow` lists reasons for which lines may drop."""

    keep_one_in: int = 1  # lines
    offset: int = 0  # the number, from 0, of the first line that is kept
    heldout_share: float = 0.0  # of the documents, by the hash of the id
    # How often a source's documents are taken, by its name: "books-*=2.5". The first pattern that
    # matches counts; a source without a match has weight 1. Fractions go by the hash of the id.
    weights: list[str] = field(default_factory=list, metadata=UNHASHED)
    max_text_bytes: int = MAX_TEXT_BYTES  # a longer text is dropped
    max_line_bytes: int = MAX_LINE_BYTES  # a longer line is dropped (long-line)
    allow: list[str] = field(default_factory=list)  # reasons for which lines may drop

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("documents.keep_one_in", self.keep_one_in, 1)
        check_range("documents.max_text_bytes", self.max_text_bytes, 1)
        check_range("documents.max_line_bytes", self.max_line_bytes, 1, gz.LINE_LIMIT_BYTES)
        if not 0 <= self.offset < self.keep_one_in:
            raise ValueError(
                f"documents.offset: expected from 0 to keep_one_in - 1, {self.keep_one_in - 1}; "
                f"found {self.offset}"
            )
        if not 0 <= self.heldout_share < 1:
            raise ValueError(
                f"documents.heldout_share: expected from 0 to below 1, found {self.heldout_share}"
            )

        for weight in self.weights:
            pattern, _, number = weight.partition("=")
            try:
                is_valid = pattern and 0 < float(number) <= 1000
            except ValueError:
                is_valid = False
            if not is_valid:
                raise ValueError(
                    "documents.weights: expected pattern=number, the number above 0 and at most "
                    f"1000; found {weight!r}"
                )

    def has_repeats(self) -> bool:
        """Whether a document is taken more than once."""
        return any(float(weight.partition("=")[2]) > 1 for weight in self.weights)

    def find_weight(self, source: str) -> float:
        """How often the documents of a source are taken."""
        for pattern, _, number in (weight.partition("=") for weight in self.weights):
            if fnmatchcase(source, pattern):
                return float(number)
        return 1.0


EVERY_LINE = DocumentsSection()


def batch(sources: list[Path], listing: Path, config: DocumentsSection, kind: str = TEXT) -> None:
    """Keep one line in N of each source of a batch, check each, split off the held-out ones."""
    outputs = {
        "documents": "documents/{}.json.gz",
        "heldout": "heldout/{}.json.gz",
        "table": "documents/{}.parquet",
    }

    def inputs(source: Entry) -> dict[str, Any]:
        weight = config.find_weight(source.shard)
        name = Path(source.path).name.removesuffix(CONVERTED)
        return {"source": source.object, "name": name, "weight": weight}

    found = read_listing(sources, "source")
    entries = run_shards(documents, listing, found, outputs, inputs, config=config, kind=kind)
    write_listing(listing, entries)


@stage(version=1, conditions=gz.conditions)
def documents(
    source: Input,
    documents: Output,
    heldout: Output,
    table: Output,
    name: str,
    config: DocumentsSection = EVERY_LINE,
    weight: float = 1.0,
    kind: str = TEXT,
) -> Facts:
    """Keep one line in N of a source, check each, and split off the held-out ones.

    Keeps lines offset + 1, offset + 1 + N, … (counted from 1), so offset 0 keeps what
    `awk 'NR%N==1'` keeps. Of these, `weight` 0.3 takes three documents in ten, chosen by the hash
    of their ids, so that changed files do not change the choice; 2.5 takes each one twice and half
    of them a third time, each copy after the whole source. A document is held out, and then not
    repeated, if the hash of its id falls into `heldout_share`: its split never changes.

    Lines of the kind `messages` are conversations (olmo.corpus.conversations), whose text is the
    contents of all messages.

    `table` (parquet) has one row per line written or dropped: file (`name`, the source's in the
    recipe), line in the source, id, split (train, heldout or dropped), row (line in the file of
    that split, from 1; null when dropped), bytes (of the text in UTF-8), reason (of a drop).

    Raises ValueError for a broken or empty source and for drops that `allow` does not name.
    """
    import polars

    if not (weight > 0 and isfinite(weight)):
        raise ValueError(f"expected a weight above 0, found {weight}")
    if kind not in (TEXT, MESSAGES):
        raise ValueError(f"kind: expected {TEXT} or {MESSAGES}, found {kind!r}")
    parse: Callable[[bytes], Parsed]
    if kind == TEXT:
        known, parse = REASONS, partial(parse_document, max_text_bytes=config.max_text_bytes)
    else:
        known, parse = conversations.REASONS, conversations.parse_conversation
    if unknown := sorted(set(config.allow) - set(known)):
        raise ValueError(f"allow: unknown reason {unknown[0]!r}. Known: {', '.join(known)}")

    schema = {
        "line": polars.UInt64,
        "id": polars.String,
        "split": polars.String,
        "row": polars.UInt64,
        "bytes": polars.UInt64,
        "reason": polars.String,
    }
    table_rows: list[tuple] = []
    rows = {TRAIN: 0, HELDOUT: 0}
    reasons: Counter[str] = Counter()
    hint = ""
    places: list[str] = []  # of the first drops that are not allowed
    with gz.writing(documents) as train_lines, gz.writing(heldout) as heldout_lines:
        write = {TRAIN: train_lines.write, HELDOUT: heldout_lines.write}
        for copy in range(ceil(weight)):
            number = count(1)
            with gz.reading(source, name, config.max_line_bytes) as lines:
                # islice and zip run in C: a line that is not kept costs little beyond gunzip.
                for line, at in islice(
                    zip(lines, number, strict=False), config.offset, None, config.keep_one_in
                ):
                    is_long = len(line) > config.max_line_bytes
                    identity, text, reason = (None, None, "long-line") if is_long else parse(line)
                    size = None if text is None else size_in_utf8(text)
                    if reason is not None:
                        if copy == 0:
                            reasons[reason] += 1
                            if not hint and (found := file_types.explain_non_json(line)):
                                hint = f"  {name}:{at}: {found}"
                            if reason not in config.allow and len(places) < 10:
                                places.append(f"{find_place(line) or f'{name}:{at}'}: {reason}")
                            table_rows.append((at, identity, DROPPED, None, size, reason))
                        continue
                    assert identity is not None
                    if weight != 1 and copy >= count_copies(identity, weight):
                        continue
                    split = HELDOUT if is_held_out(identity, config.heldout_share) else TRAIN
                    if split == HELDOUT and copy > 0:
                        continue  # a copy would only slow down the evaluation
                    rows[split] += 1
                    write[split](line if line.endswith(b"\n") else line + b"\n")
                    table_rows.append((at, identity, split, rows[split], size, None))
            total = next(number) - 1
    if total == 0:
        raise ValueError(
            f"{name}: expected lines, found an empty source. Remove it or download it."
        )

    frame = polars.DataFrame(table_rows, schema, orient="row")
    if forbidden := sorted(set(reasons) - set(config.allow)):
        raise ValueError(format_drops(name, places, reasons, forbidden, known, hint))
    empty_ids = int((frame["id"] == "").sum())
    if empty_ids > 1 and (config.heldout_share or weight != 1):
        log.warning(
            f"{name}: {empty_ids:,} lines have an empty id and so one hash: all of them are held "
            "out or none, all are repeated or none"
        )
    frame.select(polars.lit(name).alias("file"), polars.all()).write_parquet(table, **PARQUET)
    return {
        "lines": total,
        "rows": frame.height,
        "documents": rows[TRAIN],
        "heldout": rows[HELDOUT],
        "text_bytes": frame.filter(polars.col("split") != DROPPED)["bytes"].sum(),
        "drops": dict(sorted(reasons.items())),
    }


def parse_document(line: bytes, max_text_bytes: int = MAX_TEXT_BYTES) -> Parsed:
    """(id, text, reason) of one line. The reason is None if the line is a document.

    The decoder (msgspec) is the toolkit's, so that both accept the same lines.
    """
    import msgspec

    try:
        if not line.isascii():
            line.decode()  # the decoder does not check the fields that it skips
        found = document_decoder().decode(line)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None, None, find_reason(line)
    if b"\r" in line and b"\r" in line.removesuffix(b"\n").removesuffix(b"\r"):
        return found.id, found.text, "carriage-return"
    if not found.text or found.text.isspace():
        return found.id, found.text, "empty-text"
    if 4 * len(found.text) > max_text_bytes and size_in_utf8(found.text) > max_text_bytes:
        return found.id, found.text, "too-long"
    return found.id, found.text, None


@cache
def document_decoder() -> Any:
    """A JSON decoder for id and text; it checks the syntax of other fields and skips them."""
    import msgspec

    return msgspec.json.Decoder(msgspec.defstruct("Document", [("id", str), ("text", str)]))


def find_reason(line: bytes) -> str:
    """Why the decoder rejected a line."""
    found, reason = json_lines.load_object(line)
    if reason is not None:
        return reason
    if found.get("id") is None:
        return "no-id"
    if not isinstance(found["id"], str):
        return "bad-id"
    if found.get("text") is None:
        return "no-text"
    if not isinstance(found["text"], str):
        return "bad-text"
    if any("\ud800" <= letter <= "\udfff" for letter in json.dumps(found, ensure_ascii=False)):
        return "surrogate"
    return "bad-json"  # Python's own decoder accepts more, such as NaN


def size_in_utf8(text: str) -> int:
    """The bytes of a text, without encoding one that is ASCII."""
    return len(text) if text.isascii() else len(text.encode())


def is_held_out(identity: str, share: float) -> bool:
    """Whether the document with this id is held out: the same on every machine, always."""
    return share > 0 and hash_fraction(identity) < share


def count_copies(identity: str, weight: float) -> int:
    """How often the document with this id is taken: `weight` times, on average over the ids."""
    return int(weight) + (hash_fraction("copies of " + identity) < weight - int(weight))


def hash_fraction(identity: str) -> float:
    """A uniform number from 0 up to 1, computed from the id alone."""
    return hash_number(identity.encode()) / 2**64


def hash_number(content: bytes) -> int:
    """A uniform number of 64 bits, the beginning of the content's sha256."""
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "big")


def format_drops(
    name: str,
    places: list[str],
    reasons: Counter[str],
    forbidden: list[str],
    known: dict[str, str],
    hint: str,
) -> str:
    """The error for drops that the recipe does not allow: how many, which ones, the remedy."""
    lines = [
        f"{name}: {sum(reasons[reason] for reason in forbidden)} lines are not valid documents:"
    ]
    lines += [f"  {reasons[reason]:,} x {reason}: {known[reason]}" for reason in forbidden]
    lines += [f"  {place}" for place in places]
    lines += [hint] if hint else []
    lines += dict.fromkeys(f"  {HINTS[reason]}" for reason in forbidden if reason in HINTS)
    allowed = f"documents: {{allow: [{', '.join(forbidden)}]}}"
    lines += [f"Correct the source, or allow them in the recipe: {allowed}"]
    return "\n".join(lines)
