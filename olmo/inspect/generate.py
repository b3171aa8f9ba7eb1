"""`olmo generate`: a checkpoint continues a prompt, printed token by token."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from olmo.inspect.documents import find_token_shards, select_shards
from olmo.inspect.run import TrainedRun, suggest_runs
from olmo.runtime.log import log
from olmo.store.stage import current_store
from olmo.tokenizer import Tokenizer, hub_name

if TYPE_CHECKING:
    from olmo.corpus.conversations import Message

# One of these is in every checkpoint folder.
CHECKPOINT_FILES = ("model.safetensors", "model.pt", "model_and_optim")


def generate_text(
    checkpoint: str,
    /,
    prompt: str,
    tokens: int | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    chat: bool | None = None,
    system: str | None = None,
    tokenizer: str | None = None,
) -> None:
    """Continue a prompt, and print the text as it is generated.

    With a temperature of 0 it takes the most likely token, else it samples: the same seed gives the
    same text. A run that was tuned on conversations is asked as one.

    Args:
        checkpoint: name of a run, a checkpoint's folder, or a URL of one, AI2's too
        prompt: the text to continue; - reads it from stdin
        tokens: most tokens to generate; 256, or the rest of the context, if not given
        temperature: 0 for the most likely token; above, logits are divided by it before sampling
        top_k: sample from the k most likely tokens
        top_p: sample from the most likely tokens that together reach this probability
        seed: of the sampling; a random one if not given
        chat: format the prompt as in instruction tuning; the default for a run that was tuned so
        system: message before the prompt of a chat
        tokenizer: tokenizer.json or a name on the hub, if the checkpoint does not name one

    Example:
        olmo generate olmo-tiny --prompt "import os" --tokens 50
        olmo generate olmo-tiny-tulu --prompt "What is a list?" --temperature 0.7
        olmo generate s3://bucket/step1000-unsharded --prompt - < prompt.txt
    """
    if temperature == 0 and not (top_k is top_p is seed is None):
        raise ValueError("--top-k, --top-p and --seed need sampling: give a --temperature")
    check_seed(seed)
    place = find_checkpoint(checkpoint)
    run = TrainedRun(place)
    words = load_checkpoint_tokenizer(place, run, tokenizer)
    if chat is None:
        chat = bool(run.cfg.data.label_mask_paths)
    if system is not None and not chat:
        raise ValueError("--system is for chat: give --chat")
    text = sys.stdin.read() if prompt == "-" else prompt
    check_utf8(text + (system or ""), "--prompt and --system")
    ids = encode_prompt(text, words, chat, system)
    if tokens is None:
        tokens = min(256, max(run.sequence_length - len(ids), 1))
    if len(ids) + tokens > run.sequence_length:
        log.warning(
            f"{len(ids)} tokens of prompt and {tokens} more exceed the {run.sequence_length} that "
            "the model was trained on"
        )
    generator = None
    if temperature > 0:
        generator = seed_generator(seed)
        print(f"seed: {generator.initial_seed()}", file=sys.stderr)
    found = generate_ids(
        load_fast_model(place), ids, max_steps=tokens, temperature=temperature, top_k=top_k,
        top_p=top_p, generator=generator,
    )  # fmt: skip
    print_text(found, words)


def check_seed(seed: int | None) -> None:
    """Raises ValueError for a seed that torch does not take."""
    if seed is not None and not -(2**63) <= seed < 2**63:
        raise ValueError(f"expected a --seed of 64 bits, found {seed}")


def seed_generator(seed: int | None) -> Any:
    """A `torch.Generator` with this seed, or with one from the system."""
    import torch

    generator = torch.Generator()
    return generator.manual_seed(generator.seed() % 2**32 if seed is None else seed)


def check_utf8(text: str, name: str) -> None:
    """Raises ValueError for a text that the terminal sent in another encoding."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"expected {name} in UTF-8, found {error.object!r}") from None


def load_fast_model(place: str) -> Any:
    """The model of a checkpoint, laid out for generation."""
    from olmo.checkpoint.read import load_model
    from olmo.model.linear import use_column_major_weights

    model = load_model(place)
    model.use_attention(with_trial=False)
    use_column_major_weights(model)
    return model


