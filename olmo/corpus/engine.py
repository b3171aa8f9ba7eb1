"""What makes token shards: the toolkit itself, or `fast`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import polars


@dataclass(frozen=True)
class Job:
    """One file of documents to tokenize."""

    documents: Path
    tokenizer: Path
    tokens: Path  # to be written: raw little-endian `dtype`
    eos_token_id: int
    pad_token_id: int
    dtype: str
    text_bytes: int
    count: int  # of documents
    max_size: int
    special_as_text: bool


class Engine(Protocol):
    """What makes token shards. `toolkit` is part of their identity: names and versions."""

    toolkit: str

    def tokenize(self, job: Job) -> tuple[polars.DataFrame, str]:
        """Write the tokens; (row, id, start, end of each document, in order), and what was said."""
