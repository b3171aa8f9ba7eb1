"""Encodes texts with the same token ids as the toolkit's version of tokenizers, but faster.

For a tokenizer that qualifies, gigatoken or tiktoken replaces Hugging Face's tokenizers. Two
conditions make the results equal:

- Merging. All three libraries repeatedly merge the adjacent pair that is first in the order of the
  merges. tiktoken looks up a pair by its concatenation, so it could merge a pair that is not in the
  list. It cannot if every token, encoded alone, gives itself: two tokens that together span a token
  come from merges within that span, which are the same as when the span is encoded alone, and then
  the last merge is the listed pair. `find_merge_mismatch` checks that for every token. gigatoken
  looks up the pair, and takes the id of its result as its place in the order, which is checked too.
- Splitting and normalising. Each library has its own version of Unicode. A document with a
  character on which versions may differ (recent marks and rare letters, characters not assigned
  yet; see `is_stable`) is not encoded here. tests/unit/test_fast.py compares all other characters.

They encode the text between added tokens only. What is an added token, and NFC, is decided here.
Any other tokenizer is encoded by the installed tokenizers, with a call that does not track
offsets. Tokenizers whose result depends on more than the text are rejected.
"""

from __future__ import annotations

import json
import os
import re
import unicodedata
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    import numpy as np

# GPT-2's pattern, of byte-level pre-tokenizers: contractions, words, numbers, the rest, spaces. The
# alternatives without a lookahead form one group, which tiktoken then matches in a single step.
GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+"
GPT2_PATTERN = rf"(?:{GPT2_WORDS})|\s+(?!\S)|\s+"
# The same where each run of m to n spaces is an added token, which is cut out first.
GPT2_PATTERN_WITH_RUNS = rf"(?: {{%d,%d}}|{GPT2_WORDS})|(?:(?! {{%d}})\s)+(?!\S)|(?:(?! {{%d}})\s)+"
# GPT-4's pattern, which the tokenizers of OLMo 2 and Llama 3 spell out; grouped as above.
GPT4_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+"
)
GPT4_PATTERN = GPT4_WORDS + r"|\s+(?!\S)|\s+"
# Longer runs of white space overflow the stack of tiktoken's regular expression engine.
MAX_SPACE_RUN = 50_000
ASCII = bytes(range(128))

# gigatoken remembers the ids of each word that it has seen: up to 9 bytes of memory for a byte of
# text without repeats. After so much text it is loaded again, which takes 0.1 s.
MAX_REMEMBERED_BYTES = 1 << 28

ENCODERS = GIGATOKEN, TIKTOKEN, TOKENIZERS = "gigatoken", "tiktoken", "tokenizers"
Ids: TypeAlias = "np.ndarray | list[int]"
Encode = Callable[[str], "Ids | None"]
EncodeWords = Callable[[str], "Ids"]


@cache
def make_encoder(content: bytes, special_as_text: bool, encoder: str = GIGATOKEN) -> Encode:
    """A function from a text to its token ids; None for a text that only the toolkit can encode.

    Args:
        encoder: one of ENCODERS; `tokenizers` replaces the others where they cannot reproduce the
            tokenizer.

    Raises ValueError, with the reason, for a tokenizer that cannot be reproduced.
    """
    tokenizer = json.loads(content)
    if reason := find_reproducibility_problem(tokenizer):
        raise ValueError(
            f"the engine `fast` cannot reproduce this tokenizer: {reason}. Use the engine `dolma`"
        )
    if encoder != TOKENIZERS and find_byte_level_problem(tokenizer, content.decode()) is None:
        return byte_level_encoder(tokenizer, special_as_text, encoder)
    return tokenizers_encoder(content, special_as_text)


def tokenizers_encoder(content: bytes, special_as_text: bool) -> Encode:
    """Hugging Face's encoder, without offsets, on one thread."""
    from tokenizers import Tokenizer

    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # files run in parallel, their documents do not
    model = Tokenizer.from_buffer(content)
    model.encode_special_tokens = special_as_text

    def encode(text: str) -> Ids | None:
        if not is_stable_text(text):
            return None
        return model.encode_batch_fast([text], add_special_tokens=False)[0].ids or None

    return encode


