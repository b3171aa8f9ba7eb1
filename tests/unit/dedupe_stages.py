"""The stages of deduplication on small files, for their tests."""

import gzip
import json
from pathlib import Path
from typing import Any

from olmo.corpus import overlaps
from olmo.corpus.dedupe import NearSection
from olmo.corpus.digests import (
    copies,
    digests,
    heldout_digests,
    signature_options,
)
from olmo.corpus.documents import documents
from olmo.corpus.duplicates import OUTPUTS, clusters, duplicates, places
from olmo.corpus.marks import marks
from olmo.corpus.overlaps import overlap_filter

DIGESTS = ("document_digests", "line_digests", "near_digests", "line_starts")


def make(folder: Path, name: str, texts: dict[str, str], **more: object) -> dict[str, Path]:
    """A source and what the documents' stage makes of it."""
    folder = folder / name
    folder.mkdir(parents=True)
    lines = [json.dumps({"text": t, "id": i, **more}, ensure_ascii=False) for i, t in texts.items()]
    (folder / "source.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    made = {kind: folder / kind for kind in ("documents", "heldout", "table")}
    documents.build(source=folder / "source.gz", name=name, **made)
    return made


def find_marks(
    files: Any,
    folder: Path,
    dolma: Any = None,
    exact: bool = False,
    paragraphs: bool = False,
    ngram: int = 0,
    overlap: float = 0.0,
    parts: int = 1,
    memory_bytes: int = 1 << 30,
    near: NearSection | None = None,
) -> list[tuple[Any, Path]]:
    """For each file: the facts of its marks, and the marks."""
    pairs, tools = files["pairs"], {"dolma": dolma, "toolkit": dolma and dolma.toolkit}
    held, of_overlaps = [], [[] for _ in pairs]
    if exact:
        held = [folder / "held"]
        heldout_digests.build(heldout=[files["heldout"]], heldout_digests=held[0])
    if ngram:
        given = {"against": [files["against"]], "ngram": ngram, **tools}
        overlap_filter.build(overlap_filter=folder / "filter", **given)
    for n, pair in enumerate(pairs):
        if ngram:
            of_overlaps[n] = [folder / f"{n}.overlaps"]
            overlaps.overlaps.build(
                documents=pair["documents"],
                table=pair["table"],
                overlap_filter=folder / "filter",
                overlaps=of_overlaps[n][0],
                ngram=ngram,
                overlap=overlap,
                **tools,
            )
        if not (exact or paragraphs or near):
            continue
        digests.build(
            documents=pair["documents"],
            overlaps=of_overlaps[n],
            exact=exact,
            paragraphs=paragraphs,
            **signature_options(near),
            **{name: folder / f"{n}.{name}" for name in DIGESTS},
        )
        found = folder / f"{n}.document_digests"
        copies.build(document_digests=found, heldout=held, copies=folder / f"{n}.copies")
    parts = parts if exact or paragraphs or near else 0
    for part in range(parts):
        given = {name: [folder / f"{n}.{name}" for n in range(len(pairs))] for name in DIGESTS}
        duplicates.build(
            **given,
            copies=[folder / f"{n}.copies" for n in range(len(pairs))],
            **{name: folder / f"{part}.{name}" for name in OUTPUTS},
            names=[f"shard {n}" for n in range(len(pairs))],
            part=part,
            parts=parts,
            memory_bytes=memory_bytes,
        )
    if near:
        files = [folder / f"{part}.near_pairs" for part in range(parts)]
        clusters.build(near_pairs=files, near=folder / "near")
    made = []
    for n, pair in enumerate(pairs):
        if parts:
            names = ("shards", "document_repeats", "line_repeats")
            places.build(
                near=[folder / "near"] if near else [],
                places=folder / f"{n}.places",
                shard=f"shard {n}",
                **{name: [folder / f"{part}.{name}" for part in range(parts)] for name in names},
            )
        facts = marks.build(
            documents=pair["documents"],
            table=pair["table"],
            overlaps=of_overlaps[n],
            copies=[folder / f"{n}.copies"] if parts else [],
            places=[folder / f"{n}.places"] if parts else [],
            marks=folder / f"{n}.marks",
        )
        made.append((facts, folder / f"{n}.marks"))
    return made
