"""`olmo blame`: the documents that moved the loss of a step, as a table, as JSON and as a page."""

from __future__ import annotations

import math
import shlex
import sys
import tempfile
from collections.abc import Iterable
from contextlib import nullcontext, redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import Any

from olmo.inspect.blame import BUDGET, Cause, Findings, find_causes
from olmo.inspect.commands import load_run_tokenizer
from olmo.inspect.documents import find_token_shards
from olmo.inspect.run import TrainedRun
from olmo.io import sealed
from olmo.report.html import hide_paths, render
from olmo.runtime.log import format_bytes, format_number
from olmo.runtime.numbers import to_json
from olmo.store.naming import check_not_in_store
from olmo.store.stage import current_store

ROWS = 20  # of the table
BEGINNING = 240  # characters of a document
HEAD = ("moves the loss by", "step", "own loss", "gradient norm", "score", "document", "where")


def blame(
    run: str,
    /,
    step: int,
    from_: int | None = None,
    budget: int = BUDGET,
    folder: Path = Path("report"),
    json: bool = False,
) -> None:
    """Find the documents that moved the loss of a step, or that made it NaN, and write a page.

    The steps before it are trained again, in this process, from the last checkpoint. A document of
    the step itself counts by its part of the mean. One of an earlier step counts by what the loss
    becomes when the steps since are trained again without its labels; whole groups are left out
    first, and halved. A run that ended at a gradient that was not finite is asked about that step.

    Args:
        run: name in config/config.yaml, or the folder of a run, finished or not
        step: the step whose loss is explained
        from_: first step whose documents are searched; by default that after the last checkpoint,
            but at most 20 steps before the step
        budget: steps that the search may train, besides those up to the step
        folder: where the page is written, RUN-blame-STEP.html
        json: print a line of JSON for each document

    Example:
        olmo blame olmo-tiny --step 8
        olmo blame olmo-tiny --step 8 --from 2 --budget 1000 --json
    """
    name = Path(run).resolve().name if Path(run).exists() else run
    page = folder / f"{name}-blame-{step}.html"
    check_not_in_store(page)
    trained = TrainedRun(run)
    with (
        tempfile.TemporaryDirectory() as work,
        redirect_stdout(sys.stderr) if json else nullcontext(),
    ):
        found = find_causes(trained, step, from_, budget, Path(work))
    rows = describe_causes(trained, found.causes[:ROWS])
    if json:
        for row in rows:
            print(to_json(row, ensure_ascii=False))
    else:
        print("\n".join([*format_rows(rows), "", *describe_findings(found), "", *advise(found)]))
    sealed.write_atomic(page, format_page(name, found, rows))
    print(f"{page}: {format_bytes(page.stat().st_size)}", file=sys.stderr if json else sys.stdout)


def describe_causes(run: TrainedRun, causes: list[Cause]) -> list[dict[str, Any]]:
    """A table's rows: what each document did, where it is from, how it begins."""
    shards = find_token_shards(current_store())
    words = load_run_tokenizer(run, shards, None)
    rows = []
    for cause in causes:
        seen, document = cause.seen, cause.seen.document
        text = None
        if words is not None:
            tokens = shards[document.shard].read_tokens(document)[:BEGINNING].tolist()
            text = words.decode(tokens, skip_special_tokens=False)[:BEGINNING]
        rows.append(
            {
                "effect": cause.effect,
                "step": seen.step,
                "loss": seen.loss,
                "norm": seen.norm,
                "score": cause.score,
                **asdict(document),
                "text": text,
            }
        )
    return rows


def format_rows(rows: list[dict[str, Any]]) -> list[str]:
    """The table, a line for each document and one for its beginning."""
    cells = [HEAD, *map(format_cells, rows)]
    widths = [max(len(row[n]) for row in cells) for n in range(len(HEAD))]
    lines = []
    for number, row in enumerate(cells):
        aligned = (
            cell.rjust(width) if n < 5 else cell.ljust(width)
            for n, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join(aligned).rstrip())
        if number and (text := rows[number - 1]["text"]) is not None:
            lines.append(f"    {text[:80]!r}")
    return lines


def format_cells(row: dict[str, Any]) -> tuple[str, ...]:
    origin = f" of {row['origin']}" if row["origin"] else ""
    effect = row["effect"]
    moved = "not measured" if effect is None else f"{effect:+.5f}"
    moved = "to finite" if effect is not None and math.isinf(effect) else moved
    numbers = (f"{row['loss']:.3f}", f"{row['norm']:.3g}", f"{row['score']:.1f}")
    return (moved, str(row["step"]), *numbers, row["id"], f"{row['source']}:{row['line']}{origin}")


