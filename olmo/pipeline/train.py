"""A training run as a stage: from token shards and an order to a final checkpoint.

The trainer does not depend on this module. It gets a config with the paths filled in, and a folder
in the store that survives failures, in which it marks that it has finished.
"""

import json
import os
from pathlib import Path
from typing import Any

from olmo.checkpoint.layout import list_checkpoints
from olmo.cluster.launch import Geometry, launch
from olmo.config import DataConfig, EvaluatorConfig, TrainConfig
from olmo.config.identity import identity
from olmo.corpus.listing import read_listing, read_objects
from olmo.corpus.tokenizer import check_tokenizer
from olmo.pipeline.reuse import GIVEN, find_saved, take_over
from olmo.report.loss import plot_losses, redrawing
from olmo.report.series import collect_series
from olmo.runtime.log import log
from olmo.runtime.numbers import encode_non_finite, to_json
from olmo.store.stage import (
    STORE_ENV,
    Facts,
    Folder,
    Input,
    Inputs,
    Unhashed,
    Work,
    current_store,
    stage,
)
from olmo.train.chain import STATE, identity_until

HELDOUT = "heldout"  # the label of the data set's own held-out documents
PER_LABEL = "CrossEntropyLossPerLabel"  # of olmo.eval.perplexity, if labels are masked
BITS_PER_BYTE = "BitsPerByte"  # of the same, if the bytes of tokens are known
NOT_IN_CONTENT = ["metrics.jsonl", "loss.svg"]  # timings and plots: not in the output's digest


def train_run(
    config: Path,
    tokens: list[Path],
    order: Path,
    tokenizer: Path,
    final: Path,
    start: Path | None = None,
    processes: int = 1,
    nodes: int = 1,
    min_nodes: int | None = None,
    max_restarts: int = 0,
    after: Path | None = None,
    until: int | None = None,
    holes: Path | None = None,
    overrides: tuple[str, ...] = (),
) -> None:
    """Train as `config` says on the shards of `tokens`, or resume an interrupted run.

    `start` is the folder of a final checkpoint whose weights, and optimizer state unless the config
    resets it, the run begins with. In a chain (olmo.train.chain) `after` is the folder of the link
    to continue, and `until` the step at which this link ends. `processes` run on each of `nodes`
    nodes of the SLURM allocation; the run needs at least `min_nodes`, at its start and after a loss
    of nodes. `overrides` are key=value, as on the trainer's own command line.

    Args:
        config: training config
        start: folder of a final checkpoint that the run begins with
        processes: processes on each node
        nodes: nodes of the SLURM allocation
        min_nodes: fewest nodes to start or continue with
        max_restarts: restarts of the processes by torchrun before the run fails
        until: step at which this link of a chain ends
        holes: file with the tokens that are not learned
        overrides: key=value, as on the trainer's own command line
    """
    cfg = TrainConfig.load(config, list(overrides), validate_paths=False)
    model = cfg.model
    check_tokenizer(
        tokenizer,
        model.eos_token_id,
        model.pad_token_id,
        model.vocab_size,
        model.embedding_size,
        cfg.data.memmap_dtype,
    )
    training(
        tokens=read_objects(tokens, "tokens"),
        labels=read_objects(tokens, "labels") or None,
        order=order,
        holes=holes,
        start=None if start is None else start_files(start, cfg),
        after=None if after is None else [after / name for name in STATE],
        until=until,
        settings=identity(cfg) if until is None else identity_until(cfg, until),
        final=final,
        attempt=final.parent / "run",
        cfg=cfg,
        heldout=read_objects(tokens, "heldout-tokens", skip_empty=True),
        heldout_labels=read_objects(tokens, "heldout-labels", skip_empty=True) or None,
        heldout_bytes=find_token_bytes(tokens),
        geometry=Geometry(processes, nodes, min_nodes, max_restarts, cfg.global_train_batch_size),
    )


