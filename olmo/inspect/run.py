"""Opens a trained run for inspection: its config, the order of its data, its token files.

Ours or OLMo's, local or at a URL. Reads only the bytes that a question needs.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from olmo.checkpoint import layout
from olmo.config import PROJECT_CONFIG, TrainConfig, list_runs
from olmo.data.files import is_url
from olmo.data.holes import learned_tokens, read_holes
from olmo.data.instance_files import InstanceFiles, open_instance_files
from olmo.inspect import history
from olmo.inspect.history import OrderSource, RecordedBatches, StepRange
from olmo.inspect.order import SeenInstances
from olmo.io import downloads, http_client
from olmo.runtime.log import log
from olmo.runtime.process import SEGMENTS_FILE
from olmo.store.record import Record, parse_record
from olmo.store.stage import current_store
from olmo.train.segments import read_segments
from olmo.train.sinks import read_metrics

MAX_CONFIG_BYTES = 64 * 2**20  # bytes

# How many epochs `_epoch_of` compares with an order file, and up to how many instances (0.2 s an
# epoch).
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
    """A run by its name in config/config.yaml, its folder or config.yaml, or a URL of these.

    Args:
        where: one of these.
        order: path or URL of global_indices.npy, if the config does not name it.
        world_size: the run's, if no record has it; it decides which rank read what.

    Raises:
        ValueError: there is no such run, or its order belongs to other data.
        FileNotFoundError: a token file is missing.
    """

    def __init__(self, where: str, order: str | None = None, world_size: int | None = None) -> None:
        self.where = where
        self.config_path = find_config(where)
        self.folder = self.config_path.rpartition("/")[0] or "."
        self.cfg = load_run_config(self.config_path)
        self._order, self._world_size = order, world_size

    @cached_property
    def record(self) -> Record | None:
        """The store's record of a final checkpoint; None for any other."""
        path = Path(self.folder, "record.json")
        return parse_record(path.read_bytes(), path) if path.exists() else None

    @cached_property
    def run_folder(self) -> Path:
        """The run's folder, or a final checkpoint's; of a checkpoint folder the parent."""
        folder = Path(self.folder).resolve()
        return folder.parent if layout.is_checkpoint_name(folder) else folder

    @cached_property
    def steps(self) -> int | None:
        """The number of steps trained; None if it is not known."""
        steps: int | None = self.record["facts"].get("steps") if self.record else None
        metrics = self.run_folder / "metrics.jsonl"
        if steps is None and self.segments and metrics.exists():
            steps = max((row["step"] for row in read_metrics(metrics)), default=None)
        return steps

    @cached_property
    def segments(self) -> list[dict[str, Any]]:
        """The run's segments (olmo.train.segments): settings by step; [] if none are recorded.

        For a run by URL with a given order only that is used, since OLMo's runs have no segments.
        """
        if self.record:
            return history.collect_segments(current_store(), self.record)
        if not is_url(self.folder):
            return read_segments(self.run_folder)
        url, _, name = self.folder.rpartition("/")
        place = url if layout.is_checkpoint_name(Path(name)) else self.folder
        if self._order or not http_client.is_http(http_client.to_public_url(place)):
            return []
        with tempfile.TemporaryDirectory() as folder, contextlib.suppress(http_client.NotFound):
            file, part = Path(folder, SEGMENTS_FILE), Path(folder, "part")
            downloads.fetch(f"{place}/{SEGMENTS_FILE}", file, part, max_bytes=MAX_CONFIG_BYTES)
            return read_segments(Path(folder))
        return []

    @cached_property
    def dataset(self) -> InstanceFiles:
        places = chain(self.cfg.data.paths or (), *(self.cfg.data.datasets or {}).values())
        if unknown := next((place for place in places if "${" in place), None):
            raise ValueError(
                f"{self.config_path}: {unknown} depends on this machine's environment, which is "
                "hidden from a config that comes with a checkpoint; replace it by the path"
            )
        return open_instance_files(self.cfg)

    @cached_property
    def step_ranges(self) -> list[StepRange]:
        """The same as objects that derive the instances of their steps."""
        order = self._order or self.cfg.data.order_path
        if self._order and not any("order" in segment for segment in self.segments):
            log.warning("--order is not needed: the run recorded what decided its order")
        origin = OrderSource(
            self.cfg,
            len(self.dataset),
            order,
            is_given=bool(self._order),
            is_fixed=bool(self.record),
        )
        return history.build_step_ranges(self.segments, origin)

    @cached_property
    def seen_by_config(self) -> SeenInstances:
        """The instances of its steps if all of them had this config and order."""
        if self.cfg.load_path and not self.cfg.reset_trainer_state:
            log.warning(
                f"{self.config_path} continues {self.cfg.load_path}: the instances of the steps "
                "before are correct only if these had the same batch size, seed and data"
            )
        n, seed, first = len(self.dataset), self.cfg.data_seed, self.cfg.epoch or 0
        place, size = self._order or self.cfg.data.order_path, self._world_size or 1
        if place is not None:
            if (epoch := self._epoch_of(place, n)) not in (None, first):
                raise ValueError(
                    f"{place} is the order of epoch {epoch}, which has replaced that of epoch "
                    f"{first}; omit --order, and the order is made from the seed"
                )
            return SeenInstances(self.cfg, n, *history.open_order(place), size)
        saved = str(self.run_folder / "train_data/global_indices.npy")
        is_comparable = not is_url(self.folder) and Path(saved).exists() and n <= MAX_INSTANCES
        if is_comparable and self._epoch_of(saved, n) is None:
            raise ValueError(
                f"{saved} is not the order of {n} instances by seed {seed} in any of {MAX_EPOCHS} "
                "epochs: the config or the data changed since. Give the first epoch's: --order"
            )
        return SeenInstances(self.cfg, n, n, history.derive_order(n, seed, first), size)

    def _epoch_of(self, place: str, n: int) -> int | None:
        """The epoch whose order a file holds; None if it is no epoch's, remote or too large."""
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
    def recorded_batches(self) -> RecordedBatches:
        return RecordedBatches(self.run_folder)

    def batch(self, step: int) -> tuple[np.ndarray, int]:
        """The (G,) instances of a step in the order of its batch, and the number of processes.

        Raises ValueError if there is no such step, or if its instances are no longer known.
        """
        if step < 1 or (self.steps is not None and step > self.steps and not self._broke_at(step)):
            end = "on" if self.steps is None else f"to {self.steps}"
            raise ValueError(f"expected a step from 1 {end}, found {step}")
        step_range = history.find_step_range(step, self.step_ranges) if self.segments else None
        size = self.cfg.global_train_batch_size if step_range is None else step_range.batch_size
        if step_range is not None and step <= step_range.repeated_to:
            log.warning(
                f"step {step} was trained more than once: this is the last time, which counts"
            )
        if (batch := self.recorded_batches.batch(step, size)) is None:
            seen = self.seen_by_config if step_range is None else step_range.seen
            batch = seen.instances(step), seen.world_size
        if self._world_size not in (None, batch[1]):
            raise ValueError(
                f"--world-size: step {step} was trained by {batch[1]} processes, found "
                f"{self._world_size}; omit it"
            )
        if step_range is not None and not self._has_files_of(step_range):
            raise ValueError(
                f"step {step} was trained on other token files than {self.config_path} names; give "
                f"a config of that time: --run {self.run_folder}/step…/config.yaml"
            )
        return batch

    def _broke_at(self, step: int) -> bool:
        """Whether a run ended within this step: it was begun, and has no metrics."""
        is_next = self.record is None and step == (self.steps or 0) + 1
        return is_next and self.recorded_batches.batch(step, None) is not None

    def world_size(self, step: int) -> int:
        """The number of processes that trained a step."""
        if self.segments:
            return history.find_step_range(step, self.step_ranges).world_size
        return self.seen_by_config.world_size

    def find_instances(self, instances: np.ndarray) -> Iterator[tuple[int, int, int]]:
        """(step, position in its batch, instance) of each use of one of these, in order."""
        if not self.segments:
            last = self.steps or self.seen_by_config.steps_per_epoch
            yield from self.seen_by_config.find(instances, last)
            return
        ends = [*(step_range.after for step_range in self.step_ranges[1:]), self.steps]
        for step_range, end in zip(self.step_ranges, ends, strict=True):
            last = end if end is not None else step_range.after + step_range.seen.steps_per_epoch
            if self._has_files_of(step_range):
                yield from step_range.seen.find(instances, last)
            elif last > step_range.after:
                log.warning(
                    f"steps {step_range.after + 1} to {last} had other token files and are skipped"
                )

    def _has_files_of(self, step_range: StepRange) -> bool:
        return step_range.files in (None, self.dataset.fingerprint)

    def instances(self, step: int, rank: int | None = None) -> Iterator[Instance]:
        """The instances of a step in the order of its batch, of all ranks or of one.

        Raises ValueError as `batch`, and if there is no such rank.
        """
        batch, size = self.batch(step)
        if rank is not None and not 0 <= rank < size:
            raise ValueError(f"expected a rank from 0 to {size - 1}, found {rank}")
        positions = range(len(batch)) if rank is None else range(rank, len(batch), size)
        indices = batch[list(positions)]
        rows = self.dataset.read_ids([self.dataset.locate(index) for index in indices.tolist()])
        for position, index, tokens in zip(positions, indices.tolist(), rows, strict=True):
            path, row = self.locate(index)
            start = row * self.sequence_length
            yield Instance(step, position, position % size, index, path, start, tokens)

    @cached_property
    def _holes(self) -> np.ndarray:
        place = self.cfg.data.holes_path
        if place is None:
            return read_holes(os.devnull)
        if not Path(place).exists():
            raise ValueError(
                f"{place}: expected the tokens that {self.where} did not learn, found no file; "
                "pull it, or run snakemake again"
            )
        return read_holes(place)

    def learns(self, index: int, start: int, end: int) -> bool:
        """Whether it learned any of the tokens [start, end) of an instance's file that it holds."""
        if not len(self._holes):
            return True
        first = self.locate(index)[1] * self.sequence_length
        learned = learned_tokens(self._holes, [index], self.sequence_length)[0]
        return bool(learned[max(start - first, 0) : max(end - first, 0)].any())

    @property
    def sequence_length(self) -> int:
        """Tokens of an instance."""
        return self.cfg.model.max_sequence_length

    def locate(self, index: int) -> tuple[str, int]:
        """The token file of an instance, and its row in that file."""
        file, row = self.dataset.locate(index)
        return str(self.dataset.paths[file]), row


def find_config(where: str) -> str:
    """The path or URL of a run's config."""
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
        f"or a URL; found {where!r} (looked in {', '.join(map(str, places))}); "
        + suggest_runs(where)
    )


def suggest_runs(name: str) -> str:
    """What to do about a name without a checkpoint: train it, or give another, nearest first."""
    if Path(PROJECT_CONFIG).is_file() and name in list_runs():
        return f"train it: uv run snakemake --cores 2 checkpoints/{name}/final"
    trained = {path.parts[1] for path in Path("checkpoints").glob("*/*/config.yaml")}
    near = sorted(trained, key=lambda run: -SequenceMatcher(None, run, name).ratio())
    return f"trained runs here: {', '.join(near[:8]) or 'none'}"


def load_run_config(place: str) -> TrainConfig:
    """Load a run's config from a path or URL, without checking the paths in it."""
    if not is_url(place):
        ours = Path(place).resolve().is_relative_to(Path("config").resolve())
        return TrainConfig.load(place, validate_paths=False, untrusted=not ours)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "config.yaml")
        downloads.fetch(place, path, Path(folder, "part"), max_bytes=MAX_CONFIG_BYTES)
        return TrainConfig.load(path, untrusted=True)