def byte_level_encoder(tokenizer: dict[str, Any], special_as_text: bool, encoder: str) -> Encode:
    """gigatoken's or tiktoken's encoder, with added tokens and NFC handled here, as tokenizers
    does."""
    import numpy as np

    added = tokenizer["added_tokens"]
    runs = find_space_runs(added) if split_pattern(tokenizer) is None else {}
    make = gigatoken_words if encoder == GIGATOKEN else tiktoken_words
    encode_words = make(tokenizer, runs)
    added = [token for token in added if token["id"] not in runs.values()]
    raw, normalized = (
        AddedTokenSplitter([t for t in added if t["normalized"] == wanted], special_as_text)
        for wanted in (False, True)
    )
    composes = tokenizer["normalizer"] is not None

    def encode(text: str) -> Ids | None:
        if not is_stable_text(text):
            return None
        if len(text) > MAX_SPACE_RUN and has_long_space(text):
            return None
        found: list[Ids] = []
        for outer in raw.split(text):
            if isinstance(outer, int):
                found.append([outer])
                continue
            for inner in normalized.split(
                unicodedata.normalize("NFC", outer) if composes else outer
            ):
                found.append([inner] if isinstance(inner, int) else encode_words(inner))
        return found[0] if len(found) == 1 else np.concatenate(found)

    return encode


