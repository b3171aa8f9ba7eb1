"""A training run as a stage: from token shards and an order to a final checkpoint.

The trainer knows nothing of this module. It gets a config whose paths are filled in, a folder in
the store that survives any failure, and says there when it has come to its end.
"""

import json
import os
from pathlib import Path
from typing import Any

from olmo.config import DataConfig, EvaluatorConfig, TrainConfig, identity
from olmo.data.shards import read
from olmo.data.tokenizer import check_tokenizer
from olmo.launch import Geometry, launch
from olmo.stage import STORE, Facts, Folder, Free, Input, Inputs, Work, here, stage

HELDOUT = "heldout"  # the label of the data set's own held-out documents
ASIDE = ["metrics.jsonl", "loss.svg"]  # timings and pictures: no part of the content


def train(
    config: Path,
    tokens: list[Path],
    order: Path,
    tokenizer: Path,
    final: Path,
    processes: int = 1,
    nodes: int = 1,
    min_nodes: int | None = None,
    max_restarts: int = 0,
    overrides: tuple[str, ...] = (),
) -> None:
    """Train as `config` says on the shards of `tokens`, or carry on where that was cut off.

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
        tokens=[entry.object for entry in read(tokens, "tokens")],
        order=order,
        settings=identity(cfg),
        final=final,
        attempt=final.parent / "run",
        cfg=cfg,
        heldout=[entry.object for entry in read(tokens, "heldout-tokens") if entry.bytes],
        geometry=Geometry(processes, nodes, min_nodes, max_restarts),
    )


@stage(version=3)
def training(
    tokens: Inputs,
    order: Input,
    settings: dict[str, Any],
    final: Folder,
    attempt: Work,
    cfg: Free[TrainConfig],
    heldout: Free[list[Path]],
    geometry: Free[Geometry],
) -> Facts:
    """Run the trainer to its end and export its last checkpoint.

    `attempt` keeps the run's own checkpoints, from which the next attempt goes on. `settings` is
    what of `cfg` decides bytes.
    """
    attempt.mkdir(parents=True, exist_ok=True)
    place = filled_in(cfg, tokens, order, heldout, attempt)
    place.save(attempt / "given.yaml")
    launch(attempt / "given.yaml", geometry, place.intra_op_threads)

    from olmo.checkpoint.final import export
    from olmo.report.loss import plot
    from olmo.train.segments import conditions, segments

    reached = export(attempt, final, settings | {"data": named_by_content(settings, tokens, order)})
    metrics = [json.loads(line) for line in (attempt / "metrics.jsonl").read_text().splitlines()]
    (final / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    plot(metrics, final / "loss.svg")
    return {
        "facts": {
            "run_name": cfg.run_name,
            "steps": reached["global_step"],
            "tokens": reached["global_train_tokens_seen"],
            "heldout_loss": heldout_losses(metrics),
            "segments": segments(attempt),
        },
        "conditions": conditions(segments(attempt)),
        "aside": ASIDE,
    }


def filled_in(
    cfg: TrainConfig, tokens: list[Path], order: Path, heldout: list[Path], folder: Path
) -> TrainConfig:
    """The config with the places of this attempt: data, order, held-out data, folder."""
    paths = [str(path) for path in tokens]
    data = cfg.data.update_with(paths=paths, datasets=None, order_path=os.path.realpath(order))
    evaluators = list(cfg.evaluators)
    if heldout:
        paths = [str(path) for path in heldout]
        held = DataConfig(paths=paths, memmap_dtype=cfg.data.memmap_dtype, drop_last=False)
        evaluators.append(EvaluatorConfig(label=HELDOUT, data=held))
    return cfg.update_with(
        data=data,
        evaluators=evaluators,
        save_folder=str(folder),
        save_overwrite=True,
        try_load_latest_save=True,
    )


def named_by_content(settings: dict[str, Any], tokens: list[Path], order: Path) -> dict[str, Any]:
    """The `data` section of final/config.yaml: the same wherever the store is."""
    store = here()

    def address(path: Path) -> str:
        digest = store.digest(path)
        return f"${{oc.env:{STORE},store}}/objects/{digest[:2]}/{digest}"

    paths = [address(path) for path in tokens]
    return settings.get("data", {}) | {"paths": paths, "order_path": address(order)}


def heldout_losses(metrics: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """The first and the last loss on each held-out set, in nats a token."""
    losses: dict[str, dict[str, float]] = {}
    for row in metrics:
        for name, value in row.items():
            if name.startswith("eval/") and name.endswith("/CrossEntropyLoss"):
                label = name.split("/")[1]
                losses.setdefault(label, {"first": value})["last"] = value
    return losses
