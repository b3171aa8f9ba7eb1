"""What runs scored, as tables: one run by itself, or several side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from olmo.io.downloads import refuse_links
from olmo.report.card import table
from olmo.runtime.numbers import from_json

SCHEMA = {
    "scorer": str,
    "task": str,
    "metric": str,
    "value": float,
    "stderr": float,  # null where there is none
    "documents": int,
}
LOWER_IS_BETTER = ("loss", "loss per label", "perplexity", "ce_loss", "bpb")
Row = dict[str, Any]


def heldout_scores(found: dict[str, Any], task: str) -> list[Row]:
    """Rows of what `olmo heldout` wrote. The perplexity's error is to first order."""
    common = {"scorer": "ours", "task": task, "documents": found["instances"]}
    loss, ppl, stderr = found["CrossEntropyLoss"], found["Perplexity"], found["stderr"]
    rows = [
        {**common, "metric": "loss", "value": loss, "stderr": stderr},
        {
            **common,
            "metric": "perplexity",
            "value": ppl,
            "stderr": None if stderr is None else ppl * stderr,
        },
    ]
    if (alone := found.get("CrossEntropyLossPerLabel")) is not None:  # of answers alone
        rows.append({**common, "metric": "loss per label", "value": alone, "stderr": None})
    return rows


def table_of_one(rows: Sequence[Row]) -> str:
    """A run's table: each score with its standard error."""
    head = ("task", "scorer", "metric", "value", "documents")
    body = [
        (row["task"], row["scorer"], row["metric"], with_error(row), row["documents"] or "")
        for row in rows
    ]
    return table(head, body)


def scores(runs: list[Path], table: Path, parquet: Path) -> None:
    """Put evaluations of several runs (folders eval/<run>) side by side, the reference first.

    The table (Markdown) has a column for each run: value ± standard error, and in brackets by how
    many standard errors of the difference it is better than the reference, as if they had been
    asked different documents; asked the same ones, they differ more surely than that. The parquet
    file holds all rows, with a column `run`.

    Raises ValueError for two runs of one name, for what is no evaluation, and for
    outputs that are links into the store.
    """
    import polars

    refuse_links(table, parquet)
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        raise ValueError(f"expected runs of different names, found {', '.join(names)}")
    found = {run.name: results(run) for run in runs}
    rows = [{"run": name, **row} for name in names for row in found[name]]
    for path in (table, parquet):
        path.parent.mkdir(parents=True, exist_ok=True)
    polars.DataFrame(rows, schema={"run": str, **SCHEMA}).write_parquet(parquet)
    table.write_text(of_several(found))


def results(run: Path) -> list[Row]:
    path = run / "results.json"
    if not path.exists():
        raise ValueError(
            f"expected {path}, found none; make it: uv run snakemake --cores 2 eval/{run.name}"
        )
    rows: list[Row] = from_json(path.read_text())
    return rows


def of_several(found: dict[str, list[Row]]) -> str:
    def key(row: Row) -> tuple[str, str, str]:
        return row["task"], row["scorer"], row["metric"]

    by_run = {name: {key(row): row for row in rows} for name, rows in found.items()}
    keys = list(dict.fromkeys(key(row) for rows in found.values() for row in rows))
    reference = by_run[next(iter(by_run))]
    lines = []
    for asked in keys:
        cells = []
        for name, rows in by_run.items():
            row = rows.get(asked)
            beside = reference.get(asked) if name != next(iter(by_run)) else None
            cells.append("" if row is None else with_error(row) + better(row, beside))
        lines.append((*asked, *cells))
    return table(("task", "scorer", "metric", *found), lines)


def with_error(row: Row) -> str:
    error = "" if row["stderr"] is None else f" ± {row['stderr']:.4f}"
    return f"{row['value']:.4f}{error}"


def better(row: Row, reference: Row | None) -> str:
    """By how many standard errors a score is better than another; "" where none is known."""
    if reference is None or row["stderr"] is None or reference["stderr"] is None:
        return ""
    error = math.hypot(row["stderr"], reference["stderr"])
    if not error or not math.isfinite(error):
        return ""
    sign = -1 if row["metric"] in LOWER_IS_BETTER else 1
    return f" ({sign * (row['value'] - reference['value']) / error:+.1f})"
