"""Conversations as instances for fine-tuning: token ids, and a mask of those that are learned.

As OLMo's preparation of Tulu v2 makes them (ai2-olmo, scripts/prepare_tulu_data.py): a conversation
is the end-of-text token, then for each message `<|role|>` and a line's end, unlabelled, and its
content without the white space around it. An assistant's content is followed by the end-of-text
token and a line's end, all of it labelled but that line's end; any other by a line's end,
unlabelled. It is cut at the sequence length and padded to it, and left out where no label is left.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from olmo.config import BaseConfig
from olmo.config.strict import check_range
from olmo.corpus.conversations import Message, said
from olmo.corpus.documents import HELDOUT, TRAIN
from olmo.corpus.listing import read, run, write
from olmo.corpus.tokens import PARQUET, vocabulary
from olmo.io import gz
from olmo.runtime.log import log
from olmo.store.stage import Facts, Input, Output, stage

if TYPE_CHECKING:
    from olmo.tokenizer import Tokenizer

ANSWERS = "assistant"  # whose words are learned
NO_LABEL = "no-label"  # why a conversation is left out: no answer within the sequence length
AT_ONCE = 512  # conversations that are tokenized together

Example = tuple[list[int], list[bool]]  # ids, which of them are learned


@dataclass
class InstructionsSection(BaseConfig):
    """How conversations become instances for fine-tuning."""

    sequence_length: int  # the model's max_sequence_length
    packed: bool = False  # as many conversations in an instance as fit; else one

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("instructions.sequence_length", self.sequence_length, 2)


def batch(
    documents: list[Path],
    tokenizer: Path,
    listing: Path,
    eos_token_id: int,
    pad_token_id: int,
    config: InstructionsSection,
) -> None:
    """Instances for fine-tuning, of a batch's conversations and held-out conversations."""
    tables = {entry.shard: entry.object for entry in read(documents, "table")}
    entries = []
    for split, output in ((TRAIN, "documents"), (HELDOUT, "heldout")):
        prefix, folder = ("", "tokens") if split == TRAIN else ("heldout-", "heldout")
        for entry in read(documents, output):
            names = {
                "tokens": f"{folder}/{entry.shard}/input_ids.npy",
                "labels": f"{folder}/{entry.shard}/label_mask.npy",
                "index": f"{folder}/{entry.shard}/conversations.parquet",
            }
            made = run(
                listing,
                entry.shard,
                instances,
                names,
                documents=entry.object,
                table=tables[entry.shard],
                tokenizer=tokenizer,
                config=config,
                eos_token_id=eos_token_id,
                pad_token_id=pad_token_id,
                split=split,
            )
            entries += [replace(file, output=prefix + file.output) for file in made]
    write(listing, entries)


