"""The page of all runs: a table, curves over one another, and where any two differ."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from olmo.config import read_project_config
from olmo.inspect.documents import find_token_shards
from olmo.report.charts import curve_kind, curve_spec
from olmo.report.diff import describe_run
from olmo.report.html import hide_paths, render
from olmo.report.run_page import flatten
from olmo.report.runs import find_state
from olmo.report.series import (
    HELDOUT,
    HELDOUT_ANSWERS,
    HELDOUT_BITS,
    LOSS,
    find_metrics,
    pack,
    read_series,
    thin,
)
from olmo.runtime.log import format_bytes, format_count, format_duration, log
from olmo.store.lease import held_names
from olmo.store.lineage import records_by_content
from olmo.store.stage import current_store

# Title → metric, of the curves that runs have in common. A run that learns answers only has its
# loss on them; its training loss counts the questions, too.
CURVES = {
    "Held-out loss": (HELDOUT_ANSWERS, HELDOUT),
    "Training loss": (LOSS,),
    "Held-out bits per byte": (HELDOUT_BITS,),
}
SECTIONS = ("config", "data", "code", "results")


def format_index(names: Sequence[str], folder: Path) -> str:
    """The page of these runs, as HTML; runs that have not begun are listed only.

    Args:
        folder: where the pages of the runs are, if they have one.
    """
    store, price = current_store(), read_project_config().get("price") or {}
    held, made_by = held_names(store.root / "leases"), records_by_content(store)
    shards = find_token_shards(store, made_by)
    runs, curves, described = [], dict[str, dict[str, Any]](), dict[str, dict[str, Any]]()
    for name in names:
        state = find_state(name, held, price)
        runs.append((state, (folder / f"{name}.html").exists()))
        if state.state == "not begun":
            continue
        series = read_series(find_metrics(Path("checkpoints", name)))
        is_tuned = HELDOUT_ANSWERS in series
        curves[name] = {
            title: pack(thin(next(series[metric] for metric in metrics if metric in series)))
            for title, metrics in CURVES.items()
            if any(m in series for m in metrics) and not (is_tuned and metrics == (LOSS,))
        }
        try:
            sections = describe_run(name, shards, made_by)
        except (ValueError, OSError) as error:  # one that is damaged hides no other
            log.warning(f"{name} is listed only: {error}")
            continue
        described[name] = {part: fields_of(sections[part]) for part in SECTIONS}
    specs = [
        {
            "title": title,
            "kind": curve_kind(metrics[0]),
            "spec": curve_spec(
                "bits a byte" if metrics == (HELDOUT_BITS,) else "nats a token", list(curves)
            ),
        }
        for title, metrics in CURVES.items()
        if any(title in found for found in curves.values())
    ]
    data = {"curves": curves, "charts": specs, "runs": described}
    context = {
        "runs": runs,
        "charts": [chart["title"] for chart in specs],
        "compared": list(described),
        "write": {"count": format_count, "duration": format_duration, "size": format_bytes},
    }
    return render("index.html", context, data)


def fields_of(section: Any) -> dict[str, str]:
    """The fields of a section by their dotted names, as text."""
    return {key: str(value) for key, value in flatten(hide_paths(section)) if key}
