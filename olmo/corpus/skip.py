"""What a run leaves out of its data set: documents, sources, steps. The rest keeps its order.

Labels are masked ("mask"): each instance stays in its step, and what is left out is read but not
learned. Or instances with any of it are removed, and the next ones move up ("next"). Steps always
move up. So the steps before the first change are those of a run that leaves nothing out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np

from olmo.config.strict import BaseConfig, non_default_fields
from olmo.corpus.listing import read_listing
from olmo.data.files import token_itemsize
from olmo.data.holes import make_holes, write_holes
from olmo.data.order import parse_steps, read_order, write_order
from olmo.runtime.log import log
from olmo.store.record import Record
from olmo.store.stage import Facts, Input, Output, Unhashed, stage


class SkipRule(StrEnum):
    """What takes the place of documents and sources that a run leaves out."""

    mask = "mask"  # nothing: they are read, and their labels are masked
    next = "next"  # the next instances, which move up


@dataclass
class Skip(BaseConfig):
    """What a run leaves out."""

    documents: list[str] = field(default_factory=list)  # by their ids
    sources: list[str] = field(default_factory=list)  # patterns of their names
    steps: list[str] = field(default_factory=list)  # "5", "100..119"
    by: SkipRule = SkipRule.mask

    def __bool__(self) -> bool:
        return bool(self.documents or self.sources or self.steps)

    @property
    def shortens(self) -> bool:
        """Whether instances are removed from the order."""
        return bool(self.steps) or (bool(self) and self.by == SkipRule.next)

    @property
    def masks(self) -> bool:
        """Whether labels are masked."""
        return bool(self.documents or self.sources) and self.by == SkipRule.mask

    @property
    def step_ranges(self) -> list[tuple[int, int]]:
        """(first, last) of each range. Raises ValueError for text that is no range of steps."""
        return [parse_step_range(text) for text in self.steps]


def parse_step_range(text: str) -> tuple[int, int]:
    """First and last step of "5" or "5..9". Raises ValueError for other text, and for step 0."""
    steps = parse_steps(text)
    if steps[0] < 1:
        raise ValueError(f"expected steps from 1 on, found {text!r}")
    return steps[0], steps[-1]


def skip(
    tokens: list[Path],
    order: Path,
    remaining: Path,
    holes: Path,
    sequence_length: int,
    config: Skip,
    after: int = 0,
    batch_size: int = 1,
    steps: int | None = None,
    dtype: str = "uint16",
) -> None:
    """Make the order of a run that leaves documents, sources or steps out, and the file of holes.

    Args:
        order: the order of a run that leaves nothing out
        remaining: file to write: that order without the instances that are removed
        holes: file to write: the tokens whose labels are masked
        sequence_length: tokens of an instance
        config: what is left out
        after: step up to which nothing may be left out, since it is trained before
        batch_size: instances of a batch
        steps: those of the run; None: any number of epochs

    Raises ValueError for an unknown document or source, for one that is used up to `after`, and if
    too few instances remain.
    """
    spans = list(find_spans(tokens, config, sequence_length, token_itemsize(dtype)))
    record = skipped(
        order=order,
        remaining=remaining,
        holes=holes,
        spans=[list(span) for span in merge_spans(spans)],
        steps=[list(pair) for pair in config.step_ranges],
        sequence_length=sequence_length,
        batch_size=batch_size,
        by=str(config.by),
        names=non_default_fields(config),
    )
    check_skipped(record["facts"], config, after, batch_size, steps, sequence_length)
    if record["facts"]["first_step"] is None:
        log.warning("the run does not use what is left out: it is not in its data order")
    log.info(describe_skipped(record["facts"]))


def check_skipped(
    facts: Facts, config: Skip, after: int, batch_size: int, steps: int | None, length: int
) -> None:
    """Check the facts of `skipped` for a run of so many steps that differs after step `after`.

    Args:
        length: tokens of an instance.

    Raises ValueError if something is left out before, too few instances remain, or no token that is
    learned.
    """
    first, left = facts["first_step"], facts["instances"] // batch_size
    if facts["instances"] and facts["masked_tokens"] == facts["instances"] * length:
        raise ValueError(
            "expected a token that the run learns, found that all of its data order is left out; "
            "leave out fewer documents or sources"
        )
    if first is not None and first <= after:
        raise ValueError(
            f"skip_after: expected a step before {first}, the first one that uses what is left "
            f"out; found {after}; set skip_after: {first - 1}, or remove it"
        )
    if config.shortens and steps is not None and left < steps:
        raise ValueError(
            f"expected instances for {steps} steps, found {left} steps of {batch_size} after "
            f"{facts['removed']:,} were removed; set a smaller max_duration, use more documents, "
            "or skip_by: mask"
        )


def describe_skipped(facts: Facts) -> str:
    """The facts of `skipped` for people."""
    return (
        f"first used at step {facts['first_step']}; in the data order "
        f"{facts['removed']:,} instances are removed, {facts['masked_tokens']:,} tokens masked"
    )


def find_spans(
    listings: Iterable[Path], config: Skip, length: int, width: int
) -> Iterator[tuple[int, int]]:
    """The spans of tokens of documents and sources, in the data set's instances laid end to end.

    What is in the incomplete last instance of a shard is left out, since no run uses it.

    Args:
        length: tokens of an instance.
        width: bytes of a token.

    Raises ValueError for an unknown document or source.
    """
    import polars

    listings = list(listings)
    shards = read_listing(listings, "tokens")
    tables = {entry.shard: entry.object for entry in read_listing(listings, "index")}
    places: dict[str, list[str]] = {name: [] for name in config.documents}  # id → its sources
    unmatched, begin = set(config.sources), 0
    for shard in shards:
        size = shard.bytes // width // length * length
        matching = {p for p in config.sources if fnmatchcase(shard.shard, p)}
        unmatched -= matching
        if matching and size:
            yield begin, begin + size
        if config.documents and shard.shard in tables:
            table = polars.scan_parquet(tables[shard.shard])
            rows = table.filter(polars.col("id").is_in(config.documents)).collect()
            for name in sorted(set(rows["id"])):
                places[name].append(shard.shard)
            for first, end in zip(rows["start"].to_list(), rows["end"].to_list(), strict=True):
                if first < min(end, size):
                    yield begin + first, begin + min(end, size)
        begin += size
    if unmatched:
        names = ", ".join(shard.shard for shard in shards[:8])
        raise ValueError(
            f"skip_sources: expected the name of a source, or a pattern of names; found "
            f"{min(unmatched)!r}, and the sources are {names}{' …' if len(shards) > 8 else ''}"
        )
    if unknown := [name for name, found in places.items() if not found]:
        known = "" if tables else ", whose token files were given without documents"
        raise ValueError(
            f"skip_documents: expected ids of documents that the data set is trained on{known}; "
            f"found {min(unknown)!r}; `olmo inspect` shows the ids of a step's documents"
        )
    if several := [name for name, found in places.items() if len(found) > 1]:
        log.warning(
            f"skip_documents: {len(several)} ids are in several sources and left out of all, the "
            f"first {several[0]!r} of {', '.join(places[several[0]][:8])}"
        )


def merge_spans(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Sorted spans without overlaps.

    >>> merge_spans([(5, 9), (0, 2), (8, 12)])
    [(0, 2), (5, 12)]
    """
    merged: list[tuple[int, int]] = []
    for first, end in sorted(spans):
        if merged and first <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((first, end))
    return merged


