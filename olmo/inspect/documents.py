"""From tokens back to documents, and from documents to tokens: by the store's records."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from olmo.io import gz
from olmo.store.lineage import records_by_content
from olmo.store.record import Record
from olmo.store.store import Store


@dataclass(frozen=True)
class Document:
    """A document of a token shard."""

    id: str
    source: str  # its file's name
    line: int  # in there, from 1
    origin: str | None  # url of that file, where it came over the net
    shard: str  # sha256 of the token file
    start: int  # its tokens in there, the end-of-text token included
    end: int


class TokenShard:
    """A token file that the pipeline made, with what it was made from."""

    def __init__(self, store: Store, record: Record, made_by: dict[str, list[Record]]) -> None:
        self.store, self.record = store, record
        self.sha256: str = record["outputs"]["tokens"]["sha256"]
        self._made_by = made_by

    @cached_property
    def _way(self) -> list[Record]:
        """The actions that the documents themselves came through, from the tokens back.

        Not those that only had a say: the tokenizer's, or attributes', which know all files.
        """
        way, seen = [self.record], {self.record["key"]}
        for record in way:  # which grows
            inputs = record["action"]["inputs"]
            for digest in (inputs[name] for name in ("documents", "source") if name in inputs):
                new = [r for r in self._made_by.get(digest, []) if r["key"] not in seen]
                seen |= {r["key"] for r in new}
                way += new
        return way

    @property
    def origin(self) -> str | None:
        urls = [r["action"]["params"].get("url") for r in self._way]
        return next((url for url in urls if url), None)

    @property
    def sources(self) -> set[str]:
        """Digests of the source files behind it."""
        return {
            file["sha256"]
            for record in self._way
            for name, file in record["outputs"].items()
            if name == "source"
        }

    @property
    def tokenizer(self) -> Path:
        return self.store.object_path(self.record["action"]["inputs"]["tokenizer"])

    @property
    def heldout(self) -> set[str]:
        """Digests of the documents that were held out where these were kept."""
        outputs = [
            r["outputs"]["heldout"]["sha256"] for r in self._way if "heldout" in r["outputs"]
        ]
        return set(outputs)

    def documents(self, start: int = 0, end: int | None = None) -> list[Document]:
        """Those with a token in [start, end), in order."""
        import polars

        table = self._rows().filter(polars.col("end") > start)
        if end is not None:
            table = table.filter(polars.col("start") < end)
        rows = table.select("id", "file", "line", "start", "end").collect().iter_rows()
        return [
            Document(id, file, line, self.origin, self.sha256, first, last)
            for id, file, line, first, last in rows
        ]

    def texts(self) -> Iterator[str]:
        """What stands in the documents, or is said in the conversations, in `documents`' order."""
        import polars

        table = polars.read_parquet(self._object("index"))
        kept = table["start"] < table["end"]
        documents = self.store.object_path(self.record["action"]["inputs"]["documents"])
        with gz.reading(documents) as lines:
            for line, here in zip(lines, kept, strict=True):
                if here:
                    yield document_text(json.loads(line, parse_int=float))  # some are too long

    def _rows(self) -> Any:
        """The table of the documents that have tokens; a conversation may have been left out."""
        import polars

        table = polars.scan_parquet(self._object("index"))
        return table.filter(polars.col("start") < polars.col("end"))

    def _object(self, output: str) -> Path:
        digest: str = self.record["outputs"][output]["sha256"]
        path = self.store.object_path(digest)
        if not path.exists():
            raise ValueError(
                f"{output} of a shard ({digest[:12]}…) is not in the store {self.store.root}; "
                "pull it, or run snakemake again"
            )
        return path


def document_text(line: dict[str, Any]) -> str:
    """What stands in a document, or is said in a conversation."""
    if "messages" in line:
        return "\n".join(message["content"] for message in line["messages"])
    text: str = line["text"]
    return text


def object_digest(path: str | Path) -> str:
    """The name of a file, here or at a URL; of an object of the store that is its digest."""
    return Path(path).name


def find_token_shards(store: Store) -> dict[str, TokenShard]:
    """Every token file that the pipeline made from documents, by its sha256."""
    made_by = records_by_content(store)
    return {
        record["outputs"]["tokens"]["sha256"]: TokenShard(store, record, made_by)
        for record in store.records()
        if record["action"]["stage"] in ("tokens", "instances")
    }
