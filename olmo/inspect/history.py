"""Which instances each step of a run was trained on, from the files that training wrote.

    data-indices/rank{r}.tsv.gz   the instances of each step
    segments.jsonl, record.json   from which step on the run had which batch size, number of
                                  processes, seed, order, and position in its data
    config.yaml                   the config of the last start; the only source for OLMo's runs

A later epoch, and a start with another config or number of processes, overwrite the order file and
the config of earlier steps. So these two are read last.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from olmo.config import TrainConfig
from olmo.data.files import ArrayFile, file_sizes
from olmo.data.order import ORDER_DTYPE, global_indices
from olmo.inspect.order import SeenInstances
from olmo.io.untrusted import check_digest
from olmo.store.lineage import records_by_content
from olmo.store.record import Record
from olmo.store.stage import current_store
from olmo.store.store import Store
from olmo.train.sinks import lines_upto


@dataclass(frozen=True)
class OrderSource:
    """A run's config, data and order file, to derive the instances of steps from."""

    cfg: TrainConfig
    n: int  # instances in the data that the config names
    order: str | None  # path or URL of a stored order
    is_given: bool = False  # the order is the user's: its name is not checked
    is_fixed: bool = False  # every step had this config: it is part of the run's key


class StepRange:
    """Consecutive steps that were trained with the same settings, from `after` + 1 on."""

    def __init__(
        self, segment: dict[str, Any], origin: OrderSource, before: StepRange | None
    ) -> None:
        self.after: int = segment["after"]
        self.files: str | None = segment.get("files")
        self.repeated_to: int = segment.get("again_to", 0)
        self.source: str | None = segment.get("from")
        self._segment, self._origin, self._before = segment, origin, before

    @property
    def world_size(self) -> int:
        """The number of processes. Raises ValueError if segments.jsonl was damaged."""
        if "processes" not in self._segment:
            raise ValueError(
                f"segments.jsonl was damaged, so the settings of the steps after {self.after} are "
                "not known; give a step of a later start, or another run's checkpoint"
            )
        return int(self._segment["processes"])

    @property
    def batch_size(self) -> int | None:
        """The global batch size; None if an older version did not record it."""
        size: int | None = self._segment.get("batch")
        return size

    @cached_property
    def seen(self) -> SeenInstances:
        """Its instances, derived from its settings. Raises ValueError if these are not known."""
        facts = self._segment if self.batch_size is not None else self._facts_from_config()
        cfg, n, first = self._origin.cfg, facts["instances"], facts["epoch"]
        stored, read, base = n, derive_order(n, facts["seed"], first), first
        if (name := facts.get("order")) is not None:
            place, base = self._origin.order, facts["order_epoch"]
            if place is not None and not self._origin.is_given:
                place = find_order(place, name)
            if place is None or not (self._origin.is_given or Path(place).name == name):
                raise ValueError(
                    f"expected the order {name} of the steps after {self.after}, found "
                    f"{place or 'none'} in config.yaml; give it: --order {name}"
                )
            stored, read = open_order(place)
        settings = cfg.update_with(
            global_train_batch_size=facts["batch"],
            seed=facts["seed"],
            epoch=base,
            data=cfg.data.update_with(seed=None, drop_last=facts["drop_last"]),
        )
        position = (self.after, first - base, facts["examples"])
        return SeenInstances(settings, n, stored, read, self.world_size, *position)

    def _facts_from_config(self) -> dict[str, Any]:
        """The settings of steps for which an older version recorded none."""
        cfg, first = self._origin.cfg, self._origin.cfg.epoch or 0
        if self.after and not (self._origin.is_fixed and self._before):
            raise ValueError(
                f"the instances of the steps after {self.after} were not recorded: an older "
                "version trained them, possibly with another config than config.yaml"
            )
        facts: dict[str, Any] = {
            "batch": cfg.global_train_batch_size,
            "seed": cfg.data_seed,
            "drop_last": cfg.data.drop_last,
            "instances": self._origin.n,
            "epoch": first,
            "examples": 0,
        }
        if self._before is not None:
            epoch, start = self._before.seen.locate(self.after)
            facts |= {"epoch": first + epoch, "examples": start + cfg.global_train_batch_size}
        if self._origin.order is not None:
            return facts | {"order": Path(self._origin.order).name, "order_epoch": first}
        return facts


