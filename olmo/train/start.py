"""Where a run begins, where it ends, and what is refused before it does either."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from olmo.checkpoint import layout
from olmo.checkpoint.read import Checkpoint, look, newest
from olmo.config import CustomDatasetCollatorConfig, EvaluatorType, TrainConfig
from olmo.data.batches import check_labels
from olmo.data.memmap import build_memmap_dataset, check_token_files
from olmo.distributed.parallelize import is_fsdp
from olmo.distributed.world import World
from olmo.model import loss
from olmo.model.kernels import Mask, choose
from olmo.optim import master_weights
from olmo.precision import backends, msamp
from olmo.runtime.log import format_count, log
from olmo.train.unused import check_unused

T = TypeVar("T")


@dataclass
class TrainState:
    """Where a run is. The names are OLMo's."""

    global_step: int = 0
    epoch: int = 0
    global_train_examples_seen_this_epoch: int = 0
    global_train_tokens_seen: int = 0


def check(cfg: TrainConfig, world: World) -> None:
    """What can be known to be wrong before anything is built. The first process reads the data.

    Raises:
        ValueError: a setting that cannot be had, or contradicts another or the data: a batch that
            the processes cannot share, token ids beyond the embeddings, …
        OSError: token files that are not there or cannot be read.
    """
    check_unused(cfg)
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
    check_ends(cfg)
    check_device(cfg, world.device, is_fsdp(cfg, world))
    if not world.is_rank0:
        return
    warn_of_other_tokenizer(cfg)
    vocabulary = cfg.model.embedding_size or cfg.model.vocab_size
    looked_at = 0
    if cfg.data.custom_dataset is None:
        dataset = build_memmap_dataset(cfg, cfg.data)
        looked_at = check_token_files(dataset, vocabulary)
        check_labels(dataset)
    for evaluator in cfg.evaluators:
        if evaluator.type != EvaluatorType.lm:
            continue  # read when it is built
        where = f"evaluators.{evaluator.label}.data"
        dataset = build_memmap_dataset(cfg, evaluator.data)
        looked_at += check_token_files(dataset, vocabulary, where)
        check_labels(dataset, where, required=False)
    log.info(f"checked: {format_count(looked_at)} tokens, all below {vocabulary}")


def check_device(cfg: TrainConfig, device: torch.device, sharded: bool) -> None:
    """What the device, torch or a package cannot compute; known before a model is built.

    Raises:
        ValueError: with the remedy.
    """
    if cfg.use_msamp and (reason := msamp.find_msamp_problem(cfg)):
        raise ValueError(f"use_msamp: {reason}")
    if cfg.master_weights and (reason := master_weights.find_master_weights_problem(cfg, sharded)):
        raise ValueError(f"master_weights: {reason}")
    if cfg.cross_entropy is not None and (reason := loss.find_loss_problem(cfg)):
        raise ValueError(f"cross_entropy: {cfg.cross_entropy} is not available: {reason}")
    if cfg.compile and cfg.compile.coordinate_descent_tuning and cfg.compile.mode:
        raise ValueError(
            f"compile.coordinate_descent_tuning: expected compile.mode: null, found "
            f"{cfg.compile.mode}, which says by itself what is tuned; --compile.mode=null"
        )
    if cfg.fp8 is not None:
        backends.get_converter(cfg.fp8, device)
    choose(cfg.model, device, cfg.autocast_precision, cfg.attention, masks(cfg))


def check_ends(cfg: TrainConfig) -> None:
    """Warn of a model.eos_token_id or pad_token_id that is of another tokenizer than the rest.

    Raises:
        ValueError: something looks for that token in the data, or puts it into batches.
    """
    model = cfg.model
    texts = [e for e in cfg.evaluators if e.type == EvaluatorType.lm]
    sets = [cfg.data, *(evaluator.data for evaluator in texts)]
    pads = model.pad_token_id >= (model.embedding_size or model.vocab_size)
    uses = {
        "eos_token_id": {"generate_doc_lengths": any(d.generate_doc_lengths for d in sets)},
        "pad_token_id": {
            "generate_attention_mask": any(d.generate_attention_mask for d in sets),
            "data.custom_dataset": pads and cfg.data.custom_dataset is not None,
            "a downstream evaluator": pads and len(texts) < len(cfg.evaluators),
        },
    }
    for name, users in uses.items():
        if (token := getattr(model, name)) < model.vocab_size:
            continue
        found = f"model.{name}={token} is not below model.vocab_size={model.vocab_size}"
        if needed := [user for user, needs in users.items() if needs]:
            raise ValueError(
                f"{found}, and {' and '.join(needed)} needs it; they are of different tokenizers, "
                f"give --model.{name}=… of the data's"
            )
        log.warning(f"{found}: they are of different tokenizers. Nothing in this run needs it")


