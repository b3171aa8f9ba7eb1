"""From a resolved config to the end of the first training step, in a new process.

    python bench/start.py [--rounds 3] [--train config/train/olmo-tiny.yaml]

Measured from the start of `python -m olmo.train` to its line about step 1: imports, data order,
model, the checkpoint before training, the step. Wall seconds, and CPU seconds of the process and
its children. Eager, and compiled with a cold and a warm compile cache. The tokens are random.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from olmo.bench.script import (
    cpu_time,
    describe_run,
    measure_interleaved,
    medians,
    parse_options,
    process_cpu_time,
)
from olmo.bench.table import markdown_table
from olmo.config import TrainConfig


def write_config(train: str, folder: Path) -> Path:
    """The config with its own folder and random tokens for ten steps."""
    cfg = TrainConfig.load(train, [], validate_paths=False)
    size = 10 * cfg.global_train_batch_size * cfg.model.max_sequence_length
    tokens = np.random.default_rng(0).integers(2, cfg.model.vocab_size, size, dtype=np.uint16)
    tokens.tofile(folder / "tokens.npy")
    cfg = cfg.update_with(
        save_folder=str(folder / "run"),
        save_overwrite=True,
        console_log_interval=1,
        evaluators=[],
        data=cfg.data.update_with(paths=[str(folder / "tokens.npy")]),
    )
    cfg.save(folder / "config.yaml")
    return folder / "config.yaml"


def first_step(config: Path, cache: Path | None) -> tuple[float, float]:
    """Wall and CPU seconds to the line about the first step; compiled where there is a cache."""
    command = [sys.executable, "-m", "olmo.train", str(config), "--stop_after=1"]
    env = dict(os.environ)
    if cache is not None:
        command.append("--compile={}")
        env["TORCHINDUCTOR_CACHE_DIR"] = str(cache)
    began, before = time.monotonic(), cpu_time(resource.RUSAGE_CHILDREN)
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env
    )
    assert process.stdout is not None
    lines: list[str] = []
    for line in process.stdout:
        lines.append(line)
        if "step 1/" in line:
            break
    wall, cpu = time.monotonic() - began, process_cpu_time(process.pid)
    rest = process.stdout.read()
    if process.wait() != 0 and "step 1/" not in lines[-1]:
        raise SystemExit(f"{' '.join(command)} failed:\n{''.join(lines)}{rest}")
    # The compiler's children are counted when they are waited for, at the end of the process.
    return wall, cpu if cache is None else cpu_time(resource.RUSAGE_CHILDREN) - before


def main() -> None:
    options = parse_options(__doc__, rounds=3, train="config/train/olmo-tiny.yaml")
    cpu: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        config = write_config(options.train, Path(folder))

        def start(kind: str) -> float:
            costs = cpu.setdefault(kind, [])
            # The cold and the warm start of a round share a fresh cache.
            cache = None if kind == "eager" else Path(folder, f"cache{len(costs)}")
            wall, cpu_s = first_step(config, cache)
            costs.append(cpu_s)
            print(f"{kind} {wall:.1f} s", flush=True)
            return wall

        kinds = ("eager", "compiled, cold cache", "compiled, warm cache")
        wall = measure_interleaved(
            options.rounds, {kind: lambda kind=kind: start(kind) for kind in kinds}
        )
    print(f"\n{describe_run(f'{options.rounds} rounds')}\n")
    wall_s, cpu_s = medians(wall), medians(cpu)
    rows = [
        {"start": kind, "wall s": f"{wall_s[kind]:.1f}", "CPU s": f"{cpu_s[kind]:.1f}"}
        for kind in kinds
    ]
    print(*markdown_table(rows), sep="\n")


if __name__ == "__main__":
    main()