def build_step_ranges(segments: list[dict[str, Any]], origin: OrderSource) -> list[StepRange]:
    """The step ranges of a run's segments (olmo.train.segments), in order."""
    ranges: list[StepRange] = []
    for segment in segments:
        ranges.append(StepRange(segment, origin, ranges[-1] if ranges else None))
    return ranges


def find_step_range(step: int, ranges: list[StepRange]) -> StepRange:
    """The range that holds a step. Raises ValueError for a step before all of them."""
    begun = [step_range for step_range in ranges if step_range.after < step]
    if not begun:
        first = ranges[0]
        raise ValueError(
            f"step {step} was not trained here: this run continues from step {first.after} of "
            f"{first.source or 'another run'}; inspect that one for earlier steps"
        )
    return begun[-1]


def collect_segments(store: Store, record: Record | None) -> list[dict[str, Any]]:
    """All segments of a finished run; of a chained run, also those of earlier links."""
    found: list[dict[str, Any]] = []
    for link in list_links(store, record):
        facts, last = link.get("facts", {}), found[0]["after"] if found else None
        own = facts.get("segments") or [{"processes": 1, **link.get("conditions", {}), "after": 0}]
        found = [s for s in own if last is None or s["after"] < last] + found
    return found


def list_links(store: Store, record: Record | None) -> Iterator[Record]:
    """The record of a finished run and, of a chained one, those of its links, the last first."""
    made_by: dict[str, list[Record]] = {}
    while record:
        yield record
        if not (links := record.get("action", {}).get("inputs", {}).get("after")):
            return
        made_by = made_by or records_by_content(store)
        training = [r for r in made_by.get(links[0], []) if r["action"]["stage"] == "training"]
        record = training[0] if training else None


class RecordedBatches:
    """data-indices/rank{r}.tsv.gz: the instances of each step by process."""

    def __init__(self, folder: Path) -> None:
        paths = (folder / "data-indices").glob("rank*.tsv.gz")
        numbered = {int(p.name.removeprefix("rank").removesuffix(".tsv.gz")): p for p in paths}
        self._paths = dict(sorted(numbered.items()))

    def batch(self, step: int, size: int | None) -> tuple[np.ndarray, int] | None:
        """The (G,) instances of a step in the order of its batch, and the number of processes.

        None if some are missing: a process on another machine writes elsewhere, or died before its
        line was on disk. `size` is G, None if it is not known.
        """
        rows = {rank: row for rank, path in self._paths.items() if (row := _row(path, step))}
        lengths = {len(row) for row in rows.values()}
        if not rows or list(rows) != list(range(len(rows))) or len(lengths) > 1:
            return None
        batch = np.array(list(rows.values())).T.reshape(-1)
        return (batch, len(rows)) if size in (None, len(batch)) else None


def _row(path: Path, step: int) -> list[int]:
    last = deque(lines_upto(path, step), maxlen=1)
    number, *row = map(int, last[0].split()) if last else [0]
    return row if number == step else []


def open_order(place: str) -> tuple[int, Any]:
    """The length of a stored order, and a function that reads a slice of it."""
    return file_sizes([place])[0] // ORDER_DTYPE.itemsize, ArrayFile(place, ORDER_DTYPE).read


def find_order(place: str, name: str) -> str:
    """The order of this name, if the store has it: a mixture's earlier part had its own file."""
    with suppress(ValueError):  # the name of another file
        found = current_store().object_path(check_digest(name, "segments"))
        return str(found) if found.exists() else place
    return place


def derive_order(n: int, seed: int, epoch: int) -> Any:
    """A function that reads a slice of an epoch's order, which is made at the first call."""
    return lambda start, stop: _cached_order(n, seed, epoch)[start:stop]


_cached_order = lru_cache(maxsize=1)(global_indices)  # one only: it takes 4 bytes an instance
