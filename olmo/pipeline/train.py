"""A training run as a stage: from token shards and an order to a final checkpoint.

The trainer knows nothing of this module. It gets a config whose paths are filled in, a folder in
the store that survives any failure, and says there when it has come to its end.
"""

import os
from pathlib import Path
from typing import Any

from olmo.cluster.launch import Geometry, launch
from olmo.config import DataConfig, EvaluatorConfig, TrainConfig
from olmo.config.identity import identity
from olmo.corpus.listing import read_listing
from olmo.corpus.tokenizer import check_tokenizer
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
PER_LABEL = "CrossEntropyLossPerLabel"  # olmo.eval.perplexity's, where labels are masked
ASIDE = ["metrics.jsonl", "loss.svg"]  # timings and pictures: no part of the content


def train(
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
    overrides: tuple[str, ...] = (),
) -> None:
    """Train as `config` says on the shards of `tokens`, or carry on where that was cut off.

    `start` is the folder of a final checkpoint whose weights, and unless the config resets it
    optimizer state, the run begins with. Of a run that is a chain (olmo.train.chain) `after` is the
    folder of the link to go on from, and `until` the step at which this link ends.
    `processes` are of each of `nodes`, which are those of the SLURM allocation that this runs in;
    it begins, and after a loss of nodes goes on, with as few as `min_nodes`. `overrides` are
    key=value, as on the trainer's own command line.
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
        tokens=[entry.object for entry in read_listing(tokens, "tokens")],
        labels=[entry.object for entry in read_listing(tokens, "labels")] or None,
        order=order,
        start=None if start is None else parts_of(start, cfg),
        after=None if after is None else [after / name for name in STATE],
        until=until,
        settings=identity(cfg) if until is None else identity_until(cfg, until),
        final=final,
        attempt=final.parent / "run",
        cfg=cfg,
        heldout=[entry.object for entry in read_listing(tokens, "heldout-tokens") if entry.bytes],
        heldout_labels=heldout_labels(tokens),
        geometry=Geometry(processes, nodes, min_nodes, max_restarts, cfg.global_train_batch_size),
    )


def heldout_labels(tokens: list[Path]) -> list[Path] | None:
    """Which tokens of the held-out shards are learned; None where all are."""
    return [entry.object for entry in read_listing(tokens, "heldout-labels") if entry.bytes] or None


def parts_of(checkpoint: Path, cfg: TrainConfig) -> list[Path]:
    """The files of a checkpoint that a run starts from, its weights first.

    Raises:
        ValueError: the run would not be a new one.
    """
    if not cfg.reset_trainer_state:
        raise ValueError(
            "a run that starts from a checkpoint is a new one: expected reset_trainer_state: true"
        )
    files = [checkpoint / name for name in STATE[: 1 if cfg.reset_optimizer_state else None]]
    if missing := [file.name for file in files if not file.exists()]:
        raise ValueError(
            f"{checkpoint} has no {missing[0]}; start from its weights alone: "
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
    labels: Inputs | None = None,
    start: Inputs | None = None,
    after: Inputs | None = None,
    until: int | None = None,
) -> Facts:
    """Run the trainer to its end and export its last checkpoint.

    `attempt` keeps the run's own checkpoints, from which the next attempt goes on. `settings` is
    what of `cfg` decides bytes. `labels` say which tokens are learned, `start` holds the weights,
    and the optimizer's state, that the run begins with (`parts_of`). A link of a chain goes on
    `after` the files of the one before it, and ends at step `until`.
    """
    attempt.mkdir(parents=True, exist_ok=True)
    place = filled_in(cfg, tokens, order, heldout, attempt, labels, heldout_labels)
    if start is not None:
        place = place.update_with(load_path=str(start[0].absolute().parent))
    before = None if after is None else after[0].absolute().parent
    place = place.update_with(**link(cfg, before, until))
    place.save(attempt / "given.yaml")
    launch(attempt / "given.yaml", geometry, place.intra_op_threads)

    from olmo.checkpoint.final import export_final
    from olmo.report.loss import plot_losses
    from olmo.train.segments import segments, training_conditions
    from olmo.train.sinks import read_metrics

    reached = export_final(attempt, final, named_by_content(settings, tokens, order, labels, start))
    rows = [folder / "metrics.jsonl" for folder in (before, attempt) if folder is not None]
    metrics = [row for path in rows for row in read_metrics(path)]
    (final / "metrics.jsonl").write_text("".join(to_json(row) + "\n" for row in metrics))
    plot_losses(metrics, final / "loss.svg")
    return {
        "facts": {
            "run_name": cfg.run_name,
            "steps": reached["global_step"],
            "tokens": reached["global_train_tokens_seen"],
            "heldout_loss": encode_non_finite(heldout_losses(metrics)),
            "segments": segments(attempt),
        },
        "conditions": training_conditions(segments(attempt)),
        "aside": ASIDE,
    }


def filled_in(
    cfg: TrainConfig,
    tokens: list[Path],
    order: Path,
    heldout: list[Path],
    folder: Path,
    labels: list[Path] | None = None,
    heldout_labels: list[Path] | None = None,
) -> TrainConfig:
    """The config with the places of this attempt: data, order, held-out data, folder."""

    def places(files: list[Path] | None) -> list[str] | None:
        return None if files is None else [str(path) for path in files]

    data = cfg.data.update_with(
        paths=places(tokens),
        label_mask_paths=places(labels),
        datasets=None,
        order_path=os.path.realpath(order),
    )
    evaluators = list(cfg.evaluators)
    if heldout:
        held = DataConfig(
            paths=places(heldout),
            label_mask_paths=places(heldout_labels),
            memmap_dtype=cfg.data.memmap_dtype,
            drop_last=False,
        )
        evaluators.append(EvaluatorConfig(label=HELDOUT, data=held))
    return cfg.update_with(
        data=data,
        evaluators=evaluators,
        save_folder=str(folder),
        save_overwrite=True,
        try_load_latest_save=True,
        fast_forward_batches=None,  # else passed over again whenever it is interrupted
    )


def link(cfg: TrainConfig, before: Path | None, until: int | None) -> dict[str, Any]:
    """Settings of a link: it goes on from the one before it just as an interrupted run goes on."""
    settings: dict[str, Any] = {} if until is None else {"stop_at": until}
    if before is not None:
        settings |= {
            "load_path": str(before),
            "restore_dataloader": True,
            "fast_forward_batches": None,
            "reset_optimizer_state": False,
            "reset_trainer_state": False,
            "epoch": None,  # it may have left the one that the run began in
        }
        if cfg.duration[1] == "epochs":  # which are counted from that one
            settings["max_duration"] = f"{cfg.duration[0] + (cfg.epoch or 0)}ep"
    return settings


def named_by_content(
    settings: dict[str, Any],
    tokens: list[Path],
    order: Path,
    labels: list[Path] | None = None,
    start: list[Path] | None = None,
) -> dict[str, Any]:
    """final/config.yaml: the settings, and what they were applied to, wherever the store is."""
    store = current_store()

    def address(path: Path) -> str:
        digest = store.digest(path)
        return f"${{oc.env:{STORE_ENV},store}}/objects/{digest[:2]}/{digest}"

    data = {"paths": [address(path) for path in tokens], "order_path": address(order)}
    if labels is not None:
        data["label_mask_paths"] = [address(path) for path in labels]
    named = settings | {"data": settings.get("data", {}) | data}
    return named if start is None else named | {"load_path": address(start[0])}


def heldout_losses(metrics: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """The first and the last loss on each held-out set, in nats a token that is learned."""
    losses: dict[str, dict[str, float]] = {}
    for row in metrics:
        for name, value in row.items():
            if name.startswith("eval/") and name.endswith("/CrossEntropyLoss"):
                label = name.split("/")[1]
                value = row.get(f"eval/{label}/{PER_LABEL}", value)
                losses.setdefault(label, {"first": value})["last"] = value
    return losses