def masks(cfg: TrainConfig) -> Mask:
    """Who may look at whom in the batches that will come."""
    data, fields = cfg.data, CustomDatasetCollatorConfig()
    if data.custom_dataset is not None and data.custom_dataset.collate_config is not None:
        fields = data.custom_dataset.collate_config
    if data.generate_attention_mask or fields.attention_mask_field or fields.attention_bias_field:
        return Mask.any
    between = data.generate_doc_lengths or fields.doc_lens_field
    return Mask.documents if between else Mask.causal


def origin_of_threads(cfg: TrainConfig) -> str:
    """Who says how many CPU threads a process has: the config, its environment (`olmo train` and
    torchrun set it too), or torch."""
    if cfg.intra_op_threads is not None:
        return "intra_op_threads"
    return "OMP_NUM_THREADS" if os.environ.get("OMP_NUM_THREADS") else "torch's choice"


# The token that ends a text, and its id in the tokenizers that OLMo's public configs name.
END_OF_TEXT = "<|endoftext|>"
KNOWN_ENDS = {"gpt-neox-20b-pii-special": 0, "gpt-neox-olmo-dolma-v1_5": 50279, "dolma2": 100257}


def warn_of_other_tokenizer(cfg: TrainConfig) -> None:
    """Say so where the tokenizer that a config names ends a text with another id than it says.

    OLMo's own public configs do. Training needs no tokenizer and the data is what it is, so this
    is no error; but documents are then told apart by a token that the tokenizer never writes.
    """
    identifier = cfg.tokenizer.identifier
    if Path(identifier).is_file():
        added = json.loads(Path(identifier).read_text(encoding="utf-8")).get("added_tokens", [])
        ends = [token["id"] for token in added if token["content"] == END_OF_TEXT]
    else:
        ends = [end for name, end in KNOWN_ENDS.items() if name in identifier]
    if ends and cfg.model.eos_token_id not in ends:
        log.warning(
            f"tokenizer.identifier names {identifier}, which ends a text with {ends[0]}, but "
            f"model.eos_token_id is {cfg.model.eos_token_id}: one of them is not what made the data"
        )


def find_start(
    cfg: TrainConfig, world: World, folder: Path
) -> tuple[Checkpoint | None, TrainState, bool]:
    """What to start from, where that was, and whether it is this very run that goes on.

    Args:
        folder: the run's own, save_folder.

    Raises:
        ValueError: load_path holds no checkpoint, or a broken one, or not what is to be taken from
            it; remote_save_folder cannot be had, or holds another run.
        OSError: there is nothing at load_path, or it cannot be read.
    """
    own = _of_the_first(world, partial(_newest, cfg, folder)) if cfg.try_load_latest_save else None
    if own is not None:
        checkpoint = look(own)
        assert checkpoint.train is not None
        log.info(f"going on from {own}")
        position = _position(checkpoint.train, cfg)
        # Never back: it may have left the epoch that it began in.
        _enter(max(cfg.epoch or 0, position.epoch), position)
        _skip(position, cfg)
        return checkpoint, position, True
    if cfg.load_path is None:
        _of_the_first(world, partial(_begin_there, cfg, -1))
        return None, TrainState(epoch=cfg.epoch or 0), False
    place = Path(cfg.load_path)
    parts = {
        "optimizer": not cfg.reset_optimizer_state,
        "trainer": not cfg.reset_trainer_state,
    }
    if "://" in cfg.load_path:
        place = _of_the_first(world, partial(_fetched, cfg.load_path, folder / "loaded", parts))
    _of_the_first(world, partial(layout.verify, place))
    checkpoint = look(place, **parts)
    position = TrainState(epoch=cfg.epoch or 0)
    if checkpoint.train is not None:
        position = _position(checkpoint.train, cfg)
        if not cfg.restore_dataloader:
            position = TrainState()
        elif cfg.epoch is not None:
            _enter(cfg.epoch, position)
        _skip(position, cfg)
    in_place = checkpoint.folder.resolve().parent == folder.resolve()
    resumed = in_place and checkpoint.train is not None
    _of_the_first(world, partial(_begin_there, cfg, position.global_step if resumed else -1))
    return checkpoint, position, resumed


