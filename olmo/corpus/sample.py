"""What a data set will have, expected from the beginnings of some of its sources.

Sources are grouped by the beginnings of their names. Of each group, some sources spread evenly are
read, each from its beginning, and scaled up to all bytes of the group. The range is the 95 % t
interval of a ratio estimate over sources (Cochran, Sampling Techniques, 1977, chapter 6): what the
spread between sources explains. It does not cover a file whose later part differs from its
beginning, nor what deduplication and filters take away.
"""

from __future__ import annotations

import json
import os
import re
import textwrap
from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from math import sqrt
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from olmo.config.strict import hashed_fields
from olmo.corpus import source_table
from olmo.corpus.beginnings import MAX_BYTES, Measured, beginning, measure, open_tokenizer
from olmo.corpus.documents import EVERY_LINE, DocumentsSection
from olmo.corpus.formats import EVERY_ROW, RowsSection, split_suffixes
from olmo.corpus.ingest import ingest_files, transfer
from olmo.corpus.listing import Entry
from olmo.corpus.source_table import Source
from olmo.corpus.sources import SourcesSection
from olmo.io import http_client
from olmo.io.downloads import Progress
from olmo.runtime.log import format_bytes, format_count, log
from olmo.store.stage import Facts, Input, Inputs, Output, stage

MAX_SOURCES = 128  # that are read; with MAX_BYTES of each, 256 MiB
AMOUNTS = ("documents", "text_bytes", "tokens", "source_bytes", "documents_bytes")
CONFIDENCE = 0.95
ONE_SOURCE_FACTOR = 2.0  # the range, assumed, where one source shows no spread
ALL = "all"
NUMBER = re.compile(r"([-_.]\d+-of)?([-_.]\d+)+$|\d+$")  # that ends a source's name
NOTE = (
    "Ranges: 95 % t intervals over the sampled sources; of a group with one, a factor of "
    f"{ONE_SOURCE_FACTOR:g} is assumed. Only the beginning of a file is read: if its later part "
    "differs, the truth may be outside. Documents are counted before deduplication and filters."
)
NO_TOKENIZER = "Tokens: no tokenizer is here yet, so `olmo plan` takes a fixed rate."


@dataclass(frozen=True)
class Group:
    """Sources whose names begin alike, in all."""

    name: str
    sources: int
    bytes: int
    taken_bytes: float  # each source's times its weight in the recipe


@dataclass(frozen=True)
class Sampled:
    """A source whose beginning is measured."""

    name: str  # of the file, with the suffix
    group: str
    bytes: int
    weight: float = 1.0
    files: int = 1  # text files that it is made of


@dataclass(frozen=True)
class Estimate:
    """An amount: likely between `low` and `high`."""

    low: float
    expected: float
    high: float

    def __add__(self, other: Estimate) -> Estimate:
        """The sum of two that are independent: the widths add as standard errors do."""
        expected = self.expected + other.expected
        below = sqrt((self.expected - self.low) ** 2 + (other.expected - other.low) ** 2)
        above = sqrt((self.high - self.expected) ** 2 + (other.high - other.expected) ** 2)
        return Estimate(max(0.0, expected - below), expected, expected + above)


def batch(
    recipe: SourcesSection,
    estimates: Path,
    text: Path,
    table: Path | None = None,
    tokenizer: Path | None = None,
    config: DocumentsSection = EVERY_LINE,
    max_bytes: int = MAX_BYTES,
    max_sources: int = MAX_SOURCES,
    parallel: int = 8,
) -> None:
    """Estimate a data set's documents, text and tokens by the beginnings of some sources.

    Args:
        recipe: the recipe's section on sources
        estimates: JSON file to write
        text: text file to write
        config: the recipe's section on documents
        max_bytes: that are read of a source
        max_sources: that are read
    """
    dataset = estimates.parent
    sources = find_sources(recipe, dataset.name, table)
    groups = group_names(sources, max_sources)
    chosen = choose(groups, max_sources)
    sizes: dict[str, int] = {}
    heads: dict[str, Path] = {}
    with TemporaryDirectory() as folder:

        def ingest(source: Source, progress: Progress) -> list[Entry]:
            if source.is_remote:
                full = replace(chosen[source.name], mirrors=recipe.mirrors_of(source.place))
                record = beginning(
                    url=source.place,
                    head=dataset / "sample" / source.name,
                    max_bytes=max_bytes,
                    sha256=source.sha256,
                    transfer=transfer(full, progress),
                )
                sizes[source.name] = record["facts"]["size"]
                heads[source.name] = dataset / "sample" / source.name
            else:
                heads[source.name] = copy_beginning(source, Path(folder, source.name), max_bytes)
                sizes[source.name] = local_size(source)
            return []

        wanted = [replace(s, bytes=min(s.bytes or max_bytes, max_bytes)) for s in chosen.values()]
        ingest_files(dataset / "sample/0.tsv", wanted, ingest, parallel, recipe.allow_missing)
        failed = chosen.keys() - heads.keys()  # which the recipe allows
        groups = {
            group: [source for source in members if source.name not in failed]
            for group, members in groups.items()
        }
        complete_sizes([s for s in sources if s.name not in failed], sizes, recipe.allow_missing)
        read = [(group, s) for group, members in groups.items() for s in members if s.name in heads]
        sample(
            heads=[heads[source.name] for _, source in read],
            estimates=estimates,
            text=text,
            sampled=[
                {
                    "name": (source.parts or (source.place,))[0],
                    "group": group,
                    "bytes": sizes[source.name],
                    "weight": config.find_weight(source.name),
                    "files": max(1, len(source.parts)),
                }
                for group, source in read
            ],
            groups=[
                asdict(sum_group(group, members, sizes, config))
                for group, members in groups.items()
                if members
            ],
            tokenizer=tokenizer,
            rows=recipe.rows,
            config=config,
        )
    log.info(text.read_text(encoding="utf-8").rstrip())


