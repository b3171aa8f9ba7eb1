"""What each step of a run saw, by what was written down while it was trained.

    data-indices/rank{r}.tsv.gz   the instances of each step themselves
    segments.jsonl, record.json   from which step on the run had which batch size, number of
                                  processes, seed, order, and where in its data it was
    config.yaml                   what was asked for the last time; alone, of runs of which nothing
                                  else is at hand: OLMo's, by URL

A later epoch, and a start with another config or number of processes, write over the order and the
config that earlier steps had. So these two are asked last.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from olmo.config import TrainConfig
from olmo.data.files import TokenFile, file_sizes
from olmo.data.order import ORDER_DTYPE, global_indices
from olmo.inspect.order import SeenInstances
from olmo.store.lineage import records_by_content
from olmo.store.record import Record
from olmo.store.store import Store
from olmo.train.sinks import lines_upto


@dataclass(frozen=True)
class OrderSource:
    """Where a run's order and data are now, for stretches whose instances must be derived."""

    cfg: TrainConfig
    n: int  # instances in the data that the config names
    order: str | None  # a stored order
    given: bool = False  # by who asks, whatever its name
    fixed: bool = False  # whether the config is that of every step: it is part of the run's key


class StepRange:
    """Steps that were trained one after the other with the same settings, from `after` on."""

    def __init__(
        self, segment: dict[str, Any], origin: OrderSource, before: StepRange | None
    ) -> None:
        self.after: int = segment["after"]
        self.files: str | None = segment.get("files")
        self.again_to: int = segment.get("again_to", 0)
        self.source: str | None = segment.get("from")
        self._segment, self._origin, self._before = segment, origin, before

    @property
    def world_size(self) -> int:
        """How many processes trained it. ValueError where segments.jsonl was damaged."""
        if "processes" not in self._segment:
            raise ValueError(
                f"segments.jsonl was damaged, so how the steps after {self.after} were trained is "
                "not known; name a step of a later start, or a checkpoint of another run"
            )
        return int(self._segment["processes"])

    @property
    def batch_size(self) -> int | None:
        """None where it was not written down, by an older version."""
        size: int | None = self._segment.get("batch")
        return size

    @cached_property
    def seen(self) -> SeenInstances:
        """Its instances, derived from its settings. ValueError where these are not known."""
        facts = self._segment if self.batch_size is not None else self._as_config_says()
        cfg, n, first = self._origin.cfg, facts["instances"], facts["epoch"]
        stored, read, base = n, derive_order(n, facts["seed"], first), first
        if (name := facts.get("order")) is not None:
            place, base = self._origin.order, facts["order_epoch"]
            if place is None or not (self._origin.given or Path(place).name == name):
                raise ValueError(
                    f"the steps after {self.after} followed the order {name}, and config.yaml "
                    f"names {place or 'none'} now; give it: --order {name}"
                )
            stored, read = open_order(place)
        settings = cfg.update_with(
            global_train_batch_size=facts["batch"],
            seed=facts["seed"],
            epoch=base,
            data=cfg.data.update_with(seed=None, drop_last=facts["drop_last"]),
        )
        place_in_data = (self.after, first - base, facts["examples"])
        return SeenInstances(settings, n, stored, read, self.world_size, *place_in_data)

    def _as_config_says(self) -> dict[str, Any]:
        """Of a run that wrote down less, by an older version."""
        cfg, first = self._origin.cfg, self._origin.cfg.epoch or 0
        if self.after and not (self._origin.fixed and self._before):
            raise ValueError(
                f"what the steps after {self.after} saw was not written down: an older version "
                "trained them, possibly with another config than config.yaml"
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
            epoch, start = self._before.seen.place(self.after)
            facts |= {"epoch": first + epoch, "examples": start + cfg.global_train_batch_size}
        if self._origin.order is not None:
            return facts | {"order": Path(self._origin.order).name, "order_epoch": first}
        return facts


def build_step_ranges(segments: list[dict[str, Any]], origin: OrderSource) -> list[StepRange]:
    """A run's segments (olmo.train.segments), in order."""
    found: list[StepRange] = []
    for segment in segments:
        found.append(StepRange(segment, origin, found[-1] if found else None))
    return found


def find_step_range(step: int, found: list[StepRange]) -> StepRange:
    """The stretch of a step. ValueError for one before all of them."""
    held = [stretch for stretch in found if stretch.after < step]
    if not held:
        first = found[0]
        raise ValueError(
            f"step {step} was not trained here: this run goes on after step {first.after} of "
            f"{first.source or 'another one'}; look there for the steps before"
        )
    return held[-1]


def collect_segments(store: Store, record: Record | None) -> list[dict[str, Any]]:
    """All segments of a finished run; of a chain, also those of the links before."""
    found: list[dict[str, Any]] = []
    made_by: dict[str, list[Record]] = {}
    while record:
        facts, last = record.get("facts", {}), found[0]["after"] if found else None
        mine = facts.get("segments") or [
            {"processes": 1, **record.get("conditions", {}), "after": 0}
        ]
        found = [s for s in mine if last is None or s["after"] < last] + found
        if not (links := record.get("action", {}).get("inputs", {}).get("after")):
            break
        made_by = made_by or records_by_content(store)
        training = [r for r in made_by.get(links[0], []) if r["action"]["stage"] == "training"]
        record = training[0] if training else None
    return found


class RecordedBatches:
    """data-indices/rank{r}.tsv.gz: what each process wrote of each step."""

    def __init__(self, folder: Path) -> None:
        paths = (folder / "data-indices").glob("rank*.tsv.gz")
        numbered = {int(p.name.removeprefix("rank").removesuffix(".tsv.gz")): p for p in paths}
        self._paths = dict(sorted(numbered.items()))

    def batch(self, step: int, size: int | None) -> tuple[np.ndarray, int] | None:
        """The (G,) instances of a step in the order of its batch, and how many processes shared it.

        None where they are not all here: a process on another machine wrote elsewhere, or died
        before its line was on disk. `size` is G.
        """
        rows = {rank: row for rank, path in self._paths.items() if (row := _row(path, step))}
        lengths = {len(row) for row in rows.values()}
        if not rows or list(rows) != list(range(len(rows))) or len(lengths) > 1:
            return None
        batch = np.array(list(rows.values())).T.reshape(-1)
        return (batch, len(rows)) if size in (None, len(batch)) else None


def _row(path: Path, step: int) -> list[int]:
    newest = deque(lines_upto(path, step), maxlen=1)  # that is not beyond it
    number, *row = map(int, newest[0].split()) if newest else [0]
    return row if number == step else []


def open_order(place: str) -> tuple[int, Any]:
    """How many numbers a stored order has, and what reads a part of it."""
    return file_sizes([place])[0] // ORDER_DTYPE.itemsize, TokenFile(place, ORDER_DTYPE).read


def derive_order(n: int, seed: int, epoch: int) -> Any:
    """What reads a part of an epoch's order, which is made when it is asked for."""
    return lambda start, stop: _made(n, seed, epoch)[start:stop]


@lru_cache(maxsize=1)  # 4 bytes an instance
def _made(n: int, seed: int, epoch: int) -> np.ndarray:
    return global_indices(n, seed, epoch)
