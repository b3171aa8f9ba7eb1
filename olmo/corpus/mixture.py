"""A run's mixture: the share of tokens of each group of sources, in one part or several.

Several parts are a curriculum: each begins at a step. A part's order continues the one before it
(`mixture_order`), so that a change of a later part leaves the order of the earlier ones, and with
it the links that were trained by it, as they are.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np

from olmo.config.strict import BaseConfig, check_range
from olmo.corpus.listing import Entry
from olmo.data.mixture import count_instances, mix_instances, token_shares
from olmo.data.order import check_size, read_order, write_order
from olmo.runtime.log import log
from olmo.store.record import Record
from olmo.store.stage import Facts, Input, Output, stage

STAGE = "mixture_order"
BYTES_PER_INSTANCE = 40  # of memory at the peak: times, orders, a sort; groups, uses
MANY_TIMES = 4  # passes over the same tokens, from which they teach less (arXiv:2305.16264)


@dataclass
class MixturePart(BaseConfig):
    """What a run is trained on from a step to the next part, or to its end."""

    from_step: int = 0  # the step after which this part begins
    # The weights of sources, by their names: "books-*=3". The first pattern that matches counts;
    # a last pattern *=1 matches the rest, and 0 leaves sources out. A weight is a share of tokens.
    weights: list[str] = field(default_factory=list)
    # A weight is multiplied by the size of what its pattern matches, to the power 1/temperature:
    # with 1 it is a factor of upsampling, with a larger number small sources gain.
    temperature: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("mixture.from_step", self.from_step, 0)
        if self.temperature is not None and not 0 < self.temperature < float("inf"):
            raise ValueError(
                f"mixture.temperature: expected a number above 0, found {self.temperature}; leave "
                "it out for weights that are shares"
            )
        for weight in self.weights:
            pattern, _, number = weight.partition("=")
            try:
                is_valid = bool(pattern) and 0 <= float(number) < float("inf")
            except ValueError:
                is_valid = False
            if not is_valid:
                raise ValueError(
                    "mixture.weights: expected pattern=number, the number 0 or above; found "
                    f"{weight!r}"
                )
        if repeated := [p for i, p in enumerate(self.patterns) if p in self.patterns[:i]]:
            raise ValueError(
                f"mixture.weights: expected {repeated[0]} once, found it twice; remove one"
            )
        if not any(self.numbers):
            raise ValueError("mixture.weights: expected a weight above 0, found none; add *=1")

    @property
    def patterns(self) -> list[str]:
        return [weight.partition("=")[0] for weight in self.weights]

    @property
    def numbers(self) -> list[float]:
        return [float(weight.partition("=")[2]) for weight in self.weights]

    def find_groups(self, sources: Iterable[str]) -> list[int]:
        """Of each source the number of its pattern.

        Raises ValueError for a source that no pattern matches, or a pattern that matches none.
        """
        groups = []
        for source in sources:
            matching = (i for i, p in enumerate(self.patterns) if fnmatchcase(source, p))
            if (group := next(matching, None)) is None:
                raise ValueError(
                    f"weights: expected a pattern for each source, found none for {source}; add "
                    "*=1, or *=0 to leave the rest out"
                )
            groups.append(group)
        if unused := sorted(set(range(len(self.patterns))) - set(groups)):
            raise ValueError(
                f"weights: {self.patterns[unused[0]]} matches no source that an earlier pattern "
                "does not; correct or remove it"
            )
        return groups


def check_parts(parts: Sequence[MixturePart], steps: int | None) -> None:
    """Raises ValueError unless a run of so many steps reaches each part, the first from step 0."""
    begins = [part.from_step for part in parts]
    if steps is None:
        raise ValueError(
            "mixture: expected a max_duration in steps or tokens, found one in epochs; a mixture "
            "has no epochs"
        )
    if begins[0] != 0 or begins != sorted(set(begins)) or begins[-1] >= steps:
        raise ValueError(
            f"mixture: expected from_step 0, and then rising steps below {steps}, where the run "
            f"ends; found {', '.join(map(str, begins))}"
        )


def build_mixture_order(
    part: MixturePart,
    shards: Sequence[Entry],
    shard_instances: Sequence[int],
    order: Path,
    seed: int,
    instances: int,
    before: Path | None,
) -> None:
    """Make the order of a run up to the end of a part that takes so many instances.

    Args:
        shards: the token files, of which each has so many `shard_instances`.
        before: the order up to the part's beginning.

    Raises ValueError if the weights do not fit the shards, or one has no instance.
    """
    groups = part.find_groups(shard.shard for shard in shards)
    spans = [
        [sum(count for _, count in members), group]
        for group, members in itertools.groupby(
            zip(groups, shard_instances, strict=True), key=lambda pair: pair[0]
        )
    ]
    record = mixture_order(
        order=order,
        before=before,
        spans=spans,
        weights=part.weights,
        temperature=part.temperature,
        from_step=part.from_step,
        instances=instances,
        seed=seed,
    )
    for row in record["facts"].get("mixture", ()):
        log.info(
            f"{row['weight']}: {row['realised']:.2%} of the tokens ({row['expected']:.2%} "
            f"expected), {row['instances']:,} instances of {row['available']:,}"
        )
        if row["passes"] > MANY_TIMES:
            log.warning(
                f"{row['weight']}: each instance is used {row['passes']:.3g} times up to here; "
                "give it a smaller weight, or more data"
            )


@stage(version=1)
def mixture_order(
    order: Output,
    spans: list[list[int]],
    weights: list[str],
    instances: int,
    seed: int,
    from_step: int = 0,
    temperature: float | None = None,
    before: Input | None = None,
) -> Facts:
    """Write the order of a run up to the end of a part of its mixture.

    Args:
        spans: consecutive instances of one pattern: [how many, number of the pattern].
        weights: of the patterns: pattern=number.
        instances: those of this part.
        from_step: where the part begins.
        before: the order of the parts before it.

    The fact "mixture" has of each pattern the shares of this part's tokens that were expected and
    realised, the instances used of those available, and how often each was used up to here.

    Raises ValueError if a weight has no instance, or there are too many for an order or memory.
    """
    available = sum(count for count, _ in spans)
    check_size(available, (available + instances) * BYTES_PER_INSTANCE)
    numbers = [float(weight.partition("=")[2]) for weight in weights]
    owners = np.repeat([group for _, group in spans], [count for count, _ in spans])
    groups = [np.flatnonzero(owners == number) for number in range(len(weights))]
    if empty := [w for w, n, g in zip(weights, numbers, groups, strict=True) if n and not len(g)]:
        raise ValueError(
            f"mixture: expected an instance for {empty[0]}, found none: its files are shorter than "
            "one; use more documents, or give it the weight 0"
        )
    earlier = np.empty(0, np.uint32) if before is None else read_order(before)
    used = np.bincount(earlier, minlength=len(owners))
    shares = token_shares(numbers, [len(group) for group in groups], temperature)
    counts = count_instances(shares, instances)
    found = mix_instances(groups, counts.tolist(), used, [seed, from_step])
    write_order(np.concatenate([earlier, found]), order)

    def describe(number: int) -> dict[str, Any]:
        size = len(groups[number])
        return {
            "weight": weights[number],
            "expected": float(shares[number]),
            "realised": int(counts[number]) / instances,
            "instances": int(counts[number]),
            "available": size,
            "passes": float(used[groups[number]].mean()) if size else 0.0,
        }

    rows = [describe(number) for number in range(len(weights))]
    return {"instances": len(earlier) + len(found), "from_step": from_step, "mixture": rows}


def read_parts(order: str, made_by: dict[str, list[Record]]) -> list[dict[str, Any]]:
    """The facts of the parts of a mixture, in order; [] for an order without a mixture.

    Args:
        order: digest of a run's order.
        made_by: of `records_by_content`.
    """
    found: list[dict[str, Any]] = []
    for record in made_by.get(order, []):
        if record["action"]["stage"] == "skipped":  # the order without what the run leaves out
            order = record["action"]["inputs"]["order"]
    while records := [
        record for record in made_by.get(order, []) if record["action"]["stage"] == STAGE
    ]:
        found.insert(0, records[0]["facts"])
        order = records[0]["action"]["inputs"].get("before", "")
    return found
