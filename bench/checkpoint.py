"""How long a checkpoint stalls training: `python bench/checkpoint.py [--size 6m|85m] [--saves 3]`.

A run of the real trainer saves a few times, unsharded and sharded. The stall is the time that the
training thread spends on a save: for copying the state, while the files are written by another
thread. It is told in steps of the same run. Steps that fall into the writing are slower, since they
share the processor with it: what that costs is told beside it. The first save is left out: its
memory is new to the process.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from step import SIZES, config_of

from olmo.config import TrainConfig
from olmo.train import loop
from olmo.train.saver import Saver


class Watch:
    """Wall times of a run: when each step began, and how long each save held it up."""

    def __init__(self) -> None:
        self.began: list[float] = []
        self.stalls: dict[int, float] = {}  # by the number of steps before it

    def listen(self) -> None:
        step, save = loop.forward_backward, Saver.save

        def watched_step(*arguments: Any) -> Any:
            self.began.append(time.perf_counter())
            return step(*arguments)

        def watched_save(saver: Saver, kind: str | None = None) -> Path:
            begin = time.perf_counter()
            try:
                return save(saver, kind)
            finally:
                self.stalls[len(self.began)] = time.perf_counter() - begin

        loop.forward_backward = watched_step  # type: ignore[assignment]
        Saver.save = watched_save  # type: ignore[method-assign]


def settings(size: str, kind: str, folder: Path, interval: int, saves: int) -> dict[str, Any]:
    shape = SIZES[size]
    steps = interval * (saves + 2)
    tokens = np.random.default_rng(0).integers(
        2, shape["vocab_size"], shape["T"] * shape["batch"] * steps
    )
    tokens.astype(np.uint16).tofile(folder / "tokens.npy")
    of_kind = "save_interval_unsharded" if kind == "unsharded" else "save_interval"
    intervals = {"save_interval": None, "save_interval_unsharded": None, of_kind: interval}
    return config_of(shape) | intervals | {
        "save_folder": str(folder / "run"),
        "data": {"paths": [str(folder / "tokens.npy")]},
        "max_duration": steps - 1,
        "global_train_batch_size": shape["batch"],
        "device_train_microbatch_size": shape["batch"],
        "distributed_strategy": "ddp",
        "no_pre_train_checkpoint": True,
        "save_num_checkpoints_to_keep": 1,
        "save_num_unsharded_checkpoints_to_keep": 1,
        "console_log_interval": 1000,
        "intra_op_threads": 1,
        "precision": "fp32",
    }  # fmt: skip


def measure(size: str, kind: str, interval: int, saves: int) -> str:
    watch = Watch()
    original = loop.forward_backward, Saver.save
    watch.listen()
    try:
        with tempfile.TemporaryDirectory() as folder:
            config = settings(size, kind, Path(folder), interval, saves)
            loop.train(TrainConfig.new(**config))
    finally:
        loop.forward_backward, Saver.save = original  # type: ignore[misc, method-assign]
    lengths = dict(enumerate(np.diff(watch.began).tolist(), 1))
    periodic = [done for done in watch.stalls if done % interval == 0][1 : saves + 1]
    # The writing falls into the first half of the steps after a save, or it is longer than that.
    quiet = [lengths[n] for done in periodic for n in range(done - interval // 2, done)]
    step = statistics.median(quiet)
    stalls = [watch.stalls[done] for done in periodic]
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
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="6m")
    parser.add_argument("--saves", type=int, default=3)
    parser.add_argument("--interval", type=int, default=10)
    chosen = parser.parse_args()
    lines = [
        measure(chosen.size, k, chosen.interval, chosen.saves) for k in ("unsharded", "sharded")
    ]
    print("\n".join(lines))


if __name__ == "__main__":
    main()
