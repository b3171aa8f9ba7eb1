"""Tags of documents by the toolkit's own taggers (`dolma tag`): lengths, repetitions, C4's rules, …

A tagger looks at one text at a time, so files are tagged side by side, each once. The conditions
on tags (olmo.corpus.quality) are a stage of their own: a threshold can change in seconds.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import zip_longest
from pathlib import Path
from typing import Any

from olmo.corpus.dedupe import read_train_rows
from olmo.corpus.documents import document_decoder
from olmo.corpus.dolma import Dolma, open_dolma, scratch_folder, time_limit
from olmo.corpus.listing import read_listing, run_shard, write_listing
from olmo.corpus.overlaps import locate_row
from olmo.corpus.quality import QualitySection, quality, variable_name
from olmo.io import gz
from olmo.runtime.log import log
from olmo.store.stage import Facts, Input, Inputs, Output, Unhashed, stage

DOCUMENTS = "in/documents/documents.gz"


def batch(
    documents: Path,
    listing: Path,
    requirements: Path,
    config: QualitySection,
    environment: Path | None = None,
) -> None:
    """Tag the documents of a batch's files, and mark those that the conditions drop.

    Otherwise as `olmo tokens`.
    """
    tables = {entry.shard: entry.object for entry in read_listing([documents], "table")}
    taggers, keep = tuple(config.taggers), tuple(map(str, config.conditions))
    with_model = tuple(tagger for tagger in config.taggers if tagger in config.models)
    entries = []
    with open_dolma(requirements, environment) as dolma:
        for entry in read_listing([documents], "documents"):
            tagged = run_shard(
                tags,
                listing,
                entry.shard,
                {"tags": "tags/{}.tags.gz"},
                documents=entry.object,
                table=tables[entry.shard],
                models=[Path(config.models[tagger]) for tagger in with_model],
                with_model=with_model,
                toolkit=dolma.toolkit,
                dolma=dolma,
                taggers=taggers,
            )
            outputs = {"quality": "tags/{}.quality.gz", "values": "tags/{}.parquet"}
            given = {"tags": tagged[0].object, "taggers": taggers, "keep": keep}
            entries += tagged + run_shard(quality, listing, entry.shard, outputs, **given)
    write_listing(listing, entries)


@stage(version=1, conditions=gz.conditions)
def tags(
    documents: Input,
    table: Input,
    models: Inputs,
    tags: Output,
    toolkit: str,
    dolma: Unhashed[Dolma],
    taggers: tuple[str, ...],
    with_model: tuple[str, ...] = (),
) -> Facts:
    """The tags of a file's training documents, by the toolkit's `taggers`.

    `tags` has a line per document, in order, {"id", "attributes": {tag: [[start, end, value], …]}}.
    `models` are the files of the taggers `with_model`.

    Raises ValueError where the toolkit fails or leaves a document out; ChildProcessError when it
    dies or takes too long.
    """
    rows = read_train_rows(table)
    with scratch_folder(tags) as folder:
        write_texts(documents, folder / DOCUMENTS)
        output = dolma.request(
            "tag",
            len(taggers) * time_limit(int(rows["bytes"].sum())),
            folder=str(folder),
            documents=DOCUMENTS,
            taggers=list(taggers),
            models={t: str(path.resolve()) for t, path in zip(with_model, models, strict=True)},
        )
        count = 0
        with gz.writing(tags) as lines:
            for line in join_tags(folder, taggers, rows, output):
                lines.write(json.dumps(line).encode() + b"\n")
                count += 1
    return {"documents": count}


def write_texts(documents: Path, path: Path) -> None:
    """A file of the documents' ids and texts alone: the toolkit fails on a source that is null."""
    import msgspec

    decode, encode = document_decoder().decode, msgspec.json.encode
    path.parent.mkdir(parents=True)
    with gz.reading(documents) as lines, gz.writing(path) as output:
        for line in lines:
            output.write(encode(decode(line)) + b"\n")


def join_tags(
    folder: Path, taggers: tuple[str, ...], rows: Any, toolkit_output: str
) -> Iterator[dict[str, Any]]:
    """The tags of each document, which the toolkit wrote to a file for each tagger.

    Raises ValueError unless each file has each of `rows`, once, in order.
    """
    expected = rows["id"].to_list()
    with ExitStack() as stack:
        files = []
        for tagger in taggers:
            path = folder / "in/attributes" / variable_name(tagger) / Path(DOCUMENTS).name
            files.append(stack.enter_context(gz.reading(path)) if path.exists() else iter(()))
        for row, (identity, *lines) in enumerate(zip_longest(expected, *files)):
            found: list[Any] = [json.loads(line) if line else {"id": None} for line in lines]
            if any(one["id"] != identity for one in found):
                place = locate_row(rows, row) if row < len(expected) else rows["file"][0]
                log.info(toolkit_output)
                raise ValueError(
                    f"{place}: expected tags of {len(expected):,} documents from the toolkit, in "
                    "their order, found others; its output is above"
                )
            spans = {tag: value for one in found for tag, value in one["attributes"].items()}
            yield {"id": identity, "attributes": spans}
