"""Conversations as instances for fine-tuning: token ids and a label mask.

As in OLMo's preparation of Tulu v2 (ai2-olmo, scripts/prepare_tulu_data.py): a conversation is the
end-of-text token, then for each message the header `<|role|>\\n` and the stripped content. An
assistant's content ends with the end-of-text token and a newline; content and end-of-text token are
labelled. Any other content ends with a newline. Nothing else is labelled. A conversation is cut at
the sequence length, or padded to it, and dropped if no label is left.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from olmo.config import BaseConfig
from olmo.config.strict import check_range
from olmo.corpus.conversations import LABELLED_ROLE, Message, parse_messages
from olmo.corpus.documents import PARQUET, TRAIN
from olmo.corpus.tokenizer import read_vocabulary, token_dtype
from olmo.corpus.tokens import run_splits
from olmo.io import gz
from olmo.runtime.log import log
from olmo.store.stage import Facts, Input, Output, stage

if TYPE_CHECKING:
    from olmo.tokenizer import Tokenizer

NO_LABEL = "no-label"  # the reason of a drop: no answer within the sequence length
ENCODE_BATCH = 512  # conversations that one call of the tokenizer encodes

Example = tuple[list[int], list[bool]]  # token ids, label mask


@dataclass
class InstructionsSection(BaseConfig):
    """How conversations become instances for fine-tuning."""

    sequence_length: int  # the model's max_sequence_length
    packed: bool = False  # as many conversations in an instance as fit; else one each

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
    """Make instances for fine-tuning from a batch's conversations, training and held-out ones."""
    run_splits(
        instances,
        documents,
        listing,
        {
            "tokens": "{}/input_ids.npy",
            "labels": "{}/label_mask.npy",
            "index": "{}/conversations.parquet",
        },
        "{}/token_bytes.npy",
        tokenizer,
        config=config,
        eos_token_id=eos_token_id,
        pad_token_id=pad_token_id,
    )


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
    bool, both (instances, sequence_length). An instance is one conversation, or with `packed` as
    many as fit, in their order. `index` (parquet) has a row per conversation: start, end (its token
    range, without padding), id, file, line, bytes, labels, length (in tokens, before the cut),
    reason (of a drop; start and end are then equal). `table` is the conversations' table, `split`
    the split of it that `documents` has.

    Raises:
        ValueError: the tokenizer gives an answer no end; `table` is of other conversations.
    """
    import numpy as np
    import polars

    from olmo.tokenizer import Tokenizer

    sequence_length = config.sequence_length
    rows = polars.read_parquet(table).filter(polars.col("split") == split).sort("row")
    vocab_size, special = read_vocabulary(tokenizer.read_bytes())
    dtype = token_dtype(vocab_size)
    encoder = Tokenizer.from_file(tokenizer, eos_token_id=eos_token_id, pad_token_id=pad_token_id)
    check_eos_token(encoder, special)

    found: list[tuple[int, int, int, int, str | None]] = []
    in_text: Counter[str] = Counter()
    started = 0  # instances
    room = 0  # tokens left in the last one
    with gz.reading(documents) as lines, open(tokens, "wb") as ids, open(labels, "wb") as mask:

        def pad(count: int) -> None:
            ids.write(np.full(count, pad_token_id, dtype).tobytes())
            mask.write(bytes(count))

        conversations = map(parse_messages, lines)
        for conversation, example in encode_conversations(conversations, encoder):
            in_text.update(
                name for name in special.values() for _, text in conversation if name in text
            )
            length = len(example[0])
            kept, labelled = example[0][:sequence_length], example[1][:sequence_length]
            start = started * sequence_length - room
            if not any(labelled):
                found.append((start, start, 0, length, NO_LABEL))
                continue
            if not config.packed or len(kept) > room:
                pad(room)
                start, room = started * sequence_length, sequence_length
                started += 1
            ids.write(np.array(kept, dtype).tobytes())
            mask.write(np.array(labelled, np.bool_).tobytes())
            room -= len(kept)
            found.append((start, start + len(kept), sum(labelled), length, None))
        pad(room)
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
            f"{name} occurs in {count} messages and became that special token there, as in OLMo's "
            "preparation"
        )
    if found and not started:
        log.warning(
            f"all {len(found)} conversations of {documents} are dropped: none has an answer "
            f"(role {LABELLED_ROLE}) within sequence_length={sequence_length} tokens"
        )
    used, drops = made.filter(polars.col("reason").is_null()), made["reason"].value_counts()
    return {
        "conversations": made.height,
        "examples": used.height,
        "drops": dict(drops.drop_nulls().iter_rows()),
        "instances": started,
        "tokens": int((used["end"] - used["start"]).sum()),
        "labels": int(used["labels"].sum()),
        "cut": used.filter(polars.col("length") > sequence_length).height,
        "dtype": dtype.name,
        "special_tokens_in_text": dict(sorted(in_text.items())),
    }


def check_eos_token(tokenizer: Tokenizer, special: dict[int, str]) -> None:
    """Raises ValueError unless the tokenizer encodes the end-of-text token and a newline as one
    token each, the first a special one.
    """
    eos = tokenizer.eos_token
    ids = tokenizer.encode(eos + "\n", add_special_tokens=False)
    if len(ids) != 2 or ids[0] != tokenizer.eos_token_id or ids[0] not in special:
        raise ValueError(
            f"expected {eos!r} and a newline to be two tokens, {tokenizer.eos_token_id} (a special "
            f"one) and another; found {ids}: with this tokenizer, or this eos_token_id, an answer "
            "has no end"
        )


def encode_conversations(
    conversations: Iterable[list[Message]], tokenizer: Tokenizer
) -> Iterator[tuple[list[Message], Example]]:
    """Each conversation with its token ids and label mask, neither cut nor padded."""
    eos = tokenizer.eos_token
    stream = iter(conversations)
    while group := list(islice(stream, ENCODE_BATCH)):
        texts = []
        for role, content in (message for conversation in group for message in conversation):
            ending = eos + "\n" if role == LABELLED_ROLE else "\n"
            texts += [f"<|{role}|>\n", content.strip() + ending]
        parts = iter(tokenizer.encode_batch(texts, add_special_tokens=False))
        for conversation in group:
            ids, labels = [tokenizer.eos_token_id], [False]
            for role, _ in conversation:
                header, body = next(parts), next(parts)
                ids += header + body
                is_labelled = role == LABELLED_ROLE
                labels += [False] * len(header) + [is_labelled] * (len(body) - 1) + [False]
            yield conversation, (ids, labels)
