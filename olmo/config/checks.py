"""Checks that need the config alone: they run before any file is read or model is built."""

from __future__ import annotations

import math
import sys
from typing import Any

from olmo.config.data_config import DataConfig
from olmo.config.enums import ActivationType, FSDPWrapStrategy, OptimizerType
from olmo.config.strict import check_range
from olmo.config.train_config import ModelConfig, OptimizerConfig, TrainConfig

# (minimum, maximum, keys): values outside would fail later, or train nonsense.
RANGES = (
    (
        1,
        math.inf,
        "model.d_model model.n_heads model.mlp_ratio model.mlp_hidden_size model.block_group_size "
        "model.rope_theta model.max_sequence_length model.vocab_size eval_interval save_interval "
        "save_interval_unsharded save_interval_ephemeral global_train_batch_size "
        "device_train_microbatch_size device_eval_batch_size console_log_interval "
        "wandb.log_interval trackio.log_interval tensorboard.log_interval "
        "fsdp.hybrid_sharding_num_model_replicas fp8.history intra_op_threads",
    ),
    (
        0,
        math.inf,
        "seed data.seed epoch fast_forward_batches model.n_layers model.n_kv_heads "
        "model.embedding_size model.clip_qkv model.layer_norm_eps "
        "max_grad_norm max_grad_norm_ratio speed_monitor.window_size",
    ),
    (0, sys.float_info.max, "optimizer.learning_rate optimizer.eps"),
    (0, 1, "model.attention_dropout model.residual_dropout model.embedding_dropout"),
    (
        0,
        2**63,
        "model.init_std model.emb_init_std model.init_cutoff_factor optimizer.weight_decay "
        "scheduler.t_warmup scheduler.t_max scheduler.t_decay scheduler.grad_clip_warmup_steps",
    ),
)


def check_train_config(cfg: TrainConfig) -> None:
    """Raises ValueError for a number out of range, and for keys that exclude each other."""
    for least, most, names in RANGES:
        for name in names.split():
            found: Any = cfg
            for key in name.split("."):
                found = getattr(found, key, None)  # None if the section is not set
            check_range(name, found, least, most)
    for evaluator in cfg.evaluators:
        name = f"evaluators.{evaluator.label}.device_eval_batch_size"
        check_range(name, evaluator.device_eval_batch_size, 1)
    _ = cfg.duration
    check_model(cfg.model)
    check_optimizer(cfg.optimizer)
    lowest, peak = cfg.scheduler.warmup_min_lr, cfg.optimizer.learning_rate
    if lowest is not None and not 0 <= lowest < peak:
        raise ValueError(
            f"scheduler.warmup_min_lr must be from 0 to below optimizer.learning_rate ({peak}), "
            f"found {lowest}"
        )
    by_group = (FSDPWrapStrategy.by_block_group, FSDPWrapStrategy.by_block_group_and_size)
    if cfg.fsdp and cfg.fsdp.wrapping_strategy in by_group and cfg.model.block_group_size == 1:
        raise ValueError(
            f"fsdp.wrapping_strategy={cfg.fsdp.wrapping_strategy} needs model.block_group_size "
            "above 1"
        )
    check_data(cfg.data)
    if cfg.compile and cfg.compile.coordinate_descent_tuning and cfg.compile.mode:
        raise ValueError(
            f"compile.coordinate_descent_tuning: expected compile.mode: null, found "
            f"{cfg.compile.mode}, which says by itself what is tuned; --compile.mode=null"
        )


def check_data(data: DataConfig) -> None:
    """Raises ValueError for instances from more than one place."""
    if data.custom_dataset and (data.paths or data.datasets):
        raise ValueError("data.custom_dataset excludes data.paths and data.datasets; keep one")
    if data.custom_dataset and data.holes_path:
        raise ValueError("data.holes_path is for token files, not for data.custom_dataset")
    if data.paths and data.datasets:
        raise ValueError("data.paths and data.datasets: expected one of them, found both")


def check_optimizer(config: OptimizerConfig) -> None:
    """Raises ValueError for settings that the optimizer does not have."""
    if config.packed_state and config.name != OptimizerType.adamw:
        raise ValueError(f"optimizer.packed_state is for adamw, not for {config.name}")
    if config.packed_state and config.selective_updates:
        raise ValueError(
            "optimizer.packed_state has one scale for a whole tensor, selective_updates works "
            "entry by entry; set one of them to false"
        )
    if config.name == OptimizerType.muon and config.selective_updates:
        raise ValueError(
            "optimizer.selective_updates works entry by entry, Muon on whole matrices; "
            "set --optimizer.selective_updates=false or another optimizer.name"
        )


def check_model(config: ModelConfig) -> None:
    """Raises ValueError for a model that cannot be built."""
    heads = config.effective_n_kv_heads
    head_size, rest = divmod(config.d_model, config.n_heads)
    if rest:
        raise ValueError(
            f"model.d_model must be a multiple of model.n_heads; found {config.d_model} and "
            f"{config.n_heads}"
        )
    if heads == 0 or config.n_heads % heads:
        raise ValueError(
            f"model.n_heads must be a multiple of model.n_kv_heads; found {config.n_heads} and "
            f"{heads}"
        )
    if config.rope and head_size % 2:
        raise ValueError(
            f"model.rope needs an even head size; model.d_model / model.n_heads is {head_size}"
        )
    if config.alibi and config.flash_attention:
        raise ValueError(
            "model.alibi needs an attention bias, which flash attention does not support; "
            "set model.flash_attention=false"
        )
    if config.alibi and config.rope:
        raise ValueError("model.alibi and model.rope exclude each other; keep one of them")
    if config.clip_qkv is not None and config.clip_qkv <= 0:
        raise ValueError(f"model.clip_qkv must be above 0 or null; found {config.clip_qkv}")
    hidden = config.mlp_hidden_size or config.mlp_ratio * config.d_model
    if config.activation_type == ActivationType.swiglu and hidden % 2:
        raise ValueError(
            f"swiglu halves the hidden size, which must be even; found {hidden}: "
            "change model.mlp_hidden_size or model.mlp_ratio"
        )
    if config.embedding_size is not None and config.embedding_size < config.vocab_size:
        raise ValueError(
            f"model.embedding_size must be at least model.vocab_size ({config.vocab_size}), "
            f"found {config.embedding_size}"
        )
    size = config.block_group_size
    if not 0 < size <= config.n_layers or config.n_layers % size:
        raise ValueError(
            f"model.n_layers must be a multiple of model.block_group_size; found "
            f"{config.n_layers} and {size}"
        )
