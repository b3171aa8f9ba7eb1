"""The loss of each held-out document by itself: for bits per byte, and to pair two runs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from olmo.corpus.conversations import parse_messages
from olmo.corpus.documents import document_decoder
from olmo.corpus.token_bytes import ByteCounter, count_bytes
from olmo.corpus.tokenizer import read_vocabulary, token_dtype
from olmo.io import gz
from olmo.pipeline.conditions import measurement_conditions
from olmo.runtime.numbers import encode_non_finite
from olmo.store.stage import Facts, Input, Inputs, Output, Unhashed, stage

if TYPE_CHECKING:
    from olmo.eval.documents import EncodedDocument

ENCODE_BATCH = 512  # documents that one call of the tokenizer encodes


@stage(version=2)
def document_losses(
    model: Input,
    config: Input,
    documents: Inputs,
    tokenizer: Input,
    losses: Output,
    checkpoint: Unhashed[Path],
    tokens: Inputs | None = None,
    index: Inputs | None = None,
    labels: Inputs | None = None,
    special_as_text: bool = False,
) -> Facts:
    """The loss of each held-out document, alone, in windows (olmo.eval.documents): a parquet file.

    A row has document (its id), digest (of its text, whose id may be another elsewhere), tokens,
    bytes (UTF-8, of its whole text) and nats. Of conversations (with `tokens`, `index` and
    `labels`, as `olmo instructions` wrote them) only the text of answers counts, as far as their
    instance has it. `checkpoint` is the folder of `model` and `config`.
    """
    import polars

    from olmo.eval.documents import measure_documents

    if labels is None:
        encoded = list(encode_texts(documents, tokenizer, special_as_text))
    else:
        assert tokens is not None and index is not None
        files = zip(documents, tokens, index, labels, strict=True)
        counter = ByteCounter(tokenizer.read_bytes())
        dtype = token_dtype(read_vocabulary(tokenizer.read_bytes())[0])
        encoded = [one for each in files for one in read_answers(*each, counter, dtype.name)]
    rows = measure_documents(checkpoint, encoded)
    schema = {
        "document": str,
        "digest": str,
        "tokens": polars.Int64,
        "bytes": polars.Int64,
        "nats": float,
    }
    polars.DataFrame(rows, schema=schema).write_parquet(losses)
    return {
        "facts": encode_non_finite(
            {"documents": len(rows)}
            | {name: sum(row[name] for row in rows) for name in ("tokens", "bytes", "nats")}
        ),
        "conditions": measurement_conditions(checkpoint),
    }


def encode_texts(
    documents: list[Path], tokenizer: Path, special_as_text: bool
) -> Iterator[EncodedDocument]:
    """The documents of files as lm-eval encodes them: the whole text, white space around it too."""
    from tokenizers import Tokenizer

    from olmo.eval.documents import EncodedDocument

    encoder = Tokenizer.from_file(str(tokenizer))
    encoder.no_truncation()
    encoder.no_padding()
    encoder.encode_special_tokens = special_as_text
    decoder = document_decoder()
    for path in documents:
        with gz.reading(path) as lines:
            found = [decoder.decode(line) for line in lines]
        for first in range(0, len(found), ENCODE_BATCH):
            batch = found[first : first + ENCODE_BATCH]
            texts = [one.text for one in batch]
            for one, ids in zip(
                batch, encoder.encode_batch_fast(texts, add_special_tokens=False), strict=True
            ):
                digest = digest_text(one.text)
                yield EncodedDocument(one.id, digest, ids.ids, len(one.text.encode()))


def read_answers(
    documents: Path, tokens: Path, index: Path, labels: Path, counter: ByteCounter, dtype: str
) -> Iterator[EncodedDocument]:
    """The conversations of a shard that have an answer, with the tokens of answers that count."""
    import numpy as np
    import polars

    from olmo.eval.documents import EncodedDocument

    ids, mask = np.fromfile(tokens, dtype), np.fromfile(labels, np.bool_)
    table = polars.read_parquet(index)
    sizes, _ = count_bytes(documents, ids, table, mask, counter)
    with gz.reading(documents) as lines:
        digests = [digest_text(str(parse_messages(line))) for line in lines]
    for digest, row in zip(digests, table.iter_rows(named=True), strict=True):
        # Its first token is the end-of-text token, which a document follows in any case.
        part = slice(row["start"] + 1, row["end"])
        is_text = sizes[part] >= 0
        if size := int(sizes[part][is_text].sum()):
            yield EncodedDocument(row["id"], digest, ids[part].tolist(), size, is_text)


def digest_text(text: str) -> str:
    """16 hex digits, the same for any tokenizer and data set."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]
