"""What of a training config decides the bytes of its result: what the store knows a run by."""

from __future__ import annotations

import dataclasses
from typing import Any

from olmo.config import TrainConfig
from olmo.config.strict import as_plain, default_of

# Fields that do not decide the bytes of what is trained: where things lie, what is told, when it
# is saved, what is measured on the way, and how fast data is fetched. All others do.
FREE = frozenset(
    {
        "run_name",
        "dry_run",
        "wandb",
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
        "data.num_workers",
        "data.pin_memory",
        "data.prefetch_factor",
        "data.persistent_workers",
        "data.timeout",
    }
)


def identity(cfg: TrainConfig) -> dict[str, Any]:
    """The fields that decide the bytes of the result and differ from their default.

    Plain values, ready for JSON. A field added later has its default in older runs and so does
    not change their identity. The data is not here: its files' digests are its identity, and the
    tokens' digests already depend on the tokenizer.

    Raises:
        ValueError: the environment decides one of them. It is no part of what a run is known by,
            and may be a secret.
    """
    for place, (text, _) in cfg.from_environment.items():
        keys = [str(key) for key in place]
        if not FREE & {".".join(keys[: n + 1]) for n in range(len(keys))}:
            raise ValueError(
                f"{'.'.join(keys)}: expected a value, since it decides what is trained; found "
                f"{text}. Write the value, or give it in the run's overrides"
            )

    def differing(config: Any, default: Any, where: str) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for f in dataclasses.fields(config):
            value = getattr(config, f.name)
            standard = default_of(f) if default is None else getattr(default, f.name)
            place = where + f.name
            if place in FREE or value == standard:
                continue
            if dataclasses.is_dataclass(value) and not isinstance(value, type):
                inner = differing(value, standard, place + ".")
                if inner or standard is None:
                    out[f.name] = inner
            else:
                out[f.name] = as_plain(value)
        return out

    return differing(cfg, TrainConfig(), "")
