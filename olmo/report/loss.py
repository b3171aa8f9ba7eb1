"""A plot of a run's training and held-out losses over its steps."""

from pathlib import Path
from typing import Any


def plot_losses(metrics: list[dict[str, Any]], path: Path) -> None:
    """Draw training loss as a line and held-out losses as points into an SVG file.

    Args:
        metrics: rows of metrics.jsonl.
    """
    import altair
    import polars

    rows = [
        {"step": row["step"], "loss": value, "of": metric_label(name)}
        for row in metrics
        for name, value in row.items()
        if name.endswith("/CrossEntropyLoss")
    ]
    frame = polars.DataFrame(rows, schema={"step": int, "loss": float, "of": str})
    base = altair.Chart(frame).encode(
        x=altair.X("step:Q", title="step"),
        y=altair.Y("loss:Q", title="loss (nats a token)", scale=altair.Scale(zero=False)),
        color=altair.Color("of:N", title=None),
    )
    training = altair.datum.of == "training"
    line = base.transform_filter(training).mark_line(strokeWidth=1)
    points = base.transform_filter(~training).mark_line(point=True)
    (line + points).properties(width=640, height=360).save(str(path), format="svg")


def metric_label(metric: str) -> str:
    """The legend entry of a metric: "training", or the name of the evaluation set."""
    kind, *name, _ = metric.split("/")
    return "training" if kind == "train" else "/".join(name)
