"""`olmo scores`: tables of evaluation results, of one run or of several side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from olmo.report.card import format_table
from olmo.runtime.numbers import from_json
from olmo.store.naming import check_not_in_store

if TYPE_CHECKING:
    import polars

SCHEMA = {
    "scorer": str,
    "task": str,
    "metric": str,
    "value": float,
    "stderr": float,  # null if unknown
    "documents": int,
}
PER_ANSWER = "loss per answer token"
LOWER_IS_BETTER = ("loss", PER_ANSWER, "perplexity", "bits_per_byte", "ce_loss", "bpb")
Row = dict[str, Any]


def heldout_scores(
    found: dict[str, Any], task: str, documents: polars.DataFrame | None = None
) -> list[Row]:
    """The rows of a result of `olmo heldout`. The perplexity's error is a first-order estimate.

    Args:
        documents: bytes and nats of each document, for bits per byte.
    """
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
    if (per_label := found.get("CrossEntropyLossPerLabel")) is not None:
        # On conversations the others count the questions' tokens, too, which are not learned.
        rows.insert(0, {**common, "metric": PER_ANSWER, "value": per_label, "stderr": None})
    if documents is not None and documents.height:
        bits, error = compute_bits_per_byte(
            *(documents[name].to_list() for name in ("nats", "bytes"))
        )
        row = {**common, "documents": documents.height, "metric": "bits_per_byte"}
        rows.append({**row, "value": bits, "stderr": error})
    return rows


def compute_bits_per_byte(
    nats: Sequence[float], sizes: Sequence[int]
) -> tuple[float, float | None]:
    """(bits per byte of all documents, standard error), of the nats and bytes of each document.

    The error is that of a ratio of sums over independent documents (Cochran, Sampling Techniques,
    1977, chapter 2.11); None for a single one, and where a loss is not finite.
    """
    import numpy as np

    loss, size = np.asarray(nats, np.float64), np.asarray(sizes, np.float64)
    n, ratio = len(loss), loss.sum() / size.sum()
    if n < 2 or not math.isfinite(ratio):
        return float(ratio / math.log(2)), None
    variance = np.square(loss - ratio * size).sum() / (n - 1) / n
    return float(ratio / math.log(2)), float(math.sqrt(variance) / size.mean() / math.log(2))


def format_run_table(rows: Sequence[Row]) -> str:
    """The table of one run: each score with its standard error."""
    head = ("task", "scorer", "metric", "value", "documents")
    body = [
        (row["task"], row["scorer"], row["metric"], format_value(row), row["documents"] or "")
        for row in rows
    ]
    return format_table(head, body)


def scores(runs: list[Path], table: Path, parquet: Path) -> None:
    """Put evaluations of several runs (folders eval/<run>) side by side, the reference first.

    The table (Markdown) has a column for each run: value ± standard error, and in brackets the
    improvement over the reference in standard errors of the difference. That assumes independent
    documents, and so underestimates the significance on the same documents. The parquet file holds
    all rows, with a column `run`.

    Args:
        runs: folders eval/<run>; the first is the reference
        table: Markdown file to write
        parquet: parquet file to write

    Example:
        olmo scores --runs eval/one eval/two --table a.md --parquet a.parquet

    Raises ValueError for two runs of one name, for a folder without results, and for outputs that
    are links into the store.
    """
    import polars

    check_not_in_store(table, parquet)
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        raise ValueError(f"expected runs with different names, found {', '.join(names)}")
    found = {run.name: read_results(run) for run in runs}
    rows = [{"run": name, **row} for name in names for row in found[name]]
    for path in (table, parquet):
        path.parent.mkdir(parents=True, exist_ok=True)
    polars.DataFrame(rows, schema={"run": str, **SCHEMA}).write_parquet(parquet)
    table.write_text(format_comparison_table(found))


def read_results(run: Path) -> list[Row]:
    """The rows of results.json in an evaluation's folder."""
    path = run / "results.json"
    if not path.exists():
        raise ValueError(
            f"expected {path}, found none; make it: uv run snakemake --cores 2 eval/{run.name}"
        )
    try:
        rows: list[Row] = from_json(path.read_text())
        is_whole = all(row.keys() >= SCHEMA.keys() and row["value"] is not None for row in rows)
    except (ValueError, AttributeError, TypeError):
        is_whole = False
    if not is_whole:
        raise ValueError(
            f"{path} is damaged: expected rows with {', '.join(SCHEMA)}; make it again: "
            f"rm -r {run}; uv run snakemake --cores 2 eval/{run.name}"
        )
    return rows


def format_comparison_table(found: dict[str, list[Row]]) -> str:
    """The table of several runs, a column each; the first is the reference."""

    def key(row: Row) -> tuple[str, str, str]:
        return row["task"], row["scorer"], row["metric"]

    by_run = {name: {key(row): row for row in rows} for name, rows in found.items()}
    keys = list(dict.fromkeys(key(row) for rows in found.values() for row in rows))
    reference = by_run[next(iter(by_run))]
    lines = []
    for score in keys:
        cells = []
        for name, rows in by_run.items():
            row = rows.get(score)
            compared = reference.get(score) if name != next(iter(by_run)) else None
            cells.append("" if row is None else format_value(row) + improvement(row, compared))
        lines.append((*score, *cells))
    return format_table(("task", "scorer", "metric", *found), lines)


def format_value(row: Row) -> str:
    """Value ± standard error."""
    error = "" if row["stderr"] is None else f" ± {row['stderr']:.4f}"
    return f"{row['value']:.4f}{error}"


def improvement(row: Row, reference: Row | None) -> str:
    """How many standard errors a score is better than the reference; "" if unknown."""
    if reference is None or row["stderr"] is None or reference["stderr"] is None:
        return ""
    error = math.hypot(row["stderr"], reference["stderr"])
    if not error or not math.isfinite(error):
        return ""
    sign = -1 if row["metric"] in LOWER_IS_BETTER else 1
    return f" ({sign * (row['value'] - reference['value']) / error:+.1f})"