def describe_findings(found: Findings) -> list[str]:
    loss, first = found.losses[found.step], min(found.losses)
    guilty = f"{format_number(len(found.guilty), 'document')} of steps {first} to {found.step}"
    needed = (
        f"raised its loss by more than {found.threshold:.2g}"
        if math.isfinite(loss)
        else "without which it would be finite"
    )
    left = "" if found.is_complete else "; --budget ended the search before all suspects were alone"
    return [
        f"step {found.step}: loss {loss:.6g}; {guilty} {needed}",
        f"{found.replayed} steps were trained again, {found.searched} of them by the search{left}",
        f"the replay: {found.agreement}",
    ]


def advise(found: Findings) -> list[str]:
    """The lines for config/config.yaml that leave these documents, or these steps, out."""
    if not found.guilty:
        return []
    ids = dict.fromkeys(cause.seen.document.id for cause in found.guilty)
    steps = join_ranges(cause.seen.step for cause in found.guilty)
    return [
        "for the run in config/config.yaml, one of:",
        f"skip_documents: {to_json(list(ids), ensure_ascii=False)}",
        f"skip_steps: [{', '.join(steps)}]",
    ]


def join_ranges(steps: Iterable[int]) -> list[str]:
    """Steps as ranges.

    >>> join_ranges([7, 5, 6, 9])
    ['5..7', '9']
    """
    ranges: list[list[int]] = []
    for step in sorted(set(steps)):
        if ranges and ranges[-1][1] == step - 1:
            ranges[-1][1] = step
        else:
            ranges.append([step, step])
    return [f"{first}..{last}" if first < last else str(first) for first, last in ranges]


def format_page(name: str, found: Findings, rows: list[dict[str, Any]]) -> str:
    """The page, as HTML: the window's losses, its instances, the documents."""
    charts = draw(found)
    context = {
        "name": hide_paths(name),
        "step": found.step,
        "facts": [hide_paths(line) for line in describe_findings(found)],
        "advice": advise(found),
        "command": f"olmo blame {shlex.quote(hide_paths(name))} --step {found.step}",
        "head": HEAD,
        "rows": [
            {"cells": hide_paths(format_cells(row)), "text": hide_paths(row["text"] or "")}
            for row in rows
        ],
        "charts": [{k: chart[k] for k in ("title", "description")} for chart in charts],
    }
    return render("blame.html", context, {"charts": charts}, program="quality.html")


def draw(found: Findings) -> list[dict[str, Any]]:
    """The charts: the loss by step; each instance's loss and gradient norm, step by position."""
    import altair as alt

    points = alt.Chart(alt.NamedData("points"))
    step = alt.X("step:O", title="step", axis=alt.Axis(labelOverlap=True))
    line = points.mark_line(point=True).encode(
        step, alt.Y("loss:Q", title="nats a token", scale=alt.Scale(zero=False))
    )
    mark = alt.datum.step == found.step
    blamed = points.transform_filter(mark).mark_rule(strokeDash=[4, 4]).encode(step)
    loss = found.losses[found.step]
    made: list[dict[str, Any]] = [
        {
            "title": "Loss",
            "description": f"steps {min(found.losses)} to {found.step}, whose loss is {loss:.5g}",
            "points": [{"step": s, "loss": v} for s, v in found.losses.items()],
            "spec": alt.layer(line, blamed),
        }
    ]
    for field, title in (("loss", "Loss of each instance"), ("norm", "Gradient norm of each")):
        top = max(found.instances, key=lambda one: getattr(one, field))
        value = f"{getattr(top, field):.4g}"
        where = f"{value} at step {top.step}, position {top.position}"
        made.append(
            {
                "title": title,
                "description": f"by step and position in its batch; the highest is {where}",
                "points": [asdict(one) for one in found.instances],
                "spec": points.mark_rect().encode(
                    step,
                    alt.Y("position:O", title="position", axis=alt.Axis(labelOverlap=True)),
                    alt.Color(f"{field}:Q", title=None),
                    tooltip=["step:O", "position:O", "index:O", "loss:Q", "norm:Q"],
                ),
            }
        )
    return [
        {**one, "spec": one["spec"].properties(width="container", height=240).to_dict()}
        for one in made
    ]
