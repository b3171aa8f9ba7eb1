"""A data set's tokenizer, given or trained; and whether a training config agrees with it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from olmo.config import BaseConfig
from olmo.config.strict import check_one_set, check_range
from olmo.corpus.documents import parse_document
from olmo.corpus.listing import read_objects
from olmo.io import file_types, gz
from olmo.io.downloads import explain_client_errors
from olmo.io.sealed import hash_file
from olmo.store.stage import Facts, Input, Inputs, Output, current_store, stage

if TYPE_CHECKING:
    import numpy as np

SPECIAL_TOKENS = ("<|endoftext|>", "<|padding|>")  # ids 0 and 1
# Names of the end-of-text token and of the padding token in common tokenizers.
END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[EOS]")
PADDING = ("<|padding|>", "<|pad|>", "<pad>", "[PAD]")

ORIGINS = ("file", "hub", "dataset", "train_vocab_size")  # exactly one of these fields is set


@dataclass
class TokenizerSection(BaseConfig):
    """A given tokenizer (a file, from the hub, another data set's), or one trained on documents."""

    file: str | None = None  # a tokenizer.json
    hub: str | None = None  # a name on the Hugging Face hub
    dataset: str | None = None  # another data set, with the same two ids below
    sha256: str | None = None  # that the file must have
    train_vocab_size: int | None = None  # train one with this many entries
    eos_token_id: int = 0  # ends a document
    pad_token_id: int = 1  # fills instances

    def __post_init__(self) -> None:
        super().__post_init__()
        check_one_set("tokenizer", self, ORIGINS)
        for name in ("eos_token_id", "pad_token_id"):
            check_range(f"tokenizer.{name}", getattr(self, name), 0)
        check_range("tokenizer.train_vocab_size", self.train_vocab_size, 1)


def batch(documents: list[Path], tokenizer: Path, config: TokenizerSection) -> None:
    """Make the data set's tokenizer: train it on documents, or take a file or one from the hub.

    Args:
        documents: files of documents to train on
        tokenizer: tokenizer.json to write
    """
    if config.train_vocab_size is not None:
        shards = read_objects(documents, "documents")
        trained_tokenizer(documents=shards, tokenizer=tokenizer, vocab_size=config.train_vocab_size)
    elif config.file is not None:
        file, sha256 = Path(config.file), config.sha256
        if sha256 is not None and (found := current_store().digest(file)) != sha256:
            raise ValueError(f"{file}: expected sha256 {sha256}, found {found}")
        local_tokenizer(source=file, tokenizer=tokenizer)
    else:
        name = f"hf://{config.hub}/tokenizer.json"
        given_tokenizer(name=name, tokenizer=tokenizer, sha256=config.sha256)


@stage(version=1)
def trained_tokenizer(documents: Inputs, tokenizer: Output, vocab_size: int) -> Facts:
    """Train a byte-level BPE tokenizer on documents, like GPT-NeoX's and OLMo's.

    The special tokens get the ids 0, 1, …; the 256 bytes follow, then the merges. Texts are
    normalised by NFC. The same documents in the same order give the same file.

    Raises ValueError if the documents are too few for the vocabulary.
    """
    import tokenizers

    smallest = 256 + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise ValueError(
            f"vocab_size: expected at least {smallest} (256 bytes and {len(SPECIAL_TOKENS)} "
            f"special tokens), found {vocab_size}"
        )
    model = train_byte_level(read_texts(documents), vocab_size)
    if model.get_vocab_size() != vocab_size:
        raise ValueError(
            f"vocab_size: expected {vocab_size:,} tokens, found {model.get_vocab_size():,}: these "
            "documents have no more pairs to merge. Use more documents, or a smaller "
            "tokenizer.train_vocab_size in the recipe and the same model.vocab_size in the config"
        )
    tokenizer.write_text(to_portable(model.to_str()), encoding="utf-8")
    return {"vocab_size": vocab_size, "tokenizers": tokenizers.__version__}


def train_byte_level(texts: Iterator[str], vocab_size: int) -> Any:
    """A tokenizer of at most `vocab_size` tokens: fewer if no pair occurs twice any more."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from tokenizers.trainers import BpeTrainer

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=alphabet,
        show_progress=False,
    )
    model = Tokenizer(models.BPE())
    model.normalizer = normalizers.NFC()
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.post_processor = processors.ByteLevel(trim_offsets=True)
    model.decoder = decoders.ByteLevel()
    model.train_from_iterator(texts, trainer)
    return model


@stage(version=1)
def given_tokenizer(name: str, tokenizer: Output, sha256: str | None = None) -> Facts:
    """Download a tokenizer by any URL of cached-path: hf://allenai/OLMo-7B/tokenizer.json, https://…

    Rewrites it in the form that the tokenizing toolkit reads. Raises ValueError if it has another
    sha256, or is not a tokenizer.
    """
    try:
        from cached_path import cached_path
    except ImportError as error:
        raise ValueError(
            "a tokenizer by URL needs the package cached-path: uv pip install cached-path"
        ) from error
    with explain_client_errors(name):
        path = Path(cached_path(name))
    found = hash_file(path)
    if sha256 is not None and found != sha256:
        raise ValueError(
            f"{name}: expected sha256 {sha256}, found {found}. If you want the new file, write "
            "its sha256 into the recipe"
        )
    return {"name": name, "source_sha256": found, **write_portable(path, name, tokenizer)}


@stage(version=1)
def local_tokenizer(source: Input, tokenizer: Output) -> Facts:
    """Take a tokenizer from a local file; otherwise as from a URL."""
    return write_portable(source, str(source), tokenizer)


def read_texts(documents: list[Path]) -> Iterator[str]:
    """The texts of files of documents, in order."""
    for path in documents:
        with gz.reading(path) as lines:
            for number, line in enumerate(lines, 1):
                _, text, reason = parse_document(line)
                if reason is not None or text is None:
                    raise ValueError(f"{path}:{number}: expected a document, found {reason}")
                yield text


def to_portable(content: str) -> str:
    """A tokenizer's JSON with each merge as one string, the format before tokenizers 0.20.

    The toolkit's tokenizers 0.19.1 cannot read merges as pairs. One string can represent a pair
    only if no token has a space in it; in a byte-level vocabulary none has.
    """
    tokenizer = json.loads(content)
    merges = tokenizer["model"].get("merges", [])
    if merges and isinstance(merges[0], list):
        if spaced := next((pair for pair in merges if any(" " in part for part in pair)), None):
            raise ValueError(
                f"expected merges of tokens without spaces (a byte-level BPE), found {spaced!r}: "
                "the tokenizing toolkit cannot read this tokenizer"
            )
        tokenizer["model"]["merges"] = [" ".join(pair) for pair in merges]
        return json.dumps(tokenizer, indent=2, ensure_ascii=False) + "\n"
    return content


def write_portable(source: Path, name: str, output: Path) -> dict[str, Any]:
    """Check a given tokenizer and write it in the form that the toolkit reads; facts about it."""
    from tokenizers import Tokenizer

    content = file_types.read_text(source, name)
    try:
        vocab_size = Tokenizer.from_str(content).get_vocab_size()
        settings = json.loads(content)
    except Exception as error:  # the library raises no narrower class
        raise ValueError(
            f"{name}: expected a Hugging Face tokenizer.json, found: {error}"
        ) from error
    for key in "truncation", "padding":
        if settings.get(key) is not None:
            raise ValueError(
                f"{name}: expected {key}: null, found {settings[key]}: it would change "
                "the length of documents. Set it to null in the file"
            )
    if settings["model"].get("dropout"):
        raise ValueError(
            f"{name}: expected dropout: null, found {settings['model']['dropout']}: the same text "
            "would not give the same tokens. Set it to null in the file"
        )
    text = to_portable(content)
    if text == content:
        shutil.copyfile(source, output)
    else:
        output.write_text(text, encoding="utf-8")
    return {"vocab_size": vocab_size}


@cache
def read_vocabulary(tokenizer: bytes) -> tuple[int, dict[int, str]]:
    """The number of tokens of a tokenizer file, and its special tokens by id."""
    from tokenizers import Tokenizer

    model = Tokenizer.from_buffer(tokenizer)
    added = sorted(model.get_added_tokens_decoder().items())
    return model.get_vocab_size(), {id: token.content for id, token in added if token.special}


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest dtype that holds all token ids."""
    import numpy as np

    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def check_tokenizer(
    tokenizer: Path,
    eos_token_id: int,
    pad_token_id: int,
    vocab_size: int,
    embedding_size: int | None = None,
    dtype: str = "uint16",
) -> None:
    """Raises ValueError if a tokenizer and a training config do not match, with all mismatches."""
    import numpy as np
    from tokenizers import Tokenizer

    model = Tokenizer.from_file(str(tokenizer))
    size = model.get_vocab_size()
    added = model.get_added_tokens_decoder()  # id → token
    found = []
    if vocab_size != size:
        found.append(f"model.vocab_size: expected the tokenizer's {size:,}, found {vocab_size:,}")
    rows = embedding_size or vocab_size
    if (largest := max(model.get_vocab().values())) >= rows:
        found.append(
            f"model.embedding_size: expected more than the tokenizer's largest id, {largest:,}; "
            f"found {rows:,}"
        )
    if largest > np.iinfo(dtype).max:
        fits = "uint16" if largest < 2**16 else "uint32"  # as the stage `tokens` writes them
        found.append(
            f"data.memmap_dtype: expected {fits}, in which ids to {largest:,} fit; found {dtype}"
        )
    expected = {"eos": END_OF_TEXT, "pad": PADDING}
    for kind, id in (("eos", eos_token_id), ("pad", pad_token_id)):
        known = [name for name in expected[kind] if model.token_to_id(name) is not None]
        token = model.id_to_token(id)
        if token in known or (kind == "pad" and id == eos_token_id):
            continue
        if known:
            wanted = " or ".join(f"{model.token_to_id(name)} ({name})" for name in known)
            found.append(f"model.{kind}_token_id: expected {wanted}, found {id} ({token})")
        elif id not in added:
            found.append(f"model.{kind}_token_id: expected a special token, found {id} ({token})")
    if found:
        raise ValueError(
            f"the tokenizer {tokenizer} and the training config do not match:\n  "
            + "\n  ".join(found)
            + "\nCorrect the config, or use the tokenizer that it was written for"
        )