def find_sources(recipe: SourcesSection, dataset: str, table: Path | None) -> list[Source]:
    """The sources that can be sampled. Raises ValueError for those that cannot."""
    if recipe.files:
        path = Path(f"config/data/{dataset}.yaml")
        grouped = recipe.rows.takes_whole_files
        sources = source_table.find_local_files(recipe.files, path, is_grouped=grouped)
    elif table is not None:
        sources = source_table.read_stashing_secrets(table)
    else:
        raise ValueError(
            f"{dataset}: expected files, a table or a list of URLs to sample, found text that is "
            f"generated here: make it with uv run snakemake --cores 2 data/{dataset}/statistics.txt"
        )
    # A file that is listed twice is used twice.
    if taken := next((s.place for s in sources if split_suffixes(s.place)[0] == ".parquet"), None):
        raise ValueError(
            f"{taken}: expected a file that can be read from its beginning, found parquet, whose "
            "index is at its end: a data set with parquet cannot be sampled, so `olmo plan` takes "
            "fixed rates"
        )
    return sources


def group_names(sources: list[Source], max_sources: int) -> dict[str, list[Source]]:
    """Sources by their names without the number at the end; all in one group if few are alike."""
    groups: dict[str, list[Source]] = defaultdict(list)
    for source in sources:
        groups[NUMBER.sub("", source.name) or ALL].append(source)
    is_fine = 2 * len(groups) <= min(len(sources), max_sources)
    return dict(sorted(groups.items())) if is_fine else {ALL: sources}


