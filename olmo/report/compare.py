"""Runs beside one of them: how far each got, and what it took to get where that one ended."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

from olmo.config import TrainConfig
from olmo.inspect.documents import digest_of, shards
from olmo.inspect.run import Run
from olmo.io.downloads import refuse_links
from olmo.runtime.log import log
from olmo.runtime.numbers import from_json
from olmo.store.stage import here

LABEL = "heldout"


def compare(runs: list[Path], table: Path, picture: Path, label: str = LABEL) -> None:
    """Write a table (Markdown) and a picture (SVG) of runs, the reference first.

    RUNS are names of runs or their final folders. Compared is the loss on documents that none was
    trained on, at the same tokens of the same data. Where a run gets to the reference's last loss
    is read off the line between two evaluations.

    Raises ValueError for runs that were measured on other documents or in other tokens.
    """
    refuse_links(table, picture)
    found = [Run(str(run)) for run in runs]
    finals = [Path(os.path.abspath(run.folder)) for run in found]
    names = [final.parent.name for final in finals]
    if len(set(names)) < len(names):
        raise ValueError(f"expected runs of different names, found {[str(run) for run in runs]}")
    check_alike(found, names, label)
    curves = {name: curve(final, label) for name, final in zip(names, finals, strict=True)}
    end = curves[names[0]][-1][1]
    lines = [
        f"# Beside {names[0]}",
        "",
        f"Held-out loss in nats a token ({label}); tokens to {names[0]}'s last, {end:.4f}.",
        "",
        "| run | tokens | last loss | tokens to it | of the reference's |",
        "|---|---|---|---|---|",
    ]
    for name, points in curves.items():
        needed = tokens_to(end, points)
        all_tokens = curves[names[0]][-1][0]
        tail = "never | " if needed is None else f"{needed:,.0f} | "
        if needed is not None and all_tokens:  # else the reference was measured untrained
            tail += f"{needed / all_tokens:.2f}"
        lines.append(f"| {name} | {points[-1][0]:,} | {points[-1][1]:.4f} | {tail} |")
    table.parent.mkdir(parents=True, exist_ok=True)
    table.write_text("\n".join(lines) + "\n")
    draw(curves, picture)


def check_alike(runs: list[Run], names: list[str], label: str) -> None:
    """Raises ValueError where the losses of two runs are not of the same tokens of the same data.

    What is not known, since a checkpoint has no record or the store none of its data, is told.
    """
    known = shards(here())
    of_each = [
        [known[d] for d in map(digest_of, r.cfg.data.paths or []) if d in known] for r in runs
    ]
    asked: dict[str, list[set[Any]]] = {
        "model.vocab_size": [{run.cfg.model.vocab_size} for run in runs],
        "tokenizer": [{shard.tokenizer.name for shard in tokens} for tokens in of_each],
    }
    if label == LABEL:  # else an evaluator of the config, whose data no record holds
        asked["held-out documents"] = [set().union(*(s.heldout for s in t)) for t in of_each]
    for what, (first, *others) in asked.items():
        for name, other in zip(names[1:], others, strict=True):
            if other and first and other != first:
                raise ValueError(
                    f"expected runs with the same {what}, found {in_words(first)} in {names[0]} "
                    f"and {in_words(other)} in {name}: their losses cannot be compared. Give both "
                    "one `dataset` in config/config.yaml"
                )
    if unknown := [name for name, tokens in zip(names, of_each, strict=True) if not tokens]:
        log.warning(
            f"it is not known here what {', '.join(unknown)} was trained on: see that it is alike"
        )


def in_words(found: set[Any]) -> str:
    first, *others = sorted(found)
    more = f" and {len(others)} more" if others else ""
    return f"{str(first)[:12]}…{more}" if isinstance(first, str) else f"{first}{more}"


def curve(final: Path, label: str) -> list[tuple[int, float]]:
    """(tokens seen, held-out loss) of each evaluation of a run, in order."""
    cfg = TrainConfig.load(final / "config.yaml", foreign=True)
    per_step = cfg.global_train_batch_size * cfg.model.max_sequence_length
    rows = map(from_json, (final / "metrics.jsonl").read_text().splitlines())
    name = f"eval/{label}/CrossEntropyLoss"
    points = [(row["step"] * per_step, row[name]) for row in rows if name in row]
    if not points:
        raise ValueError(f"{final}: expected evaluations on {label}, found none in metrics.jsonl")
    return points


def tokens_to(loss: float, points: list[tuple[int, float]]) -> float | None:
    """After how many tokens a curve is first at `loss` or below; None where it never is."""
    before = points[0]
    for point in points:
        if point[1] <= loss:
            if before[1] <= loss or not math.isfinite(before[1] - point[1]):
                return float(point[0])
            share = (before[1] - loss) / (before[1] - point[1])
            return before[0] + share * (point[0] - before[0])
        before = point
    return None


def draw(curves: dict[str, list[tuple[int, float]]], path: Path) -> None:
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
            y=altair.Y("loss:Q", title="held-out loss (nats a token)", scale=scale),
            color=altair.Color("run:N", sort=None, title=None),
        )
    )
    chart.properties(width=640, height=360).save(path, format="svg")
