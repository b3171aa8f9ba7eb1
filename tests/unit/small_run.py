"""A run of seconds, for the trainer's tests."""

import gc
import gzip
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from olmo.config import TrainConfig
from olmo.train.loop import train

LENGTH, VOCABULARY = 16, 60

SETTINGS: dict[str, Any] = {
    "model": {
        "d_model": 16,
        "n_heads": 2,
        "n_layers": 2,
        "mlp_ratio": 4,
        "rope": True,
        "attention_dropout": 0.0,
        "residual_dropout": 0.0,
        "embedding_dropout": 0.0,
        "include_bias": False,
        "layer_norm_with_affine": False,
        "max_sequence_length": LENGTH,
        "vocab_size": VOCABULARY,
        "embedding_size": 128,
        "eos_token_id": 0,
        "pad_token_id": 1,
        "init_fn": "mitchell",
    },
    "optimizer": {"name": "adamw", "learning_rate": 1e-2},
    "scheduler": {"t_warmup": 3},
    "distributed_strategy": "ddp",
    "save_interval": None,
    "save_interval_unsharded": 4,
    "eval_interval": 5,
    "max_duration": 10,
    "global_train_batch_size": 8,
    "device_train_microbatch_size": 4,
    "max_grad_norm": 1.0,
    "precision": "fp32",
    "intra_op_threads": 1,
}


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    """The small run's, on data in `folder`, saving to `folder`/run."""
    generator = np.random.default_rng(0)
    for name, n in (("train.npy", 203 * LENGTH), ("heldout.npy", 11 * LENGTH)):
        if not (folder / name).exists():
            # Ids that repeat, so that there is something to learn.
            ids = np.cumsum(generator.integers(0, 3, n)) % (VOCABULARY - 2) + 2
            ids.astype(np.uint16).tofile(folder / name)
    base = SETTINGS | {
        "save_folder": str(folder / "run"),
        "data": {"paths": [str(folder / "train.npy")], "drop_last": True},
        "evaluators": [{"label": "heldout", "data": {"paths": [str(folder / "heldout.npy")]}}],
    }
    for key, value in changes.items():
        base[key] = base[key] | value if isinstance(value, dict) and base.get(key) else value
    return base


def config(folder: Path, **changes: Any) -> TrainConfig:
    return TrainConfig.new(**settings(folder, **changes))


def run(folder: Path, **changes: Any) -> int:
    """Train in this process, as `python -m olmo.train` would; its exit code."""
    threads, handler = torch.get_num_threads(), signal.getsignal(signal.SIGTERM)
    try:
        return train(config(folder, **changes))
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(False)
        signal.signal(signal.SIGTERM, handler)
        gc.enable()


def command(folder: Path, processes: int = 1, **changes: Any) -> list[str]:
    """The command line of the same."""
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(settings(folder, **changes)))
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [sys.executable, *(launcher if processes > 1 else []), "-m", "olmo.train", str(path)]


def given(folder: Path, **changes: Any) -> Path:
    """The config of the same in its save folder, as the pipeline writes it there."""
    base = settings(folder, try_load_latest_save=True, save_overwrite=True, **changes)
    path = Path(base["save_folder"]) / "given.yaml"
    path.parent.mkdir(exist_ok=True)
    TrainConfig.new(**base).save(path)
    return path


def until(true: Callable[[], bool], within: float = 120) -> None:
    """Wait for something that another process does."""
    end = time.monotonic() + within
    while not true():
        assert time.monotonic() < end, "it never came to that"
        time.sleep(0.05)


def start(folder: Path, processes: int = 1, **changes: Any) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        command(folder, processes, **changes),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def read_until(process: "subprocess.Popen[str]", seen: Callable[[str], bool]) -> str:
    """What it says, up to the line for which `seen` is true."""
    assert process.stdout is not None
    text = ""
    for line in process.stdout:
        text += line
        if seen(line):
            return text
    raise AssertionError(f"it never came to that; it said:\n{text}")


def metrics(run_folder: Path) -> list[dict[str, float]]:
    """Lines of metrics.jsonl without what differs from machine to machine: times, memory."""
    lines = (run_folder / "metrics.jsonl").read_text().splitlines()
    measured = ("throughput/device", "throughput/data_wait", "System/")
    return [
        {k: v for k, v in json.loads(line).items() if not k.startswith(measured)} for line in lines
    ]


def state(run_folder: Path) -> dict[str, Any]:
    """All that a run leaves that must not depend on interruptions."""
    latest = run_folder / "latest-unsharded"
    indices = sorted((run_folder / "data-indices").glob("*"))
    return {
        "files": {f: torch.load(latest / f, weights_only=True) for f in ("model.pt", "optim.pt")},
        "train": torch.load(latest / "train.pt", weights_only=True),
        "metrics": metrics(run_folder),
        "indices": [gzip.decompress(path.read_bytes()) for path in indices],
    }


def same(a: Any, b: Any) -> bool:
    """Equal to the bit, tensors included."""
    if torch.is_tensor(a):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b