@stage(version=1)
def skipped(
    order: Input,
    remaining: Output,
    holes: Output,
    spans: list[list[int]],
    steps: list[list[int]],
    sequence_length: int,
    batch_size: int,
    by: str = "mask",
    names: Unhashed[dict[str, Any] | None] = None,
) -> Facts:
    """Write an order without what is left out, and the tokens whose labels are masked.

    Args:
        spans: of tokens: [first, end), in the data set's instances laid end to end.
        steps: [first, last] of the order.
        names: the fields of `Skip`, for people.

    The facts: the instances that remain and those removed, the masked tokens, and the first step of
    the order that differs, None if none does.
    """
    indices = read_order(order)
    keep, first = keep_instances(indices, steps, batch_size)
    rows = make_holes([(begin, end) for begin, end in spans], sequence_length)
    is_affected = np.isin(indices, rows[:, 0])
    if affected := np.flatnonzero(is_affected)[:1].tolist():
        step = affected[0] // batch_size + 1
        first = step if first is None else min(first, step)
    if by == "next":
        keep &= ~is_affected
        rows = rows[:0]
    found = np.asarray(indices)[keep]
    write_order(found, remaining)
    write_holes(rows, holes)
    masked = np.bincount(rows[:, 0], weights=rows[:, 2] - rows[:, 1], minlength=1)
    uses = np.bincount(found, minlength=len(masked))[: len(masked)]
    return {
        "instances": len(found),
        "removed": len(indices) - len(found),
        "masked_tokens": int(masked @ uses),
        "first_step": first,
        "left_out": names or {},
    }


def keep_instances(
    indices: np.ndarray, steps: Sequence[Sequence[int]], batch_size: int
) -> tuple[np.ndarray, int | None]:
    """(N,) bool, False for the instances of some steps; and the first of these steps."""
    keep = np.ones(len(indices), bool)
    for first, last in steps:
        keep[(first - 1) * batch_size : last * batch_size] = False
    return keep, min((first for first, _ in steps), default=None)


def read_left_out(inputs: Mapping[str, Any], made_by: Mapping[str, list[Record]]) -> dict[str, Any]:
    """What a run left out, as its `Skip` has it; {} for a run that left nothing out.

    Args:
        inputs: of the run's action.
        made_by: of `records_by_content`.
    """
    for name in ("holes", "order"):
        for record in made_by.get(inputs.get(name, ""), []):
            # An order from which nothing is removed is that of a run that leaves nothing out.
            if record["action"]["stage"] == "skipped" and (
                name == "holes" or record["facts"].get("removed")
            ):
                return dict(record["facts"].get("left_out", {}))
    return {}
