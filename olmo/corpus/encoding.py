"""From a text to its token ids, as the tokenizing toolkit's own tokenizers gives them, but faster.

Where a tokenizer qualifies, tiktoken merges in place of Hugging Face's tokenizers. That the two
agree rests on two things:

- Merging. Both merge, again and again, the adjacent pair that comes first in the order of the
  merges. tiktoken looks a pair up by its concatenation, so it could merge one that is not in the
  list. It cannot where every token, merged alone, becomes itself: a pair of tokens that fills a
  token's span was made by merges inside that span, which are those that the span makes alone, and
  alone it ends in the listed pair. `merges_differ` checks that for every token.
- Splitting and normalising. Each library brings its own edition of Unicode. A document with a
  character on which editions may differ (young marks and rare letters, characters not assigned
  yet; see `is_settled`) is not encoded here. tests/unit/test_fast.py compares the others.

Any other tokenizer is encoded by the newest tokenizers, which no longer tracks where in the text
each token stood; what it cannot do as the toolkit's does is refused.
"""

from __future__ import annotations

import json
import os
import re
import unicodedata
from collections.abc import Callable
from functools import cache
from typing import Any

# GPT-2's, which byte-level pre-tokenizers use: contractions, words, numbers, the rest, spaces. What
# looks not ahead is one group, which tiktoken's regular expressions then match in a single step.
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+"
PATTERN = rf"(?:{WORDS})|\s+(?!\S)|\s+"
# The same where each run of so many spaces is a token of its own, cut out before all else.
PATTERN_WITH_RUNS = rf"(?: {{%d,%d}}|{WORDS})|(?:(?! {{%d}})\s)+(?!\S)|(?:(?! {{%d}})\s)+"
# GPT-4's, which OLMo 2's tokenizer and Llama 3's name in so many words; grouped as above.
NAMED_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+"
)
NAMED_PATTERN = NAMED_WORDS + r"|\s+(?!\S)|\s+"
# Runs of white space longer than this overflow the stack of tiktoken's regular expressions.
LONG_SPACE = 50_000

Encode = Callable[[str], "list[int] | None"]


@cache
def encoder(content: bytes, special_as_text: bool) -> Encode:
    """A function from a text to its token ids, or to None where only the toolkit knows them.

    Raises ValueError, with the reason, for a tokenizer that cannot be reproduced.
    """
    tokenizer = json.loads(content)
    if reason := irreproducible(tokenizer):
        raise ValueError(
            f"the engine `fast` cannot reproduce this tokenizer: {reason}. Use the engine `dolma`"
        )
    if disqualifies(tokenizer, content.decode()) is None:
        return by_tiktoken(tokenizer, special_as_text)
    return by_tokenizers(content, special_as_text)


def by_tokenizers(content: bytes, special_as_text: bool) -> Encode:
    """Hugging Face's own encoder, without the offsets that nobody asks for; one thread."""
    from tokenizers import Tokenizer

    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # files run side by side, not their documents
    model = Tokenizer.from_buffer(content)
    model.encode_special_tokens = special_as_text

    def encode(text: str) -> list[int] | None:
        if not text.isascii() and not all(map(is_settled, set(text))):
            return None
        return model.encode_batch_fast([text], add_special_tokens=False)[0].ids or None

    return encode


