"""How long a checkpoint stalls training: `python bench/checkpoint.py [--size 6m|85m] [--saves 3]`.

A run of the real trainer saves a few times, unsharded and sharded. The stall is the time that the
training thread spends on a save: it copies the state, and another thread writes the files. Steps
that overlap with the writing are slower, since they share the processor; that cost is reported with
it. Both are in steps of the same run. The first save is left out, since it allocates memory.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from olmo.bench.matrix import load_section
from olmo.bench.script import parse_options
from olmo.config import TrainConfig
from olmo.train import loop
from olmo.train.saver import Saver

SECTION = load_section(Path(__file__).parents[1] / "config/bench/ai2-olmo.yaml", "cpu")
CELLS = {pair.ours.shape: pair.ours for pair in SECTION.pairs()}


class SaveTimer:
    """Wall times of a run: when each step began, and how long each save stalled it."""

    def __init__(self) -> None:
        self.began: list[float] = []
        self.stalls: dict[int, float] = {}  # by the number of steps before it
        self._step, self._save = loop.forward_backward, Saver.save

    def step(self, *arguments: Any) -> Any:
        self.began.append(time.perf_counter())
        return self._step(*arguments)

    def save(self, saver: Saver, kind: str | None = None) -> Path:
        began = time.perf_counter()
        try:
            return self._save(saver, kind)
        finally:
            self.stalls[len(self.began)] = time.perf_counter() - began


def train_config(size: str, kind: str, folder: Path, interval: int, saves: int) -> TrainConfig:
    config, steps = SECTION.shared_config(CELLS[size]), interval * (saves + 2)
    model, instances = config["model"], config["global_train_batch_size"]
    count = model["max_sequence_length"] * instances * steps
    tokens = np.random.default_rng(0).integers(2, model["vocab_size"], count, dtype=np.uint16)
    tokens.tofile(folder / "tokens.npy")
    key = "save_interval_unsharded" if kind == "unsharded" else "save_interval"
    intervals = {"save_interval": None, "save_interval_unsharded": None, key: interval}
    return TrainConfig.new(
        **config
        | intervals
        | {
            "save_folder": str(folder / "run"),
            "data": {"paths": [str(folder / "tokens.npy")]},
            "max_duration": steps - 1,
            "distributed_strategy": "ddp",
            "no_pre_train_checkpoint": True,
            "save_num_checkpoints_to_keep": 1,
            "save_num_unsharded_checkpoints_to_keep": 1,
            "console_log_interval": 1000,
            "intra_op_threads": 1,
        }
    )


def time_saves(size: str, kind: str, interval: int, saves: int) -> str:
    timer = SaveTimer()
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(loop, "forward_backward", timer.step),
        mock.patch.object(Saver, "save", lambda *arguments: timer.save(*arguments)),
    ):
        loop.train(train_config(size, kind, Path(folder), interval, saves))
    lengths = dict(enumerate(np.diff(timer.began).tolist(), 1))
    periodic = [done for done in timer.stalls if done % interval == 0][1 : saves + 1]
    # The writing falls into the first half of the steps after a save, or takes longer than that.
    quiet = [lengths[n] for done in periodic for n in range(done - interval // 2, done)]
    step = statistics.median(quiet)
    stalls = [timer.stalls[done] for done in periodic]
    after = [
        sum(lengths[n] for n in range(done, done + interval // 2)) - (interval // 2) * step
        for done in periodic
        if done + interval // 2 in lengths
    ]
    stall, cost = statistics.median(stalls), statistics.median(after)
    return (
        f"{size} {kind}: step {step * 1000:.0f} ms; stall {stall * 1000:.0f} ms = "
        f"{stall / step:.2f} steps (worst of {len(stalls)}: {max(stalls) / step:.2f}); "
        f"with the writing {cost / step:.2f} steps"
    )


def main() -> None:
    options = parse_options(
        __doc__, size={"choices": list(CELLS), "default": "6m"}, saves=3, interval=10
    )
    for kind in ("unsharded", "sharded"):
        print(time_saves(options.size, kind, options.interval, options.saves))


if __name__ == "__main__":
    main()
