"""Keys of OLMo's config that this trainer does not act on: all of them, and why they may be set."""

from __future__ import annotations

from typing import Any

from olmo.config import TrainConfig
from olmo.runtime.log import log

# Ignoring these changes nothing that was asked for. They are named once at the start if set.
HARMLESS = {
    "fused_loss": "the loss is always fused",
    "device_train_batch_size": "it follows from the global one and the number of processes",
    "device_train_grad_accum": "it follows from the batch and device_train_microbatch_size",
    "new_style_checkpoints": "one sharded layout is written",
    "sharded_checkpointer": "one sharded layout is written",
    "load_path_sharded_checkpointer": "the layout is found by looking",
    "canceled_check_interval": "every step looks",
    "extra_steps_after_cancel": "a resumed run repeats nothing",
    "fsdp.use_orig_params": "always so",
    "ddp.grad_sync_mode": "gradients meet once a step",
    "ddp.find_unused_params": "no parameter is unused",
    "model.init_device": "weights are drawn on the CPU, the same everywhere",
    "model.precision": "TrainConfig.precision decides",
    "data.num_workers": "a thread reads ahead",
    "data.prefetch_factor": "a thread reads ahead",
    "data.persistent_workers": "a thread reads ahead",
    "data.timeout": "a thread reads ahead",
    "wandb.log_artifacts": "checkpoints stay where they are",
    "wandb.rank_zero_only": "always so",
    "tokenizer.truncate_direction": "token files are not truncated",
}


def check_unused(cfg: TrainConfig) -> None:
    """Tell of set keys that are ignored."""
    if ignored := [f"{k} ({why})" for k, why in HARMLESS.items() if _is_set(cfg, k)]:
        log.info(f"not acted on: {', '.join(ignored)}")


def _is_set(cfg: TrainConfig, key: str) -> bool:
    """Whether a key has another value than its default."""
    value: Any = cfg
    for name in key.split("."):
        if value is None:
            return False
        owner, value = value, getattr(value, name)
    return value != getattr(type(owner)(), key.split(".")[-1])
