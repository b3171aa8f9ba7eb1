"""Keys of a training config that act in the trainer, in the stages before it: heeded or refused."""

import dataclasses
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from olmo.config import TrainConfig
from olmo.corpus.listing import Entry, write_listing
from olmo.corpus.order import order as order_command
from olmo.data import order
from olmo.pipeline.parts import order_flags
from olmo.pipeline.plan import Plan
from olmo.pipeline.train import build_link_overrides

# Another value, and what of the plan differs by it: a stage's flags, or what it is refused with.
HEEDED: dict[str, tuple[Any, str]] = {
    "epoch": (2, "--sequence-length 1024 --seed 6198 --dtype uint16 --batch-size 512 --epoch 2"),
    "seed": (7, "--sequence-length 1024 --seed 7 --dtype uint16 --batch-size 512"),
    "data.seed": (7, "--sequence-length 1024 --seed 7 --dtype uint16 --batch-size 512"),
    "data.memmap_dtype": (
        "int16",
        "--sequence-length 1024 --seed 6198 --dtype int16 --batch-size 512",
    ),
    "model.max_sequence_length": (
        64,
        "--sequence-length 64 --seed 6198 --dtype uint16 --batch-size 512",
    ),
}
REFUSED: dict[str, tuple[Any, str]] = {
    "data.custom_dataset": ({"name": "a.B"}, "only; remove it"),
    "data.order_path": ("order.npy", "only; remove it"),
    "data.mixture": (True, "only; remove it"),
    "data.label_mask_paths": (["m.npy"], "only; remove it"),
    "data.holes_path": ("h.npy", "only; remove it"),
    "data.token_bytes_paths": (["b.npy"], "only; remove it"),
    "fast_forward_batches": (2, "only; remove it"),
    "dry_run": (True, "only; remove it"),
    "load_path": ("step5", "start_from: step5"),
    "data.paths": (["a.npy"], "remove data.paths and data.datasets, or the dataset"),
    "data.datasets": ({"a": ["a.npy"]}, "remove data.paths and data.datasets, or the dataset"),
    "data.memmap_dtype": ("uint32", "expected uint16, .* found uint32"),
    "model.vocab_size": (500, "trains a tokenizer of train_vocab_size 512"),
    "model.embedding_size": (500, "at least model.vocab_size"),
    "model.eos_token_id": (5, "set model.eos_token_id: 0"),
    "model.pad_token_id": (5, "set model.pad_token_id: 1"),
    "global_train_batch_size": (9, "share global_train_batch_size=9 evenly"),
}
# Sections and keys of the model, the step, the schedule, evaluation, saving and telling: no stage
# before training makes anything that they have a say in.
TRAINING_ALONE = """
    optimizer scheduler evaluators wandb trackio tensorboard speed_monitor compile fsdp ddp single
    fp8
    eval_interval eval_subset_num_batches eval_on_load device_eval_batch_size hf_datasets_cache_dir
    remote_save_folder save_interval save_interval_unsharded save_interval_ephemeral
    save_num_checkpoints_to_keep save_num_unsharded_checkpoints_to_keep force_save_unsharded
    no_pre_train_checkpoint canceled_check_interval sharded_checkpointer new_style_checkpoints
    load_path_sharded_checkpointer run_name console_log_interval gen1_gc_interval
    device_train_batch_size device_train_microbatch_size device_train_grad_accum max_grad_norm
    max_grad_norm_ratio precision distributed_strategy softmax_auxiliary_loss
    auxiliary_loss_multiplier time_limit extra_steps_after_cancel early_stopping_factor
    save_data_indices python_profiling torch_profiling stop_after activation_checkpointing
    fused_loss module_outputs_save_steps use_msamp attention master_weights cross_entropy
    intra_op_threads hang_timeout
    model.d_model model.n_heads model.n_kv_heads model.clip_qkv model.n_layers model.mlp_ratio
    model.mlp_hidden_size model.activation_type model.block_type model.block_group_size model.alibi
    model.alibi_bias_max model.rope model.rope_full_precision model.rope_theta
    model.flash_attention model.attention_dropout model.multi_query_attention
    model.attention_layer_norm model.residual_dropout model.embedding_dropout
    model.embedding_layer_norm model.layer_norm_type model.layer_norm_with_affine
    model.layer_norm_eps model.attention_layer_norm_with_affine model.include_bias
    model.bias_for_layer_norm model.scale_logits model.weight_tying model.init_device
    model.init_fn model.init_std model.init_cutoff_factor model.precision model.scale_emb_init
    model.emb_init_std model.norm_after
    data.num_workers data.pin_memory data.prefetch_factor data.persistent_workers data.timeout
"""
HARMLESS = {
    **dict.fromkeys(TRAINING_ALONE.split(), "no stage before training has to do with it"),
    "max_duration": "the trainer makes the orders of further epochs; `cuts` counts the steps",
    "stop_at": "as max_duration",
    "save_folder": "the pipeline's own",
    "save_overwrite": "the pipeline's own",
    "try_load_latest_save": "the pipeline's own",
    "restore_dataloader": "a run with start_from is a new one, and an interrupted one goes on",
    "reset_optimizer_state": "`start_flags` uses it; without start_from there is none",
    "reset_trainer_state": "checked where there is a start_from; without it there is none",
    "tokenizer.identifier": "the recipe names the tokenizer; else `recipe_from_train_config` does",
    "tokenizer.truncate_direction": "token files are not truncated",
    "data.drop_last": "the trainer fits the stored order to its processes",
    "data.pad_direction": "instances of token files are whole, and instructions padded right",
    "data.generate_attention_mask": "by the pad_token_id, which is checked",
    "data.generate_doc_lengths": "by the eos_token_id, which is checked",
    "data.instance_filter": "tokens are kept, instances are left out of the loss",
}


