"""What an action will give and cost, from the records of earlier ones, for `olmo plan`.

A stage's outputs and time are taken to be in proportion to the bytes that it reads; training's time
to tokens × floating-point operations a token. Without a record on any machine, the figures
of docs/lab.md stand in, with a wide range.
"""

from __future__ import annotations

import platform
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from olmo.config import TrainConfig
from olmo.config.model_size import count_parameters
from olmo.data.files import token_itemsize
from olmo.store.action import Action
from olmo.store.lookup import Prediction
from olmo.store.record import Record, list_files, output_files
from olmo.store.store import Store

MAX_RECORDS = 2000  # the newest are read
# Inputs that a stage reads besides what its outputs are made of.
SIDE_INPUTS = (
    *("tokenizer", "table", "config", "order", "attributes", "overlap_filter", "heldout"),
    *("quality", "models"),
)
TRAINING = "training"
DOWNLOADS = ("download", "download_tokens", "fetched", "fetched_checkpoint", "beginning")
# Without a record: (bytes written for each byte read, bytes read in a second), by docs/lab.md for
# documents and tokens. A download's speed is a guess.
DEFAULTS = {
    **dict.fromkeys(DOWNLOADS, ({}, 50e6)),
    "local_source": ({"source": 1.0}, 200e6),
    "converted": ({"source": 1.0}, 20e6),
    "documents": ({"documents": 1.0, "table": 0.02}, 100e6),
    "tags": ({"tags": 0.2}, 0.3e6),
    "quality": ({"quality": 0.02, "values": 0.1}, 10e6),
    "digests": ({"document_digests": 0.02, "line_digests": 0.5}, 30e6),
    "overlaps": ({"overlaps": 0.02}, 5e6),
    "copies": ({"copies": 0.001}, 500e6),
    "places": ({"places": 0.01}, 500e6),
    "marks": ({"marks": 0.02}, 100e6),
    "mixed": ({"mixed": 1.0, "mixed_table": 0.02}, 10e6),
    "tokens": ({"tokens": 1.3, "index": 0.03}, 0.7e6),
    "text_index": ({"grams": 0.5, "blocks": 0.001}, 50e6),
    "token_bytes": ({"token_bytes": 1.0}, 5e6),
    "trained_tokenizer": ({}, 0.7e6),
    "sample": ({}, 1e6),
}
# Files of the standard library's text: their prefix, and bytes in all (Python 3.11).
GENERATED_FILES = {"stdlib": ("stdlib", 2_960_000), "stdlib_questions": ("questions", 1_000_000)}
MAX_FACTOR = 100  # small files say little about the speed with files that are larger by more
FAST_TOKENS = 15e6  # bytes a second, of the engine `fast`


@dataclass(frozen=True)
class Range:
    """A time in seconds, or another amount: likely between `low` and `high`."""

    low: float = 0.0
    middle: float = 0.0
    high: float = 0.0

    @classmethod
    def around(cls, seconds: float, factor: float) -> Range:
        return cls(seconds / factor, seconds, seconds * factor)

    @classmethod
    def exactly(cls, number: float) -> Range:
        return cls(number, number, number)

    def __add__(self, other: Range) -> Range:
        return Range(self.low + other.low, self.middle + other.middle, self.high + other.high)

    def __mul__(self, number: float) -> Range:
        return Range(self.low * number, self.middle * number, self.high * number)

    def __truediv__(self, number: float) -> Range:
        return Range(self.low / number, self.middle / number, self.high / number)


@dataclass
class History:
    """What the actions of one stage read, gave and took, in all."""

    actions: int = 0
    read: float = 0.0  # bytes
    kept: float = 0.0  # of `read`, the share that documents.keep_one_in keeps
    seconds: float = 0.0
    documents: int = 0
    given: dict[str, float] = field(default_factory=lambda: defaultdict(float))  # output → bytes
    is_here: bool = False  # some ran on this machine
    last: Record | None = None


@dataclass(frozen=True)
class TrainedRun:
    """The cost of a training run."""

    flops_per_s: float  # of each process
    watts: float | None  # of the machine
    is_here: bool
    on_gpu: bool


