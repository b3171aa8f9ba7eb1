"""The identity of a run in the store: the fields of its config that determine its result."""

from __future__ import annotations

import dataclasses
from typing import Any

from olmo.config import TrainConfig
from olmo.config.conversion import field_default, to_plain

# Fields that do not determine the trained weights: paths, logging, when to save, evaluation, the
# speed of data loading. All other fields do.
NOT_IN_IDENTITY = frozenset(
    {
        "run_name",
        "dry_run",
        "wandb",
        "trackio",
        "tensorboard",
        "speed_monitor",
        "console_log_interval",
        "gen1_gc_interval",
        "save_data_indices",
        "save_folder",
        "remote_save_folder",
        "save_interval",
        "save_interval_unsharded",
        "save_interval_ephemeral",
        "save_num_checkpoints_to_keep",
        "save_num_unsharded_checkpoints_to_keep",
        "save_overwrite",
        "force_save_unsharded",
        "no_pre_train_checkpoint",
        "try_load_latest_save",
        "sharded_checkpointer",
        "load_path_sharded_checkpointer",
        "new_style_checkpoints",
        "canceled_check_interval",
        "time_limit",
        "hang_timeout",
        "extra_steps_after_cancel",
        "python_profiling",
        "torch_profiling",
        "module_outputs_save_steps",
        "evaluators",
        "eval_interval",
        "eval_subset_num_batches",
        "eval_on_load",
        "device_eval_batch_size",
        "hf_datasets_cache_dir",
        "single",
        "fused_loss",
        "device_train_batch_size",
        "device_train_grad_accum",
        "tokenizer",
        "model.init_device",
        "model.precision",
        "optimizer.metrics_log_interval",
        "optimizer.record_update_metrics",
        "data.paths",
        "data.datasets",
        "data.label_mask_paths",
        "data.order_path",
        "data.holes_path",
        "data.token_bytes_paths",
        "data.num_workers",
        "data.pin_memory",
        "data.prefetch_factor",
        "data.persistent_workers",
        "data.timeout",
    }
)


def identity(cfg: TrainConfig) -> dict[str, Any]:
    """The fields that determine the result's bytes and differ from their default, as plain values.

    A field that is added later has its default in older runs, and so does not change their
    identity. Data and tokenizer are not included: the digests of the token files depend on both.

    Raises:
        ValueError: an environment variable sets one of them. Its value may be a secret, and is not
            recorded.
    """
    for place, (text, _) in cfg.from_environment.items():
        keys = [str(key) for key in place]
        if not NOT_IN_IDENTITY & {".".join(keys[: n + 1]) for n in range(len(keys))}:
            raise ValueError(
                f"{'.'.join(keys)}: expected a value, since the trained weights depend on it; "
                f"found {text}. Write the value, or give it in the run's overrides"
            )

    def non_default(config: Any, default: Any, where: str) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for f in dataclasses.fields(config):
            value = getattr(config, f.name)
            standard = field_default(f) if default is None else getattr(default, f.name)
            place = where + f.name
            if place in NOT_IN_IDENTITY or value == standard:
                continue
            if dataclasses.is_dataclass(value) and not isinstance(value, type):
                inner = non_default(value, standard, place + ".")
                if inner or standard is None:
                    out[f.name] = inner
            else:
                out[f.name] = to_plain(value)
        return out

    return non_default(cfg, TrainConfig(), "")
