"""Finds the documents of token files, and their tokens, through the store's records."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
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
    line: int  # in that file, from 1
    origin: str | None  # URL of that file, if it was downloaded
    shard: str  # sha256 of the token file
    start: int  # its first token in there
    end: int  # one past its last, the end-of-text token


class TokenShard:
    """A token file that the pipeline made, with the records of what it was made from."""

    def __init__(self, store: Store, record: Record, made_by: dict[str, list[Record]]) -> None:
        self.store, self.record = store, record
        self.sha256: str = record["outputs"]["tokens"]["sha256"]
        self._made_by = made_by

    @cached_property
    def ancestry(self) -> list[Record]:
        """The records of the stages that the documents passed through, from the tokens back.

        Not those of other inputs, as the tokenizer or attributes, which come from all files.
        """
        ancestry, seen = [self.record], {self.record["key"]}
        for record in ancestry:  # grows in the loop
            inputs = record["action"]["inputs"]
            for digest in (inputs[name] for name in ("documents", "source") if name in inputs):
                new = [r for r in self._made_by.get(digest, []) if r["key"] not in seen]
                seen |= {r["key"] for r in new}
                ancestry += new
        return ancestry

    @property
    def origin(self) -> str | None:
        urls = [r["action"]["params"].get("url") for r in self.ancestry]
        return next((url for url in urls if url), None)

    @property
    def sources(self) -> set[str]:
        """Digests of its source files."""
        return {
            file["sha256"]
            for record in self.ancestry
            for name, file in record["outputs"].items()
            if name == "source"
        }

    @property
    def tokenizer(self) -> Path:
        return self.store.object_path(self.record["action"]["inputs"]["tokenizer"])

    @property
    def heldout(self) -> set[str]:
        """Digests of the documents that were held out from the same source files."""
        outputs = [
            r["outputs"]["heldout"]["sha256"] for r in self.ancestry if "heldout" in r["outputs"]
        ]
        return set(outputs)

    def documents(
        self, start: int = 0, end: int | None = None, id: str | None = None
    ) -> list[Document]:
        """The documents with a token in [start, end), in order; with an `id`, those of that id."""
        import polars

        table = self._rows().filter(polars.col("end") > start)
        if id is not None:
            table = table.filter(polars.col("id") == id)
        if end is not None:
            table = table.filter(polars.col("start") < end)
        rows = table.select("id", "file", "line", "start", "end").collect().iter_rows()
        return [
            Document(id, file, line, self.origin, self.sha256, first, last)
            for id, file, line, first, last in rows
        ]

    def texts(self) -> Iterator[str]:
        """The texts of the documents or conversations, in the order of `documents()`."""
        import polars

        table = polars.read_parquet(self._object("index"), columns=["start", "end"])
        has_tokens = table["start"] < table["end"]
        documents = self.store.object_path(self.record["action"]["inputs"]["documents"])
        with gz.reading(documents) as lines:
            for line, is_kept in zip(lines, has_tokens, strict=True):
                if is_kept:
                    yield document_text(json.loads(line, parse_int=float))  # some are too long

    def _rows(self) -> Any:
        """The table of the documents that have tokens; conversations may have none."""
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
    """The text of a document, or of all messages of a conversation."""
    if "messages" in line:
        return "\n".join(message["content"] for message in line["messages"])
    text: str = line["text"]
    return text


def object_digest(path: str | Path) -> str:
    """The last part of a path or URL; for an object of the store that is its digest."""
    return Path(path).name


def select_shards(paths: Iterable[str | Path], shards: dict[str, TokenShard]) -> list[TokenShard]:
    """The shards of those token files that the pipeline made, in order."""
    return [shards[name] for name in map(object_digest, paths) if name in shards]


def find_token_shards(
    store: Store, made_by: dict[str, list[Record]] | None = None
) -> dict[str, TokenShard]:
    """All token files that the pipeline made from documents, by sha256.

    Args:
        made_by: of `records_by_content`, which reads every record.
    """
    made_by = records_by_content(store) if made_by is None else made_by
    return {
        record["outputs"]["tokens"]["sha256"]: TokenShard(store, record, made_by)
        for records in made_by.values()
        for record in records
        if record["action"]["stage"] in ("tokens", "instances")
    }
