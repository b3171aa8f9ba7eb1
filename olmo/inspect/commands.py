"""`olmo inspect` and `olmo seen`: from a step to its documents, from a document to its steps."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from olmo.inspect.documents import (
    Document,
    TokenShard,
    find_token_shards,
    object_digest,
    require_shard,
    select_shards,
)
from olmo.inspect.passages import MASKED, describe_passages
from olmo.inspect.run import Instance, TrainedRun
from olmo.runtime.log import log
from olmo.store.stage import current_store
from olmo.tokenizer import hub_name

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def inspect(
    run: str,
    step: int,
    rank: int | None = None,
    world_size: int | None = None,
    order: str | None = None,
    tokenizer: str | None = None,
    json: bool = False,
) -> None:
    """Show what a step of a run was trained on: tokens, text and, for our own data, documents.

    Args:
        run: name in config/config.yaml, or a folder or URL with a config.yaml, AI2's too
        step: number of the step, from 1
        rank: only the part of this process
        world_size: number of processes, if the run has no record of it
        order: path or URL of the run's global_indices.npy, if its config does not name it
        tokenizer: tokenizer.json or a name on the hub, if the run does not name one
        json: print a line of JSON for each instance

    Example:
        olmo inspect --run olmo-tiny --step 5
        olmo inspect --run olmo-tiny --step 5 --json | jq .documents
    """
    trained = TrainedRun(run, order, world_size)
    shards = find_token_shards(current_store())
    words = load_run_tokenizer(trained, shards, tokenizer)
    for instance in trained.instances(step, rank):
        shard = shards.get(object_digest(instance.path))
        end = instance.start + len(instance.tokens)
        documents = shard.documents(instance.start, end) if shard else []
        print((format_json if json else format_text)(instance, documents, words))


def load_run_tokenizer(
    run: TrainedRun, shards: dict[str, TokenShard], tokenizer: str | None
) -> Tokenizer | None:
    """The tokenizer of a run's tokens; None, with a warning, if it is not available."""
    from tokenizers import Tokenizer

    ours = select_shards(run.dataset.paths, shards)
    place = tokenizer or (str(ours[0].tokenizer) if ours else run.cfg.tokenizer.identifier)
    try:
        if Path(place).is_file():
            return Tokenizer.from_file(place)
        return Tokenizer.from_pretrained(hub_name(place))
    except Exception as error:  # the hub's client raises many kinds
        log.warning(
            f"only ids, no text: the tokenizer {place} is not available ({error}); give --tokenizer"
        )
        return None


def format_json(instance: Instance, documents: list[Document], words: Tokenizer | None) -> str:
    tokens = instance.tokens.tolist()
    found = asdict(instance) | {
        "tokens": tokens,
        "documents": [asdict(document) for document in documents],
    }
    if words is not None:
        found["text"] = words.decode(tokens, skip_special_tokens=False)
    return json.dumps(found, ensure_ascii=False)


def format_text(instance: Instance, documents: list[Document], words: Tokenizer | None) -> str:
    """An instance as text: its position, and each document's part of it."""
    size = len(instance.tokens)
    lines = [
        f"step {instance.step}, position {instance.position} (rank {instance.rank}): instance "
        f"{instance.index}, tokens {instance.start:,} to {instance.start + size - 1:,} of "
        f"{instance.path}"
    ]

    def decode(first: int, last: int) -> str:
        tokens = instance.tokens[first:last].tolist()
        return str(tokens) if words is None else repr(words.decode(tokens, False))

    if not documents:
        return "\n".join([*lines, f"  {decode(0, size)}"])
    for document in documents:
        first = max(document.start - instance.start, 0)
        last = min(document.end - instance.start, size)
        place = f"{document.source}:{document.line}"
        origin = f" of {document.origin}" if document.origin else ""
        lines += [f"  {document.id} ({place}{origin})", f"    {decode(first, last)}"]
    return "\n".join(lines)


def seen(
    run: str,
    id: str | None = None,
    url: str | None = None,
    text: str | None = None,
    file: Path | None = None,
    sha256: str | None = None,
    limit: int = 20,
    world_size: int | None = None,
) -> None:
    """Print every step and batch position at which a run of ours was trained on a document or text.

    Give a document's id, or for all documents of a source file its URL or its sha256. Or give a
    text: of its occurrences in documents, the steps that were trained on these very tokens, and the
    first checkpoint that was saved then. `data/<data set>/text_index/ready` makes that fast.

    Args:
        run: name in config/config.yaml, or the folder of a run
        id: id of a document
        url: URL of a source file
        text: part of the text of a document, to the letter
        file: a file with such a text, in UTF-8
        sha256: digest of a source file
        limit: occurrences of a text to print, the first in the order of the data; 0 prints all
        world_size: number of processes, if the run has no record of it

    Example:
        olmo seen --run olmo-tiny --text "def dedent"
        olmo seen --run olmo-250m --url https://example.org/part-0.json.gz
    """
    trained = TrainedRun(run, world_size=world_size)
    wanted = {"id": id, "url": url, "text": text, "file": file, "sha256": sha256}
    given = [f"{name} {value}" for name, value in wanted.items() if value is not None]
    if len(given) != 1:
        raise ValueError("expected one of --id, --url, --text, --file, --sha256")
    if limit < 0:
        raise ValueError(f"expected --limit of 0 or more, found {limit}")
    if text is not None or file is not None:
        found = describe_passages(trained, read_text(file) if file else text or "", limit)
    else:
        found = describe_sightings(trained, id, url, sha256)
    if (first := next(found, None)) is None:
        raise ValueError(f"no document of {run}'s data has the {given[0]}")
    for line in chain([first], found):
        print(line)


def read_text(file: Path) -> str:
    """The text of a file, with its line ends as they are. Raises ValueError if it is not UTF-8."""
    try:
        return file.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: expected text in UTF-8, found {error}; convert it") from error


def describe_sightings(
    run: TrainedRun, id: str | None, url: str | None, sha256: str | None
) -> Iterator[str]:
    """Lines for each such document: where it is, and each use."""
    for document, times in find_sightings(run, id, url, sha256):
        yield f"{document.id} ({document.source}:{document.line})"
        for step, position, index in times:
            rank = position % run.world_size(step)
            masked = "" if run.learns(index, document.start, document.end) else MASKED
            yield f"  step {step}, position {position} (rank {rank}), instance {index}{masked}"
        if not times:
            yield "  not seen: the run ended before, or it is in a file's incomplete last instance"


def find_sightings(
    run: TrainedRun, id: str | None = None, url: str | None = None, sha256: str | None = None
) -> Iterator[tuple[Document, list[tuple[int, int, int]]]]:
    """Each such document of a run's data, with (step, position, instance) of each use."""
    shards = find_token_shards(current_store())
    for number, path in enumerate(run.dataset.paths):
        shard = require_shard(path, shards)
        if (url is not None and shard.origin != url) or sha256 not in (None, *shard.sources):
            continue
        first, end = run.dataset.offsets[number]
        for document in shard.documents(id=id):
            length = run.sequence_length
            rows = np.arange(document.start // length, (document.end - 1) // length + 1)
            instances = first + rows[rows < end - first]
            yield document, list(run.find_instances(instances))