def tiktoken_words(tokenizer: dict[str, Any], runs: dict[int, int]) -> EncodeWords:
    """tiktoken's encoder of text without added tokens but `runs` of spaces (length → id)."""
    import tiktoken

    to_byte = byte_alphabet()
    ranks = {
        bytes(map(to_byte.__getitem__, token)): id
        for token, id in plain_vocabulary(tokenizer).items()
    }
    pattern = GPT2_PATTERN if split_pattern(tokenizer) is None else GPT4_PATTERN
    if runs:
        least, most = min(runs), max(runs)
        pattern = GPT2_PATTERN_WITH_RUNS % (least, most, least, least)
        # No merge sees such a run, so its bytes can represent the added token.
        ranks |= {b" " * length: id for length, id in runs.items()}
    bpe = tiktoken.Encoding("given", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    return bpe.encode_ordinary


def gigatoken_words(tokenizer: dict[str, Any], runs: dict[int, int]) -> EncodeWords:
    """gigatoken's encoder of the same; it gives arrays of uint32."""
    from gigatoken import Tokenizer

    content = json.dumps(
        {
            "model": {**tokenizer["model"], "vocab": plain_vocabulary(tokenizer)},
            "pre_tokenizer": tokenizer["pre_tokenizer"],
            "added_tokens": [{"id": id, "content": " " * n} for n, id in runs.items()],
        }
    )
    model, remembered = Tokenizer.from_json(content).backend, 0

    def encode(text: str) -> Ids:
        nonlocal model, remembered
        remembered += len(text)
        if remembered > MAX_REMEMBERED_BYTES:
            model, remembered = Tokenizer.from_json(content).backend, len(text)
        return model.encode(text)

    return encode


def plain_vocabulary(tokenizer: dict[str, Any]) -> dict[str, int]:
    """Token → id of all tokens that are not added ones."""
    added_ids = {token["id"] for token in tokenizer["added_tokens"]}
    return {t: id for t, id in tokenizer["model"]["vocab"].items() if id not in added_ids}


def find_reproducibility_problem(tokenizer: dict[str, Any]) -> str | None:
    """Why a tokenizer's ids depend on more than the text; None if they do not."""
    if tokenizer["model"].get("dropout"):
        return "its model has dropout"
    if tokenizer.get("truncation") or tokenizer.get("padding"):
        return "it truncates or pads"
    return None


def split_pattern(tokenizer: dict[str, Any]) -> str | None:
    """The regex of a pre-tokenizer that splits, then maps to bytes; None for any other."""
    outer = tokenizer["pre_tokenizer"] or {}
    if outer.get("type") != "Sequence" or len(outer["pretokenizers"]) != 2:
        return None
    split, byte_level = outer["pretokenizers"]
    isolated = {"behavior": "Isolated", "invert": False}
    bytes_only = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    if split.get("type") != "Split" or not isolated.items() <= split.items():
        return None
    pattern: str | None = split["pattern"].get("Regex")
    return pattern if bytes_only.items() <= byte_level.items() else None


def find_space_runs(added: list[dict[str, Any]]) -> dict[int, int]:
    """Length → id of the added tokens that are runs of spaces, if the pattern can match them."""
    runs = {len(token["content"]): token for token in added if not token["content"].strip(" ")}
    others = [token["content"] for token in added if token["content"].strip(" ")]
    is_plain = all(token["normalized"] and not token["special"] for token in runs.values())
    is_range = sorted(runs) == list(range(2, 2 + len(runs)))
    if not (runs and is_plain and is_range) or any(" " in other for other in others):
        return {}
    return {length: token["id"] for length, token in runs.items()}


class AddedTokenSplitter:
    """Splits a text at its added tokens, which comes first; leftmost match, then longest."""

    def __init__(self, tokens: list[dict[str, Any]], special_as_text: bool) -> None:
        self.ids = {
            token["content"]: None if special_as_text and token["special"] else token["id"]
            for token in tokens
        }
        names = sorted(self.ids, key=len, reverse=True)
        # One that all of them have: it is found ten times as fast as a name. "": there is none.
        shared = (letter for letter in "".join(names[:1]) if all(letter in n for n in names))
        self.letter = next(shared, "")
        # Those that contain no other one: a text without any of them has no added token.
        self.smallest = [n for n in names if not any(o in n for o in names if o != n)]
        self.pattern = re.compile("|".join(map(re.escape, names)))

    def split(self, text: str) -> list[str | int]:
        """The text's pieces: ids of added tokens, and the texts between them."""
        if self.letter not in text or not any(name in text for name in self.smallest):
            return [text]
        pieces: list[str | int] = []
        start = 0
        for match in self.pattern.finditer(text):
            if (id := self.ids[match[0]]) is not None:
                if start < match.start():
                    pieces.append(text[start : match.start()])
                pieces.append(id)
                start = match.end()
        if start < len(text):
            pieces.append(text[start:])
        return pieces


def is_stable_text(text: str) -> bool:
    """Whether all libraries here split and normalise each character of a text alike."""
    if text.isascii():
        return True
    others = text.encode().translate(None, ASCII).decode()  # a seventh of the time of set(text)
    return all(map(is_stable, set(others)))


@cache
def is_stable(letter: str) -> bool:
    """Whether all libraries here split and normalise this character alike.

    All versions of Unicode since 3.2 agree on the characters of 3.2, and on symbols (emoji, for
    one), which are neither letters nor marks. The versions here also agree on letters and digits of
    the basic plane, to which Unicode 15, the newest in a supported Python, adds none.
    """
    kind = unicodedata.category(letter)[0]
    return (
        unicodedata.ucd_3_2_0.category(letter) != "Cn"
        or kind in "PSZ"
        or (kind in "LN" and ord(letter) < 0x10000)
    )


def has_long_space(text: str) -> bool:
    """Whether a text has a run of MAX_SPACE_RUN white space."""
    half = MAX_SPACE_RUN // 2  # such a run covers a whole block of half its length, found at once
    blocks = (text[start : start + half] for start in range(0, len(text), half))
    return any(map(str.isspace, blocks)) and bool(re.search(rf"\s{{{MAX_SPACE_RUN}}}", text))


def find_byte_level_problem(tokenizer: dict[str, Any], content: str) -> str | None:
    """Why gigatoken and tiktoken cannot replace a tokenizer; None if they can."""
    model = tokenizer["model"]
    if model.get("type") != "BPE":
        return f"its model is {model.get('type')}, not BPE"
    # The option ignore_merges makes no difference: tiktoken also looks up a whole word first.
    for option in ("continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "unk_token"):
        if model.get(option):
            return f"its model has {option}"
    if tokenizer["normalizer"] not in (None, {"type": "NFC"}):
        return f"its normalizer is {tokenizer['normalizer']}, not NFC"
    splitter = tokenizer["pre_tokenizer"] or {}
    byte_level = splitter.get("type") == "ByteLevel" and not splitter.get("add_prefix_space")
    if split_pattern(tokenizer) != GPT4_PATTERN and not (
        byte_level and splitter.get("use_regex", True)
    ):
        return f"its pre-tokenizer is {splitter}, not ByteLevel without a prefix, nor GPT-4's"
    for token in tokenizer["added_tokens"]:
        if token["single_word"] or token["lstrip"] or token["rstrip"]:
            return f"its added token {token['content']!r} also matches characters around it"
    return find_merge_mismatch(model, plain_vocabulary(tokenizer), content)


def find_merge_mismatch(model: dict[str, Any], vocab: dict[str, int], content: str) -> str | None:
    """Why merging by rank differs from merging by the model's list; None if it does not."""
    from tokenizers import Tokenizer

    made = []
    for merge in model["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        if not {left, right, left + right} <= vocab.keys():
            return f"its merge {left} {right} has a token that is not in the vocabulary"
        made.append(left + right)
    ranks = [vocab[token] for token in made]
    if ranks != sorted(set(ranks)):
        return "its ids do not follow the order of its merges"
    unused = {0xC0, 0xC1, *range(0xF5, 0x100)}  # bytes that do not occur in UTF-8
    letters = {letter for letter, byte in byte_alphabet().items() if byte not in unused}
    if not letters <= vocab.keys() - set(made) <= set(byte_alphabet()):
        return "its vocabulary is not the bytes and the results of its merges"
    merge_alone = Tokenizer.from_str(content).model.tokenize
    for token in made:
        if [piece.value for piece in merge_alone(token)] != [token]:
            return f"its token {token} is not what its own letters merge to"
    return None


@cache
def byte_alphabet() -> dict[str, int]:
    """The printable letter of a byte-level vocabulary → its byte."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1)]
    printable += range(ord("®"), ord("ÿ") + 1)
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + number): byte for number, byte in enumerate(others)
    }
