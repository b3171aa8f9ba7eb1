"""Token shards: every document, in its place, with a table of which tokens are whose.

Two engines make them, with the same bytes: `dolma`, the toolkit itself, and `fast`. A shard
counts only if every document that went in came out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from olmo.config import BaseConfig
from olmo.config.strict import check_range
from olmo.corpus.documents import HELDOUT, MAX_BYTES_PER_BYTE, MAX_TOKENS, TRAIN
from olmo.corpus.dolma import started
from olmo.corpus.engine import Engine, Job
from olmo.corpus.fast import Fast
from olmo.corpus.listing import read, run, write
from olmo.runtime.log import log
from olmo.store.stage import Facts, Free, Input, Output, stage

if TYPE_CHECKING:
    import numpy as np
    import polars

PARQUET: dict[str, Any] = {
    "compression": "zstd",
    "compression_level": 3,
    "row_group_size": 1 << 17,
}


AS_SPECIAL, AS_TEXT = "as-special", "as-text"


@dataclass
class TokensSection(BaseConfig):
    """How documents become tokens; both engines give the same bytes."""

    engine: str = "dolma"  # the toolkit itself, or `fast`
    audit_share: float = 0.01  # of fast's files, tokenized by the toolkit as well and compared
    special_tokens: str = AS_SPECIAL  # what looks like one in a text; or "as-text"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("tokens.audit_share", self.audit_share, 0, 1)
        for name, known in {
            "engine": ("dolma", "fast"),
            "special_tokens": (AS_SPECIAL, AS_TEXT),
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
    """Token shards of a batch's documents and held-out documents, by one process of the toolkit.

    `environment` is what `olmo environment` made of `requirements`; without it, the toolkit is
    that of the `python` on PATH (`--sdm conda`).
    """
    tables = {entry.shard: entry.object for entry in read(documents, "table")}
    parts = {
        TRAIN: ("documents", {"tokens": "tokens/{}.npy", "index": "tokens/{}.parquet"}),
        HELDOUT: ("heldout", {"tokens": "heldout/{}.npy", "index": "heldout/{}.parquet"}),
    }
    entries = []
    # The toolkit starts when the first shard is not in the store.
    with started(requirements, environment) as dolma:
        engine = Fast(dolma, config.audit_share) if config.engine == "fast" else dolma
        for split, (output, paths) in parts.items():
            for entry in read(documents, output):
                made = run(
                    listing,
                    entry.shard,
                    tokens,
                    {name: path.format(entry.shard) for name, path in paths.items()},
                    documents=entry.object,
                    table=tables[entry.shard],
                    tokenizer=tokenizer,
                    eos_token_id=eos_token_id,
                    pad_token_id=pad_token_id,
                    toolkit=engine.toolkit,
                    engine=engine,
                    split=split,
                    special_tokens=config.special_tokens,
                )
                # The listing tells the held-out shards from the others by the output's name.
                prefix = "" if split == TRAIN else "heldout-"
                entries += [replace(file, output=prefix + file.output) for file in made]
    write(listing, entries)


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
    engine: Free[Engine],
    split: str = TRAIN,
    max_size: int = MAX_TOKENS,
    special_tokens: str = AS_SPECIAL,
) -> Facts:
    """Tokenize one file of documents.

    `tokens` gets raw little-endian uint16 (uint32 for more than 65,536 token ids), documents one
    after the other in their order, each ended by the eos token. `index` (parquet) has a row per
    document: start, end (its token range), id, file, line (in the source), bytes (of its text).
    `table` is the table that the documents' stage made, `split` the part of it in `documents`.
    What looks like a special token in a text becomes that token (`as-special`, the toolkit's way)
    or stays text (`as-text`). `toolkit` is the engine's: an engine that runs changes no byte, but
    its versions may.

    Raises ValueError for a document too long for `max_size`, and when what came out is not what
    went in; ChildProcessError when the toolkit's process dies or takes too long.
    """
    import numpy as np
    import polars

    assert toolkit == engine.toolkit and special_tokens in (AS_SPECIAL, AS_TEXT)
    expected = (
        polars.read_parquet(table)
        .filter(polars.col("split") == split)
        .sort("row")
        .select("row", "id", "file", "line", "bytes")
    )
    refuse_long(expected, max_size)
    vocab_size, special_names = vocabulary(tokenizer.read_bytes())
    dtype = np.dtype("<u2" if vocab_size <= 2**16 else "<u4")

    text_bytes = int(expected["bytes"].sum())
    if expected.height == 0:
        tokens.write_bytes(b"")
        ranges = expected.select("row", "id", start="row", end="row")
    else:
        job = Job(
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
        ranges, said = engine.tokenize(job)
        refuse_losses(expected, ranges, said)

    found = expected.with_columns(ranges["start"], ranges["end"])
    counts = check_tokens(tokens, dtype, found["end"].to_numpy(), eos_token_id, vocab_size)
    found.select("start", "end", "id", "file", "line", "bytes").write_parquet(index, **PARQUET)
    special = {
        name: int(counts[id] - (found.height if id == eos_token_id else 0))
        for id, name in special_names.items()
    }
    special = {name: count for name, count in special.items() if count}
    for name, count in special.items():
        log.warning(
            f"{found['file'][0]}: {name} stands {count} times in the text of documents and became "
            f"that special token; in the recipe tokens: {{special_tokens: {AS_TEXT}}} keeps it text"
        )
    return {
        "documents": found.height,
        "tokens": int(counts.sum()),
        "text_bytes": text_bytes,
        "dtype": dtype.name,
        "special_tokens_in_text": special,
    }


@cache
def vocabulary(tokenizer: bytes) -> tuple[int, dict[int, str]]:
    """A tokenizer file's number of tokens, and its special ones by their ids."""
    from tokenizers import Tokenizer

    model = Tokenizer.from_buffer(tokenizer)
    added = sorted(model.get_added_tokens_decoder().items())
    return model.get_vocab_size(), {id: token.content for id, token in added if token.special}


def refuse_long(expected: polars.DataFrame, max_size: int) -> None:
    """Raises ValueError for a document that may have `max_size` tokens or more.

    The toolkit never splits a document, and writes empty files for ever looking for one in which
    it has room.
    """
    import polars

    most = max_size // MAX_BYTES_PER_BYTE - 1
    for row in expected.filter(polars.col("bytes") > most).iter_rows(named=True):
        raise ValueError(
            f"{row['file']}:{row['line']}: expected a text of at most {most:,} bytes, so that it "
            f"has fewer than max_size={max_size:,} tokens; found {row['bytes']:,}. Drop it, in the "
            f"recipe: documents: {{max_text_bytes: {most}, allow: [too-long]}}"
        )


def refuse_losses(expected: polars.DataFrame, found: polars.DataFrame, said: str) -> None:
    """Raises ValueError unless the toolkit gave every document, once, under its id."""
    if expected.select("row", "id").equals(found.select("row", "id")):
        return
    lost = expected.join(found, on=["row", "id"], how="anti")
    gained = found.join(expected, on=["row", "id"], how="anti")
    places = [f"{row['file']}:{row['line']}" for row in lost.head(10).iter_rows(named=True)]
    log.info(said)
    raise ValueError(
        f"expected {expected.height:,} documents from the toolkit, found {found.height:,}: "
        f"{lost.height:,} lost ({', '.join(places)}), {gained.height:,} that were not asked for; "
        "what it said stands above"
    )


def check_tokens(
    tokens: Path, dtype: np.dtype, ends: np.ndarray, eos_token_id: int, vocab_size: int
) -> np.ndarray:
    """How often each token id occurs. Raises ValueError for a shard that cannot be right."""
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
