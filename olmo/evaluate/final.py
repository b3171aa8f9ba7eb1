"""Evaluate a finished checkpoint, outside its run."""

import math
from pathlib import Path
from typing import Any

import torch

from olmo.checkpoint.read import load_model
from olmo.config import DataConfig, EvaluatorConfig, TrainConfig
from olmo.evaluate.evaluators import evaluate
from olmo.evaluate.perplexity import HeldOut
from olmo.train.parallel import join_world

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
    world = join_world()
    model = load_model(checkpoint, world.device)
    paths, dtype = [str(path) for path in heldout], cfg.data.memmap_dtype
    data = DataConfig(paths=paths, memmap_dtype=dtype, drop_last=False)
    evaluator = EvaluatorConfig(LABEL, data=data, subset_num_batches=-1)
    heldout_set = HeldOut(cfg, evaluator, world)
    if len(heldout_set.dataset) == 0:
        raise ValueError(
            f"expected held-out instances of {cfg.model.max_sequence_length} tokens, found none in "
            f"{len(heldout)} files; raise heldout_share in the recipe"
        )
    found = evaluate([heldout_set], model)
    loss, instances = found[f"eval/{LABEL}/CrossEntropyLoss"], len(heldout_set.dataset)
    return {"CrossEntropyLoss": loss, "Perplexity": math.exp(loss), "instances": instances}
