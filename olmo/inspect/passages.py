"""Where a text occurs in a run's data, and when the run was trained on it, for `olmo seen --text`.

A text is found in the documents themselves. Its tokens there depend on what stands around it, so
the document is encoded once more, and the tokens that hold the text are those of its characters.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from olmo.checkpoint import layout
from olmo.config import PROJECT_CONFIG, read_project_config
from olmo.corpus.text_index import find_lines, find_texts
from olmo.corpus.tokens import AS_SPECIAL, AS_TEXT
from olmo.data.files import is_url
from olmo.inspect.documents import (
    Document,
    RecordsByContent,
    TokenShard,
    find_shards_by_documents,
    find_token_shards,
    require_shard,
)
from olmo.inspect.run import TrainedRun
from olmo.runtime.log import log
from olmo.store.lineage import records_by_content
from olmo.store.stage import current_store

if TYPE_CHECKING:
    from tokenizers import Tokenizer

LARGE_BYTES = 1 << 25  # of compressed documents: they are searched for more than a second

MASKED = ": read and not learned, since the run skips it"

Use = tuple[int, int, int]  # (step, position in its batch, instance)


@dataclass(frozen=True)
class Passage:
    """An occurrence of a text in a document of a run's data."""

    document: Document
    start: int  # its first character in the document's text
    end: int  # one past its last
    is_heldout: bool
    instances: tuple[int | None, ...]  # that hold it, in order; None: the incomplete last one


