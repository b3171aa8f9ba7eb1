"""Pairs the answers of two evaluations question by question, for `olmo scores`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from olmo.eval.paired import (
    Difference,
    Estimate,
    combine,
    estimate_difference,
    estimate_ratio,
    with_interval,
)
from olmo.eval.questions import OURS, Part

if TYPE_CHECKING:
    import polars

QUESTIONS = {"scorer": str, "task": str, "metric": str, "question": str, "value": float}
DOCUMENTS = {"dataset": str, "digest": str, "bytes": int, "nats": float}
HELDOUT_BITS = (OURS, "bits_per_byte")  # scorer, metric: of documents, not of questions
Row = dict[str, Any]
Key = tuple[str, str, str]  # task, scorer, metric


class Evaluation(NamedTuple):
    """What an evaluation's folder has, as far as it is compared."""

    name: str
    rows: dict[Key, Row]
    questions: polars.DataFrame
    documents: polars.DataFrame  # held-out ones with their nats; `dataset` is the task


def read_evaluation(run: Path, rows: list[Row]) -> Evaluation:
    """Read the answers in eval/<run>. Raises ValueError if they are missing or damaged."""
    import polars

    by_key = {key_of(row): row for row in rows}
    documents = polars.DataFrame(schema=DOCUMENTS)
    if any(key[1:] == HELDOUT_BITS for key in by_key):  # an older evaluation has none
        documents = _read(run / "documents.parquet", DOCUMENTS)
    return Evaluation(run.name, by_key, _read(run / "questions.parquet", QUESTIONS), documents)


def key_of(row: Row) -> Key:
    """What makes two rows of results.json scores of the same thing."""
    return row["task"], row["scorer"], row["metric"]


def find_differences(reference: Evaluation, other: Evaluation) -> dict[Key, Difference]:
    """The difference `other` − `reference` of each score whose questions both answered.

    A score without answers in both, as a perplexity, has none; nor has one that is not finite, or
    the bits per byte of runs whose data sets held out other documents.

    Raises ValueError if the runs share no score, if only one of them has a shared score's answers,
    or if no question is the same.
    """
    shared = [key for key in reference.rows if key in other.rows]
    if not shared:
        tasks = [
            ", ".join(sorted({key[0] for key in e.rows})) or "none" for e in (reference, other)
        ]
        raise ValueError(
            f"expected a task that both {reference.name} and {other.name} answered, found "
            f"{tasks[0]} and {tasks[1]}; give both runs one `evaluation` in config/config.yaml"
        )
    answers = _pair_questions(reference, other)
    found = {}
    for key in shared:
        if "parts" in reference.rows[key]:
            estimate = _compare_suites(key, reference, other, answers)
        elif key[1:] == HELDOUT_BITS:
            estimate = _compare_documents(key[0], reference, other)
        else:
            estimate = answers.get(key)
        if estimate is not None:
            found[key] = with_interval(estimate)
    return found


def _pair_questions(reference: Evaluation, other: Evaluation) -> dict[Key, Estimate | None]:
    """Score → its estimate; None if a score is not finite."""
    on = ["task", "scorer", "metric"]
    same = [*on, "question"]
    kept = [_number_repeats(found.questions, same) for found in (reference, other)]
    counts = [{row[:3]: row[3] for row in frame.group_by(on).len().iter_rows()} for frame in kept]
    both = kept[0].join(
        kept[1], on=[*on, "question", "time"], suffix="_other", maintain_order="left"
    )
    pairs = both.partition_by(on, as_dict=True, maintain_order=True)
    found: dict[Key, Estimate | None] = {}
    for key in (key for key in reference.rows if key in other.rows):
        asked = [count.get(key, 0) for count in counts]
        if not any(asked):
            continue
        if not all(asked):
            without = (reference, other)[asked.index(0)].name
            raise ValueError(
                f"{key[0]} ({key[1]}, {key[2]}): expected each question's score, found none of "
                f"{without}; evaluate it again: rm -r eval/{without}; "
                f"uv run snakemake --cores 2 eval/{without}"
            )
        if key not in pairs:
            raise ValueError(
                f"{key[0]} ({key[1]}, {key[2]}): expected questions that both {reference.name} and "
                f"{other.name} answered, found {asked[0]} and {asked[1]} others; evaluate both on "
                "the same data"
            )
        before, after = (pairs[key][name].to_numpy() for name in ("value", "value_other"))
        is_finite = math.isfinite(float(before.sum() + after.sum()))
        found[key] = estimate_difference(before, after) if is_finite else None
    return found


def _compare_suites(
    suite: Key,
    reference: Evaluation,
    other: Evaluation,
    answers: dict[Key, Estimate | None],
) -> Estimate | None:
    scales = [
        {key_of(part): Part(**part).scale for part in evaluation.rows[suite]["parts"]}
        for evaluation in (reference, other)
    ]
    if scales[0] != scales[1]:
        raise ValueError(
            f"{suite[0]}: expected a suite of the same parts, found others in {reference.name} "
            f"than in {other.name}; give both runs one `evaluation` in config/config.yaml"
        )
    estimates = [answers.get(key) for key in scales[0]]
    known = [estimate for estimate in estimates if estimate is not None]
    if len(known) < len(estimates):
        return None
    return combine(known, list(scales[0].values()))


def _compare_documents(task: str, reference: Evaluation, other: Evaluation) -> Estimate | None:
    """Bits per byte of the held-out documents of both; None if a loss is not finite.

    None, too, without such documents: runs of other data sets held out others.
    """
    kept = [
        _number_repeats(found.documents.filter(dataset=task), ["digest", "bytes"])
        for found in (reference, other)
    ]
    both = kept[0].join(kept[1], on=["digest", "bytes", "time"], suffix="_other")
    if not both["bytes"].sum():
        return None
    changes = (both["nats_other"] - both["nats"]).to_numpy() / math.log(2)
    if not math.isfinite(float(changes.sum())):
        return None
    return estimate_ratio(changes, both["bytes"].to_numpy())


def _number_repeats(frame: polars.DataFrame, same: list[str]) -> polars.DataFrame:
    """A column `time`: what occurs twice is paired with itself, in order."""
    import polars

    return frame.with_columns(polars.int_range(polars.len()).over(same).alias("time"))


def _read(path: Path, schema: dict[str, Any]) -> polars.DataFrame:
    import polars

    again = f"rm -r {path.parent}; uv run snakemake --cores 2 eval/{path.parent.name}"
    if not path.exists():
        raise ValueError(
            f"expected {path}, the scores one by one, found none; evaluate again: {again}"
        )
    try:
        found = polars.read_parquet(path, columns=list(schema))
        found = found.cast(
            {name: polars.DataType.from_python(kind) for name, kind in schema.items()}
        )
        if empty := [column.name for column in found if column.has_nulls()]:
            raise ValueError(f"{empty[0]} is not set in all rows")
        if "bytes" in schema and (found["bytes"] < 0).any():
            raise ValueError("bytes are below 0")
    except (polars.exceptions.PolarsError, OSError, ValueError) as error:
        first = str(error).strip().splitlines()[:1]
        raise ValueError(
            f"{path} is damaged: expected columns {', '.join(schema)} "
            f"({first[0] if first else type(error).__name__}); evaluate again: {again}"
        ) from error
    return found
