"""`olmo ladder`: a ladder's runs, the law that fits them, what it predicts, and whether it held.

The prediction is written before the size that it is about is trained, and read again to check it:
what is checked is what was said.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from olmo.config import read_project_config
from olmo.config.identity import identity
from olmo.io import sealed
from olmo.pipeline.ladder import Branch, LadderConfig
from olmo.pipeline.plan import Plan
from olmo.pipeline.recipe import PriceConfig
from olmo.report.card import format_table
from olmo.report.scaling import Interval, Law, Point, leave_out
from olmo.runtime.log import format_duration
from olmo.store.lineage import diff_actions
from olmo.store.record import parse_record

LABEL = "heldout"
BELOW_ZERO = (
    " An irreducible loss below 0 means that the sizes are too close to tell it; near them the law "
    "still holds."
)


@dataclass(frozen=True)
class Piece:
    """What one action trained of a run."""

    steps: int
    seconds: float
    joules: float  # 0: not measured


@dataclass(frozen=True)
class Rung:
    """A finished run of a ladder."""

    branch: Branch
    loss: float  # the last on held-out documents, in nats a token
    pieces: dict[str, Piece]  # by the key of the action that trained it: runs share some

    @property
    def point(self) -> Point:
        branch = self.branch
        return Point(branch.size, branch.parameters, branch.tokens, self.loss)


def ladder(name: str, /, folder: Path = Path("ladder")) -> None:
    """Predict the loss of a ladder's held-out size from its other runs, and what it will cost.

    Writes FOLDER/NAME/prediction.md, .json and .svg. Runs must have finished; `snakemake
    ladder/NAME/prediction.md` trains them first.

    Args:
        name: in `ladders` of config/config.yaml
        folder: where to write

    Example:
        olmo ladder tiny
    """
    plan, target = Plan(read_project_config()), folder / name
    config = plan.ladder(name)
    branches = plan.branches(name)
    rungs = read_rungs(plan, name, [b for b in branches if b.size != config.held_out])
    law = Law([rung.point for rung in rungs])
    wanted = [branch for branch in branches if branch.size == config.held_out]
    said = [law.predict(b.parameters, b.tokens, config.confidence) for b in wanted]
    predicted = {
        "ladder": name,
        "held_out": config.held_out,
        "confidence": config.confidence,
        "law": {
            "irreducible": law.irreducible,
            "of_parameters": law.of_parameters,
            "of_tokens": law.of_tokens,
            "exponent": law.exponent,
            "noise": law.noise,
        },
        "trained": [asdict(rung.point) | {"run": rung.branch.name} for rung in rungs],
        "predicted": [
            {"run": b.name, "parameters": b.parameters, "tokens": b.tokens, **asdict(interval)}
            for b, interval in zip(wanted, said, strict=True)
        ],
    }
    parts = [
        f"# The ladder {name}\n",
        format_rungs(rungs),
        format_saving(rungs),
        format_law(law),
        f"## {config.held_out}, predicted\n",
        format_prediction(wanted, said, config.confidence),
        format_cost(rungs, wanted, plan.pipeline.price),
        format_left_out(rungs, config.confidence),
    ]
    sealed.write_atomic(target / "prediction.md", "\n".join(parts))
    sealed.write_atomic(target / "prediction.json", json.dumps(predicted, indent=1) + "\n")
    draw(target / "prediction.svg", law, rungs, dict(zip(wanted, said, strict=True)))
    print("\n".join(parts))


def ladder_check(name: str, /, folder: Path = Path("ladder")) -> None:
    """Say whether the prediction of `olmo ladder` held, by the held-out size's own runs.

    Writes FOLDER/NAME/check.md and .svg.

    Args:
        name: in `ladders` of config/config.yaml
        folder: where the prediction is, and where to write

    Example:
        olmo ladder check tiny
    """
    plan, target = Plan(read_project_config()), folder / name
    config = plan.ladder(name)
    branches = plan.branches(name)
    wanted = [branch for branch in branches if branch.size == config.held_out]
    said = read_prediction(target / "prediction.json", name, config, wanted)
    rungs = read_rungs(plan, name, branches)
    law = Law([rung.point for rung in rungs if rung.branch.size != config.held_out])
    tested = [rung for rung in rungs if rung.branch.size == config.held_out]
    parts = [
        f"# The ladder {name}, checked\n",
        format_check(tested, said, config.confidence),
        format_rungs(rungs),
        format_saving(rungs),
    ]
    sealed.write_atomic(target / "check.md", "\n".join(parts))
    draw(target / "check.svg", law, rungs, dict(zip(wanted, said, strict=True)))
    print("\n".join(parts))


def read_rungs(plan: Plan, name: str, branches: Sequence[Branch]) -> list[Rung]:
    """The runs of a ladder, all finished."""
    found = []
    for branch in branches:
        settings = identity(plan.train_config(branch.name))
        found.append(read_rung(name, branch, plan.run(branch.name).links, settings))
    return found


def read_rung(ladder: str, branch: Branch, links: Sequence[int], settings: dict[str, Any]) -> Rung:
    """A run of the ladder, with these links.

    Args:
        settings: the identity of its training config

    Raises:
        ValueError: it has not finished, is of other settings, or has no finite held-out loss.
    """
    folder = Path("checkpoints", branch.name)
    remedy = f"train it: uv run snakemake --cores 2 {folder}/final"
    names = [*(f"step-{step}" for step in links), "final"]
    if missing := next((n for n in names if not (folder / n / "record.json").exists()), None):
        raise ValueError(
            f"ladders.{ladder}: expected its run {branch.name} in {folder}/{missing}, found none; "
            + remedy
        )
    pieces, before = {}, 0
    for name in names:
        path = folder / name / "record.json"
        record = parse_record(path.read_bytes(), path)
        steps, run = int(record["facts"]["steps"]), record.get("run", {})
        joules = run.get("machine_energy_j") or 0.0
        pieces[record["key"]] = Piece(steps - before, run.get("wall_s", 0.0), joules)
        before = steps
    if changed := diff_actions(record["action"]["params"]["settings"], settings):
        raise ValueError(
            f"{folder}/final: expected the settings of ladders.{ladder}, found that they changed "
            f"since it was trained ({changed[0]}); {remedy}"
        )
    losses = record["facts"].get("heldout_loss", {}).get(LABEL)
    if losses is None:
        raise ValueError(
            f"{folder}/final: expected a loss on held-out documents, found none; set "
            "documents.heldout_share in the recipe of the ladder's data set"
        )
    if not math.isfinite(loss := float(losses["last"])):
        raise ValueError(
            f"ladders.{ladder}: expected a finite held-out loss of {branch.name}, found {loss}: it "
            f"diverged; give {branch.size} a smaller optimizer.learning_rate, or leave the size out"
        )
    return Rung(branch, loss, pieces)


def read_prediction(
    path: Path, name: str, config: LadderConfig, wanted: Sequence[Branch]
) -> list[Interval]:
    """What `olmo ladder` predicted of each run.

    Raises:
        ValueError: there is no prediction, or it is of other runs than the ladder has now.
    """
    remedy = f"predict it: uv run snakemake --cores 2 {path.with_suffix('.md')}"
    if not path.exists():
        raise ValueError(f"expected a prediction in {path}, found none; {remedy}")
    try:
        said = json.loads(path.read_bytes())
        found = [(one["run"], one["parameters"], one["tokens"]) for one in said["predicted"]]
        intervals = [
            Interval(float(one["low"]), float(one["loss"]), float(one["high"]))
            for one in said["predicted"]
        ]
        confidence = said["confidence"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: expected the JSON of olmo ladder, found it unreadable; {remedy}"
        ) from error
    if found != [(b.name, b.parameters, b.tokens) for b in wanted] or (
        confidence != config.confidence
    ):
        raise ValueError(
            f"{path}: expected the runs that ladders.{name} has now, found others; {remedy}"
        )
    return intervals


def count_saving(rungs: Sequence[Rung]) -> tuple[int, int]:
    """The tokens of all runs, each from scratch, and those that were trained."""
    each: dict[str, int] = {}
    for rung in rungs:
        each |= {key: p.steps * rung.branch.step_tokens for key, p in rung.pieces.items()}
    return sum(rung.branch.tokens for rung in rungs), sum(each.values())


def format_rungs(rungs: Sequence[Rung]) -> str:
    """The runs as a table."""
    head = ("run", "parameters", "without embeddings", "tokens", "FLOP", "held-out loss")
    rows = [
        (
            rung.branch.name,
            f"{rung.branch.all_parameters:,}",
            f"{rung.branch.parameters:,}",
            f"{rung.branch.tokens:,}",
            f"{rung.branch.flops:.2e}",
            f"{rung.loss:.4f}",
        )
        for rung in rungs
    ]
    return (
        format_table(head, rows)
        + "\nThe loss is in nats a token, at the end of the run. FLOP: 6 for each token and each "
        "weight outside of the input embeddings.\n"
    )


def format_saving(rungs: Sequence[Rung]) -> str:
    """How much the trunks saved."""
    scratch, trained = count_saving(rungs)
    return (
        f"Tokens trained: {trained:,}. The runs from scratch have {scratch:,}: shared trunks saved "
        f"{scratch - trained:,}, {(scratch - trained) / scratch:.0%}.\n"
    )


def format_law(law: Law) -> str:
    """The law in a line."""
    tokens = f" + {law.of_tokens:.4g} / D^{law.exponent:.3f}" if law.has_tokens else ""
    sign = "" if law.irreducible >= 0 else BELOW_ZERO
    return (
        "## The law\n\n"
        f"loss = {law.irreducible:.3f} + {law.of_parameters:.4g} / N^{law.exponent:.3f}{tokens}, "
        f"N parameters without embeddings, D tokens; of {len(law.points)} runs, whose losses are "
        f"{law.noise:.4f} nats from it (standard deviation).{sign}\n"
    )


def format_prediction(wanted: Sequence[Branch], said: Sequence[Interval], confidence: float) -> str:
    """The predicted losses as a table."""
    head = (
        "run",
        "without embeddings",
        "tokens",
        "FLOP",
        "predicted",
        f"{confidence:.0%} interval",
    )
    rows = [
        (
            branch.name,
            f"{branch.parameters:,}",
            f"{branch.tokens:,}",
            f"{branch.flops:.2e}",
            f"{interval.loss:.4f}",
            f"{interval.low:.4f} to {interval.high:.4f}",
        )
        for branch, interval in zip(wanted, said, strict=True)
    ]
    return format_table(head, rows)


def format_cost(rungs: Sequence[Rung], wanted: Sequence[Branch], price: PriceConfig) -> str:
    """What the held-out size will cost, at the speed of the largest trained one."""
    largest = max(rungs, key=lambda rung: rung.branch.flops).branch
    pieces: dict[str, Piece] = {}
    for rung in rungs:
        if rung.branch.size == largest.size:
            pieces |= rung.pieces
    flops = sum(piece.steps for piece in pieces.values()) * largest.flops / largest.steps
    last = wanted[-1]
    steps = last.trunk_steps + sum(branch.steps - branch.trunk_steps for branch in wanted)
    work = steps * last.flops / last.steps
    text = f"It costs {steps * last.step_tokens:,} tokens, {work:.2e} FLOP"
    if seconds := sum(piece.seconds for piece in pieces.values()):
        text += f", about {format_duration(work / flops * seconds)} at the speed of {largest.size}"
    joules = sum(piece.joules for piece in pieces.values())
    if joules and all(piece.joules for piece in pieces.values()):
        kwh = work / flops * joules / 3.6e6
        text += f", {kwh:.3g} kWh"
        if price.kwh:
            text += f" ({kwh * price.kwh:.2f} {price.currency})"
    return text + ". The shorter runs are branches of the longest one's trunk.\n"


def format_left_out(rungs: Sequence[Rung], confidence: float) -> str:
    """How well runs of the other sizes predict each run, as a table; "" if they are too few."""
    found = leave_out([rung.point for rung in rungs], confidence)
    if not found:
        return ""
    rows = [
        (
            rung.branch.name,
            f"{point.loss:.4f}",
            f"{interval.loss:.4f}",
            f"{interval.low:.4f} to {interval.high:.4f}",
            "yes" if interval.contains(point.loss) else "no",
        )
        for rung, (point, interval) in zip(rungs, found, strict=True)
    ]
    held = sum(row[-1] == "yes" for row in rows)
    head = ("run", "measured", "predicted", f"{confidence:.0%} interval", "within")
    return (
        f"## Each size, predicted by the others\n\n{format_table(head, rows)}\n{held} of "
        f"{len(rows)} are within. The largest size is predicted as the held-out one: from "
        "smaller ones.\n"
    )


def format_check(tested: Sequence[Rung], said: Sequence[Interval], confidence: float) -> str:
    """Whether each prediction held."""
    rows, held = [], 0
    for rung, interval in zip(tested, said, strict=True):
        is_within = interval.contains(rung.loss)
        held += is_within
        rows.append(
            (
                rung.branch.name,
                f"{interval.loss:.4f}",
                f"{interval.low:.4f} to {interval.high:.4f}",
                f"{rung.loss:.4f}",
                f"{rung.loss - interval.loss:+.4f}",
                "held" if is_within else "failed",
            )
        )
    head = (
        "run",
        "predicted",
        f"{confidence:.0%} interval",
        "measured",
        "difference",
        "prediction",
    )
    return f"{format_table(head, rows)}\n{held} of {len(rows)} predictions held.\n"


def draw(path: Path, law: Law, rungs: Sequence[Rung], said: Mapping[Branch, Interval]) -> None:
    """Draw losses over compute into an SVG file: the runs, the law, and what is predicted."""
    import altair

    def row(branch: Branch, kind: str, loss: float, **more: float) -> dict[str, Any]:
        place = {"flops": branch.flops, "budget": branch.budget, "size": branch.size}
        return {**place, "kind": kind, "loss": loss, **more}

    branches = {rung.branch: None for rung in rungs} | dict.fromkeys(said)
    rows = [row(b, "law", law.loss(b.parameters, b.tokens)) for b in branches]
    rows += [row(rung.branch, "run", rung.loss) for rung in rungs]
    rows += [
        row(branch, "interval", interval.loss, low=interval.low, high=interval.high)
        for branch, interval in said.items()
    ]
    scale = altair.Scale(zero=False)
    base = altair.Chart(altair.Data(values=rows)).encode(
        x=altair.X(
            "flops:Q",
            title="training FLOP",
            axis=altair.Axis(format="~e", labelOverlap="greedy"),
            scale=altair.Scale(type="log", nice=False, padding=20),
        ),
        y=altair.Y("loss:Q", title="held-out loss (nats a token)", scale=scale),
        color=altair.Color("budget:N", title="budget", sort=None),
    )
    lines = base.transform_filter("datum.kind == 'law'").mark_line(strokeDash=[4, 3], opacity=0.7)
    points = base.transform_filter("datum.kind == 'run'").mark_point(filled=True, size=50)
    points = points.encode(shape=altair.Shape("size:N", title="size", sort=None))
    bars = base.transform_filter("datum.kind == 'interval'").mark_errorbar(ticks=True)
    bars = bars.encode(
        y=altair.Y("low:Q", title="held-out loss (nats a token)", scale=scale), y2="high:Q"
    )
    title = altair.TitleParams(
        "Loss over compute",
        subtitle="points: runs; dashed: the law; bars: predicted intervals",
    )
    chart = altair.layer(lines, bars, points).properties(width=640, height=400, title=title)
    chart.save(str(path), format="svg")
