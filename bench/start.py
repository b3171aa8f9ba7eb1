"""From a resolved config to the end of the first training step, in a new process.

    python bench/start.py [--rounds 3] [--train config/train/olmo-tiny.yaml]

Counted from the start of `python -m olmo.train` to its line about step 1: imports, data order,
model, the checkpoint before training, the step. Wall seconds, and CPU seconds of the process and
its children, since a machine that does other things too stretches the wall's. Run as it is
configured, and compiled with a cold and a warm compile cache. The tokens are random.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import numpy as np

from olmo.config import TrainConfig

KINDS = ("eager", "compiled, cold cache", "compiled, warm cache")


def resolve(train: str, folder: Path) -> Path:
    """A config of its own, with random tokens for ten steps."""
    cfg = TrainConfig.load(train, [], validate_paths=False)
    size = 10 * cfg.global_train_batch_size * cfg.model.max_sequence_length
    tokens = np.random.default_rng(0).integers(2, cfg.model.vocab_size, size, dtype=np.uint16)
    (folder / "tokens.npy").write_bytes(tokens.tobytes())
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
    """Wall and CPU seconds to the first step's line."""
    command = [sys.executable, "-m", "olmo.train", str(config), "--stop_after=1"]
    env = dict(os.environ)
    if cache is not None:
        command.append("--compile={}")
        env["TORCHINDUCTOR_CACHE_DIR"] = str(cache)
    start, before = time.monotonic(), children()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env
    )
    assert process.stdout is not None
    said: list[str] = []
    for line in process.stdout:
        said.append(line)
        if "step 1/" in line:
            break
    wall, cpu = time.monotonic() - start, cpu_of(process.pid)
    rest = process.stdout.read()
    if process.wait() != 0 and "step 1/" not in said[-1]:
        raise SystemExit(f"{' '.join(command)} failed:\n{''.join(said)}{rest}")
    # Children that the compiler started count when they are waited for, that is with the process.
    return wall, cpu if cache is None else children() - before


def cpu_of(pid: int) -> float:
    """Seconds that a process, and its children that have ended, computed so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def children() -> float:
    spent = os.times()
    return spent.children_user + spent.children_system


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", default="config/train/olmo-tiny.yaml")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    found: dict[str, list[tuple[float, float]]] = {kind: [] for kind in KINDS}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        config = resolve(args.train, folder)
        for i in range(args.rounds):
            found["eager"].append(first_step(config, None))
            for kind in KINDS[1:]:
                found[kind].append(first_step(config, folder / f"cache{i}"))
            print(", ".join(f"{k} {v[-1][0]:.1f} s" for k, v in found.items()), flush=True)
    print(f"\n{date.today()}, {platform.machine()}, {os.cpu_count()} cores, {args.rounds} rounds\n")
    print("| start | wall s | CPU s |\n|---|---|---|")
    for kind, times in found.items():
        wall, cpu = (statistics.median(column) for column in zip(*times, strict=True))
        print(f"| {kind} | {wall:.1f} | {cpu:.1f} |")


if __name__ == "__main__":
    main()
