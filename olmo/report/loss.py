"""A plot of a run's losses over its steps: loss.svg, beside its metrics."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from olmo.report.series import (
    LOSS,
    LOSSES,
    MetricsFollower,
    Series,
    metric_label,
    smooth,
    thin,
)
from olmo.runtime.log import log
from olmo.train.sinks import METRICS

WIDTH, HEIGHT = 640, 360  # px
REDRAW_S = 60.0  # while a run is trained


def plot_losses(found: dict[str, Series], path: Path, title: str) -> None:
    """Draw the training loss, smoothed too, and held-out losses as points into an SVG file."""
    import altair

    names = [n for n in found if n.split("/")[-1] == LOSSES[1]]  # a run that learns answers only
    names = names or [n for n in found if n.split("/")[-1] == LOSSES[0]]
    rows = []
    for series in (found[name] for name in names):
        mean = Series(series.name, series.steps, smooth(series.values))
        kinds = {"raw": series, "smooth": mean} if series.name == LOSS else {"point": series}
        rows += [
            {"step": step, "loss": value, "of": metric_label(series.name), "kind": kind}
            for kind, curve in kinds.items()
            for step, value in zip(thin(curve).steps, thin(curve).values, strict=True)
            if value - value == 0  # finite
        ]
    base = altair.Chart(altair.Data(values=rows)).encode(
        x=altair.X("step:Q", title="step"),
        y=altair.Y("loss:Q", title="loss (nats a token)", scale=altair.Scale(zero=False)),
        color=altair.Color("of:N", title=None, sort=None),
    )
    raw = base.transform_filter("datum.kind == 'raw'").mark_line(strokeWidth=1, opacity=0.35)
    smoothed = base.transform_filter("datum.kind == 'smooth'").mark_line(strokeWidth=2)
    points = base.transform_filter("datum.kind == 'point'").mark_line(point=True)
    heading = altair.TitleParams(title, subtitle="thin: each step; thick: moving average")
    chart = (raw + smoothed + points).properties(width=WIDTH, height=HEIGHT, title=heading)
    chart.configure_legend(symbolOpacity=1).save(str(path), format="svg")


@contextmanager
def redrawing(folder: Path, title: str) -> Iterator[None]:
    """Draw folder/loss.svg every REDRAW_S while the block runs, from folder/metrics.jsonl."""
    ended, path = threading.Event(), folder / METRICS
    metrics = MetricsFollower(lambda: [path] if path.exists() else [])

    def draw() -> None:
        while not ended.wait(REDRAW_S):
            try:
                if metrics.update():
                    plot_losses(metrics.series, folder / "loss.svg", title)
            except Exception as error:  # a picture must not end a training
                log.warning(f"{folder / 'loss.svg'} is not drawn: {error}")
                return

    thread = threading.Thread(target=draw, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
