"""The curves of a page, as Vega-Lite: made by altair, drawn where the page is opened."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from olmo.report.series import (
    DATA_WAIT,
    LOSS,
    LOSSES,
    MEMORY,
    NORM,
    RATE,
    SPEED,
    Series,
    metric_label,
)

# Title → (metrics, unit of the y axis); of evaluations all with one of LOSSES, and all others.
FIXED = {
    "Learning rate": ((RATE,), "learning rate"),
    "Gradient norm": ((NORM,), "norm, before clipping"),
    "Speed": ((SPEED,), "tokens/s of a device"),
    "Waiting for data": ((DATA_WAIT,), "share of the time"),
    "Memory": (MEMORY, "MB at the peak"),
}


def choose_charts(names: Iterable[str]) -> dict[str, tuple[list[str], str]]:
    """Title → (metrics, unit) of each chart that has something to draw."""
    names = list(names)
    evaluated = [name for name in names if name.startswith("eval/")]
    training = [name for name in (LOSS, "train/ZLoss") if name in names]
    losses = [n for n in evaluated if n.split("/")[-1] == LOSSES[0]]
    scores = [n for n in evaluated if n.split("/")[-1] not in (*LOSSES, "Perplexity")]
    found: dict[str, tuple[list[str], str]] = {}
    if answers := [n for n in evaluated if n.split("/")[-1] == LOSSES[1]]:
        found["Loss on answers"] = (answers, "nats a token")
    title = "Loss on all tokens" if answers else "Loss"  # of a run that learns answers only
    bits = [n for n in evaluated if n.split("/")[-1] == LOSSES[2]]
    found |= {
        title: (training + losses, "nats a token"),
        "Bits per byte": (bits, "bits a byte"),
        "Evaluations": (scores, "score"),
    }
    found |= {
        title: ([n for n in all_ if n in names], unit) for title, (all_, unit) in FIXED.items()
    }
    return {title: chart for title, chart in found.items() if chart[0]}


def curve_specs(names: Iterable[str]) -> list[dict[str, Any]]:
    """The page's charts: title, series with their labels, and the Vega-Lite specification."""
    made = []
    for title, (metrics, unit) in choose_charts(names).items():
        labels = {name: label(name) for name in metrics}
        if len(set(labels.values())) < len(labels):  # an evaluator is called "training"
            labels = {name: name for name in metrics}
        curves = [{"metric": n, "label": labels[n], "kind": curve_kind(n)}
                  for n in metrics]  # fmt: skip
        made.append(
            {"title": title, "curves": curves, "spec": curve_spec(unit, list(labels.values()))}
        )
    return made


def curve_kind(metric: str) -> str:
    """How a curve is drawn: "point" (few), "line", or "noisy", with its moving average."""
    if metric.startswith("eval/"):
        return "point"
    return "line" if metric == RATE or metric in MEMORY else "noisy"


def label(metric: str) -> str:
    """What a metric is called in a chart: "training", "heldout", "GPU"."""
    if metric.startswith("eval/") and metric.split("/")[-1] not in LOSSES:
        return metric.removeprefix("eval/")
    if metric.endswith("/ZLoss"):
        return "z-loss"
    if metric.startswith(("train/", "eval/")):
        return metric_label(metric)
    if metric in MEMORY:
        return metric.split()[-3]
    return {RATE: "learning rate", NORM: "norm", SPEED: "tokens/s", DATA_WAIT: "share"}[metric]


def curve_spec(unit: str, labels: list[str], x: str = "step") -> dict[str, Any]:
    """Curves by `series` of the data set "points": raw and smoothed lines, and single points.

    The page's program fills in the points: {step, value, series, kind, exact}.
    """
    import altair as alt

    base = alt.Chart(alt.NamedData("points")).encode(
        x=alt.X("step:Q", title=x, scale=alt.Scale(nice=False, zero=False)),
        y=alt.Y("value:Q", title=unit, scale=alt.Scale(zero=False)),
        color=alt.Color(
            "series:N",
            title=None,
            scale=alt.Scale(domain=labels),
            legend=alt.Legend(orient="top") if len(labels) > 1 else None,
        ),
    )
    brush = alt.selection_interval(name="brush", encodings=["x"])
    near = alt.selection_point(
        name="near", nearest=True, on="pointerover", clear="pointerout", fields=["step", "series"],
        empty=False,
    )  # fmt: skip
    raw = base.transform_filter("datum.kind == 'raw'").mark_line(strokeWidth=1, opacity=0.35)
    is_thick = "datum.kind == 'smooth' || datum.kind == 'line'"
    smoothed = base.transform_filter(is_thick).mark_line(strokeWidth=2)
    points = base.transform_filter("datum.kind == 'point'").mark_line(
        strokeWidth=2, point=alt.OverlayMarkDef(filled=True, size=40)
    )
    hover = (
        base.transform_filter("datum.kind != 'smooth'")
        .mark_point(filled=True, size=90)
        .encode(
            opacity=alt.condition(near, alt.value(1), alt.value(0)),
            # Where the nearest point is looked for, Vega-Lite has it in another place.
            tooltip=alt.value(
                alt.expr(
                    "{curve: (datum.datum || datum).series, "
                    f"{x}: format((datum.datum || datum).step, ',d'), "
                    "value: (datum.datum || datum).exact}"
                )
            ),
        )
        .add_params(near)
    )
    chart = alt.layer(raw.add_params(brush), smoothed, points, hover)
    return chart.properties(width="container", height=240).to_dict(context={"pre_transform": False})


def describe_curve(name: str, series: Series) -> str:
    """A curve in a sentence, for those who do not see it."""
    finite = [(v, s) for s, v in zip(series.steps, series.values, strict=True) if v - v == 0]
    if not finite:
        return f"{label(name)}: no finite value"
    (low, at_low), (high, at_high) = min(finite), max(finite)
    return (
        f"{label(name)}: {series.values[0]:.4g} at step {series.steps[0]:,}, "
        f"{series.values[-1]:.4g} at step {series.steps[-1]:,}; lowest "
        f"{low:.4g} at step {at_low:,}, highest {high:.4g} at step {at_high:,}"
    )
