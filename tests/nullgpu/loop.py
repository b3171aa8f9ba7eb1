"""The trainer's loop on random tokens: what happens from one step's start to the next one's.

    python loop.py '{"steps": 6, "compile": {"fullgraph": true}, …}'

`steps`, and what is to be otherwise than in config/train/olmo-250m.yaml with one layer, two
microbatches a step, and an evaluation after step 3 whose last batch is smaller.
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import nullgpu
import numpy as np
import torch
from torch import Tensor

from olmo.config import TrainConfig
from olmo.model import OLMo
from olmo.train import loop

EVALUATED = 3


class Enough(Exception):
    """As many steps as were asked for."""


def in_graphs(gradients: Iterable[Tensor]) -> int:
    """How many of them lie in memory that a replay of a CUDA graph overwrites."""
    segments = torch.cuda.memory_snapshot()
    own = [s for s in segments if tuple(s["segment_pool_id"]) != (0, 0)]
    return sum(
        s["address"] <= gradient.data_ptr() < s["address"] + s["total_size"]
        for gradient in gradients
        for s in own
    )


def config(folder: Path, changes: dict[str, Any]) -> TrainConfig:
    length = 2048
    for name, instances in (("train", 64), ("heldout", 3)):
        generator = np.random.default_rng(0)
        ids = generator.integers(2, 50_000, instances * length)
        ids[generator.random(len(ids)) < 1 / 400] = 50279  # a document's end
        ids.astype(np.uint16).tofile(folder / f"{name}.npy")
    base = TrainConfig.load("config/train/olmo-250m.yaml").asdict()
    base |= {
        "save_folder": str(folder / "run"),
        "global_train_batch_size": 4,
        "device_train_microbatch_size": 2,
        "device_eval_batch_size": 2,
        "evaluators": [{"label": "heldout", "data": {"paths": [str(folder / "heldout.npy")]}}],
        "eval_interval": EVALUATED,
        "no_pre_train_checkpoint": True,
        "compile": None,
        "master_weights": False,
        "max_duration": 1000,
    }
    base["model"]["n_layers"] = 1
    base["data"]["paths"] = [str(folder / "train.npy")]
    for key, value in changes.items():
        base[key] = base[key] | value if isinstance(value, dict) and base.get(key) else value
    return TrainConfig.new(**base)


def main() -> None:
    request = json.loads(sys.argv[1])
    steps, lag = request.pop("steps", 6), request.pop("lag", 0)
    OLMo.reset_parameters = lambda self: None  # it does not matter what they are
    nullgpu.lag(lag)
    found: list[dict[str, int]] = []
    counts: nullgpu.Counts | None = None
    overwritten = 0
    forward_backward = loop.forward_backward

    def counted(model: OLMo, *args: Any, **kwargs: Any) -> Any:
        nonlocal counts, overwritten
        if counts is not None:
            found.append(counts.now())
        if len(found) == steps:
            raise Enough
        counts = nullgpu.Counts()
        losses = forward_backward(model, *args, **kwargs)
        overwritten = in_graphs(p.grad for p in model.parameters() if p.grad is not None)
        return losses

    loop.forward_backward = counted
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.suppress(Enough):
            loop.train(config(Path(folder), request))
        rows = Path(folder, "run/metrics.jsonl").read_text().splitlines()
    print(
        json.dumps(
            {
                "steps": found,
                "rows": [json.loads(row)["step"] for row in rows],
                "gradients_in_graphs": overwritten,
                **nullgpu.compilations(),
            }
        )
    )


if __name__ == "__main__":
    main()
