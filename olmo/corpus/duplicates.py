"""Documents and lines that occur earlier in a data set, by the digests of all its files.

The hashes are cut into `parts` ranges, a job each. The first one in the recipe's order stays, so
the result is the same for any number of parts. Near duplicates are pairs of documents; `clusters`
connects those of all parts.

Across files a place is the file's number, in the recipe's order, times 2^32, plus the place in the
file: uint64, little-endian.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from olmo.corpus.digests import ROW_BYTES, Rows
from olmo.corpus.listing import read_listing, read_objects, run_shard, write_listing
from olmo.runtime.log import log
from olmo.store.stage import Facts, Inputs, Output, Unhashed, stage

HASHES = 2**64
ROW_MEMORY = 120  # bytes that comparing a row needs
EMPTY, LOWER = np.zeros(0, np.uint64), np.uint64(2**32 - 1)
OUTPUTS = ("shards", "document_repeats", "line_repeats", "near_pairs")


def batch(digests: list[Path], listing: Path, part: int, parts: int) -> None:
    """Find what occurs earlier in a data set, in one of `parts` ranges of hashes.

    Args:
        digests: the listings of `olmo digests`, in the recipe's order
        part: which of the ranges, from 0
        parts: how many ranges there are
    """
    shards = [entry.shard for entry in read_listing(digests, "document_digests")]
    if twice := [shard for shard, times in Counter(shards).items() if times > 1]:
        raise ValueError(
            f"expected each source once, found {twice[0]} twice, so that every document of it is a "
            "duplicate; remove one from the sources, or remove dedupe from the recipe"
        )
    inputs = ("document_digests", "line_digests", "near_digests", "line_starts", "copies")
    found = run_shard(
        duplicates,
        listing,
        f"part-{part}",
        {name: f"duplicates/{{}}.{name}" for name in OUTPUTS},
        names=shards,
        part=part,
        parts=parts,
        **{name: read_objects(digests, name) for name in inputs},
    )
    write_listing(listing, found)


def batch_clusters(duplicates: list[Path], listing: Path) -> None:
    """Connect the near duplicates that all parts found.

    Args:
        duplicates: the listings of `olmo duplicates`, of all parts
    """
    pairs = read_objects(duplicates, "near_pairs")
    write_listing(
        listing, run_shard(clusters, listing, "all", {"near": "clusters/{}"}, near_pairs=pairs)
    )


@stage(version=1)
def duplicates(
    document_digests: Inputs,
    line_digests: Inputs,
    near_digests: Inputs,
    line_starts: Inputs,
    copies: Inputs,
    shards: Output,
    document_repeats: Output,
    line_repeats: Output,
    near_pairs: Output,
    names: list[str],
    part: int,
    parts: int,
    memory_bytes: Unhashed[int] = 1 << 30,
) -> Facts:
    """Where documents and lines occur that occur earlier, in the range `part` of the hashes.

    Inputs are those of `digests` and `copies`, one of each for each of `names`, in the recipe's
    order; lines and signatures of copies of held-out documents do not count. `document_repeats` and
    `line_repeats` have places, sorted; `near_pairs` the first place with a digest and a later one,
    in turns; `shards` the names (JSON). The stage compares as many rows at once as fit into
    `memory_bytes`.

    Raises ValueError for a part that is not one of `parts`.
    """
    if not 0 <= part < parts:
        raise ValueError(f"expected a part from 0 to {parts - 1}, found {part}")
    span = part * HASHES // parts, (part + 1) * HASHES // parts
    dropped = [np.fromfile(path, "<u4") for path in copies]
    starts = [np.memmap(p, "<u4", "r") if p.stat().st_size else EMPTY for p in line_starts]
    counts = {}
    for kind, digests, output in (
        ("documents", document_digests, document_repeats),
        ("lines", line_digests, line_repeats),
        ("near", near_digests, near_pairs),
    ):
        found = []
        for files in cut_into_steps(digests, span, memory_bytes):
            if kind != "documents":
                first = starts if kind == "lines" else [None] * len(files)
                files = list(map(leave_out, files, dropped, first))
            pairs = pair_with_first(files)
            found.append(np.unique(pairs, axis=0) if kind == "near" else pairs[:, 1])
        places = np.concatenate(found) if kind == "near" else np.sort(np.concatenate(found))
        places.tofile(output)
        counts[kind] = len(places)
    shards.write_text(json.dumps(names), encoding="utf-8")
    return counts


@stage(version=1)
def clusters(near_pairs: Inputs, near: Output) -> Facts:
    """The places of all but the first of connected near duplicates, sorted.

    `near_pairs` are those of all parts of `duplicates`. Memory: 60 bytes for each pair.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    pairs = np.concatenate([np.fromfile(path, "<u8") for path in near_pairs])
    places, at = np.unique(pairs, return_inverse=True)
    at = at.reshape(-1, 2)
    graph = coo_array((np.ones(len(at), bool), (at[:, 0], at[:, 1])), (places.size, places.size))
    count, cluster = connected_components(graph, directed=False)
    firsts = np.full(count, 2**64 - 1, np.uint64)
    np.minimum.at(firsts, cluster, places)
    later = places[places != firsts[cluster]]
    later.tofile(near)
    return {"clusters": int(count), "near": later.size}