def by_tiktoken(tokenizer: dict[str, Any], special_as_text: bool) -> Encode:
    import tiktoken

    added = tokenizer["added_tokens"]
    to_byte = alphabet()
    outside = {token["id"] for token in added}
    ranks = {
        bytes(map(to_byte.__getitem__, token)): id
        for token, id in tokenizer["model"]["vocab"].items()
        if id not in outside
    }
    pattern = PATTERN if named_pattern(tokenizer) is None else NAMED_PATTERN
    if pattern is PATTERN and (runs := runs_of_spaces(added)):
        least, most = min(runs), max(runs)
        pattern = PATTERN_WITH_RUNS % (least, most, least, least)
        # No merge ever sees such a run, so that its bytes can stand for the added token.
        ranks |= {b" " * length: id for length, id in runs.items()}
        added = [token for token in added if token["id"] not in runs.values()]
    bpe = tiktoken.Encoding("given", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    raw = Splitter([token for token in added if not token["normalized"]], special_as_text)
    normalized = Splitter([token for token in added if token["normalized"]], special_as_text)
    composes = tokenizer["normalizer"] is not None

    def encode(text: str) -> list[int] | None:
        if not text.isascii() and not all(map(is_settled, set(text))):
            return None
        if len(text) > LONG_SPACE and long_space(text):
            return None
        found: list[int] = []
        for outer in raw.split(text):
            if isinstance(outer, int):
                found.append(outer)
                continue
            for inner in normalized.split(
                unicodedata.normalize("NFC", outer) if composes else outer
            ):
                if isinstance(inner, int):
                    found.append(inner)
                else:
                    found += bpe.encode_ordinary(inner)
        return found

    return encode


def irreproducible(tokenizer: dict[str, Any]) -> str | None:
    """What about a tokenizer makes its ids depend on more than the text; None if nothing does."""
    if tokenizer["model"].get("dropout"):
        return "its model has dropout"
    if tokenizer.get("truncation") or tokenizer.get("padding"):
        return "it truncates or pads"
    return None


def named_pattern(tokenizer: dict[str, Any]) -> str | None:
    """The regular expression by which a pre-tokenizer splits, if it does and then takes bytes."""
    outer = tokenizer["pre_tokenizer"] or {}
    if outer.get("type") != "Sequence" or len(outer["pretokenizers"]) != 2:
        return None
    split, letters = outer["pretokenizers"]
    plain = {"behavior": "Isolated", "invert": False}
    bytes_only = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    if split.get("type") != "Split" or not plain.items() <= split.items():
        return None
    pattern: str | None = split["pattern"].get("Regex")
    return pattern if bytes_only.items() <= letters.items() else None


def runs_of_spaces(added: list[dict[str, Any]]) -> dict[int, int]:
    """Length → id of the added tokens that are runs of spaces, if they can join the pattern."""
    runs = {len(token["content"]): token for token in added if not token["content"].strip(" ")}
    others = [token["content"] for token in added if token["content"].strip(" ")]
    alike = all(token["normalized"] and not token["special"] for token in runs.values())
    whole = sorted(runs) == list(range(2, 2 + len(runs)))
    if not (runs and alike and whole) or any(" " in other for other in others):
        return {}
    return {length: token["id"] for length, token in runs.items()}


class Splitter:
    """Cuts the added tokens out of a text before anything else: leftmost first, longest first."""

    def __init__(self, tokens: list[dict[str, Any]], special_as_text: bool) -> None:
        self.ids = {
            token["content"]: None if special_as_text and token["special"] else token["id"]
            for token in tokens
        }
        names = sorted(self.ids, key=len, reverse=True)
        # Those that hold no other: where none of them stands, there is nothing to cut.
        self.smallest = [n for n in names if not any(o in n for o in names if o != n)]
        self.pattern = re.compile("|".join(map(re.escape, names)))

    def split(self, text: str) -> list[str | int]:
        """The text's pieces: ids of added tokens, and what stands between them."""
        if not any(name in text for name in self.smallest):
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


@cache
def is_settled(letter: str) -> bool:
    """Whether the editions of Unicode at work here split and normalise this character alike.

    Those since 3.2 agree on what 3.2 has and on symbols (emoji, for one), which are neither
    letters nor marks; those at work on letters and digits of the basic plane as well, to which
    Unicode 15, the newest that a Python of ours knows, adds none.
    """
    kind = unicodedata.category(letter)[0]
    return (
        unicodedata.ucd_3_2_0.category(letter) != "Cn"
        or kind in "PSZ"
        or (kind in "LN" and ord(letter) < 0x10000)
    )


def long_space(text: str) -> bool:
    return re.search(rf"\s{{{LONG_SPACE}}}", text) is not None


def disqualifies(tokenizer: dict[str, Any], content: str) -> str | None:
    """Why tiktoken cannot stand in for a tokenizer; None if it can."""
    model = tokenizer["model"]
    if model.get("type") != "BPE":
        return f"its model is {model.get('type')}, not BPE"
    # A model that ignores its merges for whole words does as tiktoken does.
    for option in ("continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "unk_token"):
        if model.get(option):
            return f"its model has {option}"
    if tokenizer["normalizer"] not in (None, {"type": "NFC"}):
        return f"its normalizer is {tokenizer['normalizer']}, not NFC"
    splitter = tokenizer["pre_tokenizer"] or {}
    byte_level = splitter.get("type") == "ByteLevel" and not splitter.get("add_prefix_space")
    if named_pattern(tokenizer) != NAMED_PATTERN and not (
        byte_level and splitter.get("use_regex", True)
    ):
        return f"its pre-tokenizer is {splitter}, not ByteLevel without a prefix, nor GPT-4's"
    for token in tokenizer["added_tokens"]:
        if token["single_word"] or token["lstrip"] or token["rstrip"]:
            return f"its added token {token['content']!r} takes in its surroundings"
    return merges_differ(model, {token["id"] for token in tokenizer["added_tokens"]}, content)


def merges_differ(model: dict[str, Any], outside: set[int], content: str) -> str | None:
    """Why merging by rank is not merging by this list; None if it is."""
    from tokenizers import Tokenizer

    vocab = {token: id for token, id in model["vocab"].items() if id not in outside}
    made = []
    for merge in model["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        if not {left, right, left + right} <= vocab.keys():
            return f"its merge {left} {right} is of or to a token that is not there"
        made.append(left + right)
    ranks = [vocab[token] for token in made]
    if ranks != sorted(set(ranks)):
        return "its ids do not follow the order of its merges"
    never = {0xC0, 0xC1, *range(0xF5, 0x100)}  # bytes that no UTF-8 text holds
    letters = {letter for letter, byte in alphabet().items() if byte not in never}
    if not letters <= vocab.keys() - set(made) <= set(alphabet()):
        return "its vocabulary is not the bytes and what its merges make"
    merge_alone = Tokenizer.from_str(content).model.tokenize
    for token in made:
        if [piece.value for piece in merge_alone(token)] != [token]:
            return f"its token {token} does not come out of its own letters"
    return None


@cache
def alphabet() -> dict[str, int]:
    """The printable letter that stands for each byte in a byte-level vocabulary → the byte."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1)]
    printable += range(ord("®"), ord("ÿ") + 1)
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + number): byte for number, byte in enumerate(others)
    }
