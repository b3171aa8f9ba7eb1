"""`olmo chat`: a conversation with a checkpoint, line by line."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from olmo.inspect.generate import (
    check_seed,
    check_utf8,
    encode_chat,
    find_checkpoint,
    generate_ids,
    load_checkpoint_tokenizer,
    load_fast_model,
    print_text,
    seed_generator,
)
from olmo.inspect.run import TrainedRun

if TYPE_CHECKING:
    from olmo.corpus.conversations import Message
    from olmo.tokenizer import Tokenizer


def chat(
    checkpoint: str,
    /,
    system: str | None = None,
    temperature: float = 0.7,
    tokens: int = 256,
    seed: int | None = None,
    tokenizer: str | None = None,
) -> None:
    """Talk with a run's checkpoint: a line is a message, and Ctrl-D ends.

    A run that was tuned on conversations answers; any other continues the text. Without a terminal,
    messages are the lines of stdin. The oldest messages are left out when the conversation exceeds
    the model's context.

    Args:
        checkpoint: name of a run, a checkpoint's folder, or a URL of one
        system: message before the conversation, for a run that was tuned on conversations
        temperature: 0 for the most likely token; above, logits are divided by it before sampling
        tokens: most tokens of an answer
        seed: of the sampling; a random one if not given
        tokenizer: tokenizer.json or a name on the hub, if the checkpoint does not name one

    Example:
        olmo chat olmo-tiny-tulu
        olmo chat olmo-tiny-tulu --system "Be brief." --temperature 0 < questions.txt
    """
    check_seed(seed)
    place = find_checkpoint(checkpoint)
    run = TrainedRun(place)
    is_tuned = bool(run.cfg.data.label_mask_paths)
    if system is not None and not is_tuned:
        raise ValueError(
            f"--system is for a run that was tuned on conversations, found {checkpoint}; omit it"
        )
    check_utf8(system or "", "--system")
    words = load_checkpoint_tokenizer(place, run, tokenizer)
    model, generator = load_fast_model(place), seed_generator(seed)
    kind = "answers, as it was tuned" if is_tuned else "continues the text, as it was not tuned"
    print(f"{checkpoint} {kind} on conversations; Ctrl-D ends", file=sys.stderr)
    talk: list[Message] = [] if system is None else [("system", system)]
    try:
        for line in read_messages():
            room = run.sequence_length - min(tokens, run.sequence_length // 2)
            kept, ids = drop_oldest_messages([*talk, ("user", line)], words, room, is_tuned)
            if len(ids) >= run.sequence_length:
                print(
                    f"expected a message of fewer than {run.sequence_length:,} tokens, the model's "
                    f"context, found {len(ids):,}; shorten it",
                    file=sys.stderr,
                )
                continue
            answer = generate_ids(
                model, ids, max_steps=min(tokens, run.sequence_length - len(ids)),
                temperature=temperature, generator=generator,
            )  # fmt: skip
            talk = [*kept, ("assistant", print_text(answer, words))]
    except KeyboardInterrupt:
        print()


def read_messages() -> Iterator[str]:
    """The lines of stdin that are not empty, with a prompt and line editing on a terminal."""
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        import readline  # noqa: F401  # `input` then edits lines and keeps a history
    while True:
        try:
            line = input("> " if is_terminal else "")
        except EOFError:
            if is_terminal:
                print()
            return
        check_utf8(line, "a message")
        if line.strip():
            yield line


def drop_oldest_messages(
    talk: list[Message], words: Tokenizer, room: int, is_tuned: bool
) -> tuple[list[Message], list[int]]:
    """A conversation without its oldest messages, so that `room` tokens hold it, and its ids.

    The system's and the last message stay, even if they are longer.
    """
    first = int(talk[0][0] == "system")
    while True:
        ids = encode_chat(talk, words) if is_tuned else encode_text(talk, words)
        if len(ids) <= room or len(talk) <= first + 1:
            return talk, ids
        talk = talk[:first] + talk[first + 2 :]  # without a message and its answer


def encode_text(talk: list[Message], words: Tokenizer) -> list[int]:
    """The ids of messages and their continuations as one text, each message on a new line."""
    pieces = [f"\n{text}" if role == "user" else text for role, text in talk]
    return words.encode("".join(pieces)[1:], add_special_tokens=False)
