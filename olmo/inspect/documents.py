"""Finds the documents of token files, and their tokens, through the store's records."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from olmo.store.lineage import records_by_content
from olmo.store.record import Record
from olmo.store.stage import current_store
from olmo.store.store import Store

if TYPE_CHECKING:
    import polars

RecordsByContent = dict[str, list[Record]]  # of olmo.store.lineage.records_by_content


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
        rows = table.select("id", "file", "line", "start", "end").collect()
        return [self.document(row) for row in rows.iter_rows(named=True)]

    @property
    def documents_digest(self) -> str:
        """The digest of the documents that became its tokens."""
        digest: str = self.record["action"]["inputs"]["documents"]
        return digest

    @property
    def documents_path(self) -> Path:
        """The file of these documents, a line for each row of `read_table`."""
        return self.find_object("documents", self.documents_digest)

    def read_table(self) -> polars.DataFrame:
        """A row for each document, also for conversations that have no tokens."""
        import polars

        return polars.read_parquet(self.find_output("index"))

    def document(self, row: dict[str, Any]) -> Document:
        """The document of a row of `read_table`."""
        return Document(
            id=row["id"],
            source=row["file"],
            line=row["line"],
            origin=self.origin,
            shard=self.sha256,
            start=row["start"],
            end=row["end"],
        )

    def read_tokens(self, document: Document) -> np.ndarray:
        """The token ids of a document of this shard: (end - start,)."""
        dtype = np.dtype(self.record["facts"]["dtype"])
        tokens, size = self.find_output("tokens"), document.end - document.start
        return np.fromfile(tokens, dtype, size, offset=document.start * dtype.itemsize)

    def _rows(self) -> Any:
        """The table of the documents that have tokens; conversations may have none."""
        import polars

        table = polars.scan_parquet(self.find_output("index"))
        return table.filter(polars.col("start") < polars.col("end"))

    def find_output(self, output: str) -> Path:
        """The path of one of its files: "tokens", "index". Raises ValueError if it is lost."""
        return self.find_object(output, self.record["outputs"][output]["sha256"])

    def find_object(self, name: str, digest: str) -> Path:
        """The path of an object of the store. Raises ValueError if it is not there."""
        path = self.store.object_path(digest)
        if not path.exists():
            raise ValueError(
                f"{name} of a shard ({digest[:12]}…) is not in the store {self.store.root}; "
                "pull it, or run snakemake again"
            )
        return path


def object_digest(path: str | Path) -> str:
    """The last part of a path or URL; for an object of the store that is its digest."""
    return Path(path).name


def require_shard(path: str | Path, shards: dict[str, TokenShard]) -> TokenShard:
    """The shard of a token file. Raises ValueError if the pipeline did not make it."""
    if (shard := shards.get(object_digest(path))) is None:
        raise ValueError(
            f"{path} is not known to the store {current_store().root}: only data that this "
            "pipeline made can be searched for documents"
        )
    return shard


def select_shards(paths: Iterable[str | Path], shards: dict[str, TokenShard]) -> list[TokenShard]:
    """The shards of those token files that the pipeline made, in order."""
    return [shards[name] for name in map(object_digest, paths) if name in shards]


def find_token_shards(
    store: Store, made_by: RecordsByContent | None = None
) -> dict[str, TokenShard]:
    """All token files that the pipeline made from documents, by sha256.

    Args:
        made_by: of `records_by_content`, which reads every record.
    """
    made_by = records_by_content(store) if made_by is None else made_by
    return {shard.sha256: shard for shard in _all_shards(store, made_by)}


def find_shards_by_documents(store: Store, made_by: RecordsByContent) -> dict[str, TokenShard]:
    """The same by the digest of their documents; without tokens, several have one sha256."""
    return {shard.documents_digest: shard for shard in _all_shards(store, made_by)}


def _all_shards(store: Store, made_by: RecordsByContent) -> Iterator[TokenShard]:
    for record in (record for records in made_by.values() for record in records):
        if record["action"]["stage"] in ("tokens", "instances"):
            yield TokenShard(store, record, made_by)
