"""The engine `fast`: the toolkit's bytes at several times its speed.

Where a tokenizer qualifies, tiktoken merges in place of Hugging Face's tokenizers. That the two
agree rests on three things:

- Merging. Both merge, again and again, the adjacent pair that comes first in the order of the
  merges. tiktoken looks a pair up by its concatenation, so it could merge one that is not in the
  list. It cannot where every token, merged alone, becomes itself: a pair of tokens that fills a
  token's span was made by merges inside that span, which are those that the span makes alone, and
  alone it ends in the listed pair. `merges_differ` checks that for every token.
- Splitting and normalising. Each library brings its own edition of Unicode. A document with a
  character on which editions may differ (young marks and rare letters, characters not assigned
  yet; see `is_settled`) is tokenized by the toolkit itself. tests/unit/test_fast.py compares the
  others.
- Auditing. A share of the shards is tokenized by the toolkit as well, and compared.

A tokenizer that does not qualify is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import unicodedata
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from olmo.data import gz
from olmo.data.documents import parse
from olmo.data.dolma import Dolma, scratch_beside
from olmo.data.tokens import Job

if TYPE_CHECKING:
    import polars

# GPT-2's, which byte-level pre-tokenizers use: contractions, words, numbers, the rest, spaces. What
# looks not ahead is one group, which tiktoken's regular expressions then match in a single step.
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+"
PATTERN = rf"(?:{WORDS})|\s+(?!\S)|\s+"
# The same where each run of so many spaces is a token of its own, cut out before all else.
PATTERN_WITH_RUNS = rf"(?: {{%d,%d}}|{WORDS})|(?:(?! {{%d}})\s)+(?!\S)|(?:(?! {{%d}})\s)+"
# Runs of white space longer than this overflow the stack of tiktoken's regular expressions.
LONG_SPACE = 50_000


class Fast:
    """The engine. What it cannot vouch for, and what it audits, goes to the toolkit itself.

    Args:
        dolma: the toolkit, started only when it is needed.
        audit_share: of the files, chosen by their contents, are tokenized twice and compared.
    """

    def __init__(self, dolma: Dolma, audit_share: float = 0.01) -> None:
        self.dolma = dolma
        self.audit_share = audit_share
        self.toolkit = f"fast==1 tiktoken=={installed()} {dolma.toolkit}"

    def tokenize(self, job: Job) -> tuple[polars.DataFrame, str]:
        """Write a file's tokens; each document's row, id and range, and what there is to tell.

        Raises ValueError for a tokenizer that does not qualify, and for an audit that fails.
        """
        import numpy as np
        import polars

        encode = encoder(job.tokenizer.read_bytes(), job.special_as_text)
        ids: list[str] = []
        lengths: list[int] = []
        left: list[int] = []  # the documents that are left to the toolkit
        left_bytes = 0
        with scratch_beside(job.tokens) as folder:
            with (
                gz.reading(job.documents) as lines,
                gz.writing(folder / "left.gz") as left_lines,
                open(folder / "tokens", "wb") as output,
            ):
                for line in lines:
                    identity, text, reason = parse(line)
                    if reason is not None or identity is None or text is None:
                        raise ValueError(
                            f"line {len(ids) + 1}: expected a document, found {reason}"
                        )
                    found = encode(text.strip())
                    if found is None:
                        left.append(len(ids))
                        left_bytes += len(text.encode())
                        left_lines.write(line)
                        found = []
                    elif found[-1] != job.eos_token_id:
                        found.append(job.eos_token_id)
                    ids.append(identity)
                    lengths.append(len(found))
                    output.write(np.array(found, job.dtype).tobytes())
            if left:
                rest = replace(
                    job,
                    documents=folder / "left.gz",
                    tokens=folder / "left",
                    text_bytes=left_bytes,
                    count=len(left),
                )
                ranges, said = self.dolma.tokenize(rest)
                if ranges["id"].to_list() != [ids[row] for row in left]:
                    raise ValueError(f"the toolkit lost documents of those left to it: {said}")
                splice(
                    job,
                    folder,
                    lengths,
                    dict(zip(left, ranges["end"] - ranges["start"], strict=True)),
                )
            else:
                os.replace(folder / "tokens", job.tokens)

        sizes = np.array(lengths, np.uint64)
        ends = np.cumsum(sizes, dtype=np.uint64)
        ranges = polars.DataFrame(
            {"row": range(1, len(ids) + 1), "id": ids, "start": ends - sizes, "end": ends},
            schema=dict(
                row=polars.UInt64, id=polars.String, start=polars.UInt64, end=polars.UInt64
            ),
        )
        audited = self.is_audited(job)
        if audited:
            self.audit(job, ranges)
        return ranges, f"{len(left)} of {len(ids)} documents left to the toolkit" + (
            ", all audited" * audited
        )

    def is_audited(self, job: Job) -> bool:
        """Whether this file is among those that are tokenized twice: by its contents."""
        with open(job.documents, "rb") as file:
            digest = hashlib.sha256(file.read(gz.BUFFER)).digest()
        return int.from_bytes(digest[:8], "big") < self.audit_share * 2**64

    def audit(self, job: Job, ranges: polars.DataFrame) -> None:
        """Raises ValueError where the toolkit's tokens are others."""
        import numpy as np

        with scratch_beside(job.tokens) as folder:
            expected, _ = self.dolma.tokenize(replace(job, tokens=folder / "tokens"))
            theirs = np.memmap(folder / "tokens", job.dtype, mode="r")
            ours = np.memmap(job.tokens, job.dtype, mode="r")
            if expected.equals(ranges) and np.array_equal(ours, theirs):
                return
            for mine, other in zip(
                ranges.iter_rows(named=True), expected.iter_rows(named=True), strict=False
            ):
                if mine != other or not np.array_equal(
                    ours[mine["start"] : mine["end"]], theirs[other["start"] : other["end"]]
                ):
                    break
        raise ValueError(
            f"the engine `fast` failed its audit: document {mine['id']!r} has other tokens than "
            "the toolkit gives it. Use the engine `dolma`, and tell us the document"
        )


