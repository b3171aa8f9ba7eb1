"""Token shards: the documents as token ids, in order, with a table of each document's range.

Two engines make them, with the same bytes: `dolma`, the toolkit itself, and `fast`. A shard is
accepted only if it has every document that went in.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from olmo.config import BaseConfig
from olmo.config.strict import check_range
from olmo.corpus.documents import HELDOUT, MAX_BYTES_PER_BYTE, MAX_TOKENS, PARQUET, TRAIN
from olmo.corpus.dolma import Dolma, open_dolma
from olmo.corpus.encoding import ENCODERS, GIGATOKEN
from olmo.corpus.engine import Engine, TokenizeJob
from olmo.corpus.fast import Fast
from olmo.corpus.listing import read_listing, run_shards, write_listing
from olmo.corpus.token_bytes import count_heldout_bytes
from olmo.corpus.tokenizer import read_vocabulary, token_dtype
from olmo.runtime.log import log
from olmo.store.stage import Facts, Input, Output, Stage, Unhashed, stage

if TYPE_CHECKING:
    import numpy as np
    import polars

ENGINES = DOLMA, FAST = "dolma", "fast"
SPECIAL_TOKENS = AS_SPECIAL, AS_TEXT = "as-special", "as-text"


@dataclass
class TokensSection(BaseConfig):
    """How documents become tokens; both engines give the same bytes."""

    engine: str = DOLMA  # the toolkit itself, or `fast`
    audit_share: float = 0.01  # of fast's files, which the toolkit tokenizes too, to compare
    encoder: str = GIGATOKEN  # of fast; without it: "tiktoken", or "tokenizers"
    special_tokens: str = AS_SPECIAL  # what becomes of their names in a text; or "as-text"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("tokens.audit_share", self.audit_share, 0, 1)
        for name, known in {
            "engine": ENGINES,
            "encoder": ENCODERS,
            "special_tokens": SPECIAL_TOKENS,
        }.items():
            if getattr(self, name) not in known:
                raise ValueError(
                    f"tokens.{name}: expected {' or '.join(known)}, found {getattr(self, name)!r}"
                )


def batch(
    documents: list[Path],
    tokenizer: Path,
    listing: Path,
    eos_token_id: int,
    pad_token_id: int,
    requirements: Path,
    config: TokensSection,
    environment: Path | None = None,
) -> None:
    """Tokenize a batch's documents, training and held-out ones, with one process of the toolkit.

    `environment` is what `olmo environment` made of `requirements`; without it, the toolkit is
    that of the `python` on PATH (`--sdm conda`).
    """
    # The toolkit starts when the first shard is not in the store.
    with open_dolma(requirements, environment) as dolma:
        engine = choose_engine(config, dolma)
        run_splits(
            tokens,
            documents,
            listing,
            {"tokens": "{}.npy", "index": "{}.parquet"},
            "{}.token_bytes.npy",
            tokenizer,
            config.special_tokens == AS_TEXT,
            eos_token_id=eos_token_id,
            pad_token_id=pad_token_id,
            toolkit=engine.toolkit,
            engine=engine,
            special_tokens=config.special_tokens,
        )


def choose_engine(config: TokensSection, dolma: Dolma) -> Engine:
    if config.engine == DOLMA:
        return dolma
    return Fast(dolma, config.audit_share, config.encoder)


def run_splits(
    stage: Stage,
    documents: list[Path],
    listing: Path,
    files: dict[str, str],
    token_bytes: str,
    tokenizer: Path,
    special_as_text: bool = False,
    **arguments: Any,
) -> None:
    """Run a stage on the training, then on the held-out documents of each shard; write a listing.

    `files`: output → its path below tokens/ or heldout/, in which {} is the shard's name;
    `token_bytes` the same of the held-out tokens' bytes. The listing has the held-out outputs under
    names that begin with "heldout-".
    """
    tables = {entry.shard: entry.object for entry in read_listing(documents, "table")}
    entries = []
    for split, source, folder, prefix in (
        (TRAIN, "documents", "tokens", ""),
        (HELDOUT, "heldout", "heldout", "heldout-"),
    ):
        entries += run_shards(
            stage,
            listing,
            read_listing(documents, source),
            {output: f"{folder}/{file}" for output, file in files.items()},
            lambda entry: {"documents": entry.object, "table": tables[entry.shard]},
            {output: prefix + output for output in files},
            split=split,
            tokenizer=tokenizer,
            **arguments,
        )
    entries += count_heldout_bytes(
        listing, documents, entries, f"heldout/{token_bytes}", tokenizer, special_as_text
    )
    write_listing(listing, entries)


@stage(version=1)
def tokens(
    documents: Input,
    table: Input,
    tokenizer: Input,
    tokens: Output,
    index: Output,
    eos_token_id: int,
    pad_token_id: int,
    toolkit: str,
    engine: Unhashed[Engine],
    split: str = TRAIN,
    max_size: int = MAX_TOKENS,
    special_tokens: str = AS_SPECIAL,
) -> Facts:
    """Tokenize one file of documents.

    `tokens` gets raw little-endian uint16 (uint32 for more than 65,536 token ids): the documents in
    order, each with the eos token at its end. `index` (parquet) has a row per document: start, end
    (its token range), id, file, line (in the source), bytes (of its text). `table` is that of the
    documents' stage, `split` the split of it that `documents` has. The name of a special token
    in a text becomes that token (`as-special`, the toolkit's way) or stays text (`as-text`).
    `toolkit` is `engine.toolkit`: the versions of an engine can change bytes, its process cannot.

    Raises ValueError for a document too long for `max_size`, and when the documents that came out
    are not those that went in; ChildProcessError when the toolkit's process dies or takes too long.
    """
    import polars

    assert toolkit == engine.toolkit and special_tokens in SPECIAL_TOKENS
    expected = (
        polars.read_parquet(table)
        .filter(polars.col("split") == split)
        .sort("row")
        .select("row", "id", "file", "line", "bytes")
    )
    check_lengths(expected, max_size)
    vocab_size, special_names = read_vocabulary(tokenizer.read_bytes())
    dtype = token_dtype(vocab_size)

    text_bytes = int(expected["bytes"].sum())
    if expected.height == 0:
        tokens.write_bytes(b"")
        ranges = expected.select("row", "id", start="row", end="row")
    else:
        job = TokenizeJob(
            documents=documents,
            tokenizer=tokenizer,
            tokens=tokens,
            eos_token_id=eos_token_id,
            pad_token_id=pad_token_id,
            dtype=dtype.name,
            text_bytes=text_bytes,
            count=expected.height,
            max_size=max_size,
            special_as_text=special_tokens == AS_TEXT,
        )
        ranges, messages = engine.tokenize(job)
        check_complete(expected, ranges, messages)

    found = expected.with_columns(ranges["start"], ranges["end"])
    counts = count_token_ids(tokens, dtype, found["end"].to_numpy(), eos_token_id, vocab_size)
    found.select("start", "end", "id", "file", "line", "bytes").write_parquet(index, **PARQUET)
    special = {
        name: int(counts[id] - (found.height if id == eos_token_id else 0))
        for id, name in special_names.items()
    }
    special = {name: count for name, count in special.items() if count}
    for name, count in special.items():
        log.warning(
            f"{found['file'][0]}: {name} occurs {count} times in the text of documents and became "
            f"that special token; to keep it as text, set tokens: {{special_tokens: {AS_TEXT}}} in "
            "the recipe"
        )
    return {
        "documents": found.height,
        "tokens": int(counts.sum()),
        "text_bytes": text_bytes,
        "dtype": dtype.name,
        "special_tokens_in_text": special,
    }


def check_lengths(expected: polars.DataFrame, max_size: int) -> None:
    """Raises ValueError for a document that may have `max_size` tokens or more.

    The toolkit never splits a document. It would write empty files forever, looking for one with
    enough room.
    """
    import polars

    most = max_size // MAX_BYTES_PER_BYTE - 1
    for row in expected.filter(polars.col("bytes") > most).iter_rows(named=True):
        raise ValueError(
            f"{row['file']}:{row['line']}: expected a text of at most {most:,} bytes, so that it "
            f"has fewer than max_size={max_size:,} tokens; found {row['bytes']:,}. Drop it, in the "
            f"recipe: documents: {{max_text_bytes: {most}, allow: [too-long]}}"
        )


def check_complete(expected: polars.DataFrame, found: polars.DataFrame, messages: str) -> None:
    """Raises ValueError unless the toolkit returned every document, once, under its id."""
    if expected.select("row", "id").equals(found.select("row", "id")):
        return
    lost = expected.join(found, on=["row", "id"], how="anti")
    gained = found.join(expected, on=["row", "id"], how="anti")
    places = [f"{row['file']}:{row['line']}" for row in lost.head(10).iter_rows(named=True)]
    log.info(messages)
    raise ValueError(
        f"expected {expected.height:,} documents from the toolkit, found {found.height:,}: "
        f"{lost.height:,} lost ({', '.join(places)}), {gained.height:,} unexpected; its output is "
        "above"
    )


def count_token_ids(
    tokens: Path, dtype: np.dtype, ends: np.ndarray, eos_token_id: int, vocab_size: int
) -> np.ndarray:
    """How often each token id occurs, (vocab_size,). Raises ValueError for an invalid shard."""
    import numpy as np

    counts = np.zeros(vocab_size, np.int64)
    if len(ends) == 0:
        return counts
    array = np.memmap(tokens, dtype, mode="r")
    if len(array) != ends[-1]:
        raise ValueError(f"{tokens.name}: expected {ends[-1]:,} tokens, found {len(array):,}")
    for start in range(0, len(array), 1 << 22):
        found = np.bincount(array[start : start + (1 << 22)], minlength=vocab_size)
        if len(found) > vocab_size:
            raise ValueError(
                f"expected token ids below {vocab_size:,}, the tokenizer's size; found "
                f"{len(found) - 1:,}"
            )
        counts += found
    unended = np.flatnonzero(array[ends - 1] != eos_token_id)
    if len(unended):
        raise ValueError(
            f"expected every document to end with eos_token_id={eos_token_id}, found "
            f"{array[ends[unended[0]] - 1]} at the end of document {unended[0] + 1}"
        )
    return counts
