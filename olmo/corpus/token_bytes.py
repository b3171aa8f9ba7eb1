"""The bytes of text that each held-out token stands for: with them, a loss is in bits per byte.

A loss per token says little beside that of another tokenizer, whose tokens are longer or shorter.
Per byte of text it does. An instance begins and ends within documents, so the bytes are counted
token by token.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from olmo.corpus.conversations import LABELLED_ROLE, parse_messages
from olmo.corpus.documents import HELDOUT, document_decoder
from olmo.corpus.encoding import byte_alphabet
from olmo.corpus.listing import Entry, read_listing, run_shards
from olmo.corpus.tokenizer import read_vocabulary, token_dtype
from olmo.io import gz
from olmo.runtime.log import log
from olmo.store.stage import Facts, Input, Output, stage

if TYPE_CHECKING:
    import numpy as np
    import polars

NO_TEXT = -1  # of a token that stands for no text: the end of a document, padding, a role

Part = tuple[str, int, int, bool]  # text, its range of tokens, whether its tokens may be cut


def count_heldout_bytes(
    listing: Path,
    documents: list[Path],
    entries: list[Entry],
    file: str,
    tokenizer: Path,
    special_as_text: bool = False,
) -> list[Entry]:
    """Run `token_bytes` for the held-out tokens of each shard; the entries for the listing.

    Args:
        documents: listings of the documents
        entries: of the shards' tokens
        file: the path below data/<dataset>, in which {} is the shard's name
    """
    made = {
        (entry.shard, entry.output.removeprefix("heldout-")): entry
        for entry in entries
        if entry.output.startswith("heldout-")
    }

    def inputs(entry: Entry) -> dict[str, Path]:
        names = ("tokens", "index", "labels")
        found = {name: made[entry.shard, name] for name in names if (entry.shard, name) in made}
        return {"documents": entry.object, **{name: one.object for name, one in found.items()}}

    return run_shards(
        token_bytes,
        listing,
        read_listing(documents, HELDOUT),
        {"token_bytes": file},
        inputs,
        {"token_bytes": "heldout-token_bytes"},
        tokenizer=tokenizer,
        special_as_text=special_as_text,
    )


@stage(version=1)
def token_bytes(
    documents: Input,
    tokens: Input,
    index: Input,
    tokenizer: Input,
    token_bytes: Output,
    labels: Input | None = None,
    special_as_text: bool = False,
) -> Facts:
    """Count the UTF-8 bytes of the text that each token of a shard stands for.

    `token_bytes` gets raw little-endian int32, one for each of `tokens`; NO_TEXT for a token that
    stands for none. Over a document they add up to its text, without the white space around it,
    which has no tokens. `index` is the shard's table of documents. With `labels`, which tokens are
    learned, the documents are conversations, and only the text of answers counts.

    A document counts as NO_TEXT where the installed `tokenizers` gives it other tokens than the
    shard has, and they do not spell it either; the record has their number.
    """
    import numpy as np
    import polars

    ids = np.fromfile(tokens, token_dtype(read_vocabulary(tokenizer.read_bytes())[0]))
    mask = None if labels is None else np.fromfile(labels, np.bool_)
    counter = ByteCounter(tokenizer.read_bytes(), special_as_text)
    counts, uncounted = count_bytes(documents, ids, polars.read_parquet(index), mask, counter)
    counts.tofile(token_bytes)
    if uncounted:
        log.warning(
            f"{len(uncounted)} held-out texts, as of {uncounted[0]!r}, are left out of bits per "
            "byte: the installed tokenizers gives them other tokens than the shard has"
        )
    return {"text_bytes": int(counts[counts > 0].sum()), "uncounted": len(uncounted)}


def count_bytes(
    documents: Path,
    ids: np.ndarray,
    index: polars.DataFrame,
    mask: np.ndarray | None,
    counter: ByteCounter,
) -> tuple[np.ndarray, list[str]]:
    """(bytes of each of a shard's tokens, (N,) int32; ids of documents that could not be counted).

    Args:
        mask: which tokens are learned, (N,) bool, of conversations.
    """
    import numpy as np

    counts = np.full(len(ids), NO_TEXT, np.dtype("<i4"))
    uncounted: list[str] = []
    for row, parts in read_parts(documents, index, mask):
        for text, start, end, is_cut in parts:
            found = counter.count(text, ids[start:end].tolist(), is_cut)
            if found is None:
                uncounted.append(row)
            else:
                counts[start : start + len(found)] = found
    return counts, uncounted


def read_parts(
    documents: Path, index: polars.DataFrame, mask: np.ndarray | None
) -> Iterator[tuple[str, list[Part]]]:
    """(id, the texts that have tokens) of each document.

    The range of a text includes the end-of-text token behind it, if there is one.
    """
    decoder = document_decoder()
    with gz.reading(documents) as lines:
        for line, row in zip(lines, index.iter_rows(named=True), strict=True):
            start, end = row["start"], row["end"]
            if mask is None:
                yield row["id"], [(decoder.decode(line).text.strip(), start, end, False)]
                continue
            said = [text.strip() for role, text in parse_messages(line) if role == LABELLED_ROLE]
            runs = find_runs(mask[start:end])
            is_cut = row["length"] > end - start
            yield (
                row["id"],
                [
                    (text, start + first, start + last, is_cut and start + last == end)
                    for text, (first, last) in zip(said, runs, strict=False)
                ],
            )


def find_runs(mask: np.ndarray) -> list[tuple[int, int]]:
    """(start, end) of each run of True.

    >>> import numpy as np
    >>> find_runs(np.array([False, True, True, False, True]))
    [(1, 3), (4, 5)]
    """
    import numpy as np

    edges = np.flatnonzero(np.diff(mask.astype(np.int8), prepend=0, append=0))
    return [(int(first), int(last)) for first, last in edges.reshape(-1, 2)]


class ByteCounter:
    """Says how many bytes of a text each of its tokens stands for, for any tokenizer."""

    def __init__(self, tokenizer: bytes, special_as_text: bool = False) -> None:
        from tokenizers import Tokenizer

        # Some post-processors take the white space off the offsets.
        settings = json.loads(tokenizer) | {"post_processor": None}
        self.model = Tokenizer.from_str(json.dumps(settings))
        self.model.encode_special_tokens = special_as_text
        letters = byte_alphabet()
        added = self.model.get_added_tokens_decoder()
        self.spelled: dict[int, bytes] = {
            id: token.encode()
            if id in added or not letters.keys() >= set(token)
            else bytes(letters[letter] for letter in token)
            for token, id in self.model.get_vocab().items()
        }

    def count(self, text: str, ids: list[int], is_cut: bool = False) -> np.ndarray | None:
        """Bytes by token, (N,) int32; None if the tokens are not this text's.

        Args:
            ids: the text's tokens, with or without the end-of-text token, which gets no bytes:
                N = len(ids) - 1.
            is_cut: they may be the first ones only.
        """
        ended = self._count(text, ids[:-1], is_cut=False)
        return self._count(text, ids, is_cut) if ended is None else ended

    def _count(self, text: str, ids: list[int], is_cut: bool) -> np.ndarray | None:
        import numpy as np

        pieces, expected = [self.spelled.get(id, b"") for id in ids], text.encode()
        spelled = b"".join(pieces)
        if spelled == expected or (is_cut and expected.startswith(spelled)):
            # A byte-level tokenizer, and a text that it does not change: each token is some bytes.
            return np.array([len(piece) for piece in pieces], np.int32)
        encoded = self.model.encode(text, add_special_tokens=False)
        if not ids or (encoded.ids[: len(ids)] if is_cut else encoded.ids) != ids:
            return None
        # Of a text that is normalised first, or of another tokenizer: what lies between the end of
        # the token before and its own end. Of tokens that share a letter, the first one gets it.
        ends = np.maximum.accumulate([end for _, end in encoded.offsets])
        ends[-1] = len(text)
        letters = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        sizes = 1 + sum((letters >= least).astype(np.int64) for least in (0x80, 0x800, 0x10000))
        at = np.concatenate([[0], np.cumsum(sizes)])[ends]
        return np.diff(at, prepend=0)[: len(ids)].astype(np.int32)