class Rates:
    """Rates of a store's records."""

    def __init__(self, store: Store) -> None:
        self.histories: dict[str, History] = defaultdict(History)
        self.trained: list[TrainedRun] = []
        records = newest_records(store)
        sizes = {f["sha256"]: f["size"] for record in records for f in output_files(record)}
        for record in records:
            self._add(record, lambda digest: sizes.get(digest, 0))

    def _add(self, record: Record, size_of: Callable[[str], int]) -> None:
        action, run = Action(**record["action"]), record.get("run", {})
        history, is_here = self.histories[action.stage], run.get("host") == platform.node()
        read = main_bytes(action, size_of)
        history.last = history.last or record
        if action.inputs and not read:  # of files that are not in the store
            return
        history.actions += 1
        history.read += read
        history.kept += read / action.params.get("keep_one_in", 1)
        history.seconds += run.get("wall_s", 0.0)
        history.documents += record["facts"].get("documents", 0)
        history.is_here |= is_here
        for name, output in record["outputs"].items():
            history.given[name] += sum(file["size"] for file in list_files(output))
        if action.stage == TRAINING and (found := trained_run(record, is_here)):
            self.trained.append(found)

    def _history(self, stage: str) -> History | None:
        """The history of a stage, if there is one."""
        found = self.histories.get(stage)
        return found if found and found.actions else None

    def predict(
        self,
        action: Action,
        names: Mapping[str, Path],
        arguments: Mapping[str, Any],
        size_of: Callable[[str], int],
    ) -> Prediction:
        """The sizes of an action's outputs."""
        history, read = self._history(action.stage), main_bytes(action, size_of)
        kept = read / action.params.get("keep_one_in", 1)
        if (transfer := arguments.get("transfer")) is not None:
            most = arguments.get("max_bytes", transfer.bytes)  # of a beginning
            return Prediction({name: min(transfer.bytes or 0, most or 0) for name in names})
        if action.stage == TRAINING:
            return Prediction({"final": checkpoint_files(arguments["cfg"])})
        if action.stage in ("global_order", "mixture_order"):
            before = size_of(action.inputs["before"]) if "before" in action.inputs else 0
            return Prediction({"order": 4 * action.params["instances"] + before})
        if action.stage == "skipped":
            return Prediction({"remaining": size_of(action.inputs["order"]), "holes": 0})
        if history is None and action.stage in GENERATED_FILES:
            prefix, total = GENERATED_FILES[action.stage]
            shards = action.params["shards"]
            files = {f"{prefix}-{i:02d}.json.gz": total // shards for i in range(shards)}
            return Prediction({"folder": files})
        if history is None:
            ratios, _ = DEFAULTS.get(action.stage, ({}, 0.0))
            return Prediction({name: int(kept * ratios.get(name, 0)) for name in names})
        assert history.last is not None
        outputs: dict[str, Any] = {}
        for name, made in history.last["outputs"].items():
            scale = kept / history.kept if history.kept else 1 / history.actions
            if "files" in made:  # as the last one gave
                outputs[name] = {path: file["size"] for path, file in made["files"].items()}
            else:
                outputs[name] = int(history.given[name] * scale)
        documents = int(history.documents * kept / history.kept) if history.kept else 0
        return Prediction(outputs, {"documents": documents} if documents else {})

    def seconds(self, action: Action, read: int, written: int) -> Range | None:
        """How long an action other than training will take; None if nothing is known."""
        is_download = action.stage in DOWNLOADS
        amount, total = (written if is_download else read), 0.0
        if (history := self._history(action.stage)) is not None:
            total = sum(history.given.values()) if is_download else history.read
        is_far = action.stage in DEFAULTS and amount > MAX_FACTOR * total
        if history is not None and not is_far:
            each = history.seconds / history.actions
            found = history.seconds * amount / total if total and amount else each
            return Range.around(found, 1.5 if history.is_here else 2.5)
        if action.stage not in DEFAULTS:
            return None
        _, speed = DEFAULTS[action.stage]
        if str(action.params.get("toolkit")).startswith("fast"):
            speed = FAST_TOKENS
        return Range.around(amount / speed, 3)

    @property
    def watts(self) -> float | None:
        """The power of a machine that trains, if a record has it."""
        known = [run.watts for run in self.trained if run.watts]
        return statistics.median(known) if known else None

    @property
    def on_gpu(self) -> bool:
        """Whether runs were trained on GPUs here."""
        return any(run.on_gpu and run.is_here for run in self.trained)

    def training_seconds(
        self, cfg: TrainConfig, processes: int, tokens: int, on_gpus: bool
    ) -> Range | None:
        """The time of training on so many tokens; None for GPUs of which no run has a record.

        Without a record it is that of the floating-point operations, at this machine's speed.
        """
        work = 6 * count_parameters(cfg.model) * tokens / processes
        known = [run for run in self.trained if run.on_gpu or not on_gpus]
        here = [run.flops_per_s for run in known if run.is_here]
        speeds, factor = here or [run.flops_per_s for run in known], 1.5 if here else 4.0
        if not speeds:
            from olmo.pipeline.new import EFFICIENCY, measure_machine

            machine = measure_machine()
            if on_gpus and machine.device != "cuda":
                return None
            speeds, factor = [EFFICIENCY * machine.flops], 3.0
        found = Range.around(work / statistics.median(speeds), factor)
        return Range(
            min(found.low, work / max(speeds)), found.middle, max(found.high, work / min(speeds))
        )


def newest_records(store: Store) -> list[Record]:
    """The newest records of a store, the newest first."""
    paths = (store.root / "actions").glob("??/*.json")
    newest = sorted(paths, key=lambda path: path.stat().st_mtime, reverse=True)
    found = (store.record(path.stem) for path in islice(newest, MAX_RECORDS))
    return [record for record in found if record is not None]


def main_bytes(action: Action, size_of: Callable[[str], int]) -> int:
    """The bytes of what an action's outputs are made of."""
    return sum(
        size_of(digest)
        for name, given in action.inputs.items()
        if name not in SIDE_INPUTS
        for digest in (given if isinstance(given, list | tuple) else [given])
    )


def trained_run(record: Record, is_here: bool) -> TrainedRun | None:
    """The cost of a run that was trained in one go; None for another, whose time is not known."""
    run, facts = record.get("run", {}), record["facts"]
    weights = record["outputs"].get("final", {}).get("files", {}).get("model.safetensors")
    if not (weights and run.get("wall_s") and len(facts.get("segments", ())) == 1):
        return None
    share = 1 - facts["segments"][0].get("after", 0) / max(1, facts.get("steps", 1))  # of a link
    work = 6 * weights["size"] / 4 * facts["tokens"] * share
    work /= record["conditions"].get("processes", 1)
    joules = run.get("machine_energy_j")
    on_gpu = "NVIDIA" in str(record["conditions"].get("device"))
    return TrainedRun(work / run["wall_s"], joules and joules / run["wall_s"], is_here, on_gpu)


def trained_tokens(cfg: TrainConfig, token_bytes: int) -> int:
    """How many tokens a run trains on."""
    number, unit = cfg.duration
    if unit == "tokens":
        return number
    if unit == "epochs":
        return number * token_bytes // token_itemsize(cfg.data.memmap_dtype)
    return number * cfg.global_train_batch_size * cfg.model.max_sequence_length


def checkpoint_files(cfg: TrainConfig) -> dict[str, int]:
    """The bytes of a final checkpoint's files."""
    weights = 4 * count_parameters(cfg.model)
    return {"model.safetensors": weights, "optim.safetensors": 2 * weights, "config.yaml": 0}


def attempt_bytes(cfg: TrainConfig, token_bytes: int) -> int:
    """The bytes of the checkpoints that a run keeps while it is trained."""
    step_tokens = cfg.global_train_batch_size * cfg.model.max_sequence_length
    steps = trained_tokens(cfg, token_bytes) // step_tokens
    kept = 0
    for interval, most in (
        (cfg.save_interval, cfg.save_num_checkpoints_to_keep),
        (cfg.save_interval_unsharded, cfg.save_num_unsharded_checkpoints_to_keep),
    ):
        made = steps // interval if interval else 0
        kept += made if most < 0 else min(made, most)
    return kept * sum(checkpoint_files(cfg).values())