def find_token_bytes(listings: list[Path]) -> list[Path] | None:
    """The bytes of each held-out token; None where tokens were made before these were counted."""
    heldout = read_listing(listings, "heldout-tokens")
    found = read_objects(listings, "heldout-token_bytes", skip_empty=True)
    if len(found) < sum(entry.bytes > 0 for entry in heldout):
        log.info(
            "no bits per byte: the bytes of held-out tokens are not known, since the tokens are "
            "older; to count them: uv run snakemake --cores 2 --forcerun tokens <the same target>"
        )
        return None
    return found or None


def start_files(checkpoint: Path, cfg: TrainConfig) -> list[Path]:
    """The files of a checkpoint that a run starts from, its weights first.

    Raises:
        ValueError: reset_trainer_state is false, or the checkpoint has no optimizer state.
    """
    if not cfg.reset_trainer_state:
        raise ValueError(
            "expected reset_trainer_state: true, since a run that starts from a checkpoint is new; "
            "found false"
        )
    files = [checkpoint / name for name in STATE[: 1 if cfg.reset_optimizer_state else None]]
    if missing := [file.name for file in files if not file.exists()]:
        raise ValueError(
            f"{checkpoint}: expected {missing[0]}, found none; to start from the weights only, set "
            "reset_optimizer_state: true"
        )
    return files


@stage(version=3)
def training(
    tokens: Inputs,
    order: Input,
    settings: dict[str, Any],
    final: Folder,
    attempt: Work,
    cfg: Unhashed[TrainConfig],
    heldout: Unhashed[list[Path]],
    geometry: Unhashed[Geometry],
    heldout_labels: Unhashed[list[Path] | None] = None,
    heldout_bytes: Unhashed[list[Path] | None] = None,
    labels: Inputs | None = None,
    start: Inputs | None = None,
    after: Inputs | None = None,
    until: int | None = None,
    holes: Input | None = None,
) -> Facts:
    """Run the trainer to its end and export its last checkpoint.

    `attempt` keeps the run's own checkpoints, from which the next attempt resumes. `settings` is
    the identity of `cfg`. `labels` are masks of the tokens that are learned, `holes` the tokens
    that are not. `start` are the files that the run begins with (`start_files`). A link of a chain
    continues `after` the files of the previous one, and ends at step `until`; it is taken over
    from a finished run that has its state.
    """
    attempt.mkdir(parents=True, exist_ok=True)
    previous = None if after is None else after[0].absolute().parent
    if until is not None and not list_checkpoints(attempt):
        links = {"tokens": tokens, "order": order, "labels": labels, "start": start}
        inputs = training.action(current_store(), **links, after=after, holes=holes).inputs
        if saved := find_saved(current_store(), inputs, settings, until):
            take_over(current_store(), saved, attempt, 0 if previous is None else step_of(previous))
    filled = fill_in_paths(
        cfg, tokens, order, heldout, attempt, labels, heldout_labels, holes, heldout_bytes
    )
    if start is not None:
        filled = filled.update_with(load_path=str(start[0].absolute().parent))
    filled = filled.update_with(**build_link_overrides(cfg, previous, until))
    filled.save(attempt / GIVEN)
    title = cfg.run_name or final.parent.name
    with redrawing(attempt, title):
        launch(attempt / GIVEN, geometry, filled.intra_op_threads)

    from olmo.checkpoint.final import export_final
    from olmo.train.segments import read_segments, training_conditions
    from olmo.train.sinks import read_metrics

    reached = export_final(
        attempt, final, content_addressed_config(settings, tokens, order, labels, start, holes)
    )
    rows = [folder / "metrics.jsonl" for folder in (previous, attempt) if folder is not None]
    metrics = [row for path in rows for row in read_metrics(path)]
    (final / "metrics.jsonl").write_text("".join(to_json(row) + "\n" for row in metrics))
    plot_losses(collect_series(metrics), final / "loss.svg", title)
    return {
        "facts": {
            "run_name": cfg.run_name,
            "steps": reached["global_step"],
            "tokens": reached["global_train_tokens_seen"],
            "heldout_loss": encode_non_finite(heldout_losses(metrics)),
            "heldout_bits_per_byte": encode_non_finite(heldout_numbers(metrics, BITS_PER_BYTE)),
            "segments": read_segments(attempt),
        },
        "conditions": training_conditions(read_segments(attempt)),
        "not_in_content": NOT_IN_CONTENT,
    }


