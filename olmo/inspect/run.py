"""A run, opened to be looked into: its config, the order of its data, its token files.

Of ours or of OLMo's, from files or by URL; only the bytes that are asked for are read.
"""

from __future__ import annotations

import contextlib
import tempfile
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from olmo.checkpoint import layout
from olmo.config import TrainConfig
from olmo.data.files import is_url
from olmo.inspect import history
from olmo.inspect.history import OrderSource, RecordedBatches, StepRange
from olmo.inspect.order import SeenInstances
from olmo.io import downloads
from olmo.runtime.log import log
from olmo.runtime.process import SEGMENTS_FILE
from olmo.store.record import Record, parse_record
from olmo.store.stage import current_store

MAX_CONFIG_BYTES = 64 * 2**20  # bytes

if TYPE_CHECKING:
    from olmo.data.memmap import MemMapDataset

# An order of which nothing is known but its numbers is looked for in so many epochs, if it is not
# too large for that (0.2 s an epoch).
MAX_EPOCHS, MAX_INSTANCES = 16, 1 << 24


@dataclass(frozen=True)
class Instance:
    """One instance of a step."""

    step: int
    position: int  # in the step's global batch
    rank: int  # the process that computed it
    index: int  # in the data set
    path: str  # its token file
    start: int  # its first token in there
    tokens: np.ndarray  # (T,)


