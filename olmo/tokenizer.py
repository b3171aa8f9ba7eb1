"""OLMo's `Tokenizer`: text to ids, with the end-of-text token, and back.

A wrapper of `tokenizers.Tokenizer` for the users of a model. Training reads token files and does
not use it; `olmo.corpus.tokenizer` makes the tokenizer of those files.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

from olmo.config import ModelConfig, TokenizerConfig, TrainConfig, TruncationDirection

# Files in OLMo's own package → the same tokenizers on the hub.
PACKAGED = {
    "tokenizers/allenai_dolma2.json": "allenai/dolma2-tokenizer",
    "tokenizers/allenai_eleuther-ai-gpt-neox-20b-pii-special.json": (
        "allenai/eleuther-ai-gpt-neox-20b-pii-special"
    ),
    "tokenizers/allenai_gpt-neox-olmo-dolma-v1_5.json": "allenai/gpt-neox-olmo-dolma-v1_5",
}


def hub_name(identifier: str) -> str:
    """The hub's name of a config's tokenizer that is not a local file.

    Raises ValueError for a .json that is neither a local file nor in OLMo's own package.
    """
    if identifier.endswith(".json") and identifier not in PACKAGED:
        raise ValueError(
            f"tokenizer: expected a file that exists, a name on the hub, or one of "
            f"{', '.join(PACKAGED)}; found no file {identifier}"
        )
    return PACKAGED.get(identifier, identifier)


class Tokenizer:
    """
    Args:
        base_tokenizer: a `tokenizers.Tokenizer`.
        eos_token_id: appended to texts that are encoded with special tokens.
        pad_token_id: eos_token_id by default.
        truncate_to: the maximum number of ids of a text, with the end-of-text token.
        truncate_direction: the side on which a longer text is cut.
    """

    def __init__(
        self,
        base_tokenizer: Any,
        eos_token_id: int,
        pad_token_id: int | None = None,
        truncate_to: int | None = None,
        truncate_direction: str | TruncationDirection = TruncationDirection.right,
    ) -> None:
        self.base_tokenizer = base_tokenizer
        self.base_tokenizer.no_truncation()
        self.eos_token_id = eos_token_id
        self.pad_token_id = eos_token_id if pad_token_id is None else pad_token_id
        self.truncate_to = truncate_to
        self.truncate_direction = TruncationDirection(truncate_direction)

    @classmethod
    def from_file(cls, filename: str | Path, **options: Any) -> Self:
        """From a tokenizer.json; eos_token_id is its last id unless given."""
        return cls._with_options(_tokenizer_class().from_file(str(filename)), options)

    @classmethod
    def from_pretrained(cls, identifier: str, **options: Any) -> Self:
        """From the Hugging Face hub; eos_token_id is the last id unless given."""
        return cls._with_options(_tokenizer_class().from_pretrained(identifier), options)

    @classmethod
    def _with_options(cls, base: Any, options: dict[str, Any]) -> Self:
        return cls(base, **{"eos_token_id": base.get_vocab_size() - 1} | options)

    @classmethod
    def from_train_config(cls, config: TrainConfig) -> Self:
        """The tokenizer that config.tokenizer.identifier names: a file, or a name on the hub.

        A file of OLMo's own package (PACKAGED) that does not exist here comes from the hub.

        Raises ValueError if its size is not config.model.vocab_size.
        """
        return cls._from_configs(config.tokenizer, config.model)

    @classmethod
    def from_checkpoint(cls, checkpoint_dir: str | Path) -> Self:
        """The tokenizer that the config.yaml of a checkpoint, a folder or a URL, names."""
        from olmo.io.downloads import fetch

        place = f"{str(checkpoint_dir).rstrip('/')}/config.yaml"
        with TemporaryDirectory() as folder:
            path = Path(place)
            if "://" in place:
                path = Path(folder, "config.yaml")
                fetch(place, path, Path(folder, "part"))
            tokenizer = TokenizerConfig.load(path, key="tokenizer", untrusted=True)
            model = ModelConfig.load(path, key="model", untrusted=True)
        return cls._from_configs(tokenizer, model)

    @classmethod
    def _from_configs(cls, config: TokenizerConfig, model: ModelConfig) -> Self:
        name, ends = config.identifier, (model.eos_token_id, model.pad_token_id)
        options = dict(zip(("eos_token_id", "pad_token_id"), ends, strict=True))
        if Path(name).is_file():
            tokenizer = cls.from_file(name, **options)
        else:
            tokenizer = cls.from_pretrained(hub_name(name), **options)
        if tokenizer.vocab_size != model.vocab_size:
            raise ValueError(
                f"tokenizer.identifier: expected model.vocab_size={model.vocab_size} tokens, "
                f"found {tokenizer.vocab_size} in {config.identifier}"
            )
        return tokenizer

    @property
    def vocab_size(self) -> int:
        return self.base_tokenizer.get_vocab_size()

    @property
    def eos_token(self) -> str:
        return self.decode([self.eos_token_id], skip_special_tokens=False)

    @property
    def pad_token(self) -> str:
        return self.decode([self.pad_token_id], skip_special_tokens=False)

    def encode(self, input: str, add_special_tokens: bool = True) -> list[int]:
        """The ids of one text."""
        return self.encode_batch([input], add_special_tokens)[0]

    def encode_batch(self, inputs: list[str], add_special_tokens: bool = True) -> list[list[int]]:
        """The ids of each text."""
        room = self.truncate_to
        if room is not None and add_special_tokens:
            room -= self.num_special_tokens_to_add()
        texts = [self._cut(text.ids, room) for text in self.base_tokenizer.encode_batch(inputs)]
        return [self.add_special_tokens(ids) for ids in texts] if add_special_tokens else texts

    def _cut(self, ids: list[int], room: int | None) -> list[int]:
        if room is None or len(ids) <= room:
            return ids
        right = self.truncate_direction == TruncationDirection.right
        return ids[:room] if right else ids[len(ids) - room :]

    def add_special_tokens(self, input_ids: list[int]) -> list[int]:
        """Append the end-of-text token in place, unless it is the last one already."""
        if not input_ids or input_ids[-1] != self.eos_token_id:
            input_ids.append(self.eos_token_id)
        return input_ids

    def num_special_tokens_to_add(self, is_pair: bool = False) -> int:
        return 2 if is_pair else 1

    def decode(self, token_ids: list[int], skip_special_tokens: bool = True) -> str:
        return self.base_tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)


def _tokenizer_class() -> Any:
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise ValueError(
            "expected the package tokenizers, found none: uv pip install tokenizers"
        ) from error
    return Tokenizer