def step_of(link: Path) -> int:
    """The step at which a link ends."""
    return int(json.loads((link / "train.json").read_bytes())["global_step"])


def fill_in_paths(
    cfg: TrainConfig,
    tokens: list[Path],
    order: Path,
    heldout: list[Path],
    folder: Path,
    labels: list[Path] | None = None,
    heldout_labels: list[Path] | None = None,
    holes: Path | None = None,
    heldout_bytes: list[Path] | None = None,
) -> TrainConfig:
    """The config with the paths of this attempt: data, order, held-out data, folder."""

    def to_strings(files: list[Path] | None) -> list[str] | None:
        return None if files is None else [str(path) for path in files]

    data = cfg.data.update_with(
        paths=to_strings(tokens),
        label_mask_paths=to_strings(labels),
        datasets=None,
        order_path=os.path.realpath(order),
        holes_path=None if holes is None else os.path.realpath(holes),
    )
    evaluators = list(cfg.evaluators)
    if heldout:
        heldout_data = DataConfig(
            paths=to_strings(heldout),
            label_mask_paths=to_strings(heldout_labels),
            token_bytes_paths=to_strings(heldout_bytes),
            memmap_dtype=cfg.data.memmap_dtype,
            drop_last=False,
        )
        evaluators.append(EvaluatorConfig(label=HELDOUT, data=heldout_data))
    return cfg.update_with(
        data=data,
        evaluators=evaluators,
        save_folder=str(folder),
        save_overwrite=True,
        try_load_latest_save=True,
        fast_forward_batches=None,  # else each resume would skip them again
    )


def build_link_overrides(
    cfg: TrainConfig, previous: Path | None, until: int | None
) -> dict[str, Any]:
    """Settings of a link of a chain: it resumes from the previous link."""
    settings: dict[str, Any] = {} if until is None else {"stop_at": until}
    if previous is not None:
        settings |= {
            "load_path": str(previous),
            "restore_dataloader": True,
            "fast_forward_batches": None,
            "reset_optimizer_state": False,
            "reset_trainer_state": False,
            "epoch": None,  # the checkpoint has the epoch, which may be a later one
        }
        if cfg.duration[1] == "epochs":  # counted from cfg.epoch
            settings["max_duration"] = f"{cfg.duration[0] + (cfg.epoch or 0)}ep"
    return settings


def content_addressed_config(
    settings: dict[str, Any],
    tokens: list[Path],
    order: Path,
    labels: list[Path] | None = None,
    start: list[Path] | None = None,
    holes: Path | None = None,
) -> dict[str, Any]:
    """The content of final/config.yaml: the settings, with the inputs' addresses in any store."""
    store = current_store()

    def address(path: Path) -> str:
        digest = store.digest(path)
        return f"${{oc.env:{STORE_ENV},store}}/objects/{digest[:2]}/{digest}"

    data = {"paths": [address(path) for path in tokens], "order_path": address(order)}
    if labels is not None:
        data["label_mask_paths"] = [address(path) for path in labels]
    if holes is not None:
        data["holes_path"] = address(holes)
    config = settings | {"data": settings.get("data", {}) | data}
    return config if start is None else config | {"load_path": address(start[0])}


def heldout_numbers(
    metrics: list[dict[str, Any]], name: str, better: str | None = None
) -> dict[str, dict[str, float]]:
    """The first and the last value of a metric on each held-out set.

    Args:
        better: the metric that counts instead where it is known.
    """
    found: dict[str, dict[str, float]] = {}
    for row in metrics:
        for key, value in row.items():
            if key.startswith("eval/") and key.endswith(f"/{name}"):
                label = key.removeprefix("eval/").removesuffix(f"/{name}")
                value = row.get(f"eval/{label}/{better}", value)
                found.setdefault(label, {"first": value})["last"] = value
    return found


def heldout_losses(metrics: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """The first and the last loss on each held-out set, in nats per learned token."""
    return heldout_numbers(metrics, "CrossEntropyLoss", PER_LABEL)
