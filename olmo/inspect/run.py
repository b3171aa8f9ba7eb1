"""A run, opened to be looked into: its config, the order of its data, its token files.

Of ours or of OLMo's, from files or by URL; only the bytes that are asked for are read.
"""

from __future__ import annotations

import json
import tempfile
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from olmo import io
from olmo.config import TrainConfig
from olmo.data.files import Tokens, file_sizes, is_url
from olmo.data.order import ORDER_DTYPE, global_indices
from olmo.inspect.order import Seen

if TYPE_CHECKING:
    from olmo.data.memmap import MemMapDataset


@dataclass(frozen=True)
class Instance:
    """One instance of a step."""

    step: int
    position: int  # in the step's global batch; rank `position % world_size` computes it
    index: int  # in the data set
    path: str  # its token file
    start: int  # its first token in there
    tokens: np.ndarray  # (T,)


class Run:
    """A run: by its name in config/config.yaml, its folder or config.yaml, or a URL of these.

    Args:
        where: see above.
        order: global_indices.npy, here or by URL, where the config does not lead to it.
        world_size: of the run, where no record tells it: it says who computed what.

    Raises:
        ValueError: there is no such run; its order belongs to other data.
        FileNotFoundError: a token file is not here.
    """

    def __init__(self, where: str, order: str | None = None, world_size: int | None = None) -> None:
        self.config_path = found(where)
        self.folder = self.config_path.rpartition("/")[0] or "."
        self.cfg = load(self.config_path)
        self.world_size = world_size or int(self.record.get("conditions", {}).get("processes", 1))
        self.order_place = order or self._order_place()

    @cached_property
    def record(self) -> dict[str, Any]:
        """What the store knows of a final checkpoint; {} of others."""
        path = Path(self.folder, "record.json")
        known: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        return known

    @property
    def steps(self) -> int | None:
        """How many it has trained, where that is known."""
        steps: int | None = self.record.get("facts", {}).get("steps")
        return steps

    @cached_property
    def dataset(self) -> MemMapDataset:
        from olmo.data.memmap import build_memmap_dataset  # which imports torch

        places = chain(self.cfg.data.paths or (), *(self.cfg.data.datasets or {}).values())
        if unknown := next((place for place in places if "${" in place), None):
            raise ValueError(
                f"{self.config_path}: {unknown} depends on the machine, of which a config that "
                "comes with a checkpoint learns nothing; write the path in its place"
            )
        return build_memmap_dataset(self.cfg, self.cfg.data)

    @cached_property
    def seen(self) -> Seen:
        n = len(self.dataset)
        if self.order_place is None:
            seed = self.cfg.data_seed
            whole = global_indices(n, seed, self.cfg.epoch or 0)
            return Seen(self.cfg, n, n, lambda a, b: whole[a:b], self.world_size)
        stored = Tokens(self.order_place, ORDER_DTYPE)
        length = file_sizes([self.order_place])[0] // ORDER_DTYPE.itemsize
        return Seen(self.cfg, n, length, stored.read, self.world_size)

    def _order_place(self) -> str | None:
        """Where the order is: the config's, or where the trainer leaves it."""
        if self.cfg.data.order_path:
            return self.cfg.data.order_path
        beside = f"{self.folder}/train_data/global_indices.npy"
        return beside if not is_url(beside) and Path(beside).exists() else None

    def instances(self, step: int, rank: int | None = None) -> Iterator[Instance]:
        """What a step saw, in the order of its batch; or the share of one rank.

        Raises:
            ValueError: there is no such step or rank.
        """
        if self.steps is not None and step > self.steps:
            raise ValueError(f"expected a step from 1 to {self.steps}, found {step}")
        indices = self.seen.instances(step, rank)
        rows = self.dataset.batch(indices)["input_ids"].numpy()
        for i, (index, tokens) in enumerate(zip(indices.tolist(), rows, strict=True)):
            path, row = self.place(index)
            position = i if rank is None else i * self.world_size + rank
            yield Instance(step, position, index, path, row * self.length, tokens)

    @property
    def length(self) -> int:
        """Tokens of an instance."""
        return self.cfg.model.max_sequence_length

    def place(self, index: int) -> tuple[str, int]:
        """The token file of an instance, and its row in there."""
        file = bisect_right([end for _, end in self.dataset.offsets], index)
        return str(self.dataset.paths[file]), index - self.dataset.offsets[file][0]


def found(where: str) -> str:
    """The place of a run's config."""
    if is_url(where):
        return where if where.endswith((".yaml", ".yml")) else f"{where.rstrip('/')}/config.yaml"
    if Path(where).is_file():
        return where
    places = [Path(where), *(Path("checkpoints", where, inner) for inner in ("final", "run"))]
    for place in places:
        if (place / "config.yaml").is_file():
            return str(place / "config.yaml")
    raise ValueError(
        f"expected a run of config/config.yaml that has been trained, a folder with config.yaml, "
        f"or a URL; found {where!r} (looked in {', '.join(map(str, places))})"
    )


def load(place: str) -> TrainConfig:
    """A run's config, here or by URL; its paths are not looked for yet."""
    if not is_url(place):
        ours = Path(place).resolve().is_relative_to(Path("config").resolve())
        return TrainConfig.load(place, validate_paths=False, foreign=not ours)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "config.yaml")
        io.fetch(place, path, Path(folder, "part"))
        return TrainConfig.load(path, foreign=True)