def find_passages(run: TrainedRun, text: str) -> Iterator[Passage]:
    """Every occurrence of a text in a run's training and held-out documents, in their order.

    Only with all of its characters in one document; occurrences may overlap. What is read depends
    on how many of them are taken.

    Raises ValueError for a text that cannot be searched, and for data of which the store has no
    documents.
    """
    if not text:
        raise ValueError("expected a text of at least one character, found none; give --text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"expected a text in UTF-8, found other bytes ({error.reason})") from None
    store = current_store()
    made_by = records_by_content(store)
    shards = find_token_shards(store, made_by)
    by_documents = find_shards_by_documents(store, made_by)
    search = DocumentSearch(text, made_by)
    trained = [require_shard(path, shards) for path in run.dataset.paths]
    held = sorted({digest for shard in trained for digest in shard.heldout})
    others = [by_documents[digest] for digest in held if digest in by_documents]
    search.warn_of_missing_indexes(run, [*trained, *others])

    length = run.sequence_length
    for shard, (first, end) in zip(trained, run.dataset.offsets, strict=True):
        for document, whole, places in search.find(shard):
            locate = TokenLocator(shard, document, whole)
            for start in places:
                tokens = locate(start, start + len(text))
                rows = range(tokens.start // length, -(-tokens.stop // length)) if tokens else ()
                instances = tuple(first + row if first + row < end else None for row in rows)
                yield Passage(document, start, start + len(text), False, instances)
    for shard in others:
        for document, _, places in search.find(shard):
            for start in places:
                yield Passage(document, start, start + len(text), True, ())


class DocumentSearch:
    """Searches shards' documents for a text, with the indexes that the store has."""

    def __init__(self, text: str, made_by: RecordsByContent) -> None:
        self.text = text
        self._indexes = {
            record["action"]["inputs"]["documents"]: record["outputs"]
            for records in made_by.values()
            for record in records
            if record["action"]["stage"] == "text_index"
        }

    def _index(self, shard: TokenShard) -> tuple[Path, Path] | None:
        """The paths of `grams` and `blocks` of a shard's documents."""
        if (outputs := self._indexes.get(shard.documents_digest)) is None:
            return None
        grams, blocks = (
            shard.store.object_path(outputs[name]["sha256"]) for name in ("grams", "blocks")
        )
        return (grams, blocks) if grams.exists() and blocks.exists() else None

    def find(self, shard: TokenShard) -> Iterator[tuple[Document, str, list[int]]]:
        """Each document with the text: its whole text, and where in it."""
        index = self._index(shard)
        lines = None if index is None else find_lines(self.text, *index)
        if lines is not None and not len(lines):
            return
        table = shard.read_table()
        for line, whole, places in find_texts(shard.documents_path, self.text, lines):
            yield shard.document(table.row(line, named=True)), whole, places

    def warn_of_missing_indexes(self, run: TrainedRun, shards: Iterable[TokenShard]) -> None:
        """Tell how much is read without an index, if it is much, and how to make one."""
        without = [shard for shard in shards if self._index(shard) is None]
        size = sum(shard.documents_path.stat().st_size for shard in without)
        if size > LARGE_BYTES:
            runs = read_project_config()["runs"] if Path(PROJECT_CONFIG).is_file() else {}
            dataset = runs.get(run.where, {}).get("dataset", "<data set>")
            log.warning(
                f"reads {size / 1e6:,.0f} MB of compressed documents that have no text index; make "
                f"it once: uv run snakemake --cores 2 data/{dataset}/text_index/ready"
            )


class TokenLocator:
    """Finds the tokens of a document's characters, in its shard."""

    def __init__(self, shard: TokenShard, document: Document, whole: str) -> None:
        self.document = document
        self._skipped = len(whole) - len(whole.lstrip())  # white space that is not tokenized
        self._starts: np.ndarray | None = None
        if shard.record["action"]["stage"] != "tokens":
            return  # a conversation, whose messages stand between marks: all of it
        special = shard.record["action"]["params"].get("special_tokens", AS_SPECIAL)
        path = shard.find_object("tokenizer", shard.record["action"]["inputs"]["tokenizer"])
        tokenizer = _open_tokenizer(path, special == AS_TEXT)
        encoding = tokenizer.encode(whole.strip(), add_special_tokens=False)
        stored = shard.read_tokens(document).tolist()
        if stored not in (encoding.ids, [*encoding.ids, *stored[-1:]]):
            log.warning(
                f"{document.id}: the installed tokenizers gives other tokens than its shard has; "
                "the steps are those of the whole document"
            )
            return
        offsets = np.array(encoding.offsets, np.int64).reshape(-1, 2)
        self._ends = np.maximum.accumulate(offsets[:, 1])
        # White space that a tokenizer drops counts for the token after it.
        self._starts = np.minimum(offsets[:, 0], np.concatenate([[0], self._ends[:-1]]))

    def __call__(self, start: int, end: int) -> range:
        """The tokens, counted in the shard, of characters; empty for white space at its ends."""
        if self._starts is None:
            return range(self.document.start, self.document.end)
        start, end = (max(place - self._skipped, 0) for place in (start, end))
        first = int(np.searchsorted(self._ends, start, "right"))
        last = int(np.searchsorted(self._starts, end, "left"))
        return range(self.document.start + first, self.document.start + max(first, last))


@cache
def _open_tokenizer(path: Path, special_as_text: bool) -> Tokenizer:
    from tokenizers import Tokenizer, processors

    tokenizer = Tokenizer.from_file(str(path))
    # The usual one takes spaces out of the offsets, also those at a token's end.
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.encode_special_tokens = special_as_text
    return tokenizer


def find_uses(run: TrainedRun, passages: Iterable[Passage]) -> dict[int, list[Use]]:
    """The uses of each instance that holds one of some passages, in order."""
    instances = {index for one in passages for index in one.instances if index is not None}
    uses: dict[int, list[Use]] = defaultdict(list)
    if instances:
        for use in run.find_instances(np.array(sorted(instances))):
            uses[use[2]].append(use)
    return uses


def list_saved(run: TrainedRun) -> list[tuple[int, Path]]:
    """The run's checkpoints that are here, as (step, folder), oldest first."""
    if is_url(run.folder):
        return []
    folder = Path(run.folder)
    places = dict.fromkeys([run.run_folder, folder.parent, folder.parent / "run"])
    saved = [
        (step, path)
        for place in places
        for path in layout.list_checkpoints(place)
        if (step := layout.parse_step(path)) is not None
    ]
    if run.record and run.steps is not None:
        saved.append((run.steps, folder))
    return sorted(saved, key=lambda one: one[0])


def describe_passages(run: TrainedRun, text: str, limit: int) -> Iterator[str]:
    """Lines for each occurrence of a text: where it is, and each step that was trained on it.

    Only for the first `limit` of them, unless that is 0.
    """
    found = find_passages(run, text)
    passages = list(islice(found, limit or None))
    uses, saved = find_uses(run, passages), list_saved(run)
    for one in passages:
        document = one.document
        yield (
            f"{document.id} ({document.source}:{document.line}), characters {one.start:,} to "
            f"{one.end - 1:,}"
        )
        if one.is_heldout:
            yield "  not seen: held out, so evaluated and not trained on"
        elif not one.instances:
            yield "  not seen: white space around a document is not trained on"
        parts = [""]
        if len(one.instances) > 1:
            middle = ["its middle: "] * (len(one.instances) - 2)
            parts = ["its beginning: ", *middle, "its end: "]
        for part, instance in zip(parts, one.instances, strict=False):
            if instance is None or instance not in uses:
                reason = "it is in a file's incomplete last instance"
                yield f"  {part}not seen: {reason if instance is None else 'the run ended before'}"
                continue
            for step, position, index in uses[instance]:
                rank = position % run.world_size(step)
                later = next((f"; saved then: {path}" for at, path in saved if at >= step), "")
                yield (
                    f"  {part}step {step}, position {position} (rank {rank}), instance {index}"
                    f"{later if run.learns(index, document.start, document.end) else MASKED}"
                )
    if next(found, None):
        yield f"the first {limit:,} occurrences in the order of the data; --limit 0 prints all"
