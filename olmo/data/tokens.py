"""Token shards: `dolma tokens` held still, counted and checked, with a table of the documents.

The toolkit shuffles what it writes and loses what it cannot read without an error. So each file
of documents is given to it alone, what comes out is put back into the documents' order, and the
shard counts only if every document is there, in its place.
"""

from __future__ import annotations

import csv
import gzip
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from olmo import log
from olmo.data.documents import MAX_BYTES_PER_BYTE, MAX_TOKENS, TRAIN
from olmo.data.dolma import Dolma
from olmo.stage import Facts, Free, Input, Output, stage

if TYPE_CHECKING:
    import numpy as np
    import polars

PARQUET: dict[str, Any] = {
    "compression": "zstd",
    "compression_level": 3,
    "row_group_size": 1 << 17,
}


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
    dolma: Free[Dolma],
    split: str = TRAIN,
    max_size: int = MAX_TOKENS,
) -> Facts:
    """Tokenize one file of documents with `dolma tokens`.

    `tokens` gets raw little-endian uint16 (uint32 for more than 65,536 token ids), documents one
    after the other in their order, each ended by the eos token. `index` (parquet) has a row per
    document: start, end (its token range), id, file, line (in the source), bytes (of its text).
    `table` is the table that the documents' stage made, `split` the part of it in `documents`.

    Raises ValueError for a document too long for `max_size`, and when what came out is not what
    went in; ChildProcessError when the toolkit's process dies or takes too long.
    """
    import numpy as np
    import polars
    from tokenizers import Tokenizer

    expected = (
        polars.read_parquet(table)
        .filter(polars.col("split") == split)
        .sort("row")
        .select("row", "id", "file", "line", "bytes")
    )
    refuse_long(expected, max_size)
    model = Tokenizer.from_file(str(tokenizer))
    vocab_size = model.get_vocab_size()
    dtype = np.dtype("<u2" if vocab_size <= 2**16 else "<u4")

    text_bytes = int(expected["bytes"].sum())
    if expected.height == 0:
        tokens.write_bytes(b"")
        ranges = expected.select("row", "id", start="row", end="row")
    else:
        with scratch_beside(tokens) as folder:
            os.symlink(os.path.realpath(documents), folder / "documents.gz")
            said = dolma(
                toolkit,
                time_limit_s=time_limit(text_bytes),
                folder=str(folder),
                documents="documents.gz",
                tokenizer=os.path.realpath(tokenizer),
                eos_token_id=eos_token_id,
                pad_token_id=pad_token_id,
                dtype=dtype.name,
                # Room for the file, no more: the toolkit lays out its output at full length.
                max_size=min(max_size, text_bytes * MAX_BYTES_PER_BYTE + expected.height + 2),
            )
            ranges = gather(folder / "parts", dtype, tokens)
            refuse_losses(expected, ranges, said)

    found = expected.with_columns(ranges["start"], ranges["end"])
    counts = check_tokens(tokens, dtype, found["end"].to_numpy(), eos_token_id, vocab_size)
    found.select("start", "end", "id", "file", "line", "bytes").write_parquet(index, **PARQUET)
    special = {
        name.content: int(counts[id] - (found.height if id == eos_token_id else 0))
        for id, name in sorted(model.get_added_tokens_decoder().items())
        if name.special
    }
    special = {name: count for name, count in special.items() if count}
    for name, count in special.items():
        log.warn(
            f"{found['file'][0]}: {name} stands {count} times in the text of documents and became "
            "that special token, as the toolkit does it: it can look like a document's end"
        )
    return {
        "documents": found.height,
        "tokens": int(counts.sum()),
        "text_bytes": text_bytes,
        "dtype": dtype.name,
        "special_tokens_in_text": special,
    }


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
            f"has fewer than max_size={max_size:,} tokens; found {row['bytes']:,}. Raise max_size, "
            f"or drop it: documents with max_text_bytes: {most} and allow: [too-long]"
        )


def time_limit(text_bytes: int) -> float:
    """Seconds after which the toolkit hangs rather than works: a hundredth of its usual speed."""
    return 600 + text_bytes / 5_000


class scratch_beside:
    """A folder for the toolkit's files beside an output, gone when the block ends."""

    def __init__(self, output: Path) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix=".dolma-", dir=output.parent))

    def __enter__(self) -> Path:
        return self.folder

    def __exit__(self, *_: Any) -> None:
        shutil.rmtree(self.folder)


def gather(parts: Path, dtype: np.dtype, tokens: Path) -> polars.DataFrame:
    """Write the documents' tokens in the order of their lines; their new ranges, ids and lines.

    The toolkit's parts: raw tokens in .npy; start, end, id, source, line in .csv.gz, both in the
    order into which it shuffled them.

    Raises ValueError when a part's tokens and its table do not fit.
    """
    import numpy as np
    import polars

    csv.field_size_limit(sys.maxsize)
    arrays: list[np.ndarray] = []
    rows: list[tuple[int, str, int, int, int]] = []  # line, id, part, start, end
    for path in sorted(parts.glob("*.npy")):
        array = np.memmap(path, dtype, mode="r")
        end = 0
        with gzip.open(path.with_suffix(".csv.gz"), "rt", encoding="utf-8", newline="") as table:
            for first, last, identity, _, line in csv.reader(table):
                if int(first) != end or int(last) <= end:
                    raise ValueError(f"{path.name}: expected a document at {end}, found {first}")
                end = int(last)
                rows.append((int(line), identity, len(arrays), int(first), end))
        if end == 0:
            continue  # no document came through: the toolkit leaves a file of zeros
        if end != len(array):
            raise ValueError(
                f"{path.name}: expected {end:,} tokens by the toolkit's own table, found "
                f"{len(array):,}"
            )
        arrays.append(array)
    rows.sort()
    lengths = np.array([end - start for *_, start, end in rows], np.uint64)
    ends = np.cumsum(lengths, dtype=np.uint64)
    with open(tokens, "wb") as output:
        for _, _, part, start, end in rows:
            output.write(arrays[part][start:end].tobytes())
    return polars.DataFrame(
        {
            "row": [row[0] for row in rows],
            "id": [row[1] for row in rows],
            "start": ends - lengths,
            "end": ends,
        },
        schema=dict(row=polars.UInt64, id=polars.String, start=polars.UInt64, end=polars.UInt64),
    )


def refuse_losses(expected: polars.DataFrame, found: polars.DataFrame, said: str) -> None:
    """Raises ValueError unless the toolkit gave every document, once, under its id."""
    if expected.select("row", "id").equals(found.select("row", "id")):
        return
    lost = expected.join(found, on=["row", "id"], how="anti")
    gained = found.join(expected, on=["row", "id"], how="anti")
    places = [f"{row['file']}:{row['line']}" for row in lost.head(10).iter_rows(named=True)]
    raise ValueError(
        f"expected {expected.height:,} documents from the toolkit, found {found.height:,}: "
        f"{lost.height:,} lost ({', '.join(places)}), {gained.height:,} that were not asked for. "
        f"It said:\n{said}"
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