def print_text(ids: Iterable[int], words: Tokenizer) -> str:
    """Print the text of ids, each piece as it comes, and a newline; the text."""
    text = ""
    for piece in stream_text(ids, lambda some: words.decode(some, skip_special_tokens=False)):
        print(piece, end="", flush=True)
        text += piece
    print()
    return text


def find_checkpoint(checkpoint: str) -> str:
    """The folder or URL of a checkpoint; of a run the final or else the newest one.

    Raises ValueError if there is none.
    """
    if "://" in checkpoint:
        return checkpoint.rstrip("/")
    runs = Path("checkpoints", checkpoint)
    for folder in (Path(checkpoint), runs / "final", runs / "run"):
        if any((folder / name).exists() for name in CHECKPOINT_FILES):
            return str(folder)
        if folder.is_dir():
            from olmo.checkpoint.read import find_newest  # which imports torch

            if (found := find_newest(folder)) is not None:
                return str(found)
    raise ValueError(
        f"expected a trained run, a checkpoint's folder or a URL; found {checkpoint!r}"
        f" (looked in {checkpoint}, {runs}/final and {runs}/run); {suggest_runs(checkpoint)}"
    )


def load_checkpoint_tokenizer(place: str, run: TrainedRun, given: str | None) -> Tokenizer:
    """The tokenizer that a checkpoint was trained with.

    Raises ValueError if it is not available, or is another model's.
    """
    model = run.cfg.model
    ends = {"eos_token_id": model.eos_token_id, "pad_token_id": model.pad_token_id}
    files = [Path(given or f"{place}/tokenizer.json")]
    if not given:
        ours = select_shards(run.cfg.data.paths or [], find_token_shards(current_store()))
        files += [shard.tokenizer for shard in ours[:1]]
    try:
        if (file := next(filter(Path.is_file, files), None)) is not None:
            found = Tokenizer.from_file(file, **ends)
        elif given is not None:
            found = Tokenizer.from_pretrained(hub_name(given), **ends)
        else:
            found = Tokenizer.from_train_config(run.cfg)
    except Exception as error:  # the libraries raise no narrower class
        raise ValueError(
            f"the tokenizer of {place} is not available ({error}); give --tokenizer FILE"
        ) from error
    rows = model.embedding_size or model.vocab_size
    if found.vocab_size > rows:
        raise ValueError(
            f"expected a tokenizer of at most {rows:,} tokens, as the model has, found "
            f"{found.vocab_size:,}: it is another model's; give --tokenizer FILE"
        )
    return found


def encode_prompt(
    text: str, tokenizer: Tokenizer, chat: bool = False, system: str | None = None
) -> list[int]:
    """The ids of a prompt, which the model continues.

    `chat` formats it as a conversation up to the assistant's answer. An empty text is one
    end-of-text token, as at the start of a document.
    """
    if chat:
        messages = [] if system is None else [("system", system)]
        return encode_chat([*messages, ("user", text)], tokenizer)
    return tokenizer.encode(text, add_special_tokens=False) or [tokenizer.eos_token_id]


def encode_chat(messages: list[Message], tokenizer: Tokenizer) -> list[int]:
    """The ids of a conversation as in instruction tuning, up to the assistant's next answer."""
    from olmo.corpus.instructions import encode_conversations

    [(_, (ids, _))] = encode_conversations([messages], tokenizer)
    return ids + tokenizer.encode("<|assistant|>\n", add_special_tokens=False)


def generate_ids(model: Any, ids: list[int], **options: Any) -> Iterator[int]:
    """Generate the ids after `ids`, one by one, up to the end-of-text token."""
    import torch

    from olmo.model.generate import generate_steps

    row = torch.tensor([ids], device=model.device)
    for step in generate_steps(model, row, **options):
        if bool(step.ended[0]):
            return
        yield int(step.token_ids[0])


def stream_text(ids: Iterable[int], decode: Callable[[list[int]], str]) -> Iterator[str]:
    """Decode ids to pieces of text, each as soon as its last character is complete.

    A character may take several ids, and the text of an id may depend on the id before it: so the
    ids of the last piece are decoded again with the new ones.
    """
    before: list[int] = []
    pending: list[int] = []
    for id in ids:
        pending.append(id)
        text = decode(before + pending)
        if not text.endswith("\ufffd"):
            yield text[len(decode(before)) :]
            before, pending = pending, []
    if pending:
        yield decode(before + pending)[len(decode(before)) :]