@stage(version=1)
def instances(
    documents: Input,
    table: Input,
    tokenizer: Input,
    tokens: Output,
    labels: Output,
    index: Output,
    eos_token_id: int,
    pad_token_id: int,
    config: InstructionsSection,
    split: str = TRAIN,
) -> Facts:
    """Make instances of one file of conversations.

    `tokens` gets raw little-endian uint16 (uint32 for more than 65,536 token ids) and `labels` raw
    bool, `sequence_length` of each for an instance: one conversation, or with `packed` as many as
    fit one after the other, in their order. `index` (parquet) has a row per conversation: start,
    end (its token range, without padding), id, file, line, bytes, labels, length (before it was
    cut), reason (of a drop; start and end are then equal). `table` is the table that the
    conversations' stage made, `split` the part of it in `documents`.

    Raises:
        ValueError: the tokenizer does not end an answer as it must; a table of other conversations.
    """
    import numpy as np
    import polars

    from olmo.tokenizer import Tokenizer

    sequence_length = config.sequence_length
    rows = polars.read_parquet(table).filter(polars.col("split") == split).sort("row")
    vocab_size, special = vocabulary(tokenizer.read_bytes())
    dtype = np.dtype("<u2" if vocab_size <= 2**16 else "<u4")
    encoder = Tokenizer.from_file(tokenizer, eos_token_id=eos_token_id, pad_token_id=pad_token_id)
    check_ends(encoder, special)

    found: list[tuple[int, int, int, int, str | None]] = []
    in_text: Counter[str] = Counter()
    filled = 0  # instances that are begun
    room = 0  # tokens left in the last one
    with gz.reading(documents) as lines, open(tokens, "wb") as ids, open(labels, "wb") as mask:

        def fill(count: int) -> None:
            ids.write(np.full(count, pad_token_id, dtype).tobytes())
            mask.write(bytes(count))

        conversations = (list(said(line)) for line in lines)
        for conversation, example in encoded(conversations, encoder):
            in_text.update(
                name for name in special.values() for _, text in conversation if name in text
            )
            whole = len(example[0])
            kept, learned = example[0][:sequence_length], example[1][:sequence_length]
            here = filled * sequence_length - room
            if not any(learned):
                found.append((here, here, 0, whole, NO_LABEL))
                continue
            if not config.packed or len(kept) > room:
                fill(room)
                here, room = filled * sequence_length, sequence_length
                filled += 1
            ids.write(np.array(kept, dtype).tobytes())
            mask.write(np.array(learned, np.bool_).tobytes())
            room -= len(kept)
            found.append((here, here + len(kept), sum(learned), whole, None))
        fill(room)
    if len(found) != rows.height:
        raise ValueError(
            f"expected {rows.height:,} conversations, as the table has, found {len(found):,}"
        )

    schema = {
        "start": polars.UInt64,
        "end": polars.UInt64,
        "labels": polars.UInt32,
        "length": polars.UInt32,
        "reason": polars.String,
    }
    made = polars.DataFrame(found, schema, orient="row")
    made = polars.concat([made, rows.select("id", "file", "line", "bytes")], how="horizontal")
    names = ("start", "end", "id", "file", "line", "bytes", "labels", "length", "reason")
    made.select(names).write_parquet(index, **PARQUET)
    for name, count in sorted(in_text.items()):
        log.warning(
            f"{name} stands in {count} messages and became that special token there; OLMo's "
            "preparation does the same"
        )
    if found and not filled:
        log.warning(
            f"all {len(found)} conversations of {documents} are left out: none has an answer "
            f"(role {ANSWERS}) within sequence_length={sequence_length} tokens"
        )
    used, drops = made.filter(polars.col("reason").is_null()), made["reason"].value_counts()
    return {
        "conversations": made.height,
        "examples": used.height,
        "drops": dict(drops.drop_nulls().iter_rows()),
        "instances": filled,
        "tokens": int((used["end"] - used["start"]).sum()),
        "labels": int(used["labels"].sum()),
        "cut": used.filter(polars.col("length") > sequence_length).height,
        "dtype": dtype.name,
        "special_tokens_in_text": dict(sorted(in_text.items())),
    }


def check_ends(tokenizer: Tokenizer, special: dict[int, str]) -> None:
    """Raises ValueError unless the end-of-text token is a special one that its text gives, and a
    line's end one token.
    """
    eos = tokenizer.eos_token
    ids = tokenizer.encode(eos + "\n", add_special_tokens=False)
    if len(ids) != 2 or ids[0] != tokenizer.eos_token_id or ids[0] not in special:
        raise ValueError(
            f"expected {eos!r} and a line's end to be two tokens, {tokenizer.eos_token_id} (a "
            f"special one) and another; found {ids}: with this tokenizer, or this eos_token_id, an "
            "answer has no end"
        )


def encoded(
    conversations: Iterable[list[Message]], tokenizer: Tokenizer
) -> Iterator[tuple[list[Message], Example]]:
    """Each conversation and its ids and labels, neither cut nor padded."""
    eos = tokenizer.eos_token
    stream = iter(conversations)
    while some := list(islice(stream, AT_ONCE)):
        texts = []
        for role, content in (message for conversation in some for message in conversation):
            ending = eos + "\n" if role == ANSWERS else "\n"
            texts += [f"<|{role}|>\n", content.strip() + ending]
        parts = iter(tokenizer.encode_batch(texts, add_special_tokens=False))
        for conversation in some:
            ids, labels = [tokenizer.eos_token_id], [False]
            for role, _ in conversation:
                header, body = next(parts), next(parts)
                ids += header + body
                learned = role == ANSWERS
                labels += [False] * len(header) + [learned] * (len(body) - 1) + [False]
            yield conversation, (ids, labels)
