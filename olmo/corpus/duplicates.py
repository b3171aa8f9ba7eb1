"""Documents and lines that occur earlier in a data set, by the digests of all its files.

The hashes are cut into `parts` ranges, a job each. The first one in the recipe's order stays, so
the result is the same for any number of parts. Near duplicates are pairs of documents; `clusters`
connects those of all parts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from olmo.corpus.digests import ROW_BYTES, Rows
from olmo.corpus.listing import read_listing, read_objects, run_shard, write_listing
from olmo.runtime.log import log
from olmo.store.stage import Facts, Inputs, Output, Unhashed, stage

HASHES = 2**64
ROW_MEMORY = 64  # bytes that comparing a row needs
EMPTY, LOWER = np.zeros(0, np.uint64), np.uint64(2**32 - 1)


def batch(digests: list[Path], listing: Path, part: int, parts: int) -> None:
    """Find what occurs earlier in a data set, in one of `parts` ranges of hashes.

    Args:
        digests: the listings of `olmo digests`, in the recipe's order
        part: which of the ranges, from 0
        parts: how many ranges there are
    """
    entries = read_listing(digests, "document_digests")
    shards = [entry.shard for entry in entries]
    if twice := [shard for shard, times in Counter(shards).items() if times > 1]:
        raise ValueError(
            f"expected each source once, found {twice[0]} twice, so that every document of it is a "
            "duplicate; remove one from the sources, or remove dedupe from the recipe"
        )
    found = run_shard(
        duplicates,
        listing,
        f"part-{part}",
        {"repeats": "duplicates/{}"},
        document_digests=[entry.object for entry in entries],
        line_digests=read_objects(digests, "line_digests"),
        near_digests=read_objects(digests, "near_digests"),
        shards=shards,
        part=part,
        parts=parts,
    )
    write_listing(listing, found)


def batch_clusters(duplicates: list[Path], listing: Path) -> None:
    """Connect the near duplicates that all parts found.

    Args:
        duplicates: the listings of `olmo duplicates`, of all parts
    """
    repeats = read_objects(duplicates, "repeats")
    made = {"near": "clusters/{}"}
    write_listing(listing, run_shard(clusters, listing, "all", made, repeats=repeats))


@stage(version=1)
def duplicates(
    document_digests: Inputs,
    line_digests: Inputs,
    near_digests: Inputs,
    repeats: Output,
    shards: list[str],
    part: int,
    parts: int,
    memory_bytes: Unhashed[int] = 1 << 30,
) -> Facts:
    """Where documents and lines occur that occur earlier, in the range `part` of the hashes.

    Inputs are those of `digests`, one of each for each of `shards`, in the recipe's order.
    `repeats` (npz) has their names (`shards`) and for `documents` and `lines` the places in each,
    sorted: those of shard i are places[starts[i]:starts[i + 1]], as <kind>_places and
    <kind>_starts. Near duplicates are in `pairs`, uint64: the first document with a digest and a
    later one, the shard's number · 2^32 + the place. The stage compares as many rows at once as fit
    into `memory_bytes`.

    Raises ValueError for a part that is not one of `parts`.
    """
    if not 0 <= part < parts:
        raise ValueError(f"expected a part from 0 to {parts - 1}, found {part}")
    span = part * HASHES // parts, (part + 1) * HASHES // parts
    columns: dict[str, np.ndarray] = {"shards": np.array(shards, np.str_)}
    for kind, paths in (("documents", document_digests), ("lines", line_digests)):
        later = [pairs[:, 1] for pairs in find_repeats(paths, span, memory_bytes)]
        columns |= group_by_shard(kind, np.concatenate([EMPTY, *later]), len(shards))
    near = [np.unique(pairs, axis=0) for pairs in find_repeats(near_digests, span, memory_bytes)]
    columns["pairs"] = np.concatenate([EMPTY.reshape(0, 2), *near])
    with repeats.open("wb") as file:
        np.savez(file, **columns)  # type: ignore[arg-type]  # the stub is wrong
    counts = {kind: columns[f"{kind}_places"].size for kind in ("documents", "lines")}
    return {**counts, "pairs": len(columns["pairs"])}


@stage(version=1)
def clusters(repeats: Inputs, near: Output) -> Facts:
    """All but the first of connected near duplicates, by the pairs of all parts of `duplicates`.

    `near` (npz) has them as `near_places` and `near_starts`, as `repeats` has documents. Memory: 60
    bytes for each pair.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    found, shards = [], np.array([], np.str_)
    for path in repeats:
        with np.load(path) as columns:
            found.append(columns["pairs"])
            shards = columns["shards"]
    pairs = np.concatenate(found)
    places, at = np.unique(pairs, return_inverse=True)
    at = at.reshape(-1, 2)
    graph = coo_array((np.ones(len(at), bool), (at[:, 0], at[:, 1])), (places.size, places.size))
    count, cluster = connected_components(graph, directed=False)
    firsts = np.full(count, 2**64 - 1, np.uint64)
    np.minimum.at(firsts, cluster, places)
    later = places[places != firsts[cluster]]
    with near.open("wb") as file:
        grouped = {"shards": shards, **group_by_shard("near", later, shards.size)}
        np.savez(file, **grouped)  # type: ignore[arg-type]  # the stub is wrong
    return {"clusters": int(count), "near": later.size}


def group_by_shard(kind: str, places: np.ndarray, shards: int) -> dict[str, np.ndarray]:
    """Places with their shard's number as columns of an npz file, sorted."""
    found = np.sort(places)
    edges = np.arange(shards + 1, dtype=np.uint64) << np.uint64(32)
    starts = np.searchsorted(found, edges)
    return {f"{kind}_starts": starts, f"{kind}_places": (found & LOWER).astype("<u4")}


def find_repeats(
    paths: list[Path], span: tuple[int, int], memory_bytes: int
) -> Iterator[np.ndarray]:
    """Pairs of equal digests, the first one and each later one: shape (n, 2).

    Each is the file's number · 2^32 + the place.
    """
    files = [Rows.read(path) for path in paths]
    rows = sum(path.stat().st_size for path in paths) // ROW_BYTES
    expected = rows * (span[1] - span[0]) // HASHES
    steps = 1 + expected * ROW_MEMORY // memory_bytes
    log.debug(f"{expected:,} rows in {steps:,} steps")
    for step in range(steps):
        first, end = (span[0] + at * (span[1] - span[0]) // steps for at in (step, step + 1))
        if first < end:
            slices = [file.between(first, end - 1) for file in files]
            yield pair_with_first(slices)


def pair_with_first(files: list[Rows]) -> np.ndarray:
    """As `find_repeats`, of some rows of each file."""
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