def splice(job: Job, folder: Path, lengths: list[int], left: dict[int, int]) -> None:
    """Put the toolkit's documents (row → length) between ours; `lengths` is completed."""
    import numpy as np

    ours, theirs = (np.fromfile(folder / name, job.dtype) for name in ("tokens", "left"))
    at = {True: 0, False: 0}
    with open(job.tokens, "wb") as output:
        for row in range(len(lengths)):
            is_left = row in left
            if is_left:
                lengths[row] = left[row]
            source, start = theirs if is_left else ours, at[is_left]
            at[is_left] = start + lengths[row]
            output.write(source[start : at[is_left]].tobytes())


Encode = Callable[[str], "list[int] | None"]


@cache
def encoder(content: bytes, special_as_text: bool) -> Encode:
    """A function from a text to its token ids, or to None where only the toolkit knows them.

    Raises ValueError, with the reason, for a tokenizer that cannot be reproduced.
    """
    import tiktoken

    tokenizer = json.loads(content)
    added = tokenizer["added_tokens"]
    if reason := disqualifies(tokenizer, content.decode()):
        raise ValueError(
            f"the engine `fast` cannot reproduce this tokenizer: {reason}. Use the engine `dolma`"
        )
    to_byte = alphabet()
    outside = {token["id"] for token in added}
    ranks = {
        bytes(map(to_byte.__getitem__, token)): id
        for token, id in tokenizer["model"]["vocab"].items()
        if id not in outside
    }
    pattern = PATTERN
    if runs := runs_of_spaces(added):
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
    """What about a tokenizer `fast` cannot reproduce; None if it can."""
    model = tokenizer["model"]
    if model.get("type") != "BPE":
        return f"its model is {model.get('type')}, not BPE"
    for option in (
        "dropout",
        "continuing_subword_prefix",
        "end_of_word_suffix",
        "byte_fallback",
        "ignore_merges",
        "unk_token",
    ):
        if model.get(option):
            return f"its model has {option}"
    if tokenizer["normalizer"] not in (None, {"type": "NFC"}):
        return f"its normalizer is {tokenizer['normalizer']}, not NFC"
    splitter = tokenizer["pre_tokenizer"] or {}
    if (
        splitter.get("type") != "ByteLevel"
        or splitter.get("add_prefix_space")
        or not splitter.get("use_regex", True)
    ):
        return f"its pre-tokenizer is {splitter}, not ByteLevel without a prefix"
    if tokenizer.get("truncation") or tokenizer.get("padding"):
        return "it truncates or pads"
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


def installed() -> str:
    """tiktoken's version."""
    try:
        return version("tiktoken")
    except PackageNotFoundError as error:
        raise ValueError(
            "the engine `fast` needs tiktoken: uv pip install tiktoken; or use the engine `dolma`"
        ) from error
