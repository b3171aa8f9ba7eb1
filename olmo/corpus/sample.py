"""What a data set will have, expected from the beginnings of some of its sources.

Sources are grouped by the beginnings of their names. Of each group, some sources spread evenly are
read, each from its beginning (olmo.corpus.estimates says what follows from them).
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from olmo.corpus import source_table
from olmo.corpus.beginnings import MAX_BYTES, beginning
from olmo.corpus.documents import EVERY_LINE, DocumentsSection
from olmo.corpus.estimates import Group, sample
from olmo.corpus.formats import split_suffixes
from olmo.corpus.ingest import ingest_files, transfer
from olmo.corpus.listing import Entry
from olmo.corpus.source_table import Source
from olmo.corpus.sources import SourcesSection
from olmo.io import http_client
from olmo.io.downloads import Progress
from olmo.runtime.log import log

MAX_SOURCES = 128  # that are read; with MAX_BYTES of each, 256 MiB
ALL = "all"
NUMBER = re.compile(r"([-_.]\d+-of)?([-_.]\d+)+$|\d+$")  # that ends a source's name


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
