"""What can be known to be wrong before data, model and checkpoint are opened: with the config alone
(olmo.config.checks), then with the world size, device, installed packages and token files."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import torch

from olmo.config import CustomDatasetCollatorConfig, EvaluatorType, TrainConfig
from olmo.config.checks import check_train_config
from olmo.data.checks import check_labels, check_token_files
from olmo.data.memmap import build_memmap_dataset
from olmo.distributed.parallelize import is_fsdp
from olmo.distributed.world import World
from olmo.model import loss
from olmo.model.kernel_choice import MaskType, choose_kernel
from olmo.optim import master_weights
from olmo.precision import converters, msamp
from olmo.runtime.log import log
from olmo.train.unused import log_ignored_keys

# What ends a document, and its id in the tokenizers that OLMo's public configs name.
END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_IDS = {
    "gpt-neox-20b-pii-special": 0,
    "gpt-neox-olmo-dolma-v1_5": 50279,
    "dolma2": 100257,
}


def validate(cfg: TrainConfig, world: World) -> None:
    """Fail before hours are spent. Rank 0 also looks at the token files.

    Raises:
        ValueError: a setting that is not available here, or contradicts another or the data: a
            batch that does not divide by the world size, token ids beyond the embeddings, …
        OSError: token files that are missing or not readable.
    """
    check_train_config(cfg)
    log_ignored_keys(cfg)
    if "://" in cfg.save_folder:
        raise ValueError(
            f"save_folder: expected a local folder, found {cfg.save_folder}; give "
            "--save_folder=FOLDER, and a bucket as --remote_save_folder"
        )
    batch_size = cfg.global_train_batch_size
    if batch_size % world.size:
        raise ValueError(
            f"global_train_batch_size={batch_size} is not a multiple of the {world.size} "
            "processes; change one of them"
        )
    for tracker in ("wandb", "trackio", "tensorboard"):
        if getattr(cfg, tracker) is not None and not _is_installed(tracker):
            raise ValueError(
                f"the config has `{tracker}`, but the package is not installed: "
                f"`uv pip install {tracker}`, or remove it with --{tracker}=null"
            )
    check_special_tokens(cfg)
    check_device(cfg, world.device, is_fsdp(cfg, world))
    if world.is_rank0:
        warn_of_other_tokenizer(cfg)
        _check_data(cfg)


def check_device(cfg: TrainConfig, device: torch.device, sharded: bool) -> None:
    """Check that the device, this torch and the installed packages support the config.

    Raises:
        ValueError: with the remedy.
    """
    if cfg.use_msamp and (reason := msamp.find_msamp_problem(cfg)):
        raise ValueError(f"use_msamp: {reason}")
    if cfg.master_weights and (reason := master_weights.find_master_weights_problem(cfg, sharded)):
        raise ValueError(f"master_weights: {reason}")
    if cfg.cross_entropy is not None and (reason := loss.find_loss_problem(cfg)):
        raise ValueError(f"cross_entropy: {cfg.cross_entropy} is not available: {reason}")
    if cfg.optimizer.packed_state and sharded:
        raise ValueError(
            "optimizer.packed_state keeps whole tensors, and these are split over processes; "
            "set distributed_strategy: ddp or optimizer.packed_state: false"
        )
    if cfg.fp8 is not None:
        converters.get_converter(cfg.fp8, device)
    choose_kernel(cfg.model, device, cfg.autocast_precision, cfg.attention, choose_mask_type(cfg))


def check_special_tokens(cfg: TrainConfig) -> None:
    """Warn of a model.eos_token_id or pad_token_id beyond the vocabulary: another tokenizer's.

    Raises:
        ValueError: this run looks for that token in the data, or puts it into batches.
    """
    model = cfg.model
    texts = [e for e in cfg.evaluators if e.type == EvaluatorType.lm]
    sets = [cfg.data, *(evaluator.data for evaluator in texts)]
    pads = model.pad_token_id >= (model.embedding_size or model.vocab_size)
    users = {
        "eos_token_id": {"generate_doc_lengths": any(d.generate_doc_lengths for d in sets)},
        "pad_token_id": {
            "generate_attention_mask": any(d.generate_attention_mask for d in sets),
            "data.custom_dataset": pads and cfg.data.custom_dataset is not None,
            "a downstream evaluator": pads and len(texts) < len(cfg.evaluators),
        },
    }
    for name, needs in users.items():
        if (token := getattr(model, name)) < model.vocab_size:
            continue
        found = f"model.{name}={token} is not below model.vocab_size={model.vocab_size}"
        if needed := [user for user, is_needed in needs.items() if is_needed]:
            raise ValueError(
                f"{found}, and {' and '.join(needed)} needs it; they are of different tokenizers, "
                f"give --model.{name}=… of the data's"
            )
        log.warning(f"{found}: they are of different tokenizers. Nothing in this run needs it")


def warn_of_other_tokenizer(cfg: TrainConfig) -> None:
    """Warn where tokenizer.identifier ends a document with another id than model.eos_token_id.

    OLMo's own public configs do. It is no error, since training needs no tokenizer; but documents
    are then split at a token that the tokenizer never writes.
    """
    identifier = cfg.tokenizer.identifier
    if Path(identifier).is_file():
        added = json.loads(Path(identifier).read_text(encoding="utf-8")).get("added_tokens", [])
        ends = [token["id"] for token in added if token["content"] == END_OF_TEXT]
    else:
        ends = [end for name, end in END_OF_TEXT_IDS.items() if name in identifier]
    if ends and cfg.model.eos_token_id not in ends:
        log.warning(
            f"tokenizer.identifier names {identifier}, which ends a text with {ends[0]}, but "
            f"model.eos_token_id is {cfg.model.eos_token_id}: one of them is not what made the data"
        )


def choose_mask_type(cfg: TrainConfig) -> MaskType:
    """Which positions may attend to which in this run's batches; decides the attention kernel."""
    data, fields = cfg.data, CustomDatasetCollatorConfig()
    if data.custom_dataset is not None and data.custom_dataset.collate_config is not None:
        fields = data.custom_dataset.collate_config
    if data.generate_attention_mask or fields.attention_mask_field or fields.attention_bias_field:
        return MaskType.any
    between = data.generate_doc_lengths or fields.doc_lens_field
    return MaskType.documents if between else MaskType.causal


def _is_installed(package: str) -> bool:
    if package in sys.modules:
        return sys.modules[package] is not None
    return importlib.util.find_spec(package) is not None


def _check_data(cfg: TrainConfig) -> None:
    """Token files of training and evaluation: sizes, dtype, ids, label masks."""
    vocabulary = cfg.model.embedding_size or cfg.model.vocab_size
    if cfg.data.custom_dataset is None:
        dataset = build_memmap_dataset(cfg, cfg.data)
        check_token_files(dataset, vocabulary)
        check_labels(dataset)
    for evaluator in cfg.evaluators:
        if evaluator.type == EvaluatorType.lm:  # a task's data is read when that is built
            where = f"evaluators.{evaluator.label}.data"
            dataset = build_memmap_dataset(cfg, evaluator.data)
            check_token_files(dataset, vocabulary, where)
            check_labels(dataset, where, required=False)
