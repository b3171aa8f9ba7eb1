"""Evaluate a finished checkpoint, outside its run."""

import math
from pathlib import Path
from typing import Any

import torch

from olmo.checkpoint.read import load_model
from olmo.config import DataConfig, TrainConfig
from olmo.data.batches import build_eval_batches
from olmo.data.memmap import build_memmap_dataset
from olmo.evaluate.perplexity import evaluate
from olmo.train.step import autocast

LABEL = "heldout"


def perplexity(checkpoint: Path, heldout: list[Path]) -> dict[str, Any]:
    """Loss (nats a token) and perplexity of a final checkpoint on held-out token files.

    Computed as the run computed it: same precision, same batches.

    Raises:
        ValueError: the files hold no instance as long as the model's sequences.
    """
    cfg = TrainConfig.load(checkpoint / "config.yaml", validate_paths=False)
    if cfg.intra_op_threads is not None:
        torch.set_num_threads(cfg.intra_op_threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_model(checkpoint, device)
    data = DataConfig(paths=[str(path) for path in heldout], drop_last=False)
    dataset = build_memmap_dataset(cfg, data)
    if len(dataset) == 0:
        raise ValueError(
            f"expected held-out instances of {cfg.model.max_sequence_length} tokens, found none in "
            f"{len(heldout)} files; raise heldout_share in the recipe"
        )
    batches = build_eval_batches(cfg, data, cfg.device_eval_batch_size, 0, 1)
    found = evaluate(model, LABEL, dataset, batches, device, autocast(cfg, device))
    loss = found[f"eval/{LABEL}/CrossEntropyLoss"]
    return {"CrossEntropyLoss": loss, "Perplexity": math.exp(loss), "instances": len(dataset)}
