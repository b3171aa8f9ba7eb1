"""`olmo scores`: tables of evaluation results, of one run or of several side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from olmo.eval.paired import Difference, estimate_ratio, holm, with_interval
from olmo.eval.questions import Part
from olmo.report.card import format_table
from olmo.report.differences import Key, find_differences, key_of, read_evaluation
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
# Of a run that is compared with the reference; null without answers of both.
DIFFERENCE = {
    "difference": float,
    "low": float,  # of the 95 % interval
    "high": float,
    "p": float,
    "p_holm": float,  # corrected for all differences of the table
    "detectable": float,
    "questions": int,
}
PER_ANSWER = "loss per answer token"
LOWER_IS_BETTER = ("loss", PER_ANSWER, "perplexity", "bits_per_byte", "ce_loss", "bpb")
Differences = dict[str, dict[Key, Difference]]  # by the compared run
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
    if documents is not None and documents["bytes"].sum():
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

    The error is that of a ratio of sums over independent documents; None for a single one, and
    where a loss is not finite.
    """
    bits = [loss / math.log(2) for loss in nats]
    if not all(map(math.isfinite, bits)):
        return sum(bits) / sum(sizes), None
    found = with_interval(estimate_ratio(bits, sizes))
    return found.value, None if math.isnan(found.stderr) else found.stderr


def format_run_table(rows: Sequence[Row]) -> str:
    """The table of one run: each score with its standard error."""
    head = ("task", "scorer", "metric", "value", "documents")
    body = [
        (row["task"], row["scorer"], row["metric"], format_value(row), row["documents"] or "")
        for row in rows
    ]
    return format_table(head, body) + format_suites({"value": rows})


def scores(runs: list[Path], table: Path, parquet: Path) -> None:
    """Put evaluations of several runs (folders eval/<run>) side by side, the reference first.

    The table (Markdown) has a column for each run: value ± standard error, and in brackets the
    difference to the reference on the questions that both answered, with its 95 % interval, and
    better or worse if 0 is not in it. The last column is the least difference that so many
    questions detect in four of five cases. The parquet file holds all rows, with a column `run`.

    Args:
        runs: folders eval/<run>; the first is the reference
        table: Markdown file to write
        parquet: parquet file to write

    Example:
        olmo scores --runs eval/one eval/two --table a.md --parquet a.parquet

    Raises ValueError for less than two runs, for two of one name, for a folder without results or
    answers, for runs without a common question, and for outputs that are links into the store.
    Runs whose data sets held out other documents have no difference in bits per byte.
    """
    import polars

    check_not_in_store(table, parquet)
    names = [run.name for run in runs]
    if len(names) < 2:
        raise ValueError(
            f"expected two runs or more, the reference first, found {', '.join(names) or 'none'}; "
            "name them: `eval` in config/config.yaml, or --runs (eval/<run>/table.md is one run's)"
        )
    if len(set(names)) < len(names):
        raise ValueError(f"expected runs with different names, found {', '.join(names)}")
    found = {run.name: read_results(run) for run in runs}
    reference, *others = (read_evaluation(run, found[run.name]) for run in runs)
    differences = {other.name: find_differences(reference, other) for other in others}
    for path in (table, parquet):
        path.parent.mkdir(parents=True, exist_ok=True)
    rows = _rows_with_differences(found, differences)
    schema = {"run": str, **SCHEMA, **DIFFERENCE}
    polars.DataFrame(rows, schema=schema).write_parquet(parquet)
    table.write_text(format_comparison_table(found, differences))


def _rows_with_differences(found: dict[str, list[Row]], differences: Differences) -> list[Row]:
    places = [(name, key) for name, by_key in differences.items() for key in by_key]
    known = [differences[name][key] for name, key in places]
    corrected = dict(zip(places, holm([one.p for one in known]), strict=True))
    rows = []
    for name, scored in found.items():
        for row in scored:
            one = differences.get(name, {}).get(key_of(row))
            columns: Row = {}
            if one is not None:
                columns = one._asdict() | {
                    "difference": one.value,
                    "p_holm": corrected[name, key_of(row)],
                }
            rows.append({"run": name, **columns, **row})
    return [{column: row.get(column) for column in ("run", *SCHEMA, *DIFFERENCE)} for row in rows]


