"""The keys of OLMo's config that this trainer ignores, and why that changes no result."""

from __future__ import annotations

from typing import Any

from olmo.config import TrainConfig
from olmo.runtime.log import log

HARMLESS = {
    "fused_loss": "the loss is always fused",
    "device_train_batch_size": "global_train_batch_size and the number of processes decide it",
    "device_train_grad_accum": "device_train_microbatch_size decides it",
    "new_style_checkpoints": "one sharded layout is written",
    "sharded_checkpointer": "one sharded layout is written",
    "load_path_sharded_checkpointer": "the layout is detected",
    "canceled_check_interval": "checked at every step",
    "extra_steps_after_cancel": "a resumed run repeats nothing",
    "fsdp.use_orig_params": "always so",
    "ddp.grad_sync_mode": "gradients are reduced once a step",
    "ddp.find_unused_params": "no parameter is unused",
    "model.init_device": "weights are initialised on the CPU, the same for every device",
    "model.precision": "TrainConfig.precision decides",
    "data.num_workers": "a thread prefetches",
    "data.prefetch_factor": "a thread prefetches",
    "data.persistent_workers": "a thread prefetches",
    "data.timeout": "a thread prefetches",
    "wandb.log_artifacts": "checkpoints are not uploaded there",
    "wandb.rank_zero_only": "always so",
    "tokenizer.truncate_direction": "token files are not truncated",
}


def log_ignored_keys(cfg: TrainConfig) -> None:
    """Log the set keys that are ignored."""
    if ignored := [f"{k} ({why})" for k, why in HARMLESS.items() if _is_set(cfg, k)]:
        log.info(f"ignored keys: {', '.join(ignored)}")


def _is_set(cfg: TrainConfig, key: str) -> bool:
    """Whether a key has another value than its default."""
    value: Any = cfg
    for name in key.split("."):
        if value is None:
            return False
        owner, value = value, getattr(value, name)
    return value != getattr(type(owner)(), key.split(".")[-1])