@pytest.fixture(autouse=True)
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OLMO_STORE", "store")


def plan(key: str = "", value: Any = None, dataset: str | None = "mine") -> Plan:
    recipe = {"sources": {"stdlib": 1}, "tokenizer": {"train_vocab_size": 512}}
    Path("config/data").mkdir(parents=True, exist_ok=True)
    Path("config/data/mine.yaml").write_text(yaml.safe_dump(recipe))
    model = {"vocab_size": 512, "embedding_size": 512, "eos_token_id": 0, "pad_token_id": 1}
    config: dict[str, Any] = {"model": model}
    section, _, name = key.rpartition(".")
    (config.setdefault(section, {}) if section else config)[name] = value
    config.pop("", None)
    Path("t.yaml").write_text(yaml.safe_dump(config))
    run = {"train": "t.yaml", "dataset": dataset, "nodes": 2}
    return Plan({"runs": {"r": {k: v for k, v in run.items() if v}}})


def keys() -> set[str]:
    """Each key; of sections that only training has to do with, the section."""
    default, found = TrainConfig(), set()
    for field in dataclasses.fields(TrainConfig):
        value = getattr(default, field.name)
        inner = field.name in ("model", "data", "tokenizer")
        names = [f".{f.name}" for f in dataclasses.fields(value)] if inner else [""]
        found |= {field.name + name for name in names}
    return found


def test_every_key_is_heeded_refused_or_harmless() -> None:
    assert keys() == HEEDED.keys() | REFUSED.keys() | HARMLESS.keys()
    assert not (HEEDED.keys() | REFUSED.keys()) & HARMLESS.keys()


@pytest.mark.parametrize("key", HEEDED)
def test_what_is_heeded(key: str) -> None:
    value, flags = HEEDED[key]
    assert order_flags(plan(key, value), "r") == flags != order_flags(plan(), "r")


@pytest.mark.parametrize("key", REFUSED)
def test_what_is_refused(key: str) -> None:
    plan().train_config("r")
    value, message = REFUSED[key]
    with pytest.raises(ValueError, match=f"^(t|config/config).yaml.*{message}"):
        plan(key, value).train_config("r")


def test_what_a_run_without_a_data_set_may_not_have_either() -> None:
    names = {"data": {"paths": ["a.npy"], "order_path": "order.npy"}}
    model = {"model": {"vocab_size": 512, "eos_token_id": 0, "pad_token_id": 1}}
    Path("t.yaml").write_text(yaml.safe_dump(names | model))
    with pytest.raises(
        ValueError, match=r"^t.yaml: data.order_path works with `python -m olmo.train`"
    ):
        Plan({"runs": {"r": {"train": "t.yaml"}}}).train_config("r")


def test_the_order_is_that_of_the_epoch_in_which_the_run_begins() -> None:
    write_listing(Path("000.tsv"), [Entry("a", "tokens", "tokens/a.npy", "0" * 64, 2 * 1024 * 600)])
    words = shlex.split(order_flags(plan("epoch", 2), "r"))
    flags = {k[2:].replace("-", "_"): v for k, v in zip(words[::2], words[1::2], strict=True)}
    numbers = {k: v if k == "dtype" else int(v) for k, v in flags.items()}
    order_command([Path("000.tsv")], Path("order"), **numbers)
    assert order.read_order("order").tolist() == order.global_indices(600, 6198, 2).tolist()


def test_a_chain_counts_epochs_from_that_in_which_the_run_begins() -> None:
    cfg = TrainConfig(epoch=2, max_duration="3ep")
    settings = build_link_overrides(cfg, Path("before"), None)
    assert settings["epoch"] is None and settings["max_duration"] == "5ep"
    assert "max_duration" not in build_link_overrides(
        TrainConfig(epoch=2, max_duration=9), Path("before"), None
    )
    assert build_link_overrides(cfg, None, 3) == {"stop_at": 3}, "the first link begins there"