@stage(version=1)
def places(
    shards: Inputs,
    document_repeats: Inputs,
    line_repeats: Inputs,
    near: Inputs,
    places: Output,
    shard: str,
) -> Facts:
    """What all parts of `duplicates`, and `clusters`, found in one file of documents.

    `places` (npz) has the rows of `documents`, the numbers of `lines`, and the rows of `near`, all
    uint32 and sorted. It is small, and the same as long as nothing of this file changes.

    Raises ValueError if the parts are of different files.
    """
    [names, *others] = [json.loads(path.read_bytes()) for path in shards]
    if shard not in names or any(other != names for other in others):
        raise ValueError(
            f"expected parts of the same files, with {shard}; found others; remove them"
        )
    number = names.index(shard)
    given = {"documents": document_repeats, "lines": line_repeats, "near": near}
    columns = {
        kind: np.sort(np.concatenate([np.zeros(0, "<u4"), *(take(p, number) for p in paths)]))
        for kind, paths in given.items()
    }
    with places.open("wb") as file:
        np.savez(file, **columns)  # type: ignore[arg-type]  # the stub is wrong
    return {kind: column.size for kind, column in columns.items()}


def take(path: Path, number: int) -> np.ndarray:
    """The places in one file, of a file of places."""
    if not path.stat().st_size:
        return np.zeros(0, "<u4")
    found = np.memmap(path, "<u8", "r")
    edges = np.array([number << 32, (number + 1) << 32], np.uint64)
    start, end = np.searchsorted(found, edges)
    return (found[start:end] & LOWER).astype("<u4")


def leave_out(rows: Rows, dropped: np.ndarray, starts: np.ndarray | None) -> Rows:
    """The rows of a file that are not of `dropped` documents.

    Args:
        starts: the number of each document's first line; None if places are documents
    """
    if not dropped.size:
        return rows
    documents = rows.place if starts is None else np.searchsorted(starts, rows.place, "right") - 1
    kept = ~np.isin(documents, dropped)
    return Rows(rows.high[kept], rows.low[kept], rows.place[kept])


def cut_into_steps(
    paths: list[Path], span: tuple[int, int], memory_bytes: int
) -> Iterator[list[Rows]]:
    """The rows of each file in a range of hashes, as many of all files as memory holds."""
    files = [Rows.read(path) for path in paths]
    rows = sum(path.stat().st_size for path in paths) // ROW_BYTES
    expected = rows * (span[1] - span[0]) // HASHES
    steps = 1 + expected * ROW_MEMORY // memory_bytes
    log.debug(f"{expected:,} rows in {steps:,} steps")
    for step in range(steps):
        first, end = (span[0] + at * (span[1] - span[0]) // steps for at in (step, step + 1))
        if first < end:
            yield [file.between(first, end - 1) for file in files]


def pair_with_first(files: list[Rows]) -> np.ndarray:
    """Places of equal digests, the first one and each later one: shape (n, 2)."""
    high = np.concatenate([rows.high for rows in files])
    low = np.concatenate([rows.low for rows in files])
    place = np.concatenate(
        [rows.place.astype(np.uint64) | np.uint64(n << 32) for n, rows in enumerate(files)]
    )
    order = np.argsort(high, kind="stable")  # of sorted files: they are merged
    same_high = high[order][1:] == high[order][:-1]
    if (same_high & (low[order][1:] != low[order][:-1])).any():  # equal upper halves by chance
        order = np.lexsort((low, high))
    high, low = high[order], low[order]
    is_later = np.zeros(high.size, bool)
    is_later[1:] = (high[1:] == high[:-1]) & (low[1:] == low[:-1])
    place, later = place[order], np.flatnonzero(is_later)
    first = np.maximum.accumulate(np.where(is_later, 0, np.arange(high.size)))[later]
    return np.stack([place[first], place[later]], axis=1)