def choose(groups: dict[str, list[Source]], max_sources: int) -> dict[str, Source]:
    """Sources to read, by name: as many of each group as of another, or all, spread evenly."""
    chosen: dict[str, Source] = {}
    left = max_sources
    for done, members in enumerate(sorted(groups.values(), key=len)):
        count = min(len(members), left // (len(groups) - done))
        left -= count
        for i in range(count):
            source = members[(2 * i + 1) * len(members) // (2 * count)]
            chosen[source.name] = source
    return chosen


def copy_beginning(source: Source, head: Path, max_bytes: int) -> Path:
    """The beginning of a local source; of a group of text files, the first ones joined."""
    with open(head, "wb") as out:
        for part in source.parts or (source.place,):
            if out.tell() and split_suffixes(part)[1]:  # compressed ones are not joined
                break
            with open(part, "rb") as file:
                out.write(file.read(max_bytes - out.tell()))
            if out.tell() == max_bytes or split_suffixes(part)[1]:
                break
    return head


def local_size(source: Source) -> int:
    return sum(map(os.path.getsize, source.parts or (source.place,)))


def complete_sizes(sources: list[Source], sizes: dict[str, int], allow_missing: bool) -> None:
    """Add the sizes of sources that were not read: by the table, the disk or the server.

    Raises:
        ValueError: a size is not known, and `allow_missing` is not set.
    """
    asked = []
    for source in sources:
        if source.name in sizes:
            continue
        if source.bytes is not None:
            sizes[source.name] = source.bytes
        elif source.is_remote:
            asked.append(source)
        else:
            sizes[source.name] = local_size(source)
    told = http_client.request_sizes(source.place for source in asked)
    sizes |= {s.name: size for s, size in zip(asked, told, strict=True) if size is not None}
    if unknown := [s.place for s in asked if s.name not in sizes]:
        message = (
            f"{len(unknown):,} of {len(sources):,} sources: expected the size from the server, "
            f"found none, as for {unknown[0]}"
        )
        if not allow_missing:
            raise ValueError(
                f"{message}; correct the URL, or write the size into the source table, as bytes"
            )
        log.warning(f"left out: {message}")


def sum_group(
    name: str, members: list[Source], sizes: dict[str, int], config: DocumentsSection
) -> Group:
    known = [source for source in members if source.name in sizes]
    taken = sum(sizes[source.name] * config.find_weight(source.name) for source in known)
    return Group(name, len(known), sum(sizes[source.name] for source in known), taken)


@stage(version=1)
def sample(
    heads: Inputs,
    estimates: Output,
    text: Output,
    sampled: list[dict[str, Any]],
    groups: list[dict[str, Any]],
    tokenizer: Input | None = None,
    rows: RowsSection = EVERY_ROW,
    config: DocumentsSection = EVERY_LINE,
) -> Facts:
    """Measure beginnings, and estimate what the groups of sources and all of them will have.

    `estimates` (JSON): `groups` and `total`, each with sources, sampled, bytes, read (bytes) and
    low, expected, high of each of AMOUNTS (tokens: null without a tokenizer); and the recipe's
    section on documents. `text` is a table of it.

    Args:
        heads: the beginnings of the sources in `sampled`.
        sampled: fields of Sampled.
        groups: fields of Group.
    """
    count_tokens = open_tokenizer(tokenizer) if tokenizer else None
    measured: dict[str, list[tuple[Sampled, Measured, int]]] = defaultdict(list)
    for number, (head, fields) in enumerate(zip(heads, sampled, strict=True)):
        log.debug(f"{number} of {len(heads)} sources")
        one = Sampled(**fields)
        size, files = one.bytes, one.files
        found = measure(head, one.name, size, files, one.weight, rows, config, count_tokens)
        measured[one.group].append((one, found, head.stat().st_size))
    made = []
    for group in (Group(**fields) for fields in groups):
        if not (known := measured[group.name]):
            raise ValueError(
                f"{group.name}: expected a source that can be read, found none of "
                f"{group.sources:,}; correct their URLs, or remove them from the sources"
            )
        read = sum(size for _, _, size in known)
        row: dict[str, Any] = {"group": group.name, "sources": group.sources}
        row |= {"sampled": len(known), "bytes": group.bytes, "read": read}
        for amount in AMOUNTS:
            row[amount] = None
            if all(amount in found for _, found, _ in known):
                pairs = [(found[amount], weigh(one, amount)) for one, found, _ in known]
                total = group.bytes if amount == "source_bytes" else group.taken_bytes
                row[amount] = asdict(estimate(pairs, total, read / group.bytes))
        made.append(row)
    total_row: dict[str, Any] = {"group": "in all"}
    for key in ("sources", "sampled", "bytes", "read"):
        total_row[key] = sum(row[key] for row in made)
    for amount in AMOUNTS:
        parts = [Estimate(**row[amount]) for row in made if row[amount]]
        total_row[amount] = asdict(sum(parts[1:], parts[0])) if parts else None
    content = {"groups": made, "total": total_row, "documents": hashed_fields(config)}
    estimates.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    text.write_text(format_sample(made, total_row), encoding="utf-8")
    return {key: total_row[key] for key in ("sources", "sampled", "bytes", "read")}


def weigh(one: Sampled, amount: str) -> float:
    """The bytes that an amount of a source is in proportion to."""
    return one.bytes * (1.0 if amount == "source_bytes" else one.weight)


def estimate(pairs: list[tuple[float, float]], total: float, share_read: float) -> Estimate:
    """An amount of a group by (amount, bytes) of some of its sources, in proportion to bytes.

    Args:
        total: bytes of the whole group.
        share_read: the share of these that was read. Of what was read, nothing is uncertain.
    """
    from scipy.stats import t

    count, size = len(pairs), sum(size for _, size in pairs)
    rate = sum(amount for amount, _ in pairs) / size
    expected = rate * total
    if share_read >= 1:
        return Estimate(expected, expected, expected)
    if count == 1:
        return Estimate(expected / ONE_SOURCE_FACTOR, expected, expected * ONE_SOURCE_FACTOR)
    residuals = [amount - rate * size for amount, size in pairs]
    variance = sum(residual**2 for residual in residuals) / (count - 1) * (1 - share_read)
    error = sqrt(variance / count) / (size / count) * total
    half = float(t.ppf((1 + CONFIDENCE) / 2, count - 1)) * error
    return Estimate(max(0.0, expected - half), expected, expected + half)


def format_sample(groups: list[dict[str, Any]], total: dict[str, Any]) -> str:
    """The estimates as an aligned table, and what they mean."""

    def cell(found: dict[str, float] | None, form: Any) -> str:
        if found is None:
            return "?"
        low, expected, high = (form(int(found[key])) for key in ("low", "expected", "high"))
        return expected if low == high else f"{expected} ({low} to {high})"

    rows = [["group", "sources", "read", "size", "documents", "text", "tokens"]]
    for row in [*groups, total] if len(groups) > 1 else [total]:
        rows.append(
            [
                row["group"],
                f"{row['sampled']:,} of {row['sources']:,}",
                format_bytes(row["read"]),
                format_bytes(row["bytes"]),
                cell(row["documents"], format_count),
                cell(row["text_bytes"], format_bytes),
                cell(row["tokens"], format_count),
            ]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    notes = textwrap.wrap(NOTE, 100) + [NO_TOKENIZER] * (total["tokens"] is None)
    return "\n".join([*lines, *notes]) + "\n"