def _newest(cfg: TrainConfig, folder: Path) -> Path | None:
    """The run's newest checkpoint that is whole, also from its remote_save_folder."""
    own = newest(folder)
    if cfg.remote_save_folder is None:
        return own
    from olmo.checkpoint.mirror import newest_of_both

    return newest_of_both(own, folder, cfg.remote_save_folder)


def _begin_there(cfg: TrainConfig, step: int) -> None:
    if cfg.remote_save_folder is not None and not cfg.dry_run:
        from olmo.checkpoint.mirror import begin

        begin(cfg.remote_save_folder, step, cfg.save_overwrite)


def _fetched(url: str, into: Path, parts: dict[str, bool]) -> Path:
    from olmo.checkpoint.mirror import fetched

    log.info(f"fetching {url}")
    return fetched(url, into, **parts)


def _of_the_first(world: World, work: Callable[[], T]) -> T:
    """What one process does for all: its result everywhere, and its error."""
    found: Any = None
    if world.is_rank0:
        try:
            found = work()
        except (ValueError, OSError) as error:
            found = error
    found = world.broadcast(found)
    if isinstance(found, Exception):
        raise found
    return found


def _position(train: dict[str, Any], cfg: TrainConfig) -> TrainState:
    """From train.pt; older OLMo versions keep less there."""
    step = int(train["global_step"])
    data_step = train.get("global_data_step", step)
    examples = train.get("global_train_examples_seen", data_step * cfg.global_train_batch_size)
    tokens = data_step * cfg.global_train_batch_size * cfg.model.max_sequence_length
    return TrainState(
        global_step=step,
        epoch=int(train.get("epoch") or 0),
        global_train_examples_seen_this_epoch=int(
            train.get("global_train_examples_seen_this_epoch", examples)
        ),
        global_train_tokens_seen=int(train.get("global_train_tokens_seen", tokens)),
    )


def _enter(epoch: int, position: TrainState) -> None:
    if epoch != position.epoch:
        log.info(f"epoch {epoch} is begun, in place of epoch {position.epoch}")
        position.epoch, position.global_train_examples_seen_this_epoch = epoch, 0


def _skip(position: TrainState, cfg: TrainConfig) -> None:
    if batches := cfg.fast_forward_batches:
        log.info(f"fast_forward_batches: {batches} batches are passed over")
        position.global_train_examples_seen_this_epoch += batches * cfg.global_train_batch_size


def whole_batches(total_size: int, position: TrainState, batch_size: int) -> int:
    """How many batches an epoch of `total_size` instances still has, from a place in it on."""
    return max(total_size - position.global_train_examples_seen_this_epoch, 0) // batch_size


def duration(
    cfg: TrainConfig, position: TrainState, tokens_per_step: int, total_size: int
) -> tuple[int, int]:
    """The run's end, in steps and in tokens from its first on: max_duration, in either unit.

    Epochs are counted from `epoch` on, and end where the data does: what is left of one is counted
    from the position, which another batch size or number of processes may have led to.

    Args:
        position: where it is; what is left is counted from here.
        tokens_per_step: over all processes.
        total_size: instances of an epoch.

    Raises:
        ValueError: max_duration is neither steps, tokens ("2e9T") nor epochs ("1ep").
    """
    length, unit = cfg.duration
    step, seen = position.global_step, position.global_train_tokens_seen
    if unit == "tokens":
        return step + math.ceil(max(length - seen, 0) / tokens_per_step), length
    if unit == "epochs":
        batch_size = cfg.global_train_batch_size
        more = length - 1 - max(position.epoch - (cfg.epoch or 0), 0)
        left = whole_batches(total_size, position, batch_size) + more * (total_size // batch_size)
        return step + max(left, 0), seen + max(left, 0) * tokens_per_step
    return length, seen + max(length - step, 0) * tokens_per_step
