"""Runs beside one of them: how far each got, and what it took to get where that one ended."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from olmo.config import TrainConfig
from olmo.io import refuse_links

LABEL = "heldout"


def compare(runs: list[Path], table: Path, picture: Path, label: str = LABEL) -> None:
    """Write a table (Markdown) and a picture (SVG) of final checkpoints, the reference first.

    Compared is the loss on documents that none was trained on, at the same tokens of the same
    data. Where a run gets to the reference's last loss is read off the line between two
    evaluations.
    """
    refuse_links(table, picture)
    curves = {run.parent.name: curve(run, label) for run in runs}
    names = list(curves)
    if len(names) != len(runs):
        raise ValueError(f"expected runs of different names, found {[str(run) for run in runs]}")
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
        tail = "never | " if needed is None else f"{needed:,.0f} | {needed / all_tokens:.2f}"
        lines.append(f"| {name} | {points[-1][0]:,} | {points[-1][1]:.4f} | {tail} |")
    table.parent.mkdir(parents=True, exist_ok=True)
    table.write_text("\n".join(lines) + "\n")
    draw(curves, picture)


def curve(final: Path, label: str) -> list[tuple[int, float]]:
    """(tokens seen, held-out loss) of each evaluation of a run, in order."""
    cfg = TrainConfig.load(final / "config.yaml", validate_paths=False)
    per_step = cfg.global_train_batch_size * cfg.model.max_sequence_length
    rows = map(json.loads, (final / "metrics.jsonl").read_text().splitlines())
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
            if before[1] <= loss:
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