def read_results(run: Path) -> list[Row]:
    """The rows of results.json in an evaluation's folder."""
    import polars

    path = run / "results.json"
    if not path.exists():
        raise ValueError(
            f"expected {path}, found none; make it: uv run snakemake --cores 2 eval/{run.name}"
        )
    try:
        rows: list[Row] = from_json(path.read_text())
        parts = [part for row in rows for part in row.get("parts", ())]
        is_whole = (
            isinstance(rows, list)
            and all(row.keys() >= SCHEMA.keys() and row["value"] is not None for row in rows)
            and all(isinstance(name, str) for row in rows for name in key_of(row))
            and all(part.keys() == set(Part._fields) and part["chance"] < 1 for part in parts)
        )
        polars.DataFrame(rows, schema=SCHEMA)  # refuses values of other types
        polars.DataFrame(parts, schema=get_type_hints(Part))
    except (ValueError, AttributeError, TypeError, polars.exceptions.PolarsError):
        is_whole = False
    if not is_whole:
        raise ValueError(
            f"{path} is damaged: expected rows with {', '.join(SCHEMA)}; make it again: "
            f"rm -r {run}; uv run snakemake --cores 2 eval/{run.name}"
        )
    return rows


def format_comparison_table(found: dict[str, list[Row]], differences: Differences) -> str:
    """The table of several runs, a column each; the first is the reference."""
    by_run = {name: {key_of(row): row for row in rows} for name, rows in found.items()}
    lines = []
    for score in dict.fromkeys(key_of(row) for rows in found.values() for row in rows):
        cells, least = [], []
        for name, rows in by_run.items():
            row, one = rows.get(score), differences.get(name, {}).get(score)
            cell = "" if row is None else format_value(row)
            if one is not None:
                cell += f" ({format_difference(one, score[2])})"
                least.append(one.detectable)
            cells.append(cell)
        lines.append((*score, *cells, f"{max(least):.4f}" if least else ""))
    head = ("task", "scorer", "metric", *found, "detectable")
    explained = explain_differences(next(iter(found)), differences)
    return explained + "\n\n" + format_table(head, lines) + format_suites(found)


def explain_differences(reference: str, differences: Differences) -> str:
    """What stands above the table: how many differences to expect by chance."""
    p_values = [one.p for by_key in differences.values() for one in by_key.values()]
    p_values = [p for p in p_values if not math.isnan(p)]  # of one question alone
    marked = sum(p < 0.05 for p in p_values)
    kept = sum(p < 0.05 for p in holm(p_values))
    return (
        f"In brackets: the difference to {reference} on the questions that both answered, its 95 % "
        f"interval, and better or worse if 0 is not in it. The intervals are not corrected for "
        f"their number: of {len(p_values)}, {marked} are without 0, where runs that do not differ "
        f"would give {0.05 * len(p_values):.3g}; {kept} are left after Holm's correction. "
        "detectable: the least true difference that so many questions find in four of five cases."
    )


def format_suites(found: Mapping[str, Sequence[Row]]) -> str:
    """What the suites are made of, a column for each run; "" if there are none."""
    parts: dict[tuple[str, str, str, str], dict[str, Row]] = {}
    for name, rows in found.items():
        for row in rows:
            for part in row.get("parts", ()):
                key = (row["task"], part["task"], part["scorer"], part["metric"])
                parts.setdefault(key, {})[name] = part
    if not parts:
        return ""
    lines = []
    for key, by_run in parts.items():
        first = next(iter(by_run.values()))
        values = [f"{by_run[name]['value']:.4f}" if name in by_run else "" for name in found]
        lines.append((*key, f"{first['chance']:g}", f"{first['weight']:.4f}", *values))
    head = ("suite", "part", "scorer", "metric", "chance", "weight", *found)
    said = "A suite is the sum of weight · (value − chance) / (1 − chance) over its parts:"
    return f"\n{said}\n\n{format_table(head, lines)}"


def format_value(row: Row) -> str:
    """Value ± standard error."""
    error = "" if row["stderr"] is None else f" ± {row['stderr']:.4f}"
    return f"{row['value']:.4f}{error}"


def format_difference(one: Difference, metric: str) -> str:
    """The difference and its interval; better or worse if 0 is not in it."""
    if one.low <= 0 <= one.high or not one.low <= one.high:  # NaN: one question alone
        said = ""
    else:
        said = " better" if (one.value < 0) == (metric in LOWER_IS_BETTER) else " worse"
    return f"{one.value:+.4f} [{one.low:+.4f}, {one.high:+.4f}]{said}"
