"""Compares the losses of a run of olmo.train with the same run killed by SIGKILL and resumed.

Prints a line of JSON for each run, and one for the comparison.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[2]
LOSS = "train/CrossEntropyLoss"
STEPS, SAVED, KILLED = {"cuda": 200, "cpu": 24}, {"cuda": 50, "cpu": 6}, {"cuda": 120, "cpu": 15}


def cli_overrides(kind: str, layers: int | None, folder: Path, run: str) -> list[str]:
    """Options that change config/train/olmo-250m.yaml."""
    options = [
        f"--data.paths=[{folder / 'tokens.npy'}]",
        f"--save_folder={folder / run}",
        f"--max_duration={STEPS[kind]}",
        f"--save_interval_unsharded={SAVED[kind]}",
        "--save_num_unsharded_checkpoints_to_keep=1",
        "--no_pre_train_checkpoint=true",
        "--global_train_batch_size=4",
        "--device_train_microbatch_size=4",
        "--scheduler.t_warmup=10",
        "--eval_interval=100000",
        "--compile=null",
        "--try_load_latest_save=true",
    ]
    if layers is not None:
        options.append(f"--model.n_layers={layers}")
    if kind == "cpu":
        small = {"d_model": 64, "n_heads": 2, "n_layers": 2, "max_sequence_length": 64}
        small |= {"vocab_size": 300, "embedding_size": 384, "eos_token_id": 0}
        options += [f"--model.{name}={value}" for name, value in small.items()]
        options += ["--precision=fp32", "--master_weights=false", "--intra_op_threads=1"]
    return options


def write_tokens(kind: str, path: Path) -> None:
    """Ids that can be learnt: each is 0 to 2 above the one before."""
    vocabulary, n = (50_000, 4_000_000) if kind == "cuda" else (290, 40_000)
    steps = np.random.default_rng(0).integers(0, 3, n)
    (np.cumsum(steps) % vocabulary + 2).astype(np.uint16).tofile(path)


class TrainingRun:
    """A process that trains."""

    def __init__(self, what: str, kind: str, layers: int | None, folder: Path, run: str) -> None:
        self.what, self.folder, self.began = what, folder / run, time.monotonic()
        config = ROOT / "config/train/olmo-250m.yaml"
        command = [sys.executable, "-W", "ignore", "-m", "olmo.train", str(config)]
        self.process = subprocess.Popen(
            [*command, *cli_overrides(kind, layers, folder, run)], stdout=sys.stderr
        )

    def losses(self) -> dict[int, float]:
        """The losses of the finished steps, by step."""
        path = self.folder / "metrics.jsonl"
        if not path.exists():
            return {}
        lines = [line for line in path.read_text().splitlines(True) if line.endswith("\n")]
        return {row["step"]: row[LOSS] for row in map(json.loads, lines) if LOSS in row}

    def kill_after(self, step: int) -> None:
        while self.process.poll() is None and max(self.losses(), default=0) < step:
            time.sleep(0.02)
        self.process.kill()

    def finish(self) -> dict[int, float]:
        """Wait for the end of the process, print its record, return its losses."""
        code = self.process.wait()
        losses, seconds = self.losses(), round(time.monotonic() - self.began, 1)
        record: dict[str, Any] = {"what": self.what, "exit": code, "seconds": seconds}
        record |= {"steps": len(losses)}
        if losses:
            record |= {"first_loss": losses[min(losses)], "last_loss": losses[max(losses)]}
        print(json.dumps(record), flush=True)
        return losses


def main() -> None:
    request = json.loads(sys.argv[1])
    kind, layers = request["kind"], request["layers"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_tokens(kind, folder / "tokens.npy")
        straight = TrainingRun("straight", kind, layers, folder, "straight").finish()
        killed = TrainingRun("killed", kind, layers, folder, "killed")
        killed.kill_after(KILLED[kind])
        killed.finish()
        resumed = TrainingRun("resumed", kind, layers, folder, "killed").finish()
    both = straight.keys() & resumed.keys()
    gaps = [abs(straight[step] - resumed[step]) for step in both]
    record = {
        "what": "straight beside killed and resumed",
        "steps": len(both),
        "equal": sum(gap == 0 for gap in gaps),
        "largest_gap": max(gaps, default=None),
        "passed": len(both) == STEPS[kind] and max(gaps, default=1.0) < 0.05,
    }
    print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
