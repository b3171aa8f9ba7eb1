"""`olmo compare`: the tokens that runs need to reach the last held-out loss of a reference run."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

from olmo.config import TrainConfig
from olmo.inspect.documents import find_token_shards, select_shards
from olmo.inspect.run import TrainedRun
from olmo.report.card import format_table
from olmo.report.runs import last_metrics
from olmo.runtime.log import log
from olmo.runtime.numbers import from_json
from olmo.store.naming import check_not_in_store
from olmo.store.stage import current_store

LABEL = "heldout"
LOSS, BITS = "CrossEntropyLoss", "BitsPerByte"
UNITS = {LOSS: "nats per token", BITS: "bits per byte"}


def compare(runs: list[Path], table: Path, picture: Path, label: str = LABEL) -> None:
    """Write a table (Markdown) and a picture (SVG) of runs, the reference first.

    Their losses on held-out documents are compared, in nats per token; of runs with several
    tokenizers in bits per byte, since their tokens differ. The point at which a run reaches the
    reference's last loss is interpolated linearly between two evaluations.

    Args:
        runs: names of runs, or their final folders; the first is the reference
        table: Markdown file to write
        picture: SVG file to write
        label: evaluator whose loss is compared

    Example:
        olmo compare --runs olmo-tiny olmo-tiny-muon --table a.md --picture a.svg

    Raises ValueError for runs with other held-out documents, or with another tokenizer where there
    are no bits per byte.
    """
    check_not_in_store(table, picture)
    found = [TrainedRun(str(run)) for run in runs]
    finals = [Path(os.path.abspath(run.folder)) for run in found]
    names = [final.parent.name for final in finals]
    if len(set(names)) < len(names):
        raise ValueError(f"expected runs with different names, found {[str(run) for run in runs]}")
    metric = choose_metric(found, names, label)
    curves = {
        name: loss_curve(final, label, metric) for name, final in zip(names, finals, strict=True)
    }
    all_tokens, target = curves[names[0]][-1]
    rows: list[tuple[str, ...]] = []
    for name, points in curves.items():
        tokens, loss = points[-1]
        needed = find_tokens_to_loss(target, points)
        # all_tokens is 0 if the reference was only evaluated untrained.
        share = f"{needed / all_tokens:.2f}" if needed is not None and all_tokens else ""
        needed_text = "never" if needed is None else f"{needed:,.0f}"
        rows.append((name, f"{tokens:,}", f"{loss:.4f}", needed_text, share))
    head = ["run", "tokens", "last loss", "tokens to target", "of the reference's"]
    bits = [last_metrics(final / "metrics.jsonl").get(f"eval/{label}/{BITS}") for final in finals]
    if metric == LOSS and None not in bits:
        head.append(UNITS[BITS])
        rows = [(*row, f"{value:.4f}") for row, value in zip(rows, bits, strict=True)]
    text = (
        f"# Comparison with {names[0]}\n\nHeld-out loss in {UNITS[metric]} ({label}); the target "
        f"is {names[0]}'s last loss, {target:.4f}.\n\n"
    )
    table.parent.mkdir(parents=True, exist_ok=True)
    table.write_text(text + format_table(head, rows))
    draw_curves(curves, picture, UNITS[metric])


def choose_metric(runs: list[TrainedRun], names: list[str], label: str) -> str:
    """The metric that runs have in common: LOSS, or BITS where they have several tokenizers.

    Raises ValueError if two runs differ in held-out documents, or, with evaluators of the config,
    in vocabulary or tokenizer: only of a data set's own documents are the bytes known to be the
    same. Warns if this is unknown, since the checkpoint or its data has no record in the store.
    """
    known = find_token_shards(current_store())
    shards_of = [select_shards(run.cfg.data.paths or [], known) for run in runs]
    compared: dict[str, list[set[Any]]] = {
        "model.vocab_size": [{run.cfg.model.vocab_size} for run in runs],
        "tokenizer": [{shard.tokenizer.name for shard in tokens} for tokens in shards_of],
    }
    metric = LOSS
    if label == LABEL:  # another label is an evaluator of the config, whose data has no record
        heldout: list[set[Any]] = [set().union(*(s.heldout for s in t)) for t in shards_of]
        if all(heldout) and any(len({*map(frozenset, v)}) > 1 for v in compared.values()):
            compared, metric = {}, BITS
        compared["held-out documents"] = heldout
    for what, (first, *others) in compared.items():
        for name, other in zip(names[1:], others, strict=True):
            if other and first and other != first:
                raise ValueError(
                    f"expected runs with the same {what}, found {format_values(first)} in "
                    f"{names[0]} and {format_values(other)} in {name}: their losses cannot be "
                    "compared; give both the same `dataset` in config/config.yaml"
                )
    if unknown := [name for name, tokens in zip(names, shards_of, strict=True) if not tokens]:
        log.warning(
            f"the store has no record of the data of {', '.join(unknown)}: compare runs on the "
            "same data only"
        )
    return metric


def format_values(found: set[Any]) -> str:
    """The first of some values, digests shortened, and how many more there are."""
    first, *others = sorted(found)
    more = f" and {len(others)} more" if others else ""
    return f"{str(first)[:12]}…{more}" if isinstance(first, str) else f"{first}{more}"


def loss_curve(final: Path, label: str, metric: str = LOSS) -> list[tuple[int, float]]:
    """(tokens seen, held-out loss in the metric's unit) of each evaluation of a run, in order."""
    cfg = TrainConfig.load(final / "config.yaml", untrusted=True)
    per_step = cfg.global_train_batch_size * cfg.model.max_sequence_length
    rows = map(from_json, (final / "metrics.jsonl").read_text().splitlines())
    name = f"eval/{label}/{metric}"
    points = [(row["step"] * per_step, row[name]) for row in rows if name in row]
    if not points and metric == BITS:
        run = final.parent.name
        raise ValueError(
            f"{final}: expected evaluations in bits per byte, since the runs have several "
            "tokenizers, found none in metrics.jsonl, since its tokens are older; compare the "
            f"final checkpoints: uv run snakemake --cores 2 eval/{run}, then olmo scores"
        )
    if not points:
        raise ValueError(f"{final}: expected evaluations on {label}, found none in metrics.jsonl")
    return points


def find_tokens_to_loss(loss: float, points: list[tuple[int, float]]) -> float | None:
    """The number of tokens at which a curve first reaches `loss`; None if it never does."""
    before = points[0]
    for point in points:
        if point[1] <= loss:
            if before[1] <= loss or not math.isfinite(before[1] - point[1]):
                return float(point[0])
            share = (before[1] - loss) / (before[1] - point[1])
            return before[0] + share * (point[0] - before[0])
        before = point
    return None


def draw_curves(
    curves: dict[str, list[tuple[int, float]]], path: Path, unit: str = "nats per token"
) -> None:
    """Draw the losses of runs over tokens into an SVG file."""
    import altair

    values: list[dict[str, Any]] = [
        {"run": name, "tokens": tokens, "loss": loss}
        for name, points in curves.items()
        for tokens, loss in points
    ]
    scale = altair.Scale(zero=False)
    chart = (
        altair.Chart(altair.Data(values=values))
        .mark_line(point=True)
        .encode(
            x=altair.X("tokens:Q", title="tokens"),
            y=altair.Y("loss:Q", title=f"held-out loss ({unit})", scale=scale),
            color=altair.Color("run:N", sort=None, title=None),
        )
    )
    chart.properties(width=640, height=360).save(path, format="svg")
