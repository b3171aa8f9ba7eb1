"""The interface of the engines that make token shards: the toolkit itself, and `fast`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import polars


@dataclass(frozen=True)
class TokenizeJob:
    """One file of documents to tokenize."""

    documents: Path
    tokenizer: Path
    tokens: Path  # the output: raw little-endian `dtype`
    eos_token_id: int
    pad_token_id: int
    dtype: str
    text_bytes: int
    count: int  # of documents
    max_size: int
    special_as_text: bool


class Engine(Protocol):
    """Makes token shards. `toolkit`, its names and versions, is part of their action's key."""

    toolkit: str

    def tokenize(self, job: TokenizeJob) -> tuple[polars.DataFrame, str]:
        """Write the tokens; the table of `token_ranges`, and the engine's messages."""


def token_ranges(
    rows: Sequence[int], ids: Sequence[str], lengths: Sequence[int]
) -> polars.DataFrame:
    """A row per document, in order: row (from 1), id, start, end (its range of tokens)."""
    import numpy as np
    import polars

    sizes = np.array(lengths, np.uint64)
    ends = np.cumsum(sizes, dtype=np.uint64)
    number = polars.UInt64
    return polars.DataFrame(
        {"row": rows, "id": ids, "start": ends - sizes, "end": ends},
        schema={"row": number, "id": polars.String, "start": number, "end": number},
    )