class TrainedRun:
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
        self.config_path = find_config(where)
        self.folder = self.config_path.rpartition("/")[0] or "."
        self.cfg = load_run_config(self.config_path)
        self._order, self._world_size = order, world_size

    @cached_property
    def record(self) -> Record | None:
        """What the store knows of a final checkpoint; None for others."""
        path = Path(self.folder, "record.json")
        return parse_record(path.read_bytes(), path) if path.exists() else None

    @cached_property
    def home(self) -> Path:
        """The run's own folder, also of one of its checkpoints; that of a final checkpoint."""
        folder = Path(self.folder).resolve()
        return folder.parent if layout.is_checkpoint_name(folder) else folder

    @cached_property
    def steps(self) -> int | None:
        """How many it has trained, where that is known."""
        steps: int | None = self.record["facts"].get("steps") if self.record else None
        metrics = self.home / "metrics.jsonl"
        if steps is None and self.segments and metrics.exists():
            from olmo.train.sinks import read_metrics  # which imports torch

            steps = max((row["step"] for row in read_metrics(metrics)), default=None)
        return steps

    @cached_property
    def segments(self) -> list[dict[str, Any]]:
        """From which step on it was trained how; [] where nobody wrote that down.

        An order that is given for a run by URL is asked alone, as OLMo's runs have nothing else.
        """
        from olmo.train.segments import segments  # which imports torch

        if self.record:
            return history.collect_segments(current_store(), self.record)
        if not is_url(self.folder):
            return segments(self.home)
        url, _, name = self.folder.rpartition("/")
        place = url if layout.is_checkpoint_name(Path(name)) else self.folder
        if self._order or not downloads.is_http(downloads.to_public_url(place)):
            return []
        with tempfile.TemporaryDirectory() as folder, contextlib.suppress(downloads.NotFound):
            file, part = Path(folder, SEGMENTS_FILE), Path(folder, "part")
            downloads.fetch(f"{place}/{SEGMENTS_FILE}", file, part, max_bytes=MAX_CONFIG_BYTES)
            return segments(Path(folder))
        return []

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
    def stretches(self) -> list[StepRange]:
        """The same with what their steps saw; [] where nobody wrote that down."""
        order = self._order or self.cfg.data.order_path
        if self._order and not any("order" in segment for segment in self.segments):
            log.warning("--order is not needed: the run wrote down what decided its order")
        origin = OrderSource(
            self.cfg, len(self.dataset), order, given=bool(self._order), fixed=bool(self.record)
        )
        return history.build_step_ranges(self.segments, origin)

    @cached_property
    def by_config(self) -> SeenInstances:
        """What its steps saw if it was trained from its start with this config and order."""
        if self.cfg.load_path and not self.cfg.reset_trainer_state:
            log.warning(
                f"{self.config_path} goes on from {self.cfg.load_path}: what is told of the steps "
                "before holds if they had the same batch size, seed and data"
            )
        n, seed, first = len(self.dataset), self.cfg.data_seed, self.cfg.epoch or 0
        place, size = self._order or self.cfg.data.order_path, self._world_size or 1
        if place is not None:
            if (epoch := self._epoch_of(place, n)) not in (None, first):
                raise ValueError(
                    f"{place} is the order of epoch {epoch}, which was written over that of epoch "
                    f"{first}; leave --order out, and it is made from the seed"
                )
            return SeenInstances(self.cfg, n, *history.open_order(place), size)
        beside = str(self.home / "train_data/global_indices.npy")
        known = is_url(self.folder) or not Path(beside).exists() or n > MAX_INSTANCES
        if not known and self._epoch_of(beside, n) is None:
            raise ValueError(
                f"{beside} is not the order of {n} instances by seed {seed} in any of {MAX_EPOCHS} "
                "epochs: the config or the data changed since. Give the first epoch's: --order"
            )
        return SeenInstances(self.cfg, n, n, history.derive_order(n, seed, first), size)

    def _epoch_of(self, place: str, n: int) -> int | None:
        """Which epoch's order a file is; None: of none, or too large or too far to look at it."""
        if is_url(place) or not Path(place).exists() or n > MAX_INSTANCES:
            return None
        stored, read = history.open_order(place)
        numbers, first = read(0, stored), self.cfg.epoch or 0
        for epoch in range(first, first + MAX_EPOCHS):
            order = history.derive_order(n, self.cfg.data_seed, epoch)(0, n)
            if np.array_equal(numbers[:n], order[:stored]):
                return epoch
        return None

    @cached_property
    def recorded(self) -> RecordedBatches:
        return RecordedBatches(self.home)

    def batch(self, step: int) -> tuple[np.ndarray, int]:
        """The (G,) instances of a step in the order of its batch, and how many processes it had.

        Raises:
            ValueError: there is no such step, or what it saw is not known any more.
        """
        if step < 1 or (self.steps is not None and step > self.steps):
            upto = "on" if self.steps is None else f"to {self.steps}"
            raise ValueError(f"expected a step from 1 {upto}, found {step}")
        stretch = history.find_step_range(step, self.stretches) if self.segments else None
        size = self.cfg.global_train_batch_size if stretch is None else stretch.batch_size
        if stretch is not None and step <= stretch.again_to:
            log.warning(
                f"step {step} was trained more than once: the last time is told, which counts"
            )
        if (batch := self.recorded.batch(step, size)) is None:
            seen = self.by_config if stretch is None else stretch.seen
            batch = seen.instances(step), seen.world_size
        if self._world_size not in (None, batch[1]):
            raise ValueError(
                f"--world-size: step {step} was trained by {batch[1]} processes, found "
                f"{self._world_size}; leave it out"
            )
        if stretch is not None and not self._has_files_of(stretch):
            raise ValueError(
                f"step {step} was trained on other token files than {self.config_path} names; give "
                f"the config of a checkpoint of that time: --run {self.home}/step…/config.yaml"
            )
        return batch

    def world_size(self, step: int) -> int:
        """How many processes trained a step."""
        if self.segments:
            return history.find_step_range(step, self.stretches).world_size
        return self.by_config.world_size

    def when(self, instances: np.ndarray) -> Iterator[tuple[int, int, int]]:
        """(step, position in its batch, instance) of each time one of these was seen, in order."""
        if not self.segments:
            last = self.steps or self.by_config.steps_per_epoch
            yield from self.by_config.when(instances, last)
            return
        ends = [*(stretch.after for stretch in self.stretches[1:]), self.steps]
        for stretch, end in zip(self.stretches, ends, strict=True):
            last = end if end is not None else stretch.after + stretch.seen.steps_per_epoch
            if self._has_files_of(stretch):
                yield from stretch.seen.when(instances, last)
            else:
                log.warning(
                    f"steps {stretch.after + 1} to {last} had other token files, not looked at"
                )

    def _has_files_of(self, stretch: StepRange) -> bool:
        from olmo.train.segments import fingerprint  # which imports torch

        return stretch.files in (None, fingerprint(self.dataset))

    def instances(self, step: int, rank: int | None = None) -> Iterator[Instance]:
        """What a step saw, in the order of its batch; or the share of one rank.

        Raises:
            ValueError: as `batch`, and where there is no such rank.
        """
        batch, size = self.batch(step)
        if rank is not None and not 0 <= rank < size:
            raise ValueError(f"expected a rank from 0 to {size - 1}, found {rank}")
        positions = range(len(batch)) if rank is None else range(rank, len(batch), size)
        indices = batch[list(positions)]
        rows = self.dataset.batch(indices)["input_ids"].numpy()
        for position, index, tokens in zip(positions, indices.tolist(), rows, strict=True):
            path, row = self.place(index)
            start = row * self.length
            yield Instance(step, position, position % size, index, path, start, tokens)

    @property
    def length(self) -> int:
        """Tokens of an instance."""
        return self.cfg.model.max_sequence_length

    def place(self, index: int) -> tuple[str, int]:
        """The token file of an instance, and its row in there."""
        file = bisect_right([end for _, end in self.dataset.offsets], index)
        return str(self.dataset.paths[file]), index - self.dataset.offsets[file][0]


def find_config(where: str) -> str:
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


def load_run_config(place: str) -> TrainConfig:
    """A run's config, here or by URL; its paths are not looked for yet."""
    if not is_url(place):
        ours = Path(place).resolve().is_relative_to(Path("config").resolve())
        return TrainConfig.load(place, validate_paths=False, foreign=not ours)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "config.yaml")
        downloads.fetch(place, path, Path(folder, "part"), max_bytes=MAX_CONFIG_BYTES)
        return TrainConfig.load(path, foreign=True)
